"""LLaVA-1.5: CLIP tower, two-layer projector, LLaMA decoder. The table only.

Three spellings are in use. The hub's files (written here too) say `vision_tower.vision_model.*` and
`language_model.model.*`; transformers 5 saves the same without `vision_model.`, and in memory (or with
`save_original_format=False`) moves everything but `lm_head` under `model.`.
"""

from __future__ import annotations

from convert.table import CONV, COPY, HEADS_BIAS, LINEAR, MERGE_HEADS, SPLIT_HEADS, Rule, Table
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

# Buffers that older versions of transformers saved; both are computed.
_IGNORED = (
    r"vision_tower\.vision_model\.embeddings\.position_ids",
    r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)


def table(config: ModelConfig) -> Table:
    """The rules for one LLaVA. A tied output head is not read: the embedding table stands for it."""
    rules = _vision_rules() + _projector_rules() + _decoder_rules()
    if config.decoder.tied_head:
        return Table(rules, _SPELLINGS, (*_IGNORED, _HEAD.replace(".", r"\.")))
    return Table((*rules, Rule(_HEAD, "decoder.head.kernel", LINEAR)), _SPELLINGS, _IGNORED)


def _vision_rules() -> tuple[Rule, ...]:
    layer = _VISION + "encoder.layers.{i}."
    return (
        Rule(_VISION + "embeddings.class_embedding", "vision.class_embed", COPY),
        Rule(_VISION + "embeddings.patch_embedding.weight", "vision.patch_embed.kernel", CONV),
        Rule(_VISION + "embeddings.position_embedding.weight", "vision.position_embed", COPY),
        # The misspelling is CLIP's own.
        *_norm(_VISION + "pre_layrnorm", "vision.pre_norm"),
        *_norm(_VISION + "post_layernorm", "vision.post_norm"),
        *_norm(layer + "layer_norm1", "vision.layers.{i}.norm1"),
        *_norm(layer + "layer_norm2", "vision.layers.{i}.norm2"),
        *_attention(layer + "self_attn", "out_proj", "vision.layers.{i}.attn"),
        *_linear(layer + "mlp.fc1", "vision.layers.{i}.mlp.up"),
        *_linear(layer + "mlp.fc2", "vision.layers.{i}.mlp.down"),
    )


def _projector_rules() -> tuple[Rule, ...]:
    return (
        *_linear("multi_modal_projector.linear_1", "projector.fc1"),
        *_linear("multi_modal_projector.linear_2", "projector.fc2"),
    )


def _decoder_rules() -> tuple[Rule, ...]:
    layer = _DECODER + "layers.{i}."
    return (
        Rule(_DECODER + "embed_tokens.weight", "decoder.embed.table", COPY),
        Rule(_DECODER + "norm.weight", "decoder.norm.scale", COPY),
        Rule(layer + "input_layernorm.weight", "decoder.layers.{i}.attn_norm.scale", COPY),
        Rule(layer + "post_attention_layernorm.weight", "decoder.layers.{i}.mlp_norm.scale", COPY),
        *_attention(layer + "self_attn", "o_proj", "decoder.layers.{i}.attn"),
        *(
            Rule(f"{layer}mlp.{name}_proj.weight", f"decoder.layers.{{i}}.mlp.{name}.kernel", LINEAR)
            for name in ("gate", "up", "down")
        ),
    )


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(source + ".weight", target + ".scale", COPY), Rule(source + ".bias", target + ".bias", COPY)


def _linear(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(source + ".weight", target + ".kernel", LINEAR), Rule(source + ".bias", target + ".bias", COPY)


def _attention(source: str, output: str, target: str) -> tuple[Rule, ...]:
    """Biases are named whether or not a config has them: the model's own parameters decide."""
    return (
        *(Rule(f"{source}.{name}_proj.weight", f"{target}.{name}.kernel", SPLIT_HEADS) for name in "qkv"),
        *(Rule(f"{source}.{name}_proj.bias", f"{target}.{name}.bias", HEADS_BIAS) for name in "qkv"),
        Rule(f"{source}.{output}.weight", f"{target}.o.kernel", MERGE_HEADS),
        Rule(f"{source}.{output}.bias", f"{target}.o.bias", COPY),
    )
