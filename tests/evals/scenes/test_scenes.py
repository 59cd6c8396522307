"""The rendered scenes: what a seed promises, checked by a reader that knows the words and not the generator."""

import hashlib
import itertools
import math
from collections import Counter
from functools import cache

import numpy as np
import pytest

from evals.scenes.data import refcoco_rows, training_scene, vqa_rows
from evals.scenes.questions import KINDS, REFERRING, VQA, WORDS, SceneQuestion, questions, words
from evals.scenes.render import RGB, coverage, render
from evals.scenes.world import (
    GRIDS,
    RADII,
    SHAPES,
    SPLITS,
    TOKEN,
    Scene,
    family_scene,
    outline,
    sample_scene,
    scene_seed,
)
from reroute_jax.errors import RerouteError

SCENES = [sample_scene(scene_seed("val", index)) for index in range(400)]
ALL = dict.fromkeys(KINDS, 1000)


@cache
def every_question(index: int) -> list[SceneQuestion]:
    return questions(SCENES[index], np.random.default_rng(index), ALL)


# The reader: from words to objects. "Loosely" is by any pixel, so an exact single answer leaves nothing to argue about.


def described(scene: Scene, phrase: str) -> list[int]:
    """Objects that have every attribute named in a phrase without place or relation."""
    wanted = phrase.split()
    assert wanted[-1] in (*SHAPES, "object"), phrase
    named = [{thing.shape, thing.colour, thing.size, "object"} for thing in scene.things]
    return [index for index, attributes in enumerate(named) if set(wanted) <= attributes]


def is_beside(scene: Scene, index: int, side: str, anchor: int, margin: float) -> bool:
    one, other = scene.things[index], scene.things[anchor]
    offset = {
        "left of": other.cx - one.cx,
        "right of": one.cx - other.cx,
        "above": other.cy - one.cy,
        "below": one.cy - other.cy,
    }
    return offset[side] > margin


def split_relation(text: str) -> tuple[str, str, str] | None:
    for relation in ("left of", "right of", "above", "below", "closest to"):
        head, found, anchor = text.partition(f" {relation} the ")
        if found:
            return head, relation, anchor
    return None


def referred(scene: Scene, text: str) -> list[int]:
    """Objects an expression can mean, loosely; asserts that no word of place or relation is idle or hard to see."""
    first, _, rest = text.partition(" ")
    relation = split_relation(text)
    if first.endswith("most"):
        candidates = described(scene, rest)
        assert len(candidates) >= 2, f"place not needed: {text}"
        axis, sign = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}[first]
        centres = sorted((sign * (scene.things[i].cx, scene.things[i].cy)[axis], i) for i in candidates)
        assert centres[1][0] - centres[0][0] >= 6, f"too close: {text}"
        edges = sorted(
            (sign * (scene.things[i].cx, scene.things[i].cy)[axis] - scene.things[i].r, i) for i in candidates
        )
        return sorted({centres[0][1], edges[0][1]})
    if relation is None:
        return described(scene, text)
    head, relation, anchor_text = relation
    (anchor,) = described(scene, anchor_text)
    candidates = [index for index in described(scene, head) if index != anchor]
    assert len(candidates) >= 2, f"relation not needed: {text}"
    if relation != "closest to":
        loose = [index for index in candidates if is_beside(scene, index, relation, anchor, 0)]
        assert all(is_beside(scene, index, relation, anchor, 7) for index in loose), f"too close: {text}"
        return loose
    at = scene.things[anchor]
    distances = sorted((math.dist((scene.things[i].cx, scene.things[i].cy), (at.cx, at.cy)), i) for i in candidates)
    assert distances[1][0] - distances[0][0] >= 8, f"too close: {text}"
    gaps = sorted((distance - scene.things[i].r, i) for distance, i in distances)
    return sorted({distances[0][1], gaps[0][1]})


def answered(scene: Scene, text: str) -> str:
    """The answer to a yes/no, colour or counting question."""
    if text.startswith("Is there a "):
        return "yes" if described(scene, text[len("Is there a ") : -1]) else "no"
    if text.startswith("Is the "):
        head, side, anchor = split_relation(text[len("Is the ") : -1])
        (one,), (other,) = described(scene, head), described(scene, anchor)
        true = is_beside(scene, one, side, other, 0)
        assert not true or is_beside(scene, one, side, other, 7)
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[side]
        assert true or is_beside(scene, one, opposite, other, 7)
        return "yes" if true else "no"
    if text.startswith("What color is the "):
        (target,) = referred(scene, text[len("What color is the ") : -1])
        return scene.things[target].colour
    singular = text.removeprefix("How many ").removesuffix(" are there?").replace("crosses", "cross")
    return str(len(described(scene, singular if singular.endswith("cross") else singular.removesuffix("s"))))


# World


def test_scene_is_made_by_its_seed():
    seed = scene_seed("train", 5)
    image, scene, asked = training_scene(seed)
    again, same, asked_again = training_scene(seed)
    assert scene == same and asked == asked_again
    np.testing.assert_array_equal(image, again)
    other, different, _ = training_scene(scene_seed("train", 6))
    assert scene != different and not np.array_equal(image, other)


def test_benchmark_has_not_moved():
    """Numbers are only comparable while seeds mean the same scenes and questions; a new digest is a new benchmark."""
    told = repr([(sample_scene(seed), training_scene(seed)[2]) for seed in (scene_seed("test", i) for i in range(50))])
    told = told.replace("SceneQuestion(", "Question(")  # what the class was called when the digest was taken
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "bee92b0e448a8a82"


def test_splits_share_no_seed():
    indices = (0, 1, 17, 2**31, 2**32 - 1)
    seeds = {split: {scene_seed(split, index) for index in indices} for split in SPLITS}
    assert all(len(found) == len(indices) for found in seeds.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert max(seeds[one]) < min(seeds[other])
    assert len({sample_scene(scene_seed(split, index)) for split in SPLITS for index in range(50)}) == 150


@pytest.mark.parametrize("split, index", [("dev", 0), ("train", -1), ("test", 2**32)])
def test_bad_split_or_index(split, index):
    with pytest.raises(RerouteError, match="expected"):
        scene_seed(split, index)


@pytest.mark.parametrize("width, height", [(83, 200), (200, 83), (84, 111)])
def test_canvas_too_small(width, height):
    with pytest.raises(RerouteError, match="expected 84 pixels a side and 9408 in all or more"):
        sample_scene(0, width, height)


@pytest.mark.parametrize(
    "family, fewest, most, some",
    [
        ("qwen2_5_vl", 48, 80, {(8, 8), (6, 12), (12, 6)}),
        ("qwen3_vl", 108, 128, {(11, 11), (8, 16), (16, 8)}),
    ],
)
def test_canvases_of_the_qwen_families(family, fewest, most, some):
    """Whole visual tokens, wide, high and square; all shapes turn up, and a seed keeps its own."""
    scenes = [family_scene(scene_seed("val", index), family) for index in range(400)]
    grids = Counter((scene.height // TOKEN, scene.width // TOKEN) for scene in scenes)
    assert all(scene.height % TOKEN == scene.width % TOKEN == 0 for scene in scenes)
    assert all(fewest <= rows * cols <= most and 0.5 <= rows / cols <= 2 for rows, cols in grids)
    assert set(grids) == set(GRIDS[family]) and some <= set(grids)
    assert scenes[7] == family_scene(scene_seed("val", 7), family)
    assert {len(scene.things) for scene in scenes} == {3, 4, 5}


def test_canvas_of_the_llava_family_and_of_none():
    assert family_scene(11, "llava") == sample_scene(11, 112, 112)
    with pytest.raises(RerouteError, match="expected llava, qwen2_5_vl or qwen3_vl"):
        family_scene(11, "clip")


def test_objects_keep_to_the_canvas_and_apart():
    smallest, odd = (84, 112), (168, 140)
    for scene in [*SCENES, *(sample_scene(seed, *size) for seed in range(50) for size in (smallest, odd))]:
        assert 3 <= len(scene.things) <= 5
        for thing in scene.things:
            x, y, width, height = thing.box
            assert x >= 0 and y >= 0 and x + width <= scene.width and y + height <= scene.height
            assert RADII[thing.size][0] <= thing.r <= RADII[thing.size][1]
        for one, other in itertools.combinations(scene.things, 2):
            (ax, ay, aw, ah), (bx, by, bw, bh) = one.box, other.box
            assert max(bx - ax - aw, ax - bx - bw, by - ay - ah, ay - by - bh) >= 2


def test_attributes_repeat():
    for scene in SCENES:
        for values in ({thing.colour for thing in scene.things}, {thing.shape for thing in scene.things}):
            assert 2 <= len(values) <= 3 and len(values) < len(scene.things)


# Pixels


@pytest.mark.parametrize("shape", SHAPES)
def test_box_is_tight_around_the_shape(shape):
    for r in (8, 9, 10, 14, 18):
        mask = coverage(shape, r)
        assert mask.shape == (2 * r, 2 * r) and mask.min() >= 0 and mask.max() <= 1
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        assert (rows[0], rows[-1], columns[0], columns[-1]) == (0, 2 * r - 1, 0, 2 * r - 1)


def test_shapes_differ_at_the_smallest_radius():
    masks = [coverage(shape, 8) for shape in SHAPES]
    for one, other in itertools.combinations(masks, 2):
        assert np.abs(one - other).mean() > 0.15
    assert not coverage("ring", 8)[5:11, 5:11].any()


def test_picture_shows_what_the_scene_says():
    """Only objects are vivid: each box holds its own colour up to its edges, and nothing vivid lies outside."""
    hues = {
        "blue": (0, 0, 1),
        "cyan": (0, 0.7, 0.7),
        "green": (0, 1, 0),
        "purple": (0.7, 0, 0.7),
        "red": (1, 0, 0),
        "yellow": (0.7, 0.7, 0),
    }
    for seed, scene in enumerate(SCENES[:60]):
        image = render(scene, seed)
        assert image.shape == (scene.height, scene.width, 3) and image.dtype == np.uint8
        vivid = np.ptp(image.astype(int), axis=2) > 62
        for thing in scene.things:
            x, y, width, height = thing.box
            inside = np.s_[y : y + height, x : x + width]
            rows, columns = np.nonzero(vivid[inside])
            reach = [rows.min(), height - 1 - rows.max(), columns.min(), width - 1 - columns.max()]
            assert max(reach) <= 2, (thing, reach)
            colour = image[inside][coverage(thing.shape, thing.r) == 1].mean(axis=0)
            assert max(hues, key=lambda name: np.dot(hues[name], colour)) == thing.colour
            vivid[inside] = False
        assert not vivid.any()


def test_render_leaves_its_masks_alone():
    before = coverage("circle", 9).copy()
    render(SCENES[0], 0)
    np.testing.assert_array_equal(coverage("circle", 9), before)


def test_outline_lies_in_the_box_and_touches_it():
    for thing in (thing for scene in SCENES[:50] for thing in scene.things):
        xs, ys = np.array(outline(thing)).reshape(-1, 2).T
        x, y, width, height = thing.box
        np.testing.assert_allclose([xs.min(), xs.max(), ys.min(), ys.max()], [x, x + width, y, y + height])


def test_outline_area_is_the_mask_area():
    for thing in (thing for scene in SCENES[:50] for thing in scene.things if thing.shape != "ring"):
        xs, ys = np.array(outline(thing)).reshape(-1, 2).T
        area = abs(np.sum(xs * np.roll(ys, -1) - ys * np.roll(xs, -1))) / 2
        assert area == pytest.approx(coverage(thing.shape, thing.r).sum(), rel=0.05)


# Questions


def test_expressions_mean_one_object():
    for index, scene in enumerate(SCENES):
        for question in every_question(index):
            if question.kind in REFERRING:
                assert question.answer is None
                assert referred(scene, question.text) == [question.target], (scene, question)


def test_answers_are_right():
    for index, scene in enumerate(SCENES):
        for question in every_question(index):
            if question.kind in VQA:
                assert question.target is None
                assert answered(scene, question.text) == question.answer, (scene, question)


def test_questions_are_distinct_and_not_more_than_asked_for():
    for index, scene in enumerate(SCENES):
        texts = [question.text for question in every_question(index)]
        assert len(set(texts)) == len(texts)
        few = questions(scene, np.random.default_rng(index), {"count": 3, "attribute": 2, "yesno": 5})
        assert max(Counter(question.kind for question in few).items(), key=lambda item: item[1])[1] <= 5
        assert [question.kind for question in few] == sorted(
            (q.kind for q in few), key=["count", "attribute", "yesno"].index
        )


def test_every_scene_can_be_asked_about():
    for index in range(len(SCENES)):
        found = Counter(question.kind for question in every_question(index))
        assert found["place"] and found["yesno"] >= 2 and found["colour"] and found["count"]


def test_yes_and_no_are_balanced_whatever_the_wording():
    by_wording: dict[str, Counter] = {}
    for index in range(len(SCENES)):
        asked = [question for question in every_question(index) if question.kind == "yesno"]
        assert Counter(question.answer for question in asked)["yes"] * 2 == len(asked)
        for question in asked:
            wording = " ".join(question.text.split()[:2]) + str(len(question.text.split()))
            by_wording.setdefault(wording, Counter())[question.answer] += 1
    for wording, answers in by_wording.items():
        if answers.total() >= 400:
            assert 0.45 < answers["yes"] / answers.total() < 0.55, (wording, answers)
    single = Counter(
        questions(scene, np.random.default_rng(i), {"yesno": 1})[0].answer for i, scene in enumerate(SCENES)
    )
    assert 0.4 < single["yes"] / single.total() < 0.6


def test_negatives_are_hard():
    """What is asked for and missing has no word the scene lacks."""
    for index, scene in enumerate(SCENES):
        known = {word for thing in scene.things for word in (thing.size, thing.colour, thing.shape)} | {"object"}
        for question in every_question(index):
            if question.answer == "no" and question.text.startswith("Is there"):
                assert set(question.text[len("Is there a ") : -1].split()) <= known


def test_answers_come_about_equally_often():
    colours: Counter = Counter()
    numbers: Counter = Counter()
    for index, scene in enumerate(SCENES):
        for question in questions(scene, np.random.default_rng(index), {"colour": 2, "count": 2}):
            (colours if question.kind == "colour" else numbers)[question.answer] += 1
    assert set(numbers) == set("012345") and max(numbers.values()) < 0.35 * numbers.total()
    assert set(colours) == set(RGB) and max(colours.values()) < 0.25 * colours.total()


def test_words_are_closed_and_used():
    said = set()
    for index in range(len(SCENES)):
        for question in every_question(index):
            said |= {*words(question.text), *words(question.answer or "")}
    assert said == set(WORDS)
    assert tuple(sorted(WORDS)) == WORDS and all(word == word.lower() for word in WORDS)
    assert words("Is there a small red circle?") == ["is", "there", "a", "small", "red", "circle", "?"]


# Rows


def test_refcoco_rows():
    rows = list(refcoco_rows("val", 150, start=7))
    kinds: Counter = Counter()
    for index, row in enumerate(rows, start=7):
        assert {name: type(value) for name, value in row.items() if name != "image"} == {
            "question_id": str,
            "question": str,
            "answer": list,
            "segmentation": list,
            "bbox": list,
            "iscrowd": int,
            "file_name": str,
        }
        assert list(row)[1] == "image" and row["image"].mode == "RGB" and row["image"].size == (112, 112)
        assert {type(value) for value in row["bbox"] + row["segmentation"]} == {float}
        scene = SCENES[index] if index < len(SCENES) else sample_scene(scene_seed("val", index))
        np.testing.assert_array_equal(np.asarray(row["image"]), render(scene, scene_seed("val", index)))
        assert 1 <= len(row["answer"]) <= 3 and len(set(row["answer"])) == len(row["answer"])
        for text in row["answer"]:
            (target,) = referred(scene, text)
            assert list(scene.things[target].box) == row["bbox"]
            kinds["place" if "most " in text else "relation" if " the " in text else "attribute"] += 1
    assert len({row["question_id"] for row in rows}) == len({row["file_name"] for row in rows}) == 150
    assert min(kinds.values()) > 0.25 * kinds.total() and set(kinds) == set(REFERRING)
    assert next(refcoco_rows("val", 1, start=9))["answer"] == rows[2]["answer"]


def test_vqa_rows():
    rows = list(vqa_rows("test", 150, start=3))
    assert all(list(row) == ["question_id", "image", "question", "answer", "category"] for row in rows)
    for index, row in enumerate(rows, start=3):
        assert answered(sample_scene(scene_seed("test", index)), row["question"]) == row["answer"]
    assert Counter(row["category"] for row in rows) == dict.fromkeys(VQA, 50)
    assert Counter(row["answer"] for row in rows if row["category"] == "yesno") == {"yes": 25, "no": 25}
    assert {row["category"] for row in vqa_rows("test", 5, kinds=("count",))} == {"count"}


def test_rows_of_the_qwen_family():
    """Images of many sizes; expressions and answers are those of the scene that is shown."""
    sizes = set()
    for index, row in enumerate(refcoco_rows("val", 60, start=5, family="qwen2_5_vl"), start=5):
        scene = family_scene(scene_seed("val", index), "qwen2_5_vl")
        assert row["image"].size == (scene.width, scene.height)
        np.testing.assert_array_equal(np.asarray(row["image"]), render(scene, scene_seed("val", index)))
        sizes.add(row["image"].size)
        for text in row["answer"]:
            (target,) = referred(scene, text)
            assert list(scene.things[target].box) == row["bbox"]
    assert len(sizes) > 15
    for index, row in enumerate(vqa_rows("test", 60, family="qwen2_5_vl")):
        scene = family_scene(scene_seed("test", index), "qwen2_5_vl")
        assert row["image"].size == (scene.width, scene.height) and answered(scene, row["question"]) == row["answer"]


@pytest.mark.parametrize("kinds", [("count", "relation"), ()])
def test_vqa_rows_of_no_such_kind(kinds):
    with pytest.raises(RerouteError, match="expected some of yesno, colour, count"):
        next(vqa_rows("test", 1, kinds=kinds))
