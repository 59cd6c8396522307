"""Which layers to decide at, from how well single layers select (15.3)."""

from __future__ import annotations

from collections.abc import Sequence

from reroute_jax.errors import RerouteError


def best_layers(accuracy: Sequence[float | None], decisions: int) -> tuple[int, ...]:
    """The `decisions` ascending layers, with ascending accuracies, that SwiftVLM (arXiv 2602.03134) decides at: those
    with the largest sum of accuracy times the layers up to the next decision. Of equally good ones the earliest.

    accuracy: by decoder layer, of the model when it keeps that layer's best tokens; None where it was not measured.
    Raises RerouteError where no such layers are.
    """
    depth = len(accuracy)
    measured = [layer for layer, value in enumerate(accuracy) if value is not None]
    # By last layer, the best choice so far that ends with it: its sum, and its layers.
    best = {layer: (accuracy[layer] * (depth - layer), (layer,)) for layer in measured}
    for _ in range(decisions - 1):
        longer = {}
        for layer in measured:
            before = [best[one] for one in best if one < layer and accuracy[one] < accuracy[layer]]
            if before:
                total, chosen = max(before, key=_preferred)
                step = accuracy[layer] - accuracy[chosen[-1]]
                longer[layer] = total + step * (depth - layer), (*chosen, layer)
        best = longer
    if decisions < 1 or not best:
        raise RerouteError(
            f"{decisions} layers whose accuracies rise are not among the {len(measured)} measured: ask for fewer, at "
            "least one"
        )
    return max(best.values(), key=_preferred)[1]


def _preferred(choice: tuple[float, tuple[int, ...]]) -> tuple[float, tuple[int, ...]]:
    return choice[0], tuple(-layer for layer in choice[1])
