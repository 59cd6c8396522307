"""The user's model: plans, prefill, generation. Three compiled functions do all device work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from reroute_jax import decoder as walker
from reroute_jax.batching import Batch, make_batch, valid_rows
from reroute_jax.config import ModelConfig
from reroute_jax.decoder import Prefilled
from reroute_jax.errors import RerouteError
from reroute_jax.generation import Sampling, decode
from reroute_jax.images import open_image
from reroute_jax.models import llava
from reroute_jax.routing import methods
from reroute_jax.routing.plan import Schedule

log = logging.getLogger("reroute_jax")


@partial(jax.jit, static_argnames="merge")
def _encode(module, pixels, merge):
    log.info("compiling encode_images for pixels %s", pixels.shape)
    return llava.encode_images(module, pixels, merge)


@partial(jax.jit, static_argnames=("plan", "max_new"))
def _prefill(decoder, prompt, features, anchors, plan, max_new) -> Prefilled:
    log.info("compiling prefill for ids %s, %d stages", prompt.ids.shape, len(plan.stages))
    return walker.prefill(decoder, prompt, features, anchors, plan, max_new)


@partial(jax.jit, static_argnames=("sampling", "max_new"), donate_argnames="cache")
def _decode(decoder, logits, cache, seen, key, sampling, max_new):
    log.info("compiling decode for logits %s, %d new tokens", logits.shape, max_new)
    return decode(decoder, logits, cache, seen, key, sampling, max_new)


@dataclass(frozen=True)
class Trace:
    """What was selected. Indices count a row's original visual tokens (before any merge), ascending, -1 padded.

    selected: per decision `[B, k]`. scores: per decision fp32 `[B, n]`, -inf where a token was not a candidate.
    anchors: `[B, N1]`, tokens kept by Nuwa's stage 1, or None. kv_tokens: `[B, L]`, keys cached per layer.
    """

    selected: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]
    anchors: np.ndarray | None
    kv_tokens: np.ndarray


@dataclass(frozen=True)
class PrefillResult:
    """logits: fp32 `[B, vocab]`, last valid position of each row."""

    logits: np.ndarray
    trace: Trace | None


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint. `module` holds the parameters; nothing here changes after loading."""

    config: ModelConfig
    module: llava.Llava
    folder: Path

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image."""
        rows, cols = self.config.vision.grid
        return rows * cols

    @property
    def dtype(self) -> str:
        """Of the parameters, the activations and the KV cache."""
        return self.module.decoder.embed.table.dtype.name

    @cached_property
    def tokenizer(self):
        return _from_folder(AutoTokenizer.from_pretrained, self.folder)

    @cached_property
    def image_processor(self):
        # Without a name transformers takes torchvision where it is installed, and pixels change with it.
        return _from_folder(partial(AutoImageProcessor.from_pretrained, backend="pil"), self.folder)

    def plan(self, method: str, *, budget=None, action: str = "reroute", **switches) -> Schedule:
        """Schedule of a method for this model; `routing.methods.plan` explains the arguments."""
        return methods.plan(
            method,
            num_layers=self.config.num_layers,
            visual=self.visual_tokens,
            grid=self.config.vision.grid,
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
        pixels `[I, 3, h, w]` in order of appearance. `image_grid_thw` is for families with images of varying size.

        Raises RerouteError where ids, mask, pixels and schedule do not fit each other or the model.
        """
        _check_grid(image_grid_thw)
        batch, anchors, result = self._run(valid_rows(input_ids, attention_mask), pixel_values, schedule, 0)
        merged = schedule is not None and schedule.merge is not None
        found = _trace(batch, result, anchors if merged else None) if trace else None
        return PrefillResult(np.asarray(result.logits), found)

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
        _check_grid(image_grid_thw)
        eos = () if eos_token_id is None else tuple(np.atleast_1d(eos_token_id).tolist())
        sampling = Sampling(temperature, top_p, repetition_penalty, eos, self.config.pad_token)
        return self._generate(
            valid_rows(input_ids, attention_mask), pixel_values, schedule, max_new_tokens, sampling, seed
        )

    def generate(
        self,
        pairs: Sequence[tuple],
        *,
        schedule: Schedule | None = None,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        repetition_penalty: float = 1.0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers to (image, question) pairs, in order. An image is a PIL image, a path, a list of them, or None.

        Raises RerouteError for an image that cannot be read, naming it.
        """
        if batch_size < 1:
            raise RerouteError(f"batch_size is {batch_size}, expected at least 1")
        sampling = Sampling(temperature, top_p, repetition_penalty, self.config.eos_tokens, self.config.pad_token)
        answers = []
        for start in range(0, len(pairs), batch_size):
            chunk = list(pairs[start : start + batch_size])
            images = [_as_images(image) for image, _ in chunk]
            rows = [self.prompt_ids(text, len(group)) for (_, text), group in zip(chunk, images, strict=True)]
            flat = [image for group in images for image in group]
            pixels = self.image_processor(images=flat, return_tensors="np")["pixel_values"] if flat else None
            # Rows of one token fill a short batch to a power of two, so that few sizes are compiled.
            padding = min(batch_size, 1 << (len(rows) - 1).bit_length()) - len(rows)
            rows += [np.array([self.config.eos_tokens[0]])] * padding
            tokens = self._generate(rows, pixels, schedule, max_new_tokens, sampling, seed)[: len(chunk)]
            answers += [self.tokenizer.decode(_until(row, sampling.eos), skip_special_tokens=True) for row in tokens]
        return answers

    def prompt_ids(self, text: str, images: int) -> np.ndarray:
        """Ids of the chat prompt of a question behind `images` images, image tokens expanded."""
        ids = self.tokenizer(llava.chat_prompt(text, images))["input_ids"]
        return np.array(llava.expand_image_tokens(ids, self.config.image_token, self.visual_tokens))

    def _generate(self, rows, pixels, schedule, max_new: int, sampling: Sampling, seed: int) -> np.ndarray:
        if max_new < 1:
            raise RerouteError(f"max_new_tokens is {max_new}, expected at least 1")
        batch, _, result = self._run(rows, pixels, schedule, max_new)
        key = jax.random.key(seed)
        tokens, _ = _decode(self.module.decoder, result.logits, result.cache, batch.seen, key, sampling, max_new)
        return np.asarray(tokens)

    def _run(self, rows, pixels, schedule: Schedule | None, max_new: int):
        schedule = schedule or Schedule.from_decisions((), (), self.config.num_layers)
        batch = make_batch(rows, self.config, schedule)
        features, anchors = self._features(pixels, batch, schedule)
        result = _prefill(self.module.decoder, batch.prompt, features, anchors, batch.plan, max_new)
        return batch, anchors, result

    def _features(self, pixels, batch: Batch, schedule: Schedule):
        count = 0 if pixels is None else len(pixels)
        if count != sum(batch.images):
            raise RerouteError(f"the prompts have places for {sum(batch.images)} images and pixel_values hold {count}")
        if count == 0:
            width = self.config.decoder.hidden_size
            return jnp.zeros((1, width)), jnp.zeros(1, jnp.int32)
        pixels, side = np.asarray(pixels, np.float32), self.config.vision.image_size
        if pixels.shape[1:] != (3, side, side):
            raise RerouteError(f"pixel_values are {list(pixels.shape)}: expected [{count}, 3, {side}, {side}]")
        # Rows without an image must not change the shape that is compiled for.
        padded = np.pad(pixels, ((0, max(0, len(batch.images) - count)), (0, 0), (0, 0), (0, 0)))
        return _encode(self.module, padded, schedule.merge)


def _check_grid(image_grid_thw) -> None:
    if image_grid_thw is not None:
        raise RerouteError("image_grid_thw is given, but every LLaVA image has the same grid: leave it out")


def _from_folder(read, folder: Path):
    try:
        return read(folder)
    except (OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise RerouteError(
            f"{folder} lacks tokenizer or image processor files ({reason}): copy them there"
        ) from problem


def _trace(batch: Batch, result: Prefilled, anchors) -> Trace:
    selected = tuple(_indices(np.asarray(decision.selected)) for decision in result.decisions)
    scores = tuple(np.asarray(decision.scores) for decision in result.decisions)
    kept = None
    if anchors is not None:
        prompt = batch.prompt
        of_slot = np.asarray(anchors)[prompt.feature] - prompt.first_feature[:, None]
        kept = np.zeros(prompt.visual_positions.shape, bool)
        row, slot = np.nonzero(prompt.feature >= 0)
        kept[row, of_slot[row, slot]] = True
        kept = _indices(kept)
    return Trace(selected, scores, kept, np.asarray(result.cache.tokens_per_layer()))


def _indices(mask: np.ndarray) -> np.ndarray:
    """Columns that are set in each row, ascending, -1 padded to the longest."""
    found = [np.flatnonzero(row) for row in mask]
    width = max((len(row) for row in found), default=0)
    return np.array([np.pad(row, (0, width - len(row)), constant_values=-1) for row in found], np.int32)


def _until(tokens: np.ndarray, eos: tuple[int, ...]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(tokens, eos))
    return tokens[: ends[0]] if len(ends) else tokens


def _as_images(image) -> list[Image.Image]:
    if image is None:
        return []
    return [open_image(one) for one in (image if isinstance(image, list | tuple) else [image])]
