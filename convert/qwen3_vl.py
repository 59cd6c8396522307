"""Qwen3-VL: vision transformer with its patch merger and those of DeepStack, Qwen3 decoder. The table only.

One spelling is in use: the hub's files and transformers 5, in memory and saved, all say `model.visual.*` and
`model.language_model.*`.
"""

from __future__ import annotations

from convert.decoder_rules import decoder_rules, head_rules, layer_norm_rules, linear_rules, output_rules
from convert.table import FUSED_HEADS, FUSED_HEADS_BIAS, SAME, ConversionTable, Rule, patches
from reroute_jax.config import ModelConfig
from reroute_jax.vision.qwen_config import Qwen3VisionConfig

_DECODER = "model.language_model."


def table(config: ModelConfig) -> ConversionTable:
    """The rules for one Qwen3-VL."""
    head, copies = head_rules(config.decoder, _DECODER, "lm_head.weight")
    return ConversionTable((*_vision_rules(config.vision), *decoder_rules(_DECODER), *head), copies=copies)


def _vision_rules(config: Qwen3VisionConfig) -> tuple[Rule, ...]:
    source, target = "model.visual.blocks.{i}.", "vision.layers.{i}."
    filters = patches(config.temporal_patch_size, config.patch_size)
    return (
        Rule("model.visual.patch_embed.proj.weight", "vision.patch_embed.kernel", filters),
        Rule("model.visual.patch_embed.proj.bias", "vision.patch_embed.bias", SAME),
        Rule("model.visual.pos_embed.weight", "vision.position_embed", SAME),
        *layer_norm_rules(source + "norm1", target + "norm1"),
        *layer_norm_rules(source + "norm2", target + "norm2"),
        Rule(source + "attn.qkv.weight", target + "attn.qkv.kernel", FUSED_HEADS),
        Rule(source + "attn.qkv.bias", target + "attn.qkv.bias", FUSED_HEADS_BIAS),
        *output_rules(source + "attn.proj", target + "attn.o"),
        *linear_rules(source + "mlp.linear_fc1", target + "mlp.fc1"),
        *linear_rules(source + "mlp.linear_fc2", target + "mlp.fc2"),
        *_merger_rules("model.visual.merger", "vision.merger"),
        *_merger_rules("model.visual.deepstack_merger_list.{i}", "vision.deepstack.{i}"),
    )


def _merger_rules(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *layer_norm_rules(source + ".norm", target + ".norm"),
        *linear_rules(source + ".linear_fc1", target + ".fc1"),
        *linear_rules(source + ".linear_fc2", target + ".fc2"),
    )
