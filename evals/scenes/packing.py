"""Scenes as training arrays (numpy, host): many questions share one image.

The image prefix is `<s> USER: <image>*64`; a question is `{prompt} ASSISTANT: {answer} </s>` in `SLOTS` slots. It sees
the prefix and itself, at the positions it would have alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np

from evals.scenes.data import training_scene
from evals.scenes.questions import PLURALS, REFERRING, SIDES, Question, words
from evals.scenes.spec import GRID, PATCH
from evals.scenes.tokenizer import BINS, COORDINATE_FORMS, FORMAT_PHRASE, REC_PHRASE, VQA_PHRASE, vocabulary
from evals.scenes.world import COLOURS, SHAPES, SIZES, Scene, scene_seed, stream

PREFIX = 2 + GRID * GRID
QUESTIONS, SLOTS = 16, 16  # of a scene, and of a question; longer questions (under 1%) are not used
MAX_THINGS = 5
SHORT_PROMPT_SHARE = 0.2  # referring prompts without the sentence on the format


class Packed(NamedTuple):
    """One batch; R scenes, Q questions, W slots, O objects.

    label: token to predict at a slot, -1 where none; weight: its share of the question's loss.
    ask: slot of the last prompt token. target: object a referring question asks for, -1 for other questions.
    subjects: objects a question is about; the last column stands for none, as where something is not there.
    patch_thing: object that covers a patch's centre, -1 for background. boxes: x1, y1, x2, y2 in [0, 1].
    """

    images: np.ndarray  # uint8 [R, 112, 112, 3]
    ids: np.ndarray  # int32 [R, Q, W]
    label: np.ndarray  # int32 [R, Q, W]
    weight: np.ndarray  # float32 [R, Q, W]
    ask: np.ndarray  # int32 [R, Q]
    target: np.ndarray  # int32 [R, Q]
    subjects: np.ndarray  # bool [R, Q, O + 1]
    patch_thing: np.ndarray  # int32 [R, 64]
    boxes: np.ndarray  # float32 [R, O, 4]
    attributes: np.ndarray  # int32 [R, O, 3] shape, colour, size


@cache
def _vocab() -> dict[str, int]:
    return vocabulary()


def answer_text(scene: Scene, question: Question) -> str:
    if question.target is None:
        return question.answer
    values = corners(scene, question.target)
    return " ".join(form.format(value) for form, value in zip(COORDINATE_FORMS, values, strict=True))


def corners(scene: Scene, thing: int) -> tuple[float, float, float, float]:
    """Box of an object as x1, y1, x2, y2, relative to the canvas."""
    x, y, width, height = scene.things[thing].box
    return x / scene.width, y / scene.height, (x + width) / scene.width, (y + height) / scene.height


def pack(split: str, start: int, scenes: int, per_kind: Mapping[str, int]) -> Packed:
    """Scenes start .. start + scenes - 1 of a split as one batch, with up to `per_kind` questions of each kind."""
    packed = [_pack_scene(scene_seed(split, index), per_kind) for index in range(start, start + scenes)]
    return Packed(*(np.stack(field) for field in zip(*packed, strict=True)))


def prefix_ids() -> np.ndarray:
    return np.array([_vocab()["<s>"], _vocab()["USER:"], *[_vocab()["<image>"]] * (GRID * GRID)], np.int32)


def _pack_scene(seed: int, per_kind: Mapping[str, int]) -> tuple[np.ndarray, ...]:
    vocab, rng = _vocab(), stream(5, seed)
    image, scene, asked = training_scene(seed, per_kind)
    ids = np.full((QUESTIONS, SLOTS), vocab["<pad>"], np.int32)
    label, weight = np.full((QUESTIONS, SLOTS), -1, np.int32), np.zeros((QUESTIONS, SLOTS), np.float32)
    ask, target = np.zeros(QUESTIONS, np.int32), np.full(QUESTIONS, -1, np.int32)
    subjects = np.zeros((QUESTIONS, MAX_THINGS + 1), bool)
    number = 0
    for question in (asked[index] for index in rng.permutation(len(asked))):
        prompt = _prompt_ids(question, rng)
        answer = [vocab[token] for token in answer_text(scene, question).split()] + [vocab["</s>"]]
        stop = len(prompt) + len(answer) - 1
        if stop > SLOTS or number == QUESTIONS:
            continue
        ids[number, :stop] = (prompt + answer)[:-1]
        ask[number] = len(prompt) - 1
        label[number, ask[number] : stop] = answer
        weight[number, ask[number] : stop] = 1 / len(answer)
        target[number] = -1 if question.target is None else question.target
        about = _subjects(scene, question)
        subjects[number, about or [MAX_THINGS]] = True
        number += 1
    return image, ids, label, weight, ask, target, subjects, *_dense_targets(scene)


def _subjects(scene: Scene, question: Question) -> list[int]:
    """The objects that the question's first phrase fits (before "left of" and the like)."""
    if question.target is not None:
        return [question.target]
    sides = {side.split()[0] for side in SIDES}
    asked = words(question.text)
    phrase = asked[: next((at for at, word in enumerate(asked) if word in sides), len(asked))]
    singular = {plural: word for word, plural in PLURALS.items()}
    named = {singular.get(word, word) for word in phrase} & {*SHAPES, *COLOURS, *SIZES}
    return [i for i, thing in enumerate(scene.things) if named <= {thing.shape, thing.colour, thing.size}]


def _prompt_ids(question: Question, rng: np.random.Generator) -> list[int]:
    """The ids that the tokenizer gives for the text after `<image>`, up to and including `ASSISTANT:`."""
    text = words(question.text)
    if question.kind in REFERRING:
        tokens = [REC_PHRASE, *text] if rng.random() < SHORT_PROMPT_SHARE else [FORMAT_PHRASE, REC_PHRASE, *text]
    else:
        tokens = [*text, VQA_PHRASE]
    return [_vocab()[token] for token in (*tokens, "ASSISTANT:")]


def _dense_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centres = (np.arange(GRID) + 0.5) * PATCH
    patch_thing = np.full((GRID, GRID), -1, np.int32)
    boxes, attributes = np.zeros((MAX_THINGS, 4), np.float32), np.full((MAX_THINGS, 3), -1, np.int32)
    for index, thing in enumerate(scene.things):
        inside_x, inside_y = abs(centres - thing.cx) < thing.r, abs(centres - thing.cy) < thing.r
        patch_thing[np.ix_(inside_y, inside_x)] = index
        boxes[index] = corners(scene, index)
        attributes[index] = SHAPES.index(thing.shape), COLOURS.index(thing.colour), SIZES.index(thing.size)
    return patch_thing.reshape(-1), boxes, attributes


def soft_labels() -> np.ndarray:
    """`[vocab, vocab]` target distributions: a coordinate spreads over neighbouring bins of its own form (Gaussian,
    1.2 bins), every other token is itself."""
    vocab = _vocab()
    table = np.eye(len(vocab), dtype=np.float32)
    bins = np.arange(BINS)
    blurred = np.exp(-0.5 * ((bins[:, None] - bins) / 1.2) ** 2)
    blurred /= blurred.sum(axis=1, keepdims=True)
    for form in dict.fromkeys(COORDINATE_FORMS):
        first = vocab[form.format(0)]
        table[first : first + BINS, first : first + BINS] = blurred
    return table


def coordinate_starts() -> list[int]:
    """First token id of the four coordinate positions of an answer."""
    return [_vocab()[form.format(0)] for form in COORDINATE_FORMS]
