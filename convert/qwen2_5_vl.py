"""Qwen2.5-VL: windowed vision transformer with its patch merger, Qwen2.5 decoder. The table only.

Two spellings are in use. The hub's files (written here too, and by transformers 5) say `visual.*` and `model.*`; in
memory (or with `save_original_format=False`) transformers 5 has `model.visual.*` and `model.language_model.*`.
"""

from __future__ import annotations

import numpy as np

from convert.decoder_rules import decoder_rules, head_rules, linear_rules, output_rules, rotary_buffer
from convert.table import FUSED_HEADS, FUSED_HEADS_BIAS, SAME, Buffer, ConversionTable, Rule, patches
from reroute_jax.config import ModelConfig
from reroute_jax.vision.qwen_config import QwenVisionConfig

_HEAD = "lm_head.weight"

_SPELLINGS = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))


def table(config: ModelConfig) -> ConversionTable:
    """The rules for one Qwen2.5-VL."""
    head, copies = head_rules(config.decoder, "model.", _HEAD)
    rules = (*_vision_rules(config.vision), *decoder_rules("model."), *head)
    return ConversionTable(
        rules, _SPELLINGS, (rotary_buffer(config.decoder, "model."), _patch_buffer(config.vision)), copies
    )


def _patch_buffer(config: QwenVisionConfig) -> Buffer:
    """Inverse frequencies of the tower: half of a head turns with the row, half with the column."""
    half = config.hidden_size // config.num_heads // 2
    return Buffer(r"visual\.rotary_pos_emb\.inv_freq", 10000.0 ** -(np.arange(0, half, 2) / half))


def _vision_rules(config: QwenVisionConfig) -> tuple[Rule, ...]:
    source, target = "visual.blocks.{i}.", "vision.layers.{i}."
    filters = patches(config.temporal_patch_size, config.patch_size)
    return (
        Rule("visual.patch_embed.proj.weight", "vision.patch_embed.kernel", filters),
        Rule(source + "norm1.weight", target + "norm1.scale", SAME),
        Rule(source + "norm2.weight", target + "norm2.scale", SAME),
        Rule(source + "attn.qkv.weight", target + "attn.qkv.kernel", FUSED_HEADS),
        Rule(source + "attn.qkv.bias", target + "attn.qkv.bias", FUSED_HEADS_BIAS),
        *output_rules(source + "attn.proj", target + "attn.o"),
        *linear_rules(source + "mlp.gate_proj", target + "mlp.gate"),
        *linear_rules(source + "mlp.up_proj", target + "mlp.up"),
        *linear_rules(source + "mlp.down_proj", target + "mlp.down"),
        Rule("visual.merger.ln_q.weight", "vision.merger.norm.scale", SAME),
        *linear_rules("visual.merger.mlp.0", "vision.merger.fc1"),
        *linear_rules("visual.merger.mlp.2", "vision.merger.fc2"),
    )
