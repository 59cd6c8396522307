"""Images that come again: opened and resized once, and known by the bytes of their files."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from PIL import Image

from reroute_jax.engine.questions import FittedImage
from reroute_jax.serving.pictures import decoded


class KnownImages:
    """Images as `fit` makes them (`Model.image`), in up to `max_bytes` of memory, 0 for none; the least recently used
    leave. For any number of threads."""

    def __init__(self, fit: Callable[[Image.Image], FittedImage], max_bytes: int) -> None:
        self._fit, self._max_bytes, self._nbytes = fit, max_bytes, 0
        self._kept: OrderedDict[bytes, FittedImage] = OrderedDict()
        self._lock = Lock()

    def __call__(self, file: bytes, name: str) -> FittedImage:
        """The image in a file. name: for messages. Raises RerouteError, as `decoded` and `fit` do."""
        key = hashlib.blake2b(file, digest_size=32).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        fitted = self._fit(decoded(file, name))
        with self._lock:
            self._keep(key, fitted)
        return fitted

    def _keep(self, key: bytes, fitted: FittedImage) -> None:
        if key in self._kept:  # made by two threads at a time
            return
        self._kept[key] = fitted
        self._nbytes += fitted.pixels.nbytes
        while self._nbytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._nbytes -= oldest.pixels.nbytes
