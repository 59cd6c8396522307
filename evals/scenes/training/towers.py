"""What the vision towers make of a training batch.

Letters: R scenes, P visual tokens, D decoder width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from evals.scenes.training.packing import MEAN, STD
from reroute_jax.models.llava import Llava
from reroute_jax.models.qwen2_5_vl import QwenVL
from reroute_jax.models.qwen3_vl import Qwen3VL
from reroute_jax.vision.clip import ClipTower
from reroute_jax.vision.qwen2_5 import QwenImages
from reroute_jax.vision.qwen3 import Qwen3Images

Trained = Llava | QwenVL | Qwen3VL


class TowerStates(NamedTuple):
    """What a tower makes of a batch: features at decoder width, what DeepStack adds to them behind each of the
    decoder's first layers, and what the tower's own objectives read: hidden states of LLaVA's, attention received in
    the last block of the others."""

    features: Float[Array, "R P D"]
    deepstack: list[Float[Array, "R P D"]]
    states: list[Float[Array, "R C E"]] | None
    received: Float[Array, "R P"] | None


def look(model: Trained, images) -> TowerStates:
    if model.config.family == "llava":
        states = vision_states(model.vision, images)
        return TowerStates(model.projector(states[model.config.vision.feature_layers[0]][:, 1:]), [], states, None)
    read = _READ[model.config.family](model.vision, images)
    features, *deepstack = jnp.split(read.features(), 1 + model.config.decoder.deepstack, axis=-1)
    return TowerStates(features, deepstack, None, read.metric())


_READ = {"qwen2_5_vl": QwenImages, "qwen3_vl": Qwen3Images}


def pixels(images: UInt8[Array, "R height width 3"]) -> Float[Array, "R 3 height width"]:
    """As the CLIP image processor makes them."""
    scaled = (images.astype(jnp.float32) / 255 - MEAN) / STD
    return scaled.transpose(0, 3, 1, 2)


def vision_states(tower: ClipTower, images) -> list[Float[Array, "R C D"]]:
    states = [tower.embed(pixels(images))]
    for block in tower.layers:
        states.append(block(states[-1]))
    return states
