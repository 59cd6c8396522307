"""Words to start Qwen2.5-VL's training from: those of the trained embedded LLaVA."""

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


def with_words(
    llava: Mapping[str, jax.Array], fresh: Mapping[str, jax.Array], prefix: str = "model."
) -> dict[str, jax.Array]:
    """`fresh` with `llava`'s (names without `prefix`) embedding and output row of every word the two share. Numbers get
    those of the nearest coordinate; a few tokens of the prompt have no counterpart and stay fresh."""
    new, old = (jnp.array(ids) for ids in zip(*_shared_tokens(), strict=True))
    table, head = "decoder.embed.table", "decoder.head.kernel"
    return {
        **fresh,
        prefix + table: fresh[prefix + table].at[new].set(llava[table][old]),
        prefix + head: fresh[prefix + head].at[new].set(llava[head][old]),
    }


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
