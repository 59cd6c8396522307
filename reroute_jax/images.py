"""Opening images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from reroute_jax.errors import RerouteError


def open_image(image: Image.Image | str | Path) -> Image.Image:
    """The image as RGB, fully decoded. Raises RerouteError, naming it, where it cannot be read."""
    try:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        with Image.open(image) as file:
            return file.convert("RGB")
    except FileNotFoundError:
        raise RerouteError(f"no image at {image}: check the path") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as problem:
        name = image if isinstance(image, str | Path) else getattr(image, "filename", "") or "given as a PIL object"
        raise RerouteError(f"image {name} cannot be read ({problem}): expected a complete image file") from None
