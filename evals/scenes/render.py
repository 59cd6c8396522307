"""Pixels of a scene: muted noisy background, grey clutter under the objects, antialiased shapes with slight jitter."""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8

from evals.scenes.world import CROSS_ARM, RING_HOLE, Scene, Thing, stream

RGB = {
    "blue": (40, 75, 225),
    "cyan": (50, 210, 220),
    "green": (35, 165, 55),
    "purple": (165, 45, 185),
    "red": (220, 35, 40),
    "yellow": (240, 210, 40),
}
SUBSAMPLES = 4  # a side, inside a pixel
COARSE = 5  # background control points a side
STRIPE_SHADE = 0.6  # brightness of the dark bands
STRIPE_PERIOD = 6.0  # pixels
STRIPE_DIRECTIONS = ((0.0, 1.0), (1.0, 0.0), (0.71, 0.71), (0.71, -0.71))


def render(scene: Scene, seed: int) -> UInt8[np.ndarray, "height width 3"]:
    """RGB image of a scene; `seed` decides background, clutter, stripe phase and brightness, never what is asked."""
    rng = stream(1, seed)
    canvas = _background(rng, scene.width, scene.height)
    for _ in range(int(rng.integers(3, 8))):
        _draw_clutter(canvas, rng)
    for thing in scene.things:
        _draw_thing(canvas, thing, rng)
    canvas += 4.0 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


@lru_cache(maxsize=128)
def coverage(shape: str, r: int) -> Float[np.ndarray, "side side"]:
    """Share of each pixel of the object's box (2 r pixels a side) that the shape covers, 0 to 1, read-only."""
    fine = (np.arange(2 * r * SUBSAMPLES, dtype=np.float32) + 0.5) / (r * SUBSAMPLES) - 1  # -1 to 1 across the box
    x, y = fine[None, :], fine[:, None]
    inside = _inside(shape, x, y)
    blocks = inside.reshape(2 * r, SUBSAMPLES, 2 * r, SUBSAMPLES)
    mask = blocks.mean(axis=(1, 3), dtype=np.float32)
    mask.flags.writeable = False
    return mask


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    distance = np.hypot(x, y)
    match shape:
        case "circle":
            return distance <= 1
        case "ring":
            return (distance <= 1) & (distance >= RING_HOLE)
        case "square":
            return np.ones_like(distance, dtype=bool)
        case "cross":
            return (np.abs(x) <= CROSS_ARM) | (np.abs(y) <= CROSS_ARM)
        case "triangle":
            return 2 * np.abs(x) <= y + 1
    raise AssertionError(shape)


def _background(rng: np.random.Generator, width: int, height: int) -> Float[np.ndarray, "height width 3"]:
    tone = rng.uniform(75, 185) + rng.uniform(-10, 10, 3)
    coarse = (tone + rng.uniform(-22, 22, (COARSE, COARSE, 1)) + rng.uniform(-9, 9, (COARSE, COARSE, 3))).astype("f4")
    rows = _interpolation(height) @ coarse.reshape(COARSE, COARSE * 3)
    return np.ascontiguousarray(_interpolation(width) @ rows.reshape(height, COARSE, 3))


@lru_cache(maxsize=8)
def _interpolation(length: int) -> Float[np.ndarray, "length coarse"]:
    """Linear interpolation from the control points to `length` pixels, as a matrix."""
    at = np.linspace(0, COARSE - 1, length, dtype=np.float32)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(COARSE, dtype=np.float32)))


def _draw_clutter(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """One grey dot or short line, about a pixel and a half wide; a dot is a line of length 0."""
    height, width, _ = canvas.shape
    x0, y0 = rng.uniform(8, width - 8), rng.uniform(8, height - 8)
    dx, dy = rng.uniform(-6, 6, 2) * (rng.random() < 0.7)
    left, top = int(min(x0, x0 + dx)) - 1, int(min(y0, y0 + dy)) - 1
    right, bottom = int(max(x0, x0 + dx)) + 3, int(max(y0, y0 + dy)) + 3
    px = np.arange(left, right, dtype=np.float32)[None, :] + 0.5 - x0
    py = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - y0
    along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
    alpha = np.clip(1.3 - np.hypot(px - along * dx, py - along * dy), 0, 1)[..., None]
    patch = canvas[top:bottom, left:right]
    patch += alpha * (rng.uniform(30, 225) - patch)


def _draw_thing(canvas: np.ndarray, thing: Thing, rng: np.random.Generator) -> None:
    x, y, width, height = thing.box
    paint = np.asarray(RGB[thing.colour], np.float32) * rng.uniform(0.88, 1.08)
    if thing.texture == "striped":
        paint = paint * _stripes(width, rng)
    patch = canvas[y : y + height, x : x + width]
    patch += coverage(thing.shape, thing.r)[..., None] * (paint - patch)


def _stripes(side: int, rng: np.random.Generator) -> Float[np.ndarray, "side side 1"]:
    """Brightness of soft-edged bands over a square of pixels, `STRIPE_SHADE` to 1."""
    along_x, along_y = STRIPE_DIRECTIONS[rng.integers(len(STRIPE_DIRECTIONS))]
    at = np.arange(side, dtype=np.float32)
    wave = np.sin(2 * np.pi * ((along_x * at[None, :] + along_y * at[:, None]) / STRIPE_PERIOD + rng.random()))
    return (1 - (1 - STRIPE_SHADE) * np.clip(0.5 + 1.5 * wave, 0, 1))[..., None].astype(np.float32)
