"""The user's model: plans, prefill, answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from reroute_jax.config import ModelConfig
from reroute_jax.engine import programs
from reroute_jax.engine.answering import answer_group, stream_tokens
from reroute_jax.engine.answers import Answer, raise_errors
from reroute_jax.engine.batching import Batch, Question, lay_out
from reroute_jax.engine.chat import ChatLayout
from reroute_jax.engine.given import batch_given, images_given
from reroute_jax.engine.groups import Failed, batch_of, batches_of_shapes, check_limits, groups
from reroute_jax.engine.image_cache import CachedPrefill, ImageCache
from reroute_jax.engine.pipeline import ahead
from reroute_jax.engine.questions import FittedImage, fitted_image, question_of
from reroute_jax.engine.running import Prefill, answered_ids, check_finite, dtype_of, prefill_ahead, run_prefill
from reroute_jax.engine.sampling import Sampling
from reroute_jax.engine.side_files import SideFiles
from reroute_jax.engine.text import pieces
from reroute_jax.engine.trace import Trace
from reroute_jax.engine.warmup import compile_ahead
from reroute_jax.errors import RerouteError, one_of
from reroute_jax.models.family import Family
from reroute_jax.nn.sharding import mesh_of, row_shards
from reroute_jax.nn.weights import Weights
from reroute_jax.routing import methods
from reroute_jax.routing.cost import Account, account
from reroute_jax.routing.found import FOUND, found_schedule
from reroute_jax.routing.plan import Schedule
from reroute_jax.types import Grid, Size

LOOKAHEAD = 2  # batches that are made ready while one is answered


@dataclass(frozen=True)
class PrefillResult:
    """logits: fp32 `[B, vocab]`, last valid position of each row."""

    logits: np.ndarray
    trace: Trace | None


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint. `module` holds the parameters, which change no more: programs take them once."""

    config: ModelConfig
    module: nnx.Module
    folder: Path

    @cached_property
    def weights(self) -> Weights:
        """The parameters as the compiled programs take them."""
        return Weights.of(self.module)

    @cached_property
    def files(self) -> SideFiles:
        return SideFiles(self.folder, self.config)

    @property
    def family(self) -> Family:
        return self.files.family

    @property
    def tokenizer(self) -> Any:
        return self.files.tokenizer

    @property
    def image_processor(self) -> Any:
        return self.files.image_processor

    @property
    def chat_layout(self) -> ChatLayout:
        """How this checkpoint writes chats."""
        return self.files.chat_layout

    @property
    def dtype(self) -> str:
        """Of the parameters, the activations, and a KV cache without a dtype of its own."""
        return dtype_of(self.weights)

    @property
    def mesh(self) -> Mesh | None:
        """That the parameters lie on, with the axes of `nn.sharding`; None on a single device."""
        return mesh_of(self.weights)

    @property
    def reference_grid(self) -> Grid:
        """(rows, columns) of the visual tokens that methods are planned for."""
        return self.files.reference_grid

    def visual_grid(self, image: Image.Image) -> Grid:
        """(rows, columns) of an image's visual tokens."""
        return self.files.visual_grid(image)

    def model_size(self, image: Image.Image) -> Size:
        """(width, height) in pixels of the image that the model sees."""
        return self.files.model_size(image)

    # --- Schedules ----------------------------------------------------------------------------------------------------

    def plan(self, method: str, *, grid: Grid | None = None, action: str = "reroute", **options) -> Schedule:
        """Schedule of a method for this model; `routing.methods.plan` explains budget and switches. "found": the one
        that `evals.search` found for exactly this budget and put into the checkpoint's folder; it has no switches.

        grid: (rows, columns) of the visual tokens to plan for; None takes the family's typical image.
        """
        if method == FOUND:
            return found_schedule(self.folder, **options)
        rows, cols = grid or self.reference_grid
        sizes = {"num_layers": self.config.num_layers, "visual": rows * cols, "grid": (rows, cols)}
        return methods.plan(method, **sizes, family=self.config.family, action=action, **options)

    def cost(self, schedule: Schedule, *, text: int, grid: Grid | None = None) -> Account:
        """What a schedule means for a row with one image, which prints as a line: visual tokens a layer as they really
        run, multiply-accumulates, KV bytes. text: text tokens of the row. grid: as of `plan`."""
        rows, cols = grid or self.reference_grid
        sizes = {"visual": rows * cols, "grid": (rows, cols), "text": text}
        tower = self.family.tower_sizes(self.config)
        return account(schedule, self.config.decoder, **sizes, dtype=self.dtype, tower=tower)

    # --- Prompts as arrays --------------------------------------------------------------------------------------------

    def inputs(
        self,
        *,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        image_grid_thw=None,
        schedule: Schedule | None = None,
    ) -> Batch:
        """The padded arrays that `reroute_jax.apply` takes, of prompts as the HF processor returns them: ids `[B, S]`
        with image tokens expanded, padded on either side, pixels in order of appearance: `[I, 3, h, w]`, or patches of
        varying images with `image_grid_thw` `[I, 3]`. Every row has slots for as many images as the one with most.

        Raises RerouteError where ids, mask, pixels and schedule do not fit each other or the model.
        """
        schedule = self._asked(schedule)
        return batch_given(self.config, schedule, input_ids, attention_mask, pixel_values, image_grid_thw)

    def prefill(self, *, schedule: Schedule | None = None, trace: bool = False, **given) -> PrefillResult:
        """Run prompts through the decoder; arguments as of `inputs`, whose errors it raises, and RerouteError where
        numbers overflow."""
        batch = self.inputs(schedule=schedule, **given)
        anchors, found = run_prefill(self.weights, batch)
        logits = np.asarray(found.logits)
        check_finite(batch, found, np.isfinite(logits).all(axis=1), self.dtype)
        if not trace:
            return PrefillResult(logits, None)

        def images() -> list[np.ndarray]:
            return images_given(batch, given.get("pixel_values"), self.files)

        merged = partial(programs.members, self.weights, batch.images)
        return PrefillResult(logits, Trace.of(batch, found, anchors, self.config, self.dtype, images, merged))

    def generate_ids(
        self,
        *,
        schedule: Schedule | None = None,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        repetition_penalty: float | int = 1.0,
        temperature: float | int = 0.0,
        top_p: float | int = 1.0,
        seed: int = 0,
        **given,
    ) -> np.ndarray:
        """int32 `[B, max_new_tokens]`; a row ends at its first `eos_token_id` (None: never) and is padded behind it.
        Prompts as of `inputs`."""
        stop = () if eos_token_id is None else tuple(np.atleast_1d(eos_token_id).tolist())
        sampling = Sampling(temperature, top_p, repetition_penalty, stop, max_new_tokens, seed)
        return answered_ids(self.weights, self.inputs(schedule=schedule, **given), sampling, self.config.pad_token)

    # --- Questions ----------------------------------------------------------------------------------------------------

    def prompt_ids(self, text: str, grids: Sequence[Grid]) -> np.ndarray:
        """Ids of the prompt of a question behind images of these grids, image tokens expanded."""
        return self.chat_layout.question_ids(text, grids)

    def image(self, source) -> FittedImage:
        """An image for items of `answer`, opened and resized once, for any number of questions. source: what
        `images.open_image` takes.

        Raises RerouteError for an image that cannot be read, and for a size that the model does not take.
        """
        return fitted_image(source, self.files)

    def question(self, item, *, text_special_tokens: bool = True) -> Question:
        """An item of `answer`, ready to be asked under any schedule, any number of times.

        Raises RerouteError for an image that cannot be read, and for text whose placeholders are not the images'.
        """
        return question_of(item, self.files, text_special_tokens=text_special_tokens)

    def answer(
        self,
        items: Sequence,
        *,
        schedule: Schedule | None = None,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        token_budget: int | None = None,
        repetition_penalty: float | int | None = None,
        temperature: float | int = 0.0,
        top_p: float | int = 1.0,
        seed: int = 0,
        logprobs: bool = False,
        trace: bool = False,
        text_special_tokens: bool = True,
        on_error: str = "raise",
        image_cache: ImageCache | None = None,
    ) -> list[Answer]:
        """Answers in order. An item is an (image, question) pair, a chat `[(role, content), ...]`, or a `question`.

        An image is what `images.open_image` takes, or one of `image`, a list of those, or None; a content is a string,
        or a list of strings and images. Prompts that take the same programs are answered together, up to `batch_size`
        of them and, where it is given, up to `token_budget` slots at the decoder's input, padding included; their
        images are read and resized on another thread while earlier ones run. What a question is answered does not
        depend on the others. repetition_penalty: None takes the checkpoint's. text_special_tokens: False keeps text
        that reads like a special token plain. on_error: "raise" an AnswerError for questions that cannot be answered,
        when all others are, or "return" an Answer with its `error`. image_cache: for images that are asked about again,
        as of `image_cache`. Raises RerouteError for numbers that mean nothing, and what `CachedPrefill` does.
        """
        one_of("on_error", on_error, ("raise", "return"))
        check_limits(batch_size, token_budget)
        sampling = self._sampling(max_new_tokens, repetition_penalty, temperature, top_p, seed)
        how = self._asked(schedule), batch_size, token_budget, text_special_tokens, self._row_shards
        prefill, encodes = self._prefill(image_cache), image_cache is None or trace
        answers = [Answer()] * len(items)
        batches = groups(items, self.files, *how, encodes)
        # One batch has nothing to be made meanwhile, and a thread takes 4 ms of a call (2 cores, November 2026).
        if len(items) > batch_size or token_budget is not None:
            batches = ahead(batches, LOOKAHEAD)
        with closing(batches) as ready:
            for group in ready:
                if isinstance(group, Failed):
                    answers[group.number] = Answer(error=group.error)
                    continue
                found = answer_group(self.weights, self.tokenizer, group, sampling, prefill, trace)
                for number, one in zip(group.numbers, found, strict=True):
                    answers[number] = one if logprobs else replace(one, logprobs=None)
        if on_error == "raise":
            raise_errors(answers)
        return answers

    def generate(self, items: Sequence, **options) -> list[str]:
        """The texts of `answer`, which explains the arguments."""
        return [found.text for found in self.answer(items, **options)]

    def stream(
        self,
        item,
        *,
        schedule: Schedule | None = None,
        max_new_tokens: int = 64,
        repetition_penalty: float | int | None = None,
        temperature: float | int = 0.0,
        top_p: float | int = 1.0,
        seed: int = 0,
        text_special_tokens: bool = True,
        image_cache: ImageCache | None = None,
    ) -> Iterator[str]:
        """The text of `answer([item], ...)` in pieces of whole characters, as they come. Closing the iterator ends the
        decoding."""
        sampling = self._sampling(max_new_tokens, repetition_penalty, temperature, top_p, seed)
        schedule = self._asked(schedule)
        layout = lay_out(self.question(item, text_special_tokens=text_special_tokens), self.config, schedule)
        batch = batch_of([layout], self.files, schedule, size=1, encodes=image_cache is None)
        return pieces(self.tokenizer, stream_tokens(self.weights, batch, sampling, self._prefill(image_cache)))

    def image_cache(self, max_bytes: int) -> ImageCache:
        """For `answer` and `stream`: what all layers before the first decision leave of an image, and of the text in
        front of it, is kept in up to so many bytes of device memory, and later questions about it start at their own
        text. Each makes its own decisions, and its answer is the one without a cache.

        Raises RerouteError for a model on a mesh.
        """
        return ImageCache(self.weights, max_bytes)

    def warm_up(
        self,
        items: Sequence,
        *,
        schedule: Schedule | None = None,
        batch_size: int = 8,
        token_budget: int | None = None,
        max_new_tokens: int = 64,
        temperature: float | int = 0.0,
        image_cache: ImageCache | None = None,
    ) -> None:
        """Compile what `answer` will need for items like these, with answers of up to `max_new_tokens`: their shapes,
        at every number of rows that a batch is filled up to. Nothing is answered; give examples and not everything.
        temperature: any above 0 where answers are drawn, which other programs do. image_cache: where `answer` gets one,
        whose programs are others. They depend on how much text stands in front of a prompt's last image, too: items
        with as much of it as these are foreseen, and batches in which it takes one bucket.

        Raises what `answer` does.
        """
        check_limits(batch_size, token_budget)
        sampling = self._sampling(max_new_tokens, None, temperature, 1.0, 0)
        how = self._asked(schedule), batch_size, token_budget, self._row_shards, image_cache is None
        prefill = prefill_ahead if image_cache is None else self._cached_prefill(image_cache).ahead
        for batches in batches_of_shapes(items, self.files, *how):
            compile_ahead(self.weights, batches, sampling, prefill)

    # --- Defaults -----------------------------------------------------------------------------------------------------

    @cached_property
    def _row_shards(self) -> int:
        return row_shards(self.weights)

    def _asked(self, schedule: Any) -> Schedule:
        """All tokens run where there is none. Raises RerouteError for anything else than a schedule."""
        if schedule is None:
            return Schedule.from_decisions((), (), self.config.num_layers)
        if not isinstance(schedule, Schedule):
            raise RerouteError(f"schedule is {str(schedule)[:40]!r}, expected a Schedule, such as `plan` makes")
        return schedule

    def _prefill(self, cache: ImageCache | None) -> Prefill:
        return run_prefill if cache is None else self._cached_prefill(cache)

    def _cached_prefill(self, cache: ImageCache) -> CachedPrefill:
        if cache.weights is not self.weights:
            raise RerouteError("the image cache is another model's: make one with this model's `image_cache`")
        return CachedPrefill(cache, self.files)

    def _sampling(self, limit: int, penalty: float | None, temperature: float, top_p: float, seed: int) -> Sampling:
        penalty = self.config.repetition_penalty if penalty is None else penalty
        return Sampling(temperature, top_p, penalty, self.config.eos_tokens, limit, seed)
