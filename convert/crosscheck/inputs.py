"""What a cross-check asks: drawn pictures with a question each, and a prompt without an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from transformers import AutoTokenizer

from convert.source import Source
from reroute_jax.config import ModelConfig
from reroute_jax.engine.chat import ChatLayout
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.types import Grid

TEXT_ONLY = "Name three colours."
_COLOURS = {"red": (205, 50, 45), "green": (50, 150, 70), "blue": (50, 80, 200), "yellow": (230, 200, 50)}
_CANVAS, _NOISE = 225, 12


@dataclass(frozen=True)
class Probe:
    """ids: `[S]`, image tokens expanded. pixels, thw: of its images as the processor gives them, None without any.
    grids: (rows, columns) of their visual tokens."""

    ids: np.ndarray
    pixels: np.ndarray | None
    thw: np.ndarray | None
    grids: tuple[Grid, ...]

    @property
    def given(self) -> dict[str, np.ndarray | None]:
        """As the model's methods take it."""
        return {"input_ids": self.ids[None], "pixel_values": self.pixels, "image_grid_thw": self.thw}


def companions(source: Source, config: ModelConfig):
    """Tokenizer and image processor of the checkpoint."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        return tokenizer, FAMILIES[config.family].image_processor(source.folder, config)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RerouteError(
            f"{source.name} needs a tokenizer and an image processor beside its weights: {reason}"
        ) from None


def picture(number: int) -> Image.Image:
    """A light canvas with one shape of each colour, of sizes and at places that the number decides. Noise keeps patches
    apart, which would tie in every ranking if they were equal."""
    rng = np.random.default_rng(number)
    width, height = rng.integers(96, 241, 2).tolist()
    image = Image.new("RGB", (width, height), (_CANVAS,) * 3)
    draw = ImageDraw.Draw(image)
    for index, colour in enumerate(_COLOURS.values()):
        side = int(rng.integers(18, 40))
        x, y = (int(rng.integers(0, room - side)) for room in (width, height))
        shape = (draw.rectangle, draw.ellipse)[index % 2]
        shape((x, y, x + side, y + side), fill=colour)
    noise = rng.integers(-_NOISE, _NOISE + 1, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def make_probes(config: ModelConfig, layout: ChatLayout, processor, count: int) -> list[Probe]:
    """`count` pictures with a question each, and a prompt without one, all in the checkpoint's chat prompt."""
    family, probes = FAMILIES[config.family], []
    for number in range(count):
        pixels, thw = family.preprocess([picture(number)], processor)
        grids = tuple(family.image_grids(pixels, thw, config))
        question = f"Where is the {list(_COLOURS)[number % len(_COLOURS)]} one?"
        probes.append(Probe(layout.question_ids(question, grids), pixels, thw, grids))
    return [*probes, Probe(layout.question_ids(TEXT_ONLY, ()), None, None, ())]
