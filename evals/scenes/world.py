"""What a scene is made of: a few coloured shapes on a canvas, sampled from a seed.

Coordinates are pixels, x to the right and y down, (0, 0) the outer corner of the top-left pixel. Centres and radii are
whole numbers, so every shape fills its box exactly and the box needs no rounding.
"""

import math
from dataclasses import dataclass

import numpy as np

from reroute_jax.errors import RerouteError

SHAPES = ("circle", "cross", "ring", "square", "triangle")
COLOURS = ("blue", "cyan", "green", "purple", "red", "yellow")
SIZES = ("big", "small")
TEXTURES = ("solid", "striped")
CANVAS = 112
TOKEN = 14  # pixels a side of what becomes one visual token
RADII = {"small": (8, 10), "big": (14, 18)}  # inclusive, pixels; the gap between the ranges keeps the two words clear

CROSS_ARM = 0.38  # half width of a cross's arms, as a share of its radius
RING_HOLE = 0.52  # radius of a ring's hole, likewise


def _grids(fewest: int, most: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of so many visual tokens in all, up to twice as long as wide."""
    sides = range(6, 17)
    return tuple(
        (rows, cols)
        for rows in sides
        for cols in sides
        if fewest <= rows * cols <= most and max(rows, cols) <= 2 * min(rows, cols)
    )


GRIDS = {"qwen2_5_vl": _grids(48, 80), "qwen3_vl": _grids(108, 128)}  # of the families with scenes of many sizes
LEAST_SIDE, LEAST_AREA = 6 * TOKEN, 48 * TOKEN**2  # pixels; on less, five big objects hardly fit

GAP = 2  # pixels of background between any two boxes
BORDER = 1  # pixels of background around the canvas
PLACEMENT_TRIES = 32  # candidate centres an object gets before the whole scene is drawn again

# Splits are ranges of seeds of one length, laid end to end: disjoint whatever the indices.
SPLITS = ("train", "val", "test")
SPLIT_LENGTH = 2**32


@dataclass(frozen=True)
class Thing:
    """One object. `cx`, `cy` and `r` are whole pixels; the shape touches all four sides of its box."""

    shape: str
    colour: str
    size: str
    texture: str
    cx: int
    cy: int
    r: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Tight box (x, y, width, height) in pixels."""
        return self.cx - self.r, self.cy - self.r, 2 * self.r, 2 * self.r


@dataclass(frozen=True)
class Scene:
    """A canvas (pixels) and its objects, in no meaningful order."""

    width: int
    height: int
    things: tuple[Thing, ...]


def scene_seed(split: str, index: int) -> int:
    """Seed of scene number `index` of a split; no seed belongs to two splits.

    Raises RerouteError for an unknown split or an index outside [0, 2**32).
    """
    if split not in SPLITS:
        raise RerouteError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if not 0 <= index < SPLIT_LENGTH:
        raise RerouteError(f"scene index {index} is out of range: expected 0 <= index < {SPLIT_LENGTH}")
    return SPLITS.index(split) * SPLIT_LENGTH + index


def stream(purpose: int, seed: int) -> np.random.Generator:
    """Random stream of one purpose (layout, pixels, questions, ...) of a seed, independent of its other streams.

    The purpose comes first: numpy cuts a wide seed into 32-bit words and pads with zeros, so (seed, purpose) of one
    split could equal another pair of the next.
    """
    return np.random.default_rng((purpose, seed))


def family_scene(seed: int, family: str) -> Scene:
    """The scene of a seed on the canvas that a model family gets: square and fixed for "llava", of a size and shape
    that the seed decides for those of GRIDS. Raises RerouteError for another family."""
    if family == "llava":
        return sample_scene(seed)
    if family in GRIDS:
        grids = GRIDS[family]
        rows, cols = grids[int(stream(6, seed).integers(len(grids)))]
        return sample_scene(seed, cols * TOKEN, rows * TOKEN)
    raise RerouteError(f"no scenes for model family {family!r}: expected llava, {' or '.join(GRIDS)}")


def sample_scene(seed: int, width: int = CANVAS, height: int = CANVAS) -> Scene:
    """3 to 5 separate objects in 2 or 3 colours and 2 or 3 shapes, fewer than objects, so that both always repeat.

    Raises RerouteError for a canvas with a side under 84 pixels or less than 9,408 pixels in all.
    """
    if min(width, height) < LEAST_SIDE or width * height < LEAST_AREA:
        raise RerouteError(
            f"canvas {width}x{height} is too small: expected {LEAST_SIDE} pixels a side and {LEAST_AREA} in all or more"
        )
    rng = stream(0, seed)
    while True:
        things = _attempt(rng, width, height)
        if things is not None:
            return Scene(width, height, things)


def outline(thing: Thing) -> list[float]:
    """Polygon x0, y0, x1, y1, ... around an object, in pixels. A ring's hole is inside its polygon."""
    arm = CROSS_ARM
    match thing.shape:
        case "square":
            points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        case "triangle":
            points = [(0, -1), (1, 1), (-1, 1)]
        case "cross":
            quarter = [(arm, -1), (arm, -arm), (1, -arm)]
            points = [turned for turn in range(4) for turned in (_quarter_turn(point, turn) for point in quarter)]
        case _:
            angles = [2 * math.pi * step / 24 for step in range(24)]
            points = [(math.cos(angle), math.sin(angle)) for angle in angles]
    return [float(value) for x, y in points for value in (thing.cx + thing.r * x, thing.cy + thing.r * y)]


def _quarter_turn(point: tuple[float, float], turns: int) -> tuple[float, float]:
    for _ in range(turns):
        point = (-point[1], point[0])
    return point


def _attempt(rng: np.random.Generator, width: int, height: int) -> tuple[Thing, ...] | None:
    count = int(rng.integers(3, 6))
    colours = _palette(rng, COLOURS, count)
    shapes = _palette(rng, SHAPES, count)
    sizes = [SIZES[pick] for pick in rng.integers(2, size=count)]
    textures = [TEXTURES[pick] for pick in rng.integers(2, size=count)]
    radii = [int(rng.integers(low, high + 1)) for low, high in (RADII[size] for size in sizes)]
    centres = _place(rng, radii, width, height)
    if centres is None:
        return None
    rows = zip(shapes, colours, sizes, textures, centres, radii, strict=True)
    return tuple(Thing(shape, colour, size, texture, *centre, r) for shape, colour, size, texture, centre, r in rows)


def _palette(rng: np.random.Generator, words: tuple[str, ...], count: int) -> list[str]:
    """One word per object, 2 or 3 different ones in all and fewer than objects; each drawn word is used."""
    kinds = int(rng.integers(2, min(3, count - 1) + 1))
    chosen = rng.permutation(len(words))[:kinds]
    picks = np.concatenate([chosen, rng.choice(chosen, count - kinds)])
    return [words[pick] for pick in rng.permutation(picks)]


def _place(rng: np.random.Generator, radii: list[int], width: int, height: int) -> list[tuple[int, int]] | None:
    """Centres that keep boxes `GAP` apart, or None where an object found no room. Large objects choose first."""
    centres: list[tuple[int, int]] = [(0, 0)] * len(radii)
    placed: list[tuple[int, int, int]] = []
    for index in sorted(range(len(radii)), key=lambda index: -radii[index]):
        r = radii[index]
        low = r + BORDER
        xs = rng.integers(low, width - low + 1, PLACEMENT_TRIES).tolist()
        ys = rng.integers(low, height - low + 1, PLACEMENT_TRIES).tolist()
        free = (
            (x, y)
            for x, y in zip(xs, ys, strict=True)
            if all(max(abs(x - px), abs(y - py)) >= r + pr + GAP for px, py, pr in placed)
        )
        centre = next(free, None)
        if centre is None:
            return None
        centres[index] = centre
        placed.append((*centre, r))
    return centres
