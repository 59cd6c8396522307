"""The user's model: plans, prefill, generation. Three compiled functions do all device work."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from transformers import AutoTokenizer

from reroute_jax import decoder as walker
from reroute_jax.config import ModelConfig
from reroute_jax.decoder import Prefilled
from reroute_jax.engine import generation
from reroute_jax.engine.batching import Batch, BatchShape, Row, make_batch, row_shape, split_images, valid_rows
from reroute_jax.engine.chat import ChatLayout, open_layout
from reroute_jax.engine.compilation import compiled
from reroute_jax.engine.generation import Sampling
from reroute_jax.engine.images import open_image
from reroute_jax.engine.pipeline import ahead, full_groups
from reroute_jax.engine.trace import Seen, Trace
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.models.family import Family
from reroute_jax.routing import methods
from reroute_jax.routing.merge import merge_arrays
from reroute_jax.routing.plan import Schedule
from reroute_jax.types import Grid

log = logging.getLogger("reroute_jax")

LOOKAHEAD = 2  # batches that `generate` makes ready while one is answered


@compiled(static_argnames="merge")
def encode(module, pixels, arrays, first, merge):
    """Features of all images in one row of slots, and the index of each among the batch's original visual tokens."""
    features, anchors = FAMILIES[module.config.family].encode_images(module, pixels, arrays, merge)
    log.info("compiling encode_images for %d images of %d tokens", *features.shape[:2])
    return features.reshape(-1, features.shape[-1]), (anchors + first[:, None]).reshape(-1)


@compiled(static_argnames=("plan", "max_new"))
def prefill(decoder, prompt, features, anchors, plan, max_new) -> Prefilled:
    log.info("compiling prefill for ids %s, %d stages", prompt.ids.shape, len(plan.stages))
    return walker.prefill(decoder, prompt, features, anchors, plan, max_new)


@compiled(static_argnames=("sampling", "max_new"), donate_argnames="cache")
def decode(decoder, logits, cache, seen, key, sampling, max_new):
    log.info("compiling decode for logits %s, %d new tokens", logits.shape, max_new)
    return generation.decode(decoder, logits, cache, seen, key, sampling, max_new)


@dataclass(frozen=True)
class PrefillResult:
    """logits: fp32 `[B, vocab]`, last valid position of each row."""

    logits: np.ndarray
    trace: Trace | None


@dataclass(frozen=True)
class Questions:
    """A batch on the host. rows: prompt ids, `[S]` each; those behind the first `count` only fill the batch up.

    pixels, grids: of all images, as the family's image processor gives them; None without images.
    """

    rows: tuple[np.ndarray, ...]
    count: int
    pixels: np.ndarray | None
    grids: np.ndarray | None


@dataclass(frozen=True)
class Asked:
    """A question whose images are open. number: of the pair it came from."""

    number: int
    images: list[Image.Image]
    row: Row


@dataclass(frozen=True)
class Inputs:
    """Arguments of the compiled functions for one batch. images: of `encode`, behind the module; None without any."""

    batch: Batch
    images: tuple | None


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint. `module` holds the parameters; nothing here changes after loading."""

    config: ModelConfig
    module: nnx.Module
    folder: Path

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.family]

    @property
    def _unrouted(self) -> Schedule:
        return Schedule.from_decisions((), (), self.config.num_layers)

    @property
    def dtype(self) -> str:
        """Of the parameters, the activations and the KV cache."""
        return self.module.decoder.embed.table.dtype.name

    @cached_property
    def tokenizer(self):
        return _from_folder(AutoTokenizer.from_pretrained, self.folder)

    @cached_property
    def chat_layout(self) -> ChatLayout:
        """How this checkpoint writes chats."""
        return open_layout(self.folder, self.tokenizer, self.config)

    @cached_property
    def image_processor(self):
        return _from_folder(lambda folder: self.family.image_processor(folder, self.config), self.folder)

    @property
    def reference_grid(self) -> tuple[int, int]:
        """(rows, columns) of the visual tokens that methods are planned for."""
        return self.family.typical_grid(self.config, lambda: self.image_processor)

    def visual_grid(self, image: Image.Image) -> tuple[int, int]:
        """(rows, columns) of an image's visual tokens."""
        return self.family.visual_grid(image, self.config, self.image_processor)

    def model_size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) in pixels of the image that the model sees."""
        return self.family.model_size(image.size, self.image_processor)

    def plan(
        self, method: str, *, budget=None, action: str = "reroute", grid: Grid | None = None, **switches
    ) -> Schedule:
        """Schedule of a method for this model; `routing.methods.plan` explains the arguments. grid: (rows, columns) of
        visual tokens to plan for, None for `reference_grid`."""
        rows, cols = grid or self.reference_grid
        return methods.plan(
            method,
            num_layers=self.config.num_layers,
            visual=rows * cols,
            grid=(rows, cols),
            family=self.config.family,
            budget=budget,
            action=action,
            **switches,
        )

    def prefill(
        self,
        *,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        image_grid_thw=None,
        schedule: Schedule | None = None,
        trace: bool = False,
    ) -> PrefillResult:
        """Run prompts as the HF processor returns them: ids `[B, S]` with image tokens expanded, padded on either side,
        pixels in order of appearance: `[I, 3, h, w]`, or patches of varying images with `image_grid_thw` `[I, 3]`.

        Raises RerouteError where ids, mask, pixels and schedule do not fit each other or the model.
        """
        rows = valid_rows(input_ids, attention_mask)
        batch, anchors, result = self._run(rows, pixel_values, image_grid_thw, schedule, 0)
        merged = schedule is not None and schedule.merge is not None
        if not trace:
            return PrefillResult(np.asarray(result.logits), None)
        seen = Seen.of(self, rows, pixel_values, image_grid_thw, schedule)
        return PrefillResult(np.asarray(result.logits), _trace(batch, result, anchors if merged else None, seen))

    def generate_ids(
        self,
        *,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        image_grid_thw=None,
        schedule: Schedule | None = None,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        repetition_penalty: float = 1.0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> np.ndarray:
        """int32 `[B, max_new_tokens]`; a row ends at its first `eos_token_id` (None: never) and is padded behind it."""
        eos = () if eos_token_id is None else tuple(np.atleast_1d(eos_token_id).tolist())
        sampling = Sampling(temperature, top_p, repetition_penalty, eos, self.config.pad_token)
        rows = valid_rows(input_ids, attention_mask)
        return self._generate(rows, pixel_values, image_grid_thw, schedule, max_new_tokens, sampling, seed)

    def generate(
        self,
        pairs: Sequence[tuple],
        *,
        schedule: Schedule | None = None,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        token_budget: int | None = None,
        repetition_penalty: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers to (image, question) pairs, in order. An image is a PIL image, a path, a list of them, or None.

        Prompts that take the same programs are answered together, up to `batch_size` of them and, where it is given,
        up to `token_budget` slots at the decoder's input, padding included. Their images are read and resized on
        another thread while earlier ones run. A sampled answer (temperature above 0) depends on who shares its batch.
        repetition_penalty: None takes what the family generates with. Raises RerouteError for an image that cannot be
        read, naming it, and for a prompt beyond the token budget.
        """
        penalty = self.config.repetition_penalty if repetition_penalty is None else repetition_penalty
        sampling = Sampling(temperature, top_p, penalty, self.config.eos_tokens, self.config.pad_token)
        answers = [""] * len(pairs)
        with closing(ahead(self._batches(pairs, schedule, batch_size, token_budget), LOOKAHEAD)) as batches:
            for numbers, questions in batches:
                texts = self._answer(questions, schedule, max_new_tokens, sampling, seed)
                for number, text in zip(numbers, texts, strict=True):
                    answers[number] = text
        return answers

    def _batches(
        self, pairs: Sequence[tuple], schedule: Schedule | None, batch_size: int, token_budget: int | None
    ) -> Iterator[tuple[list[int], Questions]]:
        """The pairs in batches, each with their numbers."""
        asked = (self._ask(number, pair) for number, pair in enumerate(pairs))

        def shape(one: Asked) -> BatchShape:
            return row_shape(one.row, self.config, schedule or self._unrouted)

        def rows(of: BatchShape) -> int:
            return most_rows(of, batch_size, token_budget)

        for of, group in full_groups(asked, shape, rows):
            yield [one.number for one in group], self._questions(group, rows(of))

    def prepare(self, pairs: Sequence[tuple], batch_size: int) -> Questions:
        """What `answer` needs of up to `batch_size` pairs, as of `generate`: all work on the host, for any thread."""
        return self._questions([self._ask(number, pair) for number, pair in enumerate(pairs)], batch_size)

    def _ask(self, number: int, pair: tuple) -> Asked:
        image, text = pair
        images = self._open(image)
        grids = tuple(self.visual_grid(one) for one in images)
        return Asked(number, images, Row(self.prompt_ids(text, grids), grids))

    def _questions(self, asked: Sequence[Asked], most: int) -> Questions:
        flat = [image for one in asked for image in one.images]
        pixels, grids = self.family.preprocess(flat, self.image_processor) if flat else (None, None)
        # Rows of one token fill a short batch to a power of two, so that few sizes are compiled.
        padding = min(most, 1 << (len(asked) - 1).bit_length()) - len(asked)
        filling = [np.array([self.config.eos_tokens[0]])] * padding
        return Questions((*(one.row.ids for one in asked), *filling), len(asked), pixels, grids)

    def answer(self, questions: Questions, *, schedule: Schedule | None = None, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to what `prepare` made, in order: those of `generate`."""
        sampling = Sampling(0.0, 1.0, self.config.repetition_penalty, self.config.eos_tokens, self.config.pad_token)
        return self._answer(questions, schedule, max_new_tokens, sampling, 0)

    def _answer(self, questions: Questions, schedule, max_new: int, sampling: Sampling, seed: int) -> list[str]:
        ids, pixels, grids = list(questions.rows), questions.pixels, questions.grids
        tokens = self._generate(ids, pixels, grids, schedule, max_new, sampling, seed)[: questions.count]
        return [self.tokenizer.decode(_until(row, sampling.eos), skip_special_tokens=True) for row in tokens]

    def warm_up(
        self, pairs: Sequence[tuple], *, batch_size: int = 8, token_budget: int | None = None, **options
    ) -> None:
        """Compile what `generate` will need for (image, question) pairs like these, with the same `options`: their
        buckets, at every number of rows that a batch is filled up to.

        One pair of each bucket is answered, so give examples and not everything. Raises what `generate` does.
        """
        shapes = {}
        for number, pair in enumerate(pairs):
            row = self._ask(number, pair).row
            shapes.setdefault(row_shape(row, self.config, options.get("schedule") or self._unrouted), pair)
        for shape, pair in shapes.items():
            most = most_rows(shape, batch_size, token_budget)
            for rows in sorted({min(most, 1 << power) for power in range(most.bit_length() + 1)}):
                self.generate([pair] * rows, batch_size=batch_size, token_budget=token_budget, **options)

    def _open(self, image) -> list[Image.Image]:
        if image is None:
            return []
        group = image if isinstance(image, list | tuple) else [image]
        return [open_image(one) for one in group]

    def prompt_ids(self, text: str, grids: Sequence[tuple[int, int]]) -> np.ndarray:
        """Ids of the chat prompt of a question behind images of these grids, image tokens expanded."""
        return self.chat_layout.question_ids(text, grids)

    def inputs(self, rows: Sequence[np.ndarray], pixels, image_grid_thw, schedule: Schedule | None) -> Inputs:
        """Padded arrays for rows of unpadded ids, with pixels and grids as `prefill` takes them. Host work only.

        Raises RerouteError where they do not fit each other or the model.
        """
        schedule = schedule or self._unrouted
        grids = self.family.image_grids(pixels, image_grid_thw, self.config)
        batch = make_batch(split_images(rows, grids, self.config), self.config, schedule)
        return Inputs(batch, self._images(pixels, grids, len(rows), schedule) if grids else None)

    def _generate(self, ids, pixels, grids, schedule, max_new: int, sampling: Sampling, seed: int) -> np.ndarray:
        if max_new < 1:
            raise RerouteError(f"max_new_tokens is {max_new}, expected at least 1")
        batch, _, result = self._run(ids, pixels, grids, schedule, max_new)
        key = jax.random.key(seed)
        tokens, _ = decode(self.module.decoder, result.logits, result.cache, batch.seen, key, sampling, max_new)
        return np.asarray(tokens)

    def _run(self, ids, pixels, grids, schedule: Schedule | None, max_new: int):
        inputs = self.inputs(ids, pixels, grids, schedule)
        features, anchors = self._features(inputs)
        batch = inputs.batch
        result = prefill(self.module.decoder, batch.prompt, features, anchors, batch.plan, max_new)
        return batch, anchors, result

    def _features(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """Image features of the batch, flattened, and the index of each among the original visual tokens."""
        if inputs.images is None:
            return jnp.zeros((1, self.config.decoder.hidden_size)), jnp.zeros(1, jnp.int32)
        return encode(self.module, *inputs.images)

    def _images(self, pixels, grids: Sequence[Grid], rows: int, schedule: Schedule) -> tuple:
        # Rows without an image must not change the shape that is compiled for.
        images = max(len(grids), rows)
        sizes = [row * col for row, col in grids]
        first = np.zeros(images, np.int32)
        first[: len(sizes)] = np.cumsum([0, *sizes[:-1]])
        arrays = merge_arrays(schedule.merge, grids, images, self.family.token_bucket(max(sizes)))
        packed = self.family.pack(pixels, grids, self.config, images)
        return packed, arrays, first, schedule.merge


def most_rows(shape: BatchShape, batch_size: int, token_budget: int | None) -> int:
    """Rows of this shape that run together. Raises RerouteError where the budget does not hold a single one."""
    if batch_size < 1:
        raise RerouteError(f"batch_size is {batch_size}, expected at least 1")
    if token_budget is None:
        return batch_size
    if token_budget < shape.slots:
        raise RerouteError(
            f"a prompt takes {shape.slots} slots and token_budget is {token_budget}: raise it, or leave it out"
        )
    return min(batch_size, token_budget // shape.slots)


def _from_folder(read, folder: Path):
    try:
        return read(folder)
    except (OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise RerouteError(
            f"{folder} lacks tokenizer or image processor files ({reason}): copy them there"
        ) from problem


def _trace(batch: Batch, result: Prefilled, anchors, seen: Seen) -> Trace:
    selected = tuple(_indices(np.asarray(decision.selected)) for decision in result.decisions)
    scores = tuple(np.asarray(decision.scores) for decision in result.decisions)
    kept = None
    if anchors is not None:
        prompt = batch.prompt
        of_slot = np.asarray(anchors)[prompt.feature] - prompt.first_feature[:, None]
        kept = np.zeros(prompt.visual_positions.shape[-2:], bool)
        row, slot = np.nonzero(prompt.feature >= 0)
        kept[row, of_slot[row, slot]] = True
        kept = _indices(kept)
    return Trace(selected, scores, kept, np.asarray(result.cache.tokens_per_layer()), seen)


def _indices(mask: np.ndarray) -> np.ndarray:
    """Columns that are set in each row, ascending, -1 padded to the longest."""
    found = [np.flatnonzero(row) for row in mask]
    width = max((len(row) for row in found), default=0)
    return np.array([np.pad(row, (0, width - len(row)), constant_values=-1) for row in found], np.int32)


def _until(tokens: np.ndarray, eos: tuple[int, ...]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(tokens, eos))
    return tokens[: ends[0]] if len(ends) else tokens
