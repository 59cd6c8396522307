"""Tiny checkpoints shared by a test session: the torch model and ours, from the same files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from transformers import LlavaForConditionalGeneration

import reroute_jax
from reroute_jax.engine import Model
from tests.tiny import load_torch, tiny_llava


@cache
def pair(kv_heads: int) -> tuple[LlavaForConditionalGeneration, Model]:
    """MHA with 4 KV heads, GQA with 2; 8 decoder layers, 36 visual tokens."""
    folder = tiny_llava(Path(mkdtemp()) / f"kv{kv_heads}", kv_heads=kv_heads, seed=kv_heads)
    return load_torch(folder), reroute_jax.load(folder, "float32")
