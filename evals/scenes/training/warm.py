"""What the Qwen families' training starts from: words of the trained embedded LLaVA, and for Qwen3-VL its decoder and
attention in the tower that is local."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from evals.scenes.tokenizer import DIALECTS, FORMAT_PHRASE, MATCH_PHRASE, REC_PHRASE, REPORT_PHRASE, vocabulary
from reroute_jax.vision.qwen_layers import ROPE_THETA

# Where another token of LLaVA's does the work of one that it lacks.
_STAND_INS = {
    "<|im_start|>": "<s>",
    "<|im_end|>": "</s>",
    "<|endoftext|>": "<pad>",
    "<|image_pad|>": "<image>",
    "user": "USER:",
    "assistant": "ASSISTANT:",
    MATCH_PHRASE: REC_PHRASE,
    REPORT_PHRASE: FORMAT_PHRASE,
}
# Each three layers of LLaVA get a copy of their first in front, which begins by adding this much of what that one adds.
GROUP, FAINT = 3, 0.1
# What LLaVA's queries and keys measure, root mean square over a head: 1.0 to 2.1, most of them near this.
HEAD_SCALE = 1.25
# What the tower's heads look at before they have learnt anything: a neighbourhood of the patch so many rows and columns
# away. Pull of the three fastest rotary frequencies towards it, in logits.
OFFSETS = ((-1, 0), (1, -1), (1, 1))
PULLS = (1.5, 3.0, 3.0)


def with_words(
    llava: Mapping[str, jax.Array], fresh: Mapping[str, jax.Array], family: str, prefix: str = "model."
) -> dict[str, jax.Array]:
    """`fresh` with `llava`'s (names without `prefix`) embedding and output row of every word the two share. Numbers get
    those of the nearest coordinate; a few tokens of the prompt have no counterpart and stay fresh."""
    new, old = (jnp.array(ids) for ids in zip(*_shared_tokens(family), strict=True))
    table, head = "decoder.embed.table", "decoder.head.kernel"
    return {
        **fresh,
        prefix + table: fresh[prefix + table].at[new].set(llava[table][old]),
        prefix + head: fresh[prefix + head].at[new].set(llava[head][old]),
    }


def with_layers(
    llava: Mapping[str, jax.Array], fresh: Mapping[str, jax.Array], prefix: str = "model."
) -> dict[str, jax.Array]:
    """`fresh`, a decoder with four layers for each `GROUP` of `llava`'s, with all that LLaVA's has in them. It has no
    norms of queries and keys: they begin by giving them its scale."""
    start = f"{prefix}decoder.layers."
    taken = {f"{prefix}decoder.norm.scale": llava["decoder.norm.scale"]}
    for name, value in fresh.items():
        if not name.startswith(start):
            continue
        number, part = name.removeprefix(start).split(".", 1)
        group, place = divmod(int(number), GROUP + 1)
        if part in ("attn.q_norm.scale", "attn.k_norm.scale"):
            taken[name] = jnp.full_like(value, HEAD_SCALE)
        else:
            strength = FAINT if place == 0 and part in ("attn.o.kernel", "mlp.down.kernel") else 1.0
            taken[name] = strength * llava[f"decoder.layers.{GROUP * group + max(place - 1, 0)}.{part}"]
    return {**fresh, **taken}


def with_local_attention(fresh: Mapping[str, jax.Array], prefix: str = "model.") -> dict[str, jax.Array]:
    """`fresh`, a tower with rotary positions, with biases of queries and keys whose match is strongest between a patch
    and another at the head's offset (the idea of arXiv 2103.10697, section 3). Full attention would need many images to
    find out that shapes are local."""
    names = [name for name in fresh if name.startswith(f"{prefix}vision.layers.") and name.endswith("attn.qkv.bias")]
    return {**fresh, **{name: jnp.asarray(local_biases(fresh[name].shape[2])) for name in names}}


def local_biases(head_dim: int) -> np.ndarray:
    """`[3, heads, head_dim]` of queries, keys and values. A head's first quarter turns with the row, the next with the
    column, each with the other half of the head as its partner (`vision/qwen_layers.py`)."""
    quarter, half, fast = head_dim // 4, head_dim // 2, len(PULLS)
    biases = np.zeros((3, len(OFFSETS), head_dim), np.float32)
    frequencies = ROPE_THETA ** (-np.arange(fast) / quarter)
    strength = np.sqrt(np.array(PULLS) * head_dim**0.5)
    for head, offset in enumerate(OFFSETS):
        for axis, distance in enumerate(offset):
            first = axis * quarter
            biases[0, head, first : first + fast] = strength
            biases[1, head, first : first + fast] = strength * np.cos(frequencies * distance)
            biases[1, head, half + first : half + first + fast] = -strength * np.sin(frequencies * distance)
    return biases


def _shared_tokens(family: str) -> list[tuple[int, int]]:
    """(id of the family, id of LLaVA) of every token with a counterpart."""
    new, old = vocabulary(family), vocabulary("llava")
    pairs = [(new[token], old[_STAND_INS.get(token, token)]) for token in new if _STAND_INS.get(token, token) in old]
    ours, theirs = DIALECTS[family], DIALECTS["llava"]
    for form, other in zip(ours.coordinates, theirs.coordinates, strict=True):
        for number in ours.numbers:
            nearest = int(np.rint(number / ours.numbers[-1] * (len(theirs.numbers) - 1)))
            pairs.append((new[form.format(number)], old[other.format(theirs.numbers[nearest])]))
    return list(dict(pairs).items())
