"""Images of a request, from strangers: the formats that are opened, and the hosts that are asked for them."""

from __future__ import annotations

import io
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from urllib.parse import urlsplit

from PIL import Image, UnidentifiedImageError

from reroute_jax.engine.images import data_url_bytes, open_image
from reroute_jax.engine.questions import FittedImage
from reroute_jax.errors import RerouteError
from reroute_jax.serving.chat_request import ImageUrl

# Pillow knows more, and runs programs and old parsers for some of them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FETCH_SECONDS = 10


def with_images(
    messages: Sequence[tuple[str, str | list[str | ImageUrl]]],
    hosts: frozenset[str],
    most_bytes: int,
    image_of: Callable[[bytes, str], FittedImage],
) -> list[tuple[str, str | list[str | FittedImage]]]:
    """The messages with their images. hosts: that are asked for images. most_bytes: of a file. image_of: makes one of a
    file, under the name that it has in errors.

    Raises RerouteError, naming the image by its number.
    """
    found, number = [], 0
    for role, content in messages:
        if isinstance(content, list):
            parts = []
            for part in content:
                if isinstance(part, ImageUrl):
                    number += 1
                    name = f"image {number}"
                    part = image_of(image_file(part.url, name, hosts, most_bytes), name)
                parts.append(part)
            content = parts
        found.append((role, content))
    return found


def image_file(url: str, name: str, hosts: frozenset[str], most_bytes: int) -> bytes:
    """Of a data URL, or of http(s) from one of `hosts`. name: for messages. Raises RerouteError."""
    kind = url[:8].lower()
    if kind.startswith("data:"):
        return data_url_bytes(url, name)
    if kind.startswith(("http://", "https://")):
        return _fetched(url, name, hosts, most_bytes)
    raise RerouteError(f"{name} has no URL that is taken, expected data:image/...;base64,...")


def decoded(file: bytes, name: str) -> Image.Image:
    """The image in a file, as of `open_image`. name: for messages. Raises RerouteError."""
    try:
        image = Image.open(io.BytesIO(file), formats=FORMATS)
    except UnidentifiedImageError:
        raise RerouteError(f"{name} cannot be decoded, expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
    except Exception as problem:  # plugins raise anything on a broken file
        raise RerouteError(f"{name} cannot be decoded ({type(problem).__name__}), expected a whole file") from None
    return open_image(image, name)


def _fetched(url: str, name: str, hosts: frozenset[str], most_bytes: int) -> bytes:
    try:
        host = urlsplit(url).hostname
    except ValueError:
        host = None
    if host not in hosts:
        known = f"those of {', '.join(sorted(hosts))}" if hosts else "none"
        raise RerouteError(f"{name} has an http URL, and of these this server fetches {known}: send a data URL")
    try:
        with urllib.request.build_opener(_NoRedirects).open(url, timeout=FETCH_SECONDS) as answer:
            encoded = answer.read(most_bytes + 1)
    except (OSError, HTTPException, ValueError) as problem:  # of urllib, http.client and bad URLs
        reason = f"status {problem.code}" if isinstance(problem, urllib.error.HTTPError) else type(problem).__name__
        raise RerouteError(f"{name} cannot be fetched ({reason}): send a data URL") from None
    if len(encoded) > most_bytes:
        raise RerouteError(f"{name} has more than {most_bytes} bytes: make it smaller")
    return encoded


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """They lead to hosts that nobody listed."""

    def redirect_request(self, *args) -> None:
        return None
