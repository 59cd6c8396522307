"""LLaVA-1.5: CLIP tower, two-layer projector, LLaMA decoder (arXiv 2310.03744)."""

from __future__ import annotations

from flax import nnx

from reroute_jax.config import ModelConfig
from reroute_jax.decoder import Decoder
from reroute_jax.vision.clip import ClipTower, Projector


class Llava(nnx.Module):
    """The parameters of one model; functions in this file and in `decoder.py` run them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype):
        self.config = config
        self.vision = ClipTower(config.vision, rngs=rngs, dtype=dtype)
        self.projector = Projector(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.decoder, rngs=rngs, dtype=dtype)
