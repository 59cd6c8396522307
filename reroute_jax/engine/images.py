"""Opening images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from reroute_jax.errors import RerouteError


def open_image(image: Image.Image | str | Path, as_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The image, fully decoded, after `as_rgb`; it keeps the name of its file. Raises RerouteError, naming it, where it
    cannot be read."""
    try:
        if isinstance(image, Image.Image):
            rgb = as_rgb(image)
            rgb.filename = getattr(image, "filename", "")
            return rgb
        with Image.open(image) as file:
            rgb = as_rgb(file)
            rgb.filename = str(image)
            return rgb
    except FileNotFoundError:
        raise RerouteError(f"no image at {image}: check the path") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as problem:
        name = image if isinstance(image, str | Path) else getattr(image, "filename", "") or "given as a PIL object"
        raise RerouteError(f"image {name} cannot be read ({problem}): expected a complete image file") from None
