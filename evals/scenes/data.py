"""Scenes as rows of a dataset: referring expressions with RefCOCO's columns, questions with a VQA set's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from evals.scenes.questions import REFERRING, VQA, SceneQuestion, questions
from evals.scenes.render import render
from evals.scenes.world import Scene, family_scene, outline, scene_seed, stream
from reroute_jax.errors import RerouteError

TRAINING_QUESTIONS = {"attribute": 4, "place": 4, "relation": 4, "yesno": 6, "colour": 2, "count": 2}
CAPTION_QUESTION = "Describe the marked object."  # RefCOCO's `question` column holds such a text; no task reads it
EVERY = 1000  # more questions of a kind than a scene has


def training_scene(
    seed: int, per_kind: Mapping[str, int] = TRAINING_QUESTIONS, family: str = "llava"
) -> tuple[UInt8[np.ndarray, "height width 3"], Scene, list[SceneQuestion]]:
    """Image, scene and up to `per_kind` questions of each kind; use seeds from `scene_seed("train", i)`."""
    scene = family_scene(seed, family)
    return render(scene, seed), scene, questions(scene, stream(2, seed), per_kind)


def refcoco_rows(split: str, count: int, start: int = 0, family: str = "llava") -> Iterator[dict[str, Any]]:
    """Rows of scenes start .. start + count - 1, one target object each, with the columns of lmms-lab/RefCOCO.

    family: whose canvas the scenes are on; the same index is another scene for another family.

    question_id str, image (RGB PIL image, never compressed), question str (unused), answer (1 to 3 expressions of
    different kinds for the target), segmentation (polygon x0, y0, x1, y1, ... in pixels), bbox (x, y, width, height as
    floats, pixels), iscrowd int, file_name str. Raises RerouteError for an unknown split, index or family.
    """
    for index in range(start, start + count):
        seed = scene_seed(split, index)
        scene, rng = family_scene(seed, family), stream(3, seed)
        target, expressions = _refer(scene, rng)
        thing = scene.things[target]
        yield {
            "question_id": f"{split}_{index}",
            "image": Image.fromarray(render(scene, seed)),
            "question": CAPTION_QUESTION,
            "answer": expressions,
            "segmentation": outline(thing),
            "bbox": [float(value) for value in thing.box],
            "iscrowd": 0,
            "file_name": f"scene_{split}_{index}.png",
        }


def vqa_rows(
    split: str, count: int, kinds: Sequence[str] = VQA, start: int = 0, family: str = "llava"
) -> Iterator[dict[str, Any]]:
    """Rows of scenes start .. start + count - 1, one question each; the kinds take turns, and so do yes and no.

    Columns: question_id, image (RGB PIL image), question, answer (lower case), category (the kind). Raises
    RerouteError for an unknown split, index, kind or family.
    """
    unknown = [kind for kind in kinds if kind not in VQA]
    if unknown or not kinds:
        raise RerouteError(f"unknown question kinds {unknown}: expected some of {', '.join(VQA)}")
    for index in range(start, start + count):
        seed = scene_seed(split, index)
        scene, kind = family_scene(seed, family), kinds[index % len(kinds)]
        question = _ask(scene, stream(4, seed), kind, wanted=("yes", "no")[index // len(kinds) % 2])
        yield {
            "question_id": f"{split}_{index}",
            "image": Image.fromarray(render(scene, seed)),
            "question": question.text,
            "answer": question.answer,
            "category": kind,
        }


def _refer(scene: Scene, rng: np.random.Generator) -> tuple[int, list[str]]:
    """A target and 1 to 3 expressions for it. The first one's kind is drawn first, so that kinds come equally often."""
    found = questions(scene, rng, dict.fromkeys(REFERRING, EVERY))
    order = [REFERRING[index] for index in rng.permutation(len(REFERRING))]
    leads = [question for kind in order for question in found if question.kind == kind]
    target = leads[0].target
    own = {kind: next((q.text for q in leads if q.kind == kind and q.target == target), None) for kind in order}
    return target, [text for text in own.values() if text is not None][: int(rng.integers(1, 4))]


def _ask(scene: Scene, rng: np.random.Generator, kind: str, wanted: str) -> SceneQuestion:
    if kind == "yesno":
        return next(question for question in questions(scene, rng, {kind: 2}) if question.answer == wanted)
    return questions(scene, rng, {kind: 1})[0]
