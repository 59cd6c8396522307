"""What the speed measurements run on: a model, and random inputs of stated sizes for it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import reroute_jax
from convert.checkpoint import fitted_module
from convert.embedded import EMBEDDED
from convert.loading import with_kv_cache
from evals.harness.cli import load_model
from evals.speed.checkpoint_shapes import SHAPES, Shape
from reroute_jax.commandline.parsing import DATA, RUN, Parser, positive
from reroute_jax.config import ModelConfig
from reroute_jax.engine.batching import Batch
from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.mesh import open_mesh
from reroute_jax.models import FAMILIES, read_config
from reroute_jax.nn.quantised import with_quantised
from reroute_jax.nn.sharding import on_mesh
from reroute_jax.routing import methods
from reroute_jax.routing.cost import Account, account
from reroute_jax.routing.plan import Schedule
from reroute_jax.types import FLOATS, Grid
from reroute_jax.vision.clip import ClipConfig

QWEN_GRID = (24, 24)


@dataclass(frozen=True)
class Subject:
    """A model and the sizes of its prompts: one image of `grid` visual tokens and `text` text tokens in each row.

    hf_config: the checkpoint's config.json.
    """

    name: str
    model: Model
    hf_config: dict[str, Any]
    grid: Grid
    text: int

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def visual(self) -> int:
        return self.grid[0] * self.grid[1]

    def plan(self, method: str, **options) -> Schedule:
        config = self.model.config
        return methods.plan(
            method,
            num_layers=config.num_layers,
            visual=self.visual,
            grid=self.grid,
            family=config.family,
            **options,
        )

    def account(self, schedule: Schedule) -> Account:
        """Theory of one row, its cache in the model's dtype."""
        sizes = {"visual": self.visual, "text": self.text, "grid": self.grid}
        tower = FAMILIES[self.config.family].tower_sizes(self.config)
        return account(schedule, self.config.decoder, **sizes, dtype=self.model.dtype, tower=tower)


@dataclass(frozen=True)
class Sample:
    """A batch of prompts of equal length. ids: `[B, S]`; pixels and thw: one image a row, as the HF processor's."""

    ids: np.ndarray
    pixels: np.ndarray
    thw: np.ndarray | None

    def row(self, number: int) -> Sample:
        """One prompt alone."""
        parts = np.split(self.pixels, len(self.ids))
        return Sample(
            self.ids[number : number + 1],
            parts[number],
            None if self.thw is None else self.thw[number : number + 1],
        )

    def batch(self, model: Model, schedule: Schedule) -> Batch:
        return model.inputs(input_ids=self.ids, pixel_values=self.pixels, image_grid_thw=self.thw, schedule=schedule)


def add_subject_arguments(parser: Parser) -> None:
    run, data = parser.group(RUN), parser.group(DATA)
    which = run.add_mutually_exclusive_group()
    which.add_argument("--model", help=f"hub id, folder, or one of {', '.join(EMBEDDED)} (default: {EMBEDDED[0]})")
    which.add_argument("--random", choices=tuple(SHAPES), help="a model of this shape with random weights")
    run.add_argument(
        "--dtype", choices=tuple(FLOATS), help="(default: the checkpoint's, float32 for random and embedded)"
    )
    data.add_argument("--text", type=positive, default=64, help="text tokens of a prompt (default: %(default)s)")
    data.add_argument(
        "--grid",
        type=positive,
        nargs=2,
        metavar=("ROWS", "COLS"),
        help=f"visual tokens of an image, Qwen families only (default: {QWEN_GRID[0]} {QWEN_GRID[1]})",
    )


def open_subject(
    args: argparse.Namespace,
    shapes_only: bool = False,
    mesh: str | Mesh | None = None,
    quantise: str | None = None,
    kv_cache: str | None = None,
) -> Subject:
    """The model of the arguments. mesh, quantise, kv_cache: as of `load`.

    Raises RerouteError where it cannot be loaded, has another grid, or must have weights although only its shapes are
    asked for.
    """
    held = {"mesh": mesh, "quantise": quantise, "kv_cache": kv_cache}
    if args.random:
        shape, dtype = SHAPES[args.random], args.dtype or "float32"
        model, hf_config = random_model(shape, dtype, shapes_only=shapes_only, **held)
    elif shapes_only:
        raise RerouteError("only a --random model can do without its weights, name one")
    else:
        model = load_model(args.model or EMBEDDED[0], args.dtype, **held)
        hf_config = json.loads((model.folder / "config.json").read_text())
    vision = model.config.vision
    own = vision.grid if isinstance(vision, ClipConfig) else None
    if own is not None and args.grid is not None and tuple(args.grid) != own:
        raise RerouteError(f"every image of this model has {own[0]} x {own[1]} visual tokens, leave out --grid")
    grid = own or tuple(args.grid or QWEN_GRID)
    return Subject(args.random or args.model or EMBEDDED[0], model, hf_config, grid, args.text)


def random_model(
    shape: Shape,
    dtype: str,
    seed: int = 0,
    shapes_only: bool = False,
    mesh: str | Mesh | None = None,
    quantise: str | None = None,
    kv_cache: str | None = None,
) -> tuple[Model, dict[str, Any]]:
    """A model of this shape with random weights, and its config.json; it has no folder, so no tokenizer.

    shapes_only: shapes stand in for the weights; it compiles and does not run. mesh, quantise, kv_cache: as of `load`.
    """
    hf_config = shape.config(dtype)
    config = read_config(hf_config)
    if kv_cache is not None:
        config = with_kv_cache(config, kv_cache)

    def shapes(kind: str | None) -> nnx.Module:
        module = reroute_jax.abstract_params(config, dtype)
        module = module if kind is None else with_quantised(module, kind)
        return module if mesh is None else on_mesh(module, open_mesh(mesh, config.decoder))

    if shapes_only:
        return Model(config, shapes(quantise), Path()), hf_config
    make = partial(reroute_jax.init, config, jax.random.key(seed), dtype)
    if mesh is not None:
        make = jax.jit(make, out_shardings=jax.tree.map(lambda shape: shape.sharding, shapes(None)))
    module = make()
    if quantise is not None:
        module = fitted_module(module, shapes(quantise))
    return Model(config, module, Path()), hf_config


def sample(subject: Subject, batch: int, seed: int = 0) -> Sample:
    """Random prompts, the image behind the first of their text tokens; no token is a special one but the image's."""
    config, rng = subject.model.config, np.random.default_rng(seed)
    special = (config.image_token, config.video_token, config.bos_token, config.pad_token, *config.eos_tokens)
    text = np.setdiff1d(np.arange(config.decoder.vocab_size), [token for token in special if token is not None])
    ids = rng.choice(text, (batch, subject.text + subject.visual))
    ids[:, 1 : 1 + subject.visual] = config.image_token
    pixels, thw = _images(config.vision, subject.grid, batch, rng)
    return Sample(ids, pixels, thw)


def _images(vision, grid: Sequence[int], count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    if isinstance(vision, ClipConfig):
        return rng.standard_normal((count, 3, vision.image_size, vision.image_size), np.float32), None
    rows, cols = (side * vision.merge for side in grid)
    patches = rng.standard_normal((count * rows * cols, vision.patch_values), np.float32)
    return patches, np.tile([1, rows, cols], (count, 1))
