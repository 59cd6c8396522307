"""What a prefill selected, for those who want to see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trace:
    """What was selected. Indices count a row's original visual tokens (before any merge), ascending, -1 padded.

    selected: per decision `[B, k]`. scores: per decision fp32 `[B, n]`, -inf where a token was not a candidate.
    anchors: `[B, N1]`, tokens kept by Nuwa's stage 1, or None. kv_tokens: `[B, L]`, keys cached per layer.
    """

    selected: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]
    anchors: np.ndarray | None
    kv_tokens: np.ndarray
