"""A batch on the device: its prefill, the segments of its answers, and whether its numbers are finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from reroute_jax.decoder import Prefilled
from reroute_jax.engine import programs
from reroute_jax.engine.batching import Batch
from reroute_jax.engine.features import no_features
from reroute_jax.engine.sampling import Sampling, row_sampling
from reroute_jax.engine.segments import Segment, decode_segments
from reroute_jax.errors import RerouteError
from reroute_jax.nn.weights import Weights
from reroute_jax.routing.static_plan import RoutingPlan
from reroute_jax.types import AnyArray

# What `run_prefill` does, or another way to the same; and what compiles one ahead, as `prefill_ahead`.
Prefill = Callable[[Weights, Batch], tuple[AnyArray, Prefilled]]
PrefillAhead = Callable[[Weights, Batch], Prefilled]


def dtype_of(weights: Weights) -> str:
    """Of the parameters, the activations, and a KV cache without a dtype of its own."""
    return weights.module.decoder.embed.table.dtype.name


def run_prefill(weights: Weights, batch: Batch) -> tuple[jax.Array, Prefilled]:
    """The prefill, and the index of each image feature among its row's original visual tokens."""
    if batch.images is None:
        features, anchors = no_features(weights.config.decoder, len(batch.live))
    else:
        features, anchors = programs.encode(weights, batch.images)
    return anchors, programs.prefill(weights.decoder, batch.prompt, features, anchors, batch.plan)


def prefill_ahead(weights: Weights, batch: Batch) -> Prefilled:
    """Compile what `run_prefill` runs of batches like this one. Returns the shapes of its results."""
    if batch.images is None:
        features, anchors = no_features(weights.config.decoder, len(batch.live))
    else:
        features, anchors = programs.encode.ahead(weights, batch.images)
    return programs.prefill.ahead(weights.decoder, batch.prompt, features, anchors, batch.plan)


def run_decode(
    weights: Weights, batch: Batch, prefilled: Prefilled, numbers: Sequence[int], sampling: Sampling, *steps: int
) -> Iterator[Segment]:
    """The segments of a prefilled batch. numbers: of its questions in the call. steps: as of `decode_segments`."""
    rows = row_sampling(sampling, numbers)
    return decode_segments(weights.decoder, prefilled, batch.seen, batch.live, rows, *steps)


def checked_segments(
    weights: Weights, batch: Batch, sampling: Sampling, prefill: Prefill = run_prefill, *steps: int
) -> Iterator[Segment]:
    """Prefill and segments of a batch all of whose rows are live. Raises RerouteError where numbers overflow."""
    _, prefilled = prefill(weights, batch)
    for segment in run_decode(weights, batch, prefilled, range(len(batch.live)), sampling, *steps):
        finite = np.ones(len(batch.live), bool)
        finite[segment.rows] = segment.finite
        if not finite.all():
            check_finite(batch, prefilled, finite, dtype_of(weights))
        yield segment


def answered_ids(weights: Weights, batch: Batch, sampling: Sampling, pad: int) -> Int[np.ndarray, "B limit"]:
    """What each row of a batch of live rows answers, its stop id included, padded behind. Raises as
    `checked_segments`."""
    padded, count = np.full((len(batch.live), sampling.limit), pad, np.int32), np.zeros(len(batch.live), int)
    for segment in checked_segments(weights, batch, sampling):
        for row, tokens in zip(segment.rows, segment.tokens, strict=True):
            tokens = tokens[tokens >= 0]
            padded[row, count[row] : count[row] + len(tokens)] = tokens
            count[row] += len(tokens)
    return padded


def check_finite(batch: Batch, prefilled: Prefilled, finite: np.ndarray, dtype: str) -> None:
    """Raises RerouteError for the first live row that `overflow` tells of. finite: `[B]`, whether its logits are."""
    stages = np.asarray(prefilled.finite)
    for row in np.flatnonzero(batch.live):
        if problem := overflow(batch.plan, stages[:, row], finite[row], dtype, f"row {row}"):
            raise problem


def overflow(
    plan: RoutingPlan, stages: np.ndarray, finite: bool | np.bool_, dtype: str, where: str
) -> RerouteError | None:
    """What to say of a row whose numbers are not finite. stages, finite: whether its last token left each stage, and
    its logits were, finite numbers. where: the row, for the message."""
    if stages.all() and finite:
        return None
    advice = "use bfloat16 or float32" if dtype == "float16" else "check the checkpoint's weights"
    if stages.all():
        return RerouteError(f"{where}: logits are not finite in {dtype}: {advice}")
    stage = plan.stages[int(np.argmin(stages))]
    return RerouteError(
        f"{where}: hidden states are not finite in {dtype} behind decoder layers {stage.lo} to {stage.hi - 1}, and so "
        f"the logits: {advice}"
    )
