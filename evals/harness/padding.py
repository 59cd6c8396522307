"""LLaVA's own way with images, an opt-in: padded to a square, where the reference cuts out the centre."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL import Image

from evals.harness.boxes import Box
from evals.harness.data import Doc

IMAGE_MODES = ("crop", "pad")
Colour = tuple[int, int, int]


def mean_colour(image_mean: Sequence[float]) -> Colour:
    """Of an image processor with these means: after normalisation it is 0 but for rounding."""
    return tuple(int(255 * value) for value in image_mean)


def padded(docs: Iterator[Doc], colour: Colour) -> Iterator[Doc]:
    """The documents with their images as squares; `size` stays that of the stored image."""
    for doc in docs:
        yield doc if doc.image is None else replace(doc, image=square(doc.image, colour))


def square(image: Image.Image, colour: Colour) -> Image.Image:
    """The RGB image in the middle of a square of its longer side."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, _corner(image.size))
    return canvas


def from_square(box: Box, size: tuple[int, int]) -> Box:
    """A box in fractions of the square, in fractions of the image of this (width, height) within it."""
    side, (left, top), (width, height) = max(size), _corner(size), size
    x1, y1, x2, y2 = (side * value for value in box)
    return (x1 - left) / width, (y1 - top) / height, (x2 - left) / width, (y2 - top) / height


def _corner(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    return (max(size) - width) // 2, (max(size) - height) // 2
