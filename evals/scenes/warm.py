"""A decoder to start Qwen2.5-VL's from: that of the trained embedded LLaVA, in another shape and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from evals.scenes.tokenizer import DIALECTS, vocabulary

# Where another token of LLaVA's does the work of one that it lacks.
_STAND_INS = {
    "<|im_start|>": "<s>",
    "<|im_end|>": "</s>",
    "<|endoftext|>": "<pad>",
    "<|image_pad|>": "<image>",
    "user": "USER:",
    "assistant": "ASSISTANT:",
}


def warm_decoder(
    llava: Mapping[str, jax.Array], fresh: Mapping[str, jax.Array], kv_heads: int, prefix: str = "model."
) -> dict[str, jax.Array]:
    """`fresh` with its decoder's parameters replaced by those of `llava` (names without `prefix`).

    Groups of K/V heads become their mean, as in the paper on grouped-query attention (arXiv 2305.13245). Tokens keep
    their word's embedding and output row, and numbers get those of the nearest coordinate; what has no counterpart,
    biases and a few prompt tokens, stays fresh.
    """
    warm = dict(fresh)
    new, old = zip(*_shared_tokens(), strict=True)
    for name, value in llava.items():
        if not name.startswith("decoder."):
            continue
        if name == "decoder.embed.table":
            value = fresh[prefix + name].at[jnp.array(new)].set(value[jnp.array(old)])
        elif name == "decoder.head.kernel":
            value = fresh[prefix + name].at[:, jnp.array(new)].set(value[:, jnp.array(old)])
        elif name.endswith((".attn.k.kernel", ".attn.v.kernel")):
            width, heads, dim = value.shape
            value = value.reshape(width, kv_heads, heads // kv_heads, dim).mean(axis=2)
        warm[prefix + name] = value
    return warm


def _shared_tokens() -> list[tuple[int, int]]:
    """(id of Qwen2.5-VL, id of LLaVA) of every token with a counterpart."""
    new, old = vocabulary("qwen2_5_vl"), vocabulary("llava")
    pairs = [(new[token], old[_STAND_INS.get(token, token)]) for token in new if _STAND_INS.get(token, token) in old]
    ours, theirs = DIALECTS["qwen2_5_vl"], DIALECTS["llava"]
    for form, other in zip(ours.coordinates, theirs.coordinates, strict=True):
        for number in ours.numbers:
            nearest = int(np.rint(number / ours.numbers[-1] * (len(theirs.numbers) - 1)))
            pairs.append((new[form.format(number)], old[other.format(theirs.numbers[nearest])]))
    return list(dict(pairs).items())
