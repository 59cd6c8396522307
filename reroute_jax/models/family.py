"""What a model family brings along, so that batching, engine and evaluation need not know which one they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image

from reroute_jax.config import ModelConfig
from reroute_jax.errors import RerouteError
from reroute_jax.routing.nuwa_rules import NuwaRules
from reroute_jax.routing.tower import Tower, TowerSizes
from reroute_jax.types import Grid, Size


def expand_image_tokens(ids: Sequence[int], image_token: int, counts: Sequence[int]) -> list[int]:
    """Each image placeholder becomes as many of them as its image has visual tokens."""
    left = iter(counts)
    return [token for old in ids for token in ([old] * next(left) if old == image_token else [old])]


def check_processor(processor: Any, settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises RerouteError for an image processor that makes other pixels than the model is for.

    settings: by name, what it has, and what it has to be for `config.json`.
    """
    for name, (found, needed) in settings.items():
        if found != needed:
            raise RerouteError(
                f"the image processor's {name} is {found}, and config.json needs {needed}: restore "
                "preprocessor_config.json or processor_config.json from the original checkpoint"
            )
    try:
        Image.Resampling(processor.resample)
    except ValueError:
        raise RerouteError(f"the image processor's resample is {processor.resample!r}, expected 0 to 5") from None
    factor = processor.rescale_factor
    if processor.do_rescale and not (type(factor) in (int, float) and 0 < factor < math.inf):
        raise RerouteError(f"the image processor's rescale_factor is {factor!r}, expected a number above 0")
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name)
        finite = isinstance(values, list | tuple) and len(values) == 3 and all(map(math.isfinite, values))
        if not finite or (name == "image_std" and min(values) <= 0):
            raise RerouteError(
                f"the image processor's {name} is {values}, expected three numbers, for red, green and blue"
            )


@dataclass(frozen=True)
class Released:
    """The released configurations of a family. prefix: of their names. depth: decoder layers that they are for; None
    where none were released, and ours are the others' layers scaled to the model's depth, with their ratios."""

    prefix: str
    depth: int | None


@dataclass(frozen=True)
class Evaluation:
    """What a family is evaluated with: by the reference (lmms-eval v0.7.1 with the release's patch), or by its authors
    where that has no boxes of its kind.

    rec_style: of the prompt that asks for a box. coord_format: of the boxes in its answers, "normalized" to [0, 1],
    "pixel" of the image as the model sees it, or "scale_1000", thousandths of the image each way. max_new_tokens: of an
    answer where the task sets none.
    """

    rec_style: str
    coord_format: str
    max_new_tokens: int


@dataclass(frozen=True)
class Family:
    """Grids are (rows, columns) of an image's visual tokens, sizes (width, height) in pixels.

    name: `model_type` of config.json. Modules `convert.NAME` (conversion table) and `convert.crosscheck.NAME` (PyTorch
        reference) are found by it.
    one_grid: whether all images have the same square grid.
    options: of the options that only some families have (arguments of `load` and of the commands), those of this one.
    nuwa: rules of the method of that name, None where it has none for the family.
    released: the released routing configurations, or ours in their place; None where there are neither.
    evaluation: how the reference asks the family.
    read_config(hf): of config.json as transformers read it; raises RerouteError for a setting that is not implemented.
    model(config, rngs=, dtype=): the parameters, with a `decoder`.
    encode_images(model, pixels, arrays, merge): features `[I, C, D]` at decoder width, `config.decoder.deepstack` times
        as much more behind each where its decoder adds features later, and the index of the visual token that each
        stands for, `[I, C]`; compiled. `arrays` are those of `merge_arrays`; `merge` is static.
    tower(model, pixels): what a merge reads of these images, for `encode_images` (`routing/tower.py`).
    tower_sizes(config): what the cost of a merge depends on.
    image_grids(pixel_values, image_grid_thw, config): grid of each image, as the HF processor returns them; raises
        RerouteError where they do not fit each other or the model.
    pack(pixel_values, grids, config, images): pixels for `encode_images`, padded to `images` images.
    positions(ids, grids, config): rotary positions of an unpadded row, `[S]` or `[3, S]`, and the next token's.
    token_bucket(tokens): the number of visual tokens that a program is compiled for.
    windows(grids, tokens, config): the number of attention windows that the tower's program is compiled for, of images
        in a bucket of `tokens`; 0 where it has none.
    image_processor(folder, config), preprocess(images, processor): what makes (pixel_values, image_grid_thw) of opened
        images; in two steps, `pixels([fit(image, processor), ...], processor)`. What `fit` gives is RGB in the size
        that the model sees, uint8 `[h, w, 3]`; it raises RerouteError for a size that the model does not take.
        The processor is refused likewise where it does not fit `config`.
    visual_grid(image, config, processor), model_size(size, processor): of an image, or one of this size.
    typical_grid(config, open_processor): that a method is planned for; the processor only where it takes one.
    settings(config, open_processor): what else a run's answers depend on, for its record.
    unpack(pixel_values, grids, config): each image's normalised pixels `[h, w, 3]`, which `preprocess` made.
    repack(images, grids, config): pixel_values of normalised images, as `unpack` gives them.
    seen_part(size, processor): (x1, y1, x2, y2) of what the model sees of an image, in fractions of it.
    chat_template: jinja, for a checkpoint that has none of its own.
    opening(config): what its prompts begin with where a chat has no system turn.
    """

    name: str
    one_grid: bool
    options: tuple[str, ...]
    nuwa: NuwaRules | None
    released: Released | None
    evaluation: Evaluation
    read_config: Callable[[Any], ModelConfig]
    model: Callable[..., nnx.Module]
    encode_images: Callable[..., tuple]
    tower: Callable[[Any, Any], Tower]
    tower_sizes: Callable[[ModelConfig], TowerSizes]
    image_grids: Callable[[Any, Any, ModelConfig], list[Grid]]
    pack: Callable[[Any, Sequence[Grid], ModelConfig, int], Any]
    positions: Callable[[np.ndarray, Sequence[Grid], ModelConfig], tuple[np.ndarray, int]]
    token_bucket: Callable[[int], int]
    windows: Callable[[Sequence[Grid], int, ModelConfig], int]
    image_processor: Callable[[Path, ModelConfig], Any]
    preprocess: Callable[[Sequence[Image.Image], Any], tuple[np.ndarray, np.ndarray | None]]
    fit: Callable[[Image.Image, Any], np.ndarray]
    pixels: Callable[[Sequence[np.ndarray], Any], tuple[np.ndarray, np.ndarray | None]]
    visual_grid: Callable[[Image.Image, ModelConfig, Any], Grid]
    model_size: Callable[[Size, Any], Size]
    typical_grid: Callable[[ModelConfig, Callable[[], Any]], Grid]
    settings: Callable[[ModelConfig, Callable[[], Any]], dict[str, Any]]
    unpack: Callable[[Any, Sequence[Grid], ModelConfig], list[np.ndarray]]
    repack: Callable[[Sequence[np.ndarray], Sequence[Grid], ModelConfig], np.ndarray]
    seen_part: Callable[[Size, Any], tuple[float, float, float, float]]
    chat_template: str
    opening: Callable[[ModelConfig], str]
