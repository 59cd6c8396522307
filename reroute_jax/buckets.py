"""How long things may be, and the ladders of sizes that programs are compiled for."""

from __future__ import annotations

from reroute_jax.errors import RerouteError

MOST_NEW_TOKENS = 32_768  # of an answer: the longest that lmms-eval v0.7.1 lets its classes for these families give
TEXT_BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
VISUAL_BUCKETS = (
    *(4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640, 768),
    *(1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
)


def bucket(size: int, ladder: tuple[int, ...], what: str) -> int:
    """The smallest size of the ladder that holds `size`. Raises RerouteError where none does."""
    for step in ladder:
        if size <= step:
            return step
    raise RerouteError(f"{what} has {size}: expected at most {ladder[-1]}")
