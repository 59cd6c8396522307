"""Rules that several architectures share: the LLaMA-style decoder, and the pieces every table is made of."""

from __future__ import annotations

from convert.table import HEADS_BIAS, MERGE_HEADS, SAME, SPLIT_HEADS, Rule


def decoder_rules(prefix: str) -> tuple[Rule, ...]:
    """A decoder whose checkpoint keys start with `prefix`, all but its output head."""
    layer = prefix + "layers.{i}."
    return (
        Rule(prefix + "embed_tokens.weight", "decoder.embed.table", SAME),
        Rule(prefix + "norm.weight", "decoder.norm.scale", SAME),
        Rule(layer + "input_layernorm.weight", "decoder.layers.{i}.attn_norm.scale", SAME),
        Rule(layer + "post_attention_layernorm.weight", "decoder.layers.{i}.mlp_norm.scale", SAME),
        *attention_rules(layer + "self_attn", "o_proj", "decoder.layers.{i}.attn"),
        *(
            Rule(f"{layer}mlp.{name}_proj.weight", f"decoder.layers.{{i}}.mlp.{name}.kernel", SAME)
            for name in ("gate", "up", "down")
        ),
    )


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
