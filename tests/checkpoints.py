"""Tiny checkpoints shared by a test session: the torch model and ours, from the same files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from transformers import (
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

import reroute_jax
from reroute_jax.engine.model import Model
from tests import tiny_qwen, tiny_qwen3
from tests.tiny import load_torch, tiny_llava

LAYERS = 6  # of the decoders that are compared with torch: four decisions, and a last stage of two layers


@cache
def pair(kv_heads: int) -> tuple[LlavaForConditionalGeneration, Model]:
    """MHA with 4 KV heads, GQA with 2; 36 visual tokens."""
    folder = tiny_llava(Path(mkdtemp()) / "tiny", kv_heads=kv_heads, layers=LAYERS, vision_layers=4, seed=kv_heads)
    return load_torch(folder), reroute_jax.load(folder, "float32")


@cache
def small(kv_heads: int = 2) -> Model:
    """Of 4 decoder layers and 2 of vision, where nothing is compared with torch: little to compile."""
    folder = tiny_llava(Path(mkdtemp()) / "small", kv_heads=kv_heads, layers=4, vision_layers=3, seed=3)
    return reroute_jax.load(folder, "float32")


@cache
def qwen_pair(tied: bool = False) -> tuple[Qwen2_5_VLForConditionalGeneration, Model]:
    """GQA with 2 KV heads of 4; with a tied head in transformers 5's spelling, else the hub's."""
    spelling = "v5" if tied else "hub"
    sizes = {"layers": LAYERS, "vision_layers": 4}
    seed = 12 if tied else 5  # whose greedy tokens vary
    folder = tiny_qwen.tiny_qwen(Path(mkdtemp()) / spelling, spelling=spelling, tied=tied, seed=seed, **sizes)
    return tiny_qwen.load_torch(folder), reroute_jax.load(folder, "float32")


@cache
def qwen3_pair(tied: bool = False) -> tuple[Qwen3VLForConditionalGeneration, Model]:
    """GQA with 2 KV heads of 4, 6 decoder layers of which 3 get DeepStack's features; with a tied head transformers 5's
    spelling of the config, else the hub's."""
    folder = tiny_qwen3.tiny_qwen3(Path(mkdtemp()) / "qwen3", spelling="v5" if tied else "hub", tied=tied, seed=6)
    return tiny_qwen3.load_torch(folder), reroute_jax.load(folder, "float32")


@cache
def small_qwen3() -> Model:
    """Of 4 decoder layers, of which 3 get DeepStack's features."""
    folder = tiny_qwen3.tiny_qwen3(Path(mkdtemp()) / "small-qwen3", layers=4, seed=6)
    return reroute_jax.load(folder, "float32")


@cache
def smallest(kv_heads: int = 2) -> Model:
    """Of 2 decoder layers and 2 of vision, where many programs are compiled."""
    folder = tiny_llava(Path(mkdtemp()) / "smallest", kv_heads=kv_heads, layers=2, vision_layers=2, seed=3)
    return reroute_jax.load(folder, "float32")
