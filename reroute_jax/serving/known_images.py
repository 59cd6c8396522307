"""Images that come again: opened and resized once, and known by the bytes of their files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from threading import Lock

from PIL import Image

from reroute_jax.engine.questions import FittedImage
from reroute_jax.engine.recent import Recent
from reroute_jax.serving.pictures import decoded


class KnownImages:
    """Images as `fit` makes them (`Model.image`), in up to `max_bytes` of memory, 0 for none; the least recently used
    leave. For any number of threads."""

    def __init__(self, fit: Callable[[Image.Image], FittedImage], max_bytes: int) -> None:
        self._fit = fit
        self._kept = Recent(max_bytes, lambda image: image.pixels.nbytes)
        self._lock = Lock()

    def __call__(self, file: bytes, name: str) -> FittedImage:
        """The image in a file. name: for messages. Raises RerouteError, as `decoded` and `fit` do."""
        key = hashlib.blake2b(file, digest_size=32).digest()
        with self._lock:
            known = self._kept.get(key)
        if known is not None:
            return known
        fitted = self._fit(decoded(file, name))
        with self._lock:
            self._kept.keep(key, fitted)
        return fitted
