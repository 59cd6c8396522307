"""Referring expressions and questions about a scene, each with exactly one right answer by construction.

A phrase is (size, colour, shape) with None for a word that is left out: (None, "red", None) reads "red object". Sets of
objects are bit masks over their indices. The margins below keep out whatever a person could argue about.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evals.scenes.world import COLOURS, SHAPES, SIZES, Scene, Thing

REFERRING = ("attribute", "place", "relation")
VQA = ("yesno", "colour", "count")
KINDS = REFERRING + VQA

PLACE_MARGIN = 6  # pixels between the centres of the extreme object and the runner-up
SIDE_SLOPE = 2  # "left of" is claimed up to so much more distance across than along; boxes apart make that >= 9 pixels
NEAR_MARGIN = 8  # pixels by which the closest object beats the second closest

PLACES = {"leftmost": (1, 0), "rightmost": (-1, 0), "topmost": (0, 1), "bottommost": (0, -1)}  # smallest sx x + sy y
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # direction from the anchor
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CLOSEST = "closest to"

Phrase = tuple[str | None, str | None, str | None]
FORMS = tuple(itertools.product((False, True), repeat=3))  # which of size, colour and shape a phrase names
ANYTHING: Phrase = (None, None, None)

# Odds of a candidate against the others of the same object.
REDUNDANT_ODDS = 0.4  # a phrase with a word it could do without
VAGUE_ODDS = 0.5  # "object" alone as the head
CLOSEST_ODDS = 0.3  # closeness, true far more often than a side is clear, against one side
SIDE_QUESTION_ODDS = 0.35  # share of yes/no pairs that ask for a relation
SIDE_PAIRS = 3  # such pairs a scene offers at most

PLURALS = {word: word + "es" if word == "cross" else word + "s" for word in (*SHAPES, "object")}


@dataclass(frozen=True)
class SceneQuestion:
    """One question. Referring kinds: `text` is the expression and `target` the index of the object, `answer` is None.
    Other kinds: `text` is the question, `answer` one lower-case word or digit, `target` is None."""

    kind: str
    text: str
    answer: str | None
    target: int | None


def words(text: str) -> list[str]:
    """Lower-case words of an expression, question or answer; a final question mark is a word of its own."""
    return text.lower().replace("?", " ?").split()


WORDS = tuple(
    sorted(
        {*COLOURS, *SIZES, *SHAPES, "object", *PLURALS.values(), *PLACES, "yes", "no", *map(str, range(6))}
        | {word for text in (*SIDES, f"{CLOSEST} the") for word in words(text)}
        | set(words("Is there a the") + words("What color is the ?") + words("How many are there ?"))
    )
)


def questions(scene: Scene, rng: np.random.Generator, per_kind: Mapping[str, int]) -> list[SceneQuestion]:
    """Up to `per_kind[kind]` different questions of each kind, in the mapping's order; fewer where a scene has no more.

    Objects take turns as targets, and answers as answers. Yes/no questions come in pairs, one each; an odd number
    leaves the last one to chance. Raises KeyError for an unknown kind.
    """
    view = _view(scene)
    return [question for kind, count in per_kind.items() for question in _MAKERS[kind](view, rng, count)]


@dataclass(frozen=True)
class _View:
    """A scene and what its phrases mean: the objects each fits, and the phrases that fit one object alone."""

    things: tuple[Thing, ...]
    masks: dict[Phrase, int]
    names: tuple[dict[Phrase, float], ...]  # per object: phrase -> odds
    beside: dict[tuple[str, int], tuple[int, int]]  # (side, anchor) -> objects clearly there, objects at all there


def _view(scene: Scene) -> _View:
    masks: dict[Phrase, int] = {}
    for index, thing in enumerate(scene.things):
        for form in FORMS:
            phrase = _phrase(form, (thing.size, thing.colour, thing.shape))
            masks[phrase] = masks.get(phrase, 0) | 1 << index
    names: tuple[dict[Phrase, float], ...] = tuple({} for _ in scene.things)
    for phrase, mask in masks.items():
        if mask.bit_count() == 1:
            redundant = any(masks[shorter] == mask for shorter in _shorter(phrase))
            names[mask.bit_length() - 1][phrase] = REDUNDANT_ODDS if redundant else 1.0
    beside = {(side, anchor): _beside(scene.things, side, anchor) for side in SIDES for anchor in range(len(names))}
    return _View(scene.things, masks, names, beside)


def _phrase(form: Sequence[bool], attributes: tuple[str, str, str]) -> Phrase:
    size, colour, shape = (word if used else None for word, used in zip(attributes, form, strict=True))
    return size, colour, shape


def _shorter(phrase: Phrase) -> list[Phrase]:
    """The phrase less one of its words, each in turn."""
    size, colour, shape = phrase
    return [less for less in ((None, colour, shape), (size, None, shape), (size, colour, None)) if less != phrase]


def _text(phrase: Phrase, plural: bool = False) -> str:
    size, colour, shape = phrase
    head = shape or "object"
    return " ".join(word for word in (size, colour, PLURALS[head] if plural else head) if word)


def _beside(things: tuple[Thing, ...], side: str, anchor: int) -> tuple[int, int]:
    """Masks of the objects clearly on that side of the anchor, and of those which are so by any pixel."""
    sx, sy = SIDES[side]
    clear = loose = 0
    for index, thing in enumerate(things):
        dx, dy = thing.cx - things[anchor].cx, thing.cy - things[anchor].cy
        along, across = sx * dx + sy * dy, abs(sy * dx) + abs(sx * dy)
        clear |= (along > 0 and SIDE_SLOPE * along >= across) << index
        loose |= (along > 0) << index
    return clear, loose


def _members(mask: int) -> list[int]:
    return [index for index in range(mask.bit_length()) if mask >> index & 1]


def _spread(rng: np.random.Generator, groups: Sequence, odds: Sequence[float], count: int) -> list[int]:
    """Indices of up to `count` candidates: the groups take turns, by lot, and offer members by their odds.

    Each candidate draws an exponential arrival time; with odds summing to one in every group, the first arrivals of
    all groups are equally distributed, so large groups get no head start.
    """
    totals: dict = {}
    for group, weight in zip(groups, odds, strict=True):
        totals[group] = totals.get(group, 0.0) + weight
    rates = [weight / totals[group] for group, weight in zip(groups, odds, strict=True)]
    arrivals = rng.standard_exponential(len(rates)) / np.asarray(rates)
    turns: dict = {}
    ranked = []
    for index in np.argsort(arrivals).tolist():
        turn = turns.get(groups[index], 0)
        turns[groups[index]] = turn + 1
        ranked.append((turn, len(ranked), index))
    return [index for _, _, index in sorted(ranked)[:count]]


def _name(view: _View, rng: np.random.Generator, index: int) -> str:
    """One of the phrases that fit this object alone."""
    phrases, odds = list(view.names[index]), list(view.names[index].values())
    return _text(phrases[_spread(rng, [index] * len(odds), odds, 1)[0]])


def _attribute(view: _View, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    rows = [(target, phrase, odds) for target, named in enumerate(view.names) for phrase, odds in named.items()]
    picks = _spread(rng, [row[0] for row in rows], [row[2] for row in rows], count)
    return [SceneQuestion("attribute", _text(rows[pick][1]), None, rows[pick][0]) for pick in picks]


def _extremes(view: _View) -> list[tuple[int, str, Phrase, float]]:
    """(target, place, head, odds) of every head that fits several objects of which one is clearly the extreme."""
    found = []
    for head, mask in view.masks.items():
        if head[0] is not None or mask.bit_count() < 2:
            continue
        for place, (sx, sy) in PLACES.items():
            centres = sorted((sx * view.things[i].cx + sy * view.things[i].cy, i) for i in _members(mask))
            (first, target), (second, _) = centres[:2]
            edge = first - view.things[target].r
            # The near edge has to agree, or a wide object could be called the leftmost as well.
            agreed = all(edge < centre - view.things[i].r for centre, i in centres[1:])
            if second - first >= PLACE_MARGIN and agreed:
                found.append((target, place, head, VAGUE_ODDS if head == ANYTHING else 1.0))
    return found


def _place(view: _View, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    rows = _extremes(view)
    picks = _spread(rng, [row[0] for row in rows], [row[3] for row in rows], count)
    return [SceneQuestion("place", f"{rows[pick][1]} {_text(rows[pick][2])}", None, rows[pick][0]) for pick in picks]


def _relation(view: _View, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """Heads that fit at least two objects besides the anchor, so that the relation has to be read."""
    rows: list[tuple[int, str, int, Phrase, float]] = []
    anchors = [anchor for anchor, named in enumerate(view.names) if named]
    for head, anchor in itertools.product(view.masks, anchors):
        candidates = view.masks[head] & ~(1 << anchor)
        if candidates.bit_count() < 2:
            continue
        odds = VAGUE_ODDS if head == ANYTHING else 1.0
        for side in SIDES:
            clear, loose = view.beside[side, anchor]
            fits = candidates & loose
            if fits.bit_count() == 1 and fits & clear:
                rows.append((fits.bit_length() - 1, side, anchor, head, odds))
        nearest = _nearest(view.things, candidates, anchor)
        if nearest is not None:
            rows.append((nearest, CLOSEST, anchor, head, odds * CLOSEST_ODDS))
    picks = _spread(rng, [row[0] for row in rows], [row[4] for row in rows], count)
    return [
        SceneQuestion("relation", f"{_text(head)} {relation} the {_name(view, rng, anchor)}", None, target)
        for target, relation, anchor, head, _ in (rows[pick] for pick in picks)
    ]


def _nearest(things: tuple[Thing, ...], candidates: int, anchor: int) -> int | None:
    """The candidate closest to the anchor, by centres and by outlines alike, or None where that can be argued about."""
    centre = things[anchor]
    gaps = sorted(
        (float(np.hypot(things[i].cx - centre.cx, things[i].cy - centre.cy)), things[i].r, i)
        for i in _members(candidates)
    )
    (first, r, nearest), others = gaps[0], gaps[1:]
    clear = others[0][0] - first >= NEAR_MARGIN
    agreed = all(distance - other_r - (first - r) >= NEAR_MARGIN / 2 for distance, other_r, _ in others)
    return nearest if clear and agreed else None


def _yesno(view: _View, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """Yes/no pairs of one wording each, so that the wording tells nothing about the answer."""
    existence, sides = _existence_pairs(view, rng), _side_pairs(view, rng)
    found: list[SceneQuestion] = []
    while len(found) < count and (existence or sides):
        pool = sides if not existence or (sides and rng.random() < SIDE_QUESTION_ODDS) else existence
        pair = pool.pop()
        rows = [SceneQuestion("yesno", text, answer, None) for text, answer in zip(pair, ("yes", "no"), strict=True)]
        found += [rows[index] for index in rng.permutation(2)]
    return found[:count]


def _existence_pairs(view: _View, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(there, missing): both name two or three words of the scene itself, the missing one in a new combination."""
    vocabulary = [sorted({getattr(thing, name) for thing in view.things}) for name in ("size", "colour", "shape")]
    pairs = []
    for form in (form for form in FORMS if sum(form) >= 2):
        options: list[Sequence[str | None]] = [
            known if used else (None,) for known, used in zip(vocabulary, form, strict=True)
        ]
        there: list[str] = []
        missing: list[str] = []
        for phrase in itertools.product(*options):
            (there if phrase in view.masks else missing).append(f"Is there a {_text(phrase)}?")
        yes, no = rng.permutation(there).tolist(), rng.permutation(missing).tolist()
        pairs += zip(yes, no, strict=False)  # the surplus of either side has no partner
    return [pairs[index] for index in rng.permutation(len(pairs))]


def _side_pairs(view: _View, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two clear relations; one is asked about as it is, the other the wrong way round."""
    true = [
        (index, side, anchor)
        for (side, anchor), (clear, _) in view.beside.items()
        for index in _members(clear)
        if view.names[index] and view.names[anchor]
    ]
    order = rng.permutation(len(true)).tolist()
    half = len(order) // 2
    pairs = []
    for yes, no in zip(order[:half][:SIDE_PAIRS], order[half:][:SIDE_PAIRS], strict=False):
        texts = []
        for (index, side, anchor), asked in ((true[yes], True), (true[no], False)):
            side = side if asked else OPPOSITE[side]
            texts.append(f"Is the {_name(view, rng, index)} {side} the {_name(view, rng, anchor)}?")
        pairs.append((texts[0], texts[1]))
    return pairs


def _colour(view: _View, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    rows = [
        (target, _text(phrase), odds)
        for target, named in enumerate(view.names)
        for phrase, odds in named.items()
        if phrase[1] is None
    ]
    rows += [
        (target, f"{place} {_text(head)}", odds / 4) for target, place, head, odds in _extremes(view) if head[1] is None
    ]
    picks = _spread(rng, [row[0] for row in rows], [row[2] for row in rows], count)
    return [
        SceneQuestion("colour", f"What color is the {rows[pick][1]}?", view.things[rows[pick][0]].colour, None)
        for pick in picks
    ]


def _count(view: _View, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """Numbers take turns. Nought is asked about one word the scene lacks, or two of its words that never meet."""
    numbers = {phrase: mask.bit_count() for phrase, mask in view.masks.items()}
    colours, shapes = ({getattr(thing, name) for thing in view.things} for name in ("colour", "shape"))
    lacking = [(None, colour, None) for colour in COLOURS if colour not in colours]
    lacking += [(None, None, shape) for shape in SHAPES if shape not in shapes]
    apart = [(None, c, s) for c in sorted(colours) for s in sorted(shapes) if (None, c, s) not in view.masks]
    rows: list[tuple[int, Phrase, float]] = [(number, phrase, 1.0) for phrase, number in numbers.items()]
    rows += [(0, phrase, 1 / len(lacking)) for phrase in lacking] + [(0, phrase, 1 / len(apart)) for phrase in apart]
    picks = _spread(rng, [row[0] for row in rows], [row[2] for row in rows], count)
    return [
        SceneQuestion("count", f"How many {_text(rows[pick][1], plural=True)} are there?", str(rows[pick][0]), None)
        for pick in picks
    ]


_MAKERS = dict(zip(KINDS, (_attribute, _place, _relation, _yesno, _colour, _count), strict=True))
