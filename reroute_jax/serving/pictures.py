"""Images of a request, from strangers: the formats that are opened, and the hosts that are asked for them."""

from __future__ import annotations

import io
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from urllib.parse import urlsplit

from PIL import Image, UnidentifiedImageError

from reroute_jax.engine.images import data_url_bytes, open_image
from reroute_jax.errors import RerouteError
from reroute_jax.serving.chat_request import ImageUrl

# Pillow knows more, and runs programs and old parsers for some of them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FETCH_SECONDS = 10


def with_images(
    messages: Sequence[tuple[str, str | list[str | ImageUrl]]], hosts: frozenset[str], most_bytes: int
) -> list[tuple[str, str | list[str | Image.Image]]]:
    """The messages with their images opened. hosts: that are asked for images. most_bytes: of a file.

    Raises RerouteError, naming the image by its number.
    """
    opened, number = [], 0
    for role, content in messages:
        if isinstance(content, list):
            parts = []
            for part in content:
                if isinstance(part, ImageUrl):
                    number += 1
                    part = picture(part.url, f"image {number}", hosts, most_bytes)
                parts.append(part)
            content = parts
        opened.append((role, content))
    return opened


def picture(url: str, name: str, hosts: frozenset[str], most_bytes: int) -> Image.Image:
    """The image of a data URL, or of http(s) from one of `hosts`. name: for messages."""
    kind = url[:8].lower()
    if kind.startswith("data:"):
        encoded = data_url_bytes(url, name)
    elif kind.startswith(("http://", "https://")):
        encoded = _fetched(url, name, hosts, most_bytes)
    else:
        raise RerouteError(f"{name} has no URL that is taken, expected data:image/...;base64,...")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
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
