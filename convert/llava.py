"""LLaVA-1.5: CLIP tower, two-layer projector, LLaMA decoder. The table only.

Three spellings are in use. The hub's files (written here too) say `vision_tower.vision_model.*` and
`language_model.model.*`; transformers 5 saves the same without `vision_model.`, and in memory (or with
`save_original_format=False`) moves everything but `lm_head` under `model.`.
"""

from __future__ import annotations

import re

import numpy as np

from convert.decoder_rules import (
    attention_rules,
    decoder_rules,
    head_rules,
    layer_norm_rules,
    linear_rules,
    rotary_buffer,
)
from convert.table import SAME, Buffer, ConversionTable, Rule
from reroute_jax.config import ModelConfig

_VISION = "vision_tower.vision_model."
_DECODER = "language_model.model."
_HEAD = "language_model.lm_head.weight"

_SPELLINGS = (
    (r"^model\.language_model\.", _DECODER),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?!vision_model\.)", _VISION),
)


def table(config: ModelConfig) -> ConversionTable:
    """The rules for one LLaVA."""
    head, copies = head_rules(config.decoder, _DECODER, _HEAD)
    rules = (*_vision_rules(), *_projector_rules(), *decoder_rules(_DECODER), *head)
    rows, columns = config.vision.grid
    positions = Buffer(re.escape(_VISION) + r"embeddings\.position_ids", np.arange(rows * columns + 1))
    return ConversionTable(rules, _SPELLINGS, (positions, rotary_buffer(config.decoder, _DECODER)), copies)


def _vision_rules() -> tuple[Rule, ...]:
    layer = _VISION + "encoder.layers.{i}."
    return (
        Rule(_VISION + "embeddings.class_embedding", "vision.class_embed", SAME),
        Rule(_VISION + "embeddings.patch_embedding.weight", "vision.patch_embed.kernel", SAME),
        Rule(_VISION + "embeddings.position_embedding.weight", "vision.position_embed", SAME),
        # The misspelling is CLIP's own.
        *layer_norm_rules(_VISION + "pre_layrnorm", "vision.pre_norm"),
        *layer_norm_rules(_VISION + "post_layernorm", "vision.post_norm"),
        *layer_norm_rules(layer + "layer_norm1", "vision.layers.{i}.norm1"),
        *layer_norm_rules(layer + "layer_norm2", "vision.layers.{i}.norm2"),
        *attention_rules(layer + "self_attn", "out_proj", "vision.layers.{i}.attn"),
        *linear_rules(layer + "mlp.fc1", "vision.layers.{i}.mlp.up"),
        *linear_rules(layer + "mlp.fc2", "vision.layers.{i}.mlp.down"),
    )


def _projector_rules() -> tuple[Rule, ...]:
    return (
        *linear_rules("multi_modal_projector.linear_1", "projector.fc1"),
        *linear_rules("multi_modal_projector.linear_2", "projector.fc2"),
    )
