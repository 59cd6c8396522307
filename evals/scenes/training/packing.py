"""Scenes as training arrays (numpy, host): many questions share one image.

The image prefix is what a conversation opens with, the image tokens and what closes them; a question is
`{prompt} {reply} {answer} {end}` in `SLOTS` slots. It sees the prefix and itself, at the positions it would have alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from evals.scenes.data import training_scene
from evals.scenes.questions import PLURALS, REFERRING, SIDES, SceneQuestion, words
from evals.scenes.spec import IMAGE_SLOTS, model_config
from evals.scenes.tokenizer import DIALECTS, VQA_PHRASE, vocabulary
from evals.scenes.world import COLOURS, GRIDS, SHAPES, SIZES, TOKEN, Scene, scene_seed, stream
from reroute_jax.nn.mrope import mrope_positions
from reroute_jax.vision import qwen3_packing, qwen_windows
from reroute_jax.vision.qwen_config import PatchedVisionConfig

QUESTIONS = 16  # of a scene
SLOTS = {"llava": 16, "qwen2_5_vl": 18, "qwen3_vl": 18}  # of a question; longer questions (under 1%) are not used
MAX_THINGS = 5
SHORT_PROMPT_SHARE = 0.2  # referring prompts without the sentence on the format, in families that have one
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
HALF = np.full(3, 0.5, np.float32)  # mean, and standard deviation, of Qwen3-VL's image processor


class ImagePrefix(NamedTuple):
    """S slots of one image: the opening, as many image slots as the largest image takes, the closing.

    position: one row, or temporal, vertical and horizontal. runs: False where the image is smaller. start: position
    of the first token behind.
    """

    ids: np.ndarray  # int32 [S]
    position: np.ndarray  # int32 [C, S]
    runs: np.ndarray  # bool [S]
    start: np.ndarray  # int32 []


class Packed(NamedTuple):
    """One batch; R scenes, n image slots, Q questions, W slots, O objects.

    label: token to predict at a slot, -1 where none; weight: its share of the question's loss.
    ask: slot of the last prompt token. target: object a referring question asks for, -1 for other questions.
    subjects: objects a question is about; the last column stands for none, as where something is not there.
    patch_thing: object that covers the centre of what a visual token shows, -1 for background. boxes: x1, y1, x2, y2
    in the numbers that the family speaks in.
    """

    images: Any  # uint8 [R, 112, 112, 3], QwenPixels or Qwen3Pixels
    prefix: ImagePrefix  # every field with R rows in front
    ids: np.ndarray  # int32 [R, Q, W]
    label: np.ndarray  # int32 [R, Q, W]
    weight: np.ndarray  # float32 [R, Q, W]
    ask: np.ndarray  # int32 [R, Q]
    target: np.ndarray  # int32 [R, Q]
    subjects: np.ndarray  # bool [R, Q, O + 1]
    patch_thing: np.ndarray  # int32 [R, n]
    boxes: np.ndarray  # float32 [R, O, 4]
    attributes: np.ndarray  # int32 [R, O, 3] shape, colour, size


def answer_text(scene: Scene, question: SceneQuestion, family: str = "llava") -> str:
    if question.target is None:
        return question.answer
    dialect = DIALECTS[family]
    named = [dialect.numbers[round(value * dialect.density)] for value in corners(scene, question.target, family)]
    return " ".join(form.format(number) for form, number in zip(dialect.coordinates, named, strict=True))


def corners(scene: Scene, thing: int, family: str = "llava") -> tuple[float, float, float, float]:
    """Box of an object as x1, y1, x2, y2, in parts of the canvas or in pixels, as the family speaks."""
    x, y, width, height = scene.things[thing].box
    far = DIALECTS[family].far_side
    if far is None:
        return x, y, x + width, y + height
    left, right = (side * far / scene.width for side in (x, x + width))
    top, bottom = (side * far / scene.height for side in (y, y + height))
    return left, top, right, bottom


def pack(split: str, start: int, scenes: int, per_kind: Mapping[str, int], family: str = "llava") -> Packed:
    """Scenes start .. start + scenes - 1 of a split as one batch, with up to `per_kind` questions of each kind."""
    packed = [_pack_scene(scene_seed(split, index), per_kind, family) for index in range(start, start + scenes)]
    images, prefixes, *rest = zip(*packed, strict=True)
    prefix = ImagePrefix(*(np.stack(field) for field in zip(*prefixes, strict=True)))
    return Packed(_PACK_IMAGES[family](images), prefix, *(np.stack(field) for field in rest))


def image_prefix(family: str, grid: tuple[int, int]) -> ImagePrefix:
    """The prefix of an image of so many rows and columns of visual tokens."""
    dialect, vocab = DIALECTS[family], vocabulary(family)
    before, after = ([vocab[token] for token in part] for part in (dialect.opening, dialect.closing))
    slots, used = IMAGE_SLOTS[family], grid[0] * grid[1]
    ids = np.array([*before, *[vocab[dialect.image]] * slots, *after], np.int32)
    runs = np.ones(len(ids), bool)
    runs[len(before) + used : len(before) + slots] = False
    if family == "llava":
        found, start = np.arange(len(ids))[None], len(ids)
    else:
        found, start = mrope_positions(ids[runs], vocab[dialect.image], [grid])
    position = np.zeros((len(found), len(ids)), np.int32)
    position[:, runs] = found
    return ImagePrefix(ids, position, runs, np.int32(start))


def patchify(image: np.ndarray, config: PatchedVisionConfig, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """`[P, 3 * frames * patch^2]`: normalised patches of an image `[H, W, 3]` (uint8) in the order and layout of
    Qwen2VLImageProcessor, for sides that it leaves as they are."""
    patch, merge, frames = config.patch_size, config.merge, config.temporal_patch_size
    scaled = (image.astype(np.float32) / 255 - mean) / std
    rows, cols = (side // (patch * merge) for side in image.shape[:2])
    cut = scaled.reshape(rows, merge, patch, cols, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    repeated = np.repeat(cut[:, :, :, :, :, None], frames, axis=5)
    return repeated.reshape(rows * cols * merge**2, -1)


def _pack_pixels(images: Sequence[np.ndarray], family: str, pack: Callable, mean: np.ndarray, std: np.ndarray):
    """Padded to the largest image there can be: an image of that size comes along and is left out again."""
    config, largest = model_config(family).vision, max(GRIDS[family], key=math.prod)
    whole = [*images, np.zeros((largest[0] * TOKEN, largest[1] * TOKEN, 3), np.uint8)]
    grids = [(image.shape[0] // TOKEN, image.shape[1] // TOKEN) for image in whole]
    patches = [patchify(image, config, mean, std) for image in whole]
    packed = pack(np.concatenate(patches), grids, config, len(whole))
    return jax.tree.map(lambda field: field[:-1], packed)


_PACK_IMAGES = {
    "llava": np.stack,
    "qwen2_5_vl": partial(_pack_pixels, family="qwen2_5_vl", pack=qwen_windows.pack, mean=MEAN, std=STD),
    "qwen3_vl": partial(_pack_pixels, family="qwen3_vl", pack=qwen3_packing.pack, mean=HALF, std=HALF),
}


def _pack_scene(seed: int, per_kind: Mapping[str, int], family: str) -> tuple:
    vocab, rng, slots = vocabulary(family), stream(5, seed), SLOTS[family]
    dialect = DIALECTS[family]
    image, scene, asked = training_scene(seed, per_kind, family)
    ids = np.full((QUESTIONS, slots), vocab[dialect.pad], np.int32)
    label, weight = np.full((QUESTIONS, slots), -1, np.int32), np.zeros((QUESTIONS, slots), np.float32)
    ask, target = np.zeros(QUESTIONS, np.int32), np.full(QUESTIONS, -1, np.int32)
    subjects = np.zeros((QUESTIONS, MAX_THINGS + 1), bool)
    number = 0
    for question in (asked[index] for index in rng.permutation(len(asked))):
        prompt = prompt_ids(question, rng, family)
        answer = [vocab[token] for token in (*answer_text(scene, question, family).split(), dialect.end)]
        stop = len(prompt) + len(answer) - 1
        if stop > slots or number == QUESTIONS:
            continue
        ids[number, :stop] = (prompt + answer)[:-1]
        ask[number] = len(prompt) - 1
        label[number, ask[number] : stop] = answer
        weight[number, ask[number] : stop] = 1 / len(answer)
        target[number] = -1 if question.target is None else question.target
        about = _subjects(scene, question)
        subjects[number, about or [MAX_THINGS]] = True
        number += 1
    prefix = image_prefix(family, (scene.height // TOKEN, scene.width // TOKEN))
    return image, prefix, ids, label, weight, ask, target, subjects, *_dense_targets(scene, family)


def _subjects(scene: Scene, question: SceneQuestion) -> list[int]:
    """The objects that the question's first phrase fits (before "left of" and the like)."""
    if question.target is not None:
        return [question.target]
    sides = {side.split()[0] for side in SIDES}
    asked = words(question.text)
    phrase = asked[: next((at for at, word in enumerate(asked) if word in sides), len(asked))]
    singular = {plural: word for word, plural in PLURALS.items()}
    named = {singular.get(word, word) for word in phrase} & {*SHAPES, *COLOURS, *SIZES}
    return [i for i, thing in enumerate(scene.things) if named <= {thing.shape, thing.colour, thing.size}]


def prompt_ids(question: SceneQuestion, rng: np.random.Generator, family: str = "llava") -> list[int]:
    """The ids that the tokenizer gives for what stands between image and answer."""
    text, dialect = words(question.text), DIALECTS[family]
    if question.kind in REFERRING:
        before, after = dialect.locate
        if dialect.brief is not None and rng.random() < SHORT_PROMPT_SHARE:
            before = dialect.brief
        tokens = [*before, *text, *after]
    else:
        tokens = [*text, VQA_PHRASE]
    return [vocabulary(family)[token] for token in (*tokens, *dialect.reply)]


def _dense_targets(scene: Scene, family: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ys, xs = ((np.arange(side // TOKEN) + 0.5) * TOKEN for side in (scene.height, scene.width))
    shown = np.full((len(ys), len(xs)), -1, np.int32)
    boxes, attributes = np.zeros((MAX_THINGS, 4), np.float32), np.full((MAX_THINGS, 3), -1, np.int32)
    for index, thing in enumerate(scene.things):
        shown[np.ix_(abs(ys - thing.cy) < thing.r, abs(xs - thing.cx) < thing.r)] = index
        boxes[index] = corners(scene, index, family)
        attributes[index] = SHAPES.index(thing.shape), COLOURS.index(thing.colour), SIZES.index(thing.size)
    patch_thing = np.full(IMAGE_SLOTS[family], -1, np.int32)
    patch_thing[: shown.size] = shown.reshape(-1)
    return patch_thing, boxes, attributes


def soft_labels(family: str = "llava") -> np.ndarray:
    """`[vocab, vocab]` target distributions: a coordinate spreads over neighbouring numbers of its own form (Gaussian,
    1.2 steps), every other token is itself."""
    vocab, dialect = vocabulary(family), DIALECTS[family]
    table = np.eye(len(vocab), dtype=np.float32)
    steps = len(dialect.numbers)
    for first in dict.fromkeys(coordinate_starts(family)):
        table[first : first + steps, first : first + steps] = blurred(steps)
    return table


def blurred(steps: int) -> np.ndarray:
    """`[steps, steps]`: each number as a distribution over its neighbours."""
    numbers = np.arange(steps)
    soft = np.exp(-0.5 * ((numbers[:, None] - numbers) / 1.2) ** 2)
    return soft / soft.sum(axis=1, keepdims=True)


def coordinate_starts(family: str = "llava") -> list[int]:
    """First token id of the four coordinate positions of an answer."""
    dialect = DIALECTS[family]
    return [vocabulary(family)[form.format(dialect.numbers[0])] for form in dialect.coordinates]
