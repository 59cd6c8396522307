"""The user's model: plans, prefill, answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from transformers import AutoTokenizer

from reroute_jax.config import ModelConfig
from reroute_jax.decoder import Prefilled
from reroute_jax.engine import programs, warmup
from reroute_jax.engine.answers import Answer, Chosen, Usage, raise_errors
from reroute_jax.engine.batching import (
    Batch,
    BatchShape,
    Layout,
    Question,
    largest,
    lay_out,
    make_batch,
    most_rows,
    padded_rows,
    similar,
)
from reroute_jax.engine.chat import ChatLayout, Turn, open_layout, split_messages
from reroute_jax.engine.given import check_ids, questions, valid_rows
from reroute_jax.engine.images import open_image
from reroute_jax.engine.pipeline import ahead, full_groups
from reroute_jax.engine.sampling import Sampling, row_sampling
from reroute_jax.engine.segments import decode_segments
from reroute_jax.engine.text import pieces
from reroute_jax.engine.trace import Trace
from reroute_jax.errors import RerouteError, one_of
from reroute_jax.models import FAMILIES
from reroute_jax.models.family import Family
from reroute_jax.routing import methods
from reroute_jax.routing.cost import Account, account
from reroute_jax.routing.plan import Schedule

LOOKAHEAD = 2  # batches that are made ready while one is answered
STREAM_STEPS = 4  # tokens between two looks at a stream


@dataclass(frozen=True)
class PrefillResult:
    """logits: fp32 `[B, vocab]`, last valid position of each row."""

    logits: np.ndarray
    trace: Trace | None


@dataclass(frozen=True)
class Group:
    """Questions of one shape that are answered together. numbers: theirs in the call."""

    numbers: tuple[int, ...]
    layouts: tuple[Layout, ...]
    batch: Batch


@dataclass(frozen=True)
class Failed:
    """A question that cannot be asked."""

    number: int
    error: RerouteError


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
    def dtype(self) -> str:
        """Of the parameters, the activations and the KV cache."""
        return self.module.decoder.embed.table.dtype.name

    @cached_property
    def tokenizer(self):
        return _from_folder(AutoTokenizer.from_pretrained, self.folder)

    @cached_property
    def image_processor(self):
        return _from_folder(lambda folder: self.family.image_processor(folder, self.config), self.folder)

    @cached_property
    def chat_layout(self) -> ChatLayout:
        """How this checkpoint writes chats."""
        return open_layout(self.folder, self.tokenizer, self.config)

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

    def plan(self, method: str, *, grid: tuple[int, int] | None = None, action: str = "reroute", **options) -> Schedule:
        """Schedule of a method for this model; `routing.methods.plan` explains budget and switches.

        grid: (rows, columns) of the visual tokens to plan for; None takes the family's typical image.
        """
        rows, cols = grid or self.reference_grid
        sizes = {"num_layers": self.config.num_layers, "visual": rows * cols, "grid": (rows, cols)}
        return methods.plan(method, **sizes, family=self.config.family, action=action, **options)

    def cost(self, schedule: Schedule, *, text: int, grid: tuple[int, int] | None = None) -> Account:
        """What a schedule means for a row with one image, which prints as a line: visual tokens a layer as they really
        run, multiply-accumulates, KV bytes. text: text tokens of the row. grid: as of `plan`."""
        rows, cols = grid or self.reference_grid
        sizes = {"visual": rows * cols, "grid": (rows, cols), "text": text}
        return account(schedule, self.config.decoder, **sizes, dtype=self.dtype)

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
        schedule = schedule or self._unrouted
        grids = self.family.image_grids(pixel_values, image_grid_thw, self.config)
        rows = questions(valid_rows(input_ids, attention_mask), grids, self.config)
        layouts = []
        for number, row in enumerate(rows):
            with _named(f"row {number}"):
                layouts.append(lay_out(row, self.config, schedule))
        return make_batch(layouts, self.config, schedule, pixels=None if pixel_values is None else pixel_values)

    def prefill(self, *, schedule: Schedule | None = None, trace: bool = False, **given) -> PrefillResult:
        """Run prompts through the decoder; arguments as of `inputs`, whose errors it raises, and RerouteError where
        numbers overflow."""
        batch = self.inputs(schedule=schedule, **given)
        anchors, found = self._prefill(batch)
        self._check_finite(np.asarray(found.finite), np.isfinite(np.asarray(found.logits)).all(axis=1), batch)
        return PrefillResult(np.asarray(found.logits), self._trace(batch, found, anchors) if trace else None)

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
        batch = self.inputs(schedule=schedule, **given)
        tokens = [[] for _ in batch.live]
        for segment in self._segments(batch, range(len(batch.live)), sampling):
            for row, chosen in zip(segment.rows, segment.tokens, strict=True):
                tokens[row] += chosen[chosen >= 0].tolist()
        padded = np.full((len(tokens), max_new_tokens), self.config.pad_token, np.int32)
        for row, found in zip(padded, tokens, strict=True):
            row[: len(found)] = found
        return padded

    # --- Questions ----------------------------------------------------------------------------------------------------

    def prompt_ids(self, text: str, grids: Sequence[tuple[int, int]]) -> np.ndarray:
        """Ids of the prompt of a question behind images of these grids, image tokens expanded."""
        return self.chat_layout.question_ids(text, grids)

    def question(self, item, *, text_special_tokens: bool = True) -> Question:
        """An item of `answer`, ready to be asked under any schedule, any number of times: all work on the host.

        Raises RerouteError for an image that cannot be read, and for text whose placeholders are not the images'.
        """
        if isinstance(item, Question):
            return item
        images, layout = self._laid_out(item)
        opened = [open_image(image) for image in images]
        grids = tuple(self.visual_grid(image) for image in opened)
        pixels = tuple(self.family.preprocess([image], self.image_processor)[0] for image in opened)
        ids = layout(grids, text_special_tokens)
        check_ids(ids, self.config, "the prompt")
        return Question(ids, grids, pixels)

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
    ) -> list[Answer]:
        """Answers in order. An item is an (image, question) pair, a chat `[(role, content), ...]`, or a `question`.

        An image is what `images.open_image` takes, a list of those, or None; a content is a string, or a list of
        strings and images. Prompts that take the same programs are answered together, up to `batch_size` of them and,
        where it is given, up to `token_budget` slots at the decoder's input, padding included; their images are read
        and resized on another thread while earlier ones run. What a question is answered does not depend on the others.
        repetition_penalty: None takes the checkpoint's. text_special_tokens: False keeps text that reads like a special
        token plain. on_error: "raise" an AnswerError for questions that cannot be answered, when all others are, or
        "return" an Answer with its `error`. Raises RerouteError for numbers that mean nothing.
        """
        one_of("on_error", on_error, ("raise", "return"))
        sampling = self._sampling(max_new_tokens, repetition_penalty, temperature, top_p, seed)
        ready = self.groups(items, schedule, batch_size, token_budget, text_special_tokens)
        answers = [Answer()] * len(items)
        with closing(ahead(ready, LOOKAHEAD)) as groups:
            for group in groups:
                if isinstance(group, Failed):
                    answers[group.number] = Answer(error=group.error)
                else:
                    for number, found in zip(group.numbers, self.answer_group(group, sampling, trace), strict=True):
                        answers[number] = found if logprobs else replace(found, logprobs=None)
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
    ) -> Iterator[str]:
        """The text of `answer([item], ...)` in pieces of whole characters, as they come. Closing the iterator ends the
        decoding."""
        sampling = self._sampling(max_new_tokens, repetition_penalty, temperature, top_p, seed)
        schedule = schedule or self._unrouted
        layout = lay_out(self.question(item, text_special_tokens=text_special_tokens), self.config, schedule)
        batch = make_batch([layout], self.config, schedule)

        def tokens() -> Iterator[int]:
            chosen = Chosen(frozenset(sampling.stop))
            for segment in self._segments(batch, [0], sampling, STREAM_STEPS):
                shown = len(chosen.tokens)
                chosen.add(segment.tokens[0], segment.logprobs[0])
                yield from chosen.tokens[shown:]

        return pieces(self.tokenizer, tokens())

    def groups(
        self,
        items: Sequence,
        schedule: Schedule | None,
        batch_size: int,
        token_budget: int | None = None,
        text_special_tokens: bool = True,
    ) -> Iterator[Group | Failed]:
        """The batches of `answer`, ready to run: those of a shape in the order of their numbers, and what cannot be
        asked where it stands."""
        if batch_size < 1:
            raise RerouteError(f"batch_size is {batch_size}, expected at least 1")
        schedule = schedule or self._unrouted
        schedule.check_depth(self.config.num_layers)
        failed: list[Failed] = []

        def most(shape: BatchShape) -> int:
            return most_rows(shape, batch_size, token_budget)

        def laid_out() -> Iterator[tuple[int, Layout]]:
            for number, item in enumerate(items):
                try:
                    with _named(f"question {number}"):
                        question = self.question(item, text_special_tokens=text_special_tokens)
                        layout = lay_out(question, self.config, schedule)
                        most(layout.shape)
                except RerouteError as error:
                    failed.append(Failed(number, error))
                else:
                    yield number, layout

        def group(members: Sequence[tuple[int, Layout]]) -> Group:
            numbers, layouts = zip(*members, strict=True)
            size = padded_rows(len(layouts), most(largest([one.shape for one in layouts])))
            return Group(numbers, layouts, make_batch(layouts, self.config, schedule, size=size))

        left = []
        for shape, members in full_groups(laid_out(), lambda one: one[1].shape, most):
            if len(members) == most(shape):
                yield group(members)
            else:
                left += members
        yield from map(group, similar(left, lambda one: one[1].shape, batch_size, token_budget))
        yield from failed

    def answer_group(self, group: Group, sampling: Sampling, trace: bool = False) -> list[Answer]:
        """Answers to one of `groups`, in its order."""
        anchors, prefilled = self._prefill(group.batch)
        traces = self._trace(group.batch, prefilled, anchors) if trace else None
        rows = [Chosen(frozenset(sampling.stop)) for _ in group.numbers]
        finite = np.ones(len(group.batch.live), bool)
        numbers = (*group.numbers, *[0] * (len(group.batch.live) - len(group.numbers)))
        for segment in self._decode(group.batch, prefilled, numbers, sampling):
            finite[segment.rows] &= segment.finite
            for row, tokens, logprobs in zip(segment.rows, segment.tokens, segment.logprobs, strict=True):
                if row < len(rows):
                    rows[row].add(tokens, logprobs)
        stages = np.asarray(prefilled.finite)
        found = []
        for row, (number, chosen) in enumerate(zip(group.numbers, rows, strict=True)):
            problem = self._overflow(stages[:, row], finite[row], group.batch, f"question {number}")
            if problem is not None:
                found.append(Answer(error=problem))
                continue
            found.append(
                Answer(
                    text=self.tokenizer.decode(chosen.tokens, skip_special_tokens=True),
                    token_ids=tuple(chosen.tokens),
                    finish_reason="stop" if chosen.stopped else "length",
                    logprobs=tuple(chosen.logprobs),
                    trace=None if traces is None else traces.of_row(row, group.layouts[row].question.pixels),
                    usage=self._usage(group, row, len(chosen.tokens) + chosen.stopped),
                )
            )
        return found

    def warm_up(
        self,
        items: Sequence,
        *,
        schedule: Schedule | None = None,
        batch_size: int = 8,
        token_budget: int | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """Compile what `answer` will need for items like these, with answers of up to `max_new_tokens`: their shapes,
        at every number of rows that a batch is filled up to. Nothing is answered; give examples and not everything.

        Raises what `answer` does.
        """
        schedule = schedule or self._unrouted
        layouts = {}
        for item in items:
            layout = lay_out(self.question(item), self.config, schedule)
            layouts.setdefault(layout.shape, layout)
        sampling = self._sampling(max_new_tokens, None, 0.0, 1.0, 0)
        for shape, layout in layouts.items():
            most = most_rows(shape, batch_size, token_budget)
            sizes = sorted({padded_rows(rows, most) for rows in range(1, most + 1)})
            batches = [make_batch([layout] * size, self.config, schedule) for size in sizes]
            warmup.compile_ahead(self.module, batches, sampling)

    # --- Inside -------------------------------------------------------------------------------------------------------

    @property
    def _unrouted(self) -> Schedule:
        return Schedule.from_decisions((), (), self.config.num_layers)

    def _sampling(self, limit: int, penalty: float | None, temperature: float, top_p: float, seed: int) -> Sampling:
        penalty = self.config.repetition_penalty if penalty is None else penalty
        return Sampling(temperature, top_p, penalty, self.config.eos_tokens, limit, seed)

    def _laid_out(self, item) -> tuple[list, Callable[..., np.ndarray]]:
        """The images of an item, and what makes its ids of their grids."""
        if isinstance(item, list):
            turns, images = split_messages(item)
        else:
            turns, images = _one_turn(item)
        return images, lambda grids, special: self.chat_layout.prompt_ids(turns, grids, text_special_tokens=special)

    def _prefill(self, batch: Batch) -> tuple[jax.Array, Prefilled]:
        if batch.images is None:
            features, anchors = jnp.zeros((1, self.config.decoder.hidden_size)), jnp.zeros(1, jnp.int32)
        else:
            features, anchors = programs.encode(self.module, batch.images)
        return anchors, programs.prefill(self.module.decoder, batch.prompt, features, anchors, batch.plan)

    def _trace(self, batch: Batch, found: Prefilled, anchors: jax.Array) -> Trace:
        return Trace.of(batch, found, anchors, self.config, self.dtype, lambda: self.image_processor)

    def _segments(self, batch: Batch, numbers: Sequence[int], sampling: Sampling, *steps: int):
        """The segments of a batch all of whose rows are live. Raises RerouteError where numbers overflow."""
        _, prefilled = self._prefill(batch)
        for segment in self._decode(batch, prefilled, numbers, sampling, *steps):
            finite = np.ones(len(batch.live), bool)
            finite[segment.rows] = segment.finite
            if not finite.all():
                self._check_finite(np.asarray(prefilled.finite), finite, batch)
            yield segment

    def _decode(self, batch: Batch, prefilled: Prefilled, numbers: Sequence[int], sampling: Sampling, *steps: int):
        rows = row_sampling(sampling, numbers)
        return decode_segments(self.module.decoder, prefilled, batch.seen, batch.live, rows, *steps)

    def _check_finite(self, stages: np.ndarray, finite: np.ndarray, batch: Batch) -> None:
        for row in np.flatnonzero(batch.live):
            if problem := self._overflow(stages[:, row], finite[row], batch, f"row {row}"):
                raise problem

    def _overflow(self, stages: np.ndarray, finite: bool | np.bool_, batch: Batch, where: str) -> RerouteError | None:
        """stages, finite: whether the row's last token left each stage, and its logits were, finite numbers."""
        if stages.all() and finite:
            return None
        advice = "use bfloat16 or float32" if self.dtype == "float16" else "check the checkpoint's weights"
        if stages.all():
            return RerouteError(f"{where}: logits are not finite in {self.dtype}: {advice}")
        stage = batch.plan.stages[int(np.argmin(stages))]
        return RerouteError(
            f"{where}: hidden states are not finite in {self.dtype} behind decoder layers {stage.lo} to "
            f"{stage.hi - 1}, and so the logits: {advice}"
        )

    def _usage(self, group: Group, row: int, new_tokens: int) -> Usage:
        layout, batch, decoder = group.layouts[row], group.batch, self.config.decoder
        keep, layers = iter(batch.prompt.keep[:, row].tolist()), []
        fixed = layout.visual - int(layout.routed.sum())
        for stage in batch.plan.stages:
            visual = layout.visual if stage.cap is None else fixed + next(keep)
            layers += [visual] * (stage.hi - stage.lo)
        text = len(layout.ids) - layout.visual
        # The last token is chosen and not fed.
        tokens = sum(layers) + len(layers) * (text + new_tokens - 1)
        each = 2 * decoder.num_kv_heads * decoder.head_dim * self.module.decoder.embed.table.dtype.itemsize
        visual = sum(rows * cols for rows, cols in layout.question.grids)
        return Usage(len(layout.question.ids), visual, tuple(layers), new_tokens, tokens * each)


def _one_turn(item) -> tuple[list[Turn], list[Any]]:
    """An (image, question) pair as a turn of the user's, its images first."""
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[1], str):
        raise RerouteError("an item is no (image, question) pair: give one, or a chat as a list of (role, content)")
    image, text = item
    images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    return [Turn("user", (*[None] * len(images), text))], images


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors inside say where they happened."""
    try:
        yield
    except RerouteError as error:
        raise RerouteError(f"{where}: {error}") from error


def _from_folder(read, folder: Path):
    try:
        return read(folder)
    except (OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise RerouteError(
            f"{folder} lacks tokenizer or image processor files ({reason}): copy them there"
        ) from problem
