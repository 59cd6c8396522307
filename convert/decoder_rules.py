"""Rules that several architectures share: the LLaMA-style decoder, and the pieces every table is made of."""

from __future__ import annotations

import re

import numpy as np

from convert.table import HEADS_BIAS, MERGE_HEADS, SAME, SPLIT_HEADS, Buffer, Rule
from reroute_jax.config import DecoderConfig


def decoder_rules(prefix: str) -> tuple[Rule, ...]:
    """A decoder whose checkpoint keys start with `prefix`, all but its output head. The norms of queries and keys are
    named whether or not a config has them: the model's own parameters decide."""
    layer = prefix + "layers.{i}."
    return (
        Rule(prefix + "embed_tokens.weight", "decoder.embed.table", SAME),
        Rule(prefix + "norm.weight", "decoder.norm.scale", SAME),
        Rule(layer + "input_layernorm.weight", "decoder.layers.{i}.attn_norm.scale", SAME),
        Rule(layer + "post_attention_layernorm.weight", "decoder.layers.{i}.mlp_norm.scale", SAME),
        *attention_rules(layer + "self_attn", "o_proj", "decoder.layers.{i}.attn"),
        Rule(layer + "self_attn.q_norm.weight", "decoder.layers.{i}.attn.q_norm.scale", SAME),
        Rule(layer + "self_attn.k_norm.weight", "decoder.layers.{i}.attn.k_norm.scale", SAME),
        *(
            Rule(f"{layer}mlp.{name}_proj.weight", f"decoder.layers.{{i}}.mlp.{name}.kernel", SAME)
            for name in ("gate", "up", "down")
        ),
    )


def head_rules(config: DecoderConfig, prefix: str, head: str) -> tuple[tuple[Rule, ...], tuple[tuple[str, str], ...]]:
    """Rules and copies for the output head with key `head`: a tied one repeats the embeddings."""
    if config.tied_head:
        return (), ((head, prefix + "embed_tokens.weight"),)
    return (Rule(head, "decoder.head.kernel", SAME),), ()


def rotary_buffer(config: DecoderConfig, prefix: str) -> Buffer:
    """Inverse frequencies, which older versions of transformers saved, once or for every layer."""
    pattern = re.escape(prefix) + r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    return Buffer(pattern, config.rope_theta**-exponents)


def layer_norm_rules(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(source + ".weight", target + ".scale", SAME), Rule(source + ".bias", target + ".bias", SAME)


def linear_rules(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(source + ".weight", target + ".kernel", SAME), Rule(source + ".bias", target + ".bias", SAME)


def attention_rules(source: str, output: str, target: str) -> tuple[Rule, ...]:
    """Biases are named whether or not a config has them: the model's own parameters decide."""
    return (
        *(Rule(f"{source}.{name}_proj.weight", f"{target}.{name}.kernel", SPLIT_HEADS) for name in "qkv"),
        *(Rule(f"{source}.{name}_proj.bias", f"{target}.{name}.bias", HEADS_BIAS) for name in "qkv"),
        *output_rules(f"{source}.{output}", f"{target}.o"),
    )


def output_rules(source: str, target: str) -> tuple[Rule, ...]:
    """The projection from heads back to width."""
    return Rule(source + ".weight", target + ".kernel", MERGE_HEADS), Rule(source + ".bias", target + ".bias", SAME)
