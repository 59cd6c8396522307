"""DivPrune, HiPrune and VisionZip by hand (section 22) and against the eager reference's rules."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.crosscheck import merges
from reroute_jax.errors import RerouteError
from reroute_jax.routing.divprune import DivPrune, farthest
from reroute_jax.routing.downsample import Downsample
from reroute_jax.routing.hiprune import HiPrune
from reroute_jax.routing.merge import MERGES, merge_arrays, reduced
from reroute_jax.routing.methods import plan
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.pool import PoolMerge
from reroute_jax.routing.tower import Tower
from reroute_jax.routing.visionzip import VisionZip


class Given(Tower):
    """A tower that says what a test made up, for images of one batch; the reference reads the first."""

    def __init__(self, grid, **parts):
        self.grid, self.parts = grid, parts
        for name, part in parts.items():
            setattr(self, name, lambda part=part: part)

    def project(self, features):
        return features

    def resized(self, cells, back):
        return Given(cells, **self.parts)

    def in_torch(self):
        return Given(self.grid, **{name: torch.tensor(np.array(part[0])) for name, part in self.parts.items()})


def compiled(merge, tower, grids):
    """What stays of every image, as one program."""
    images, slots = tower.parts["features"].shape[:2]
    arrays = merge_arrays(merge, grids, images, slots)
    found = jax.jit(lambda parts: reduced(merge, Given(tower.grid, **parts), arrays))(tower.parts)
    return jax.tree.map(np.asarray, found)


def kept(merge, tower):
    """Indices and features by both frameworks, which must agree, as must the members."""
    size = tower.grid[0] * tower.grid[1]
    features, index = compiled(merge, tower, [tower.grid])
    expected = merges.reduced(merge, tower.in_torch())
    found = index[0][index[0] < size].tolist()
    assert found == expected.index.tolist()
    np.testing.assert_allclose(features[0, : len(found)], expected.features, atol=1e-5)
    assert made_of(merge, tower) == in_torch(expected.members)
    return found, features[0]


def in_torch(members):
    return [one.nonzero()[:, 0].tolist() for one in members]


def made_of(merge, tower):
    """Members of each token that stays."""
    size = tower.grid[0] * tower.grid[1]
    arrays = merge_arrays(merge, [tower.grid], 1, size)
    members = jax.jit(lambda parts: merge.members(Given(tower.grid, **parts), jax.tree.map(jnp.asarray, arrays)))
    found = np.array(members(tower.parts))[0]
    return [np.flatnonzero(one).tolist() for one in found[: merge.anchors(size, tower.grid)]]


def circle(degrees):
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


# Vector 22.1.
def test_divprune():
    features = circle([0, 10, 25, 90, 100, 200, 305])
    assert merges.farthest(torch.tensor(features), 4) == [5, 2, 6, 4]
    tower = Given((1, 7), features=features[None])
    assert kept(DivPrune(count=4), tower)[0] == [2, 4, 5, 6]
    assert kept(DivPrune(count=3), tower)[0] == [2, 5, 6]


def test_members_of_what_is_kept_and_of_cells():
    features = circle([0, 10, 25, 90, 100, 200, 305])[None]
    assert made_of(DivPrune(count=3), Given((1, 7), features=features)) == [[2], [5], [6]]
    for merge in (PoolMerge(Fraction(1, 4)), Downsample(count=4)):
        tower = Given((4, 4), features=np.zeros((1, 16, 2), np.float32))
        cells = made_of(merge, tower)
        assert cells == in_torch(merges.reduced(merge, tower.in_torch()).members)
        assert cells == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_divprune_never_chooses_a_token_twice():
    features = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [-1, 0]], np.float32)
    assert merges.farthest(torch.tensor(features), 4) == [4, 0, 2, 1]
    assert kept(DivPrune(count=4), Given((1, 5), features=features[None]))[0] == [0, 1, 2, 4]


def test_divprune_of_a_padded_image():
    features = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    of_five = jax.jit(partial(farthest, cap=5))
    alone, padded = (np.asarray(of_five(rows, np.int32(7), np.int32(3))) for rows in (features[:7], features))
    assert alone[:3].tolist() == padded[:3].tolist() and (padded[3:] == 12).all()


def test_counts():
    shares = (0.098, Fraction(1, 9), Fraction(2, 9), Fraction(1, 3), 0.1)
    counts = [DivPrune(Fraction(share).limit_denominator(1000)).anchors(576, (24, 24)) for share in shares]
    assert counts == [56, 64, 128, 192, 58]
    assert [HiPrune(count=9).object_anchors(keep) for keep in (192, 128, 64, 32, 16)] == [4, 3, 1, 1, 0]
    assert [VisionZip(count=9).split(keep) for keep in (64, 128, 192)] == [(54, 10), (108, 20), (162, 30)]


# Vector 22.7, without the class token: one dominant token more than as released stays.
def test_visionzip():
    features = np.array([(p, 1) for p in range(1, 9)], np.float32)
    tower = Given(
        (2, 4),
        features=features[None],
        metric=np.array([[0.30, 0.02, 0.08, 0.20, 0.10, 0.15, 0.10, 0.05]], np.float32),
        keys=circle([0, 10, 80, 0, 95, 30, 170, 0])[None],
    )
    index, found = kept(VisionZip(count=6), tower)
    # Dominant 0, 3, 5, 4, 6; of the rest 1, 2, 7 the first is the target, and their mean is added to it.
    assert index == [0, 1, 3, 4, 5, 6]
    np.testing.assert_allclose(found[1], [2 + (3 + 8) / 2, 2])
    assert made_of(VisionZip(count=6), tower) == [[0], [1, 2, 7], [3], [4], [5], [6]]


class Released(VisionZip):
    def split(self, keep):
        return 3, 2


# Vector 22.7 as released: the class token, dominant patches 1 and 4, targets 0 and 5 behind them.
def test_visionzip_with_its_class_token():
    tower = Given(
        (2, 4),
        features=np.array([[(p, 1.0) for p in range(8)]], np.float32),
        class_features=np.array([[-1.0, 1.0]], np.float32),
        metric=np.array([[0.05, 0.30, 0.02, 0.08, 0.20, 0.10, 0.15, 0.10]], np.float32),
        keys=circle([0, 0, 10, 80, 0, 95, 30, 170])[None],
    )
    merge = Released(count=5, cls="keep")
    features, index = compiled(merge, tower, [(2, 4)])
    np.testing.assert_allclose(features[0], [(-1, 1), (1, 1), (4, 1), (4, 2), (10, 2)])
    assert index[0].tolist() == [1, 1, 4, 0, 5]
    assert made_of(merge, tower) == [[1], [1], [4], [0, 2, 6], [3, 5, 7]]


def test_groups_of_visionzip():
    """Vector 22.7's groups: targets 0 and 5, groups {2, 6} and {3, 7}."""
    features = torch.tensor([(p, 1.0) for p in range(8)])
    keys = torch.tensor(circle([0, 10, 80, 0, 95, 30, 170, 0])[[0, 0, 1, 2, 3, 4, 5, 6]])
    found = merges.groups(keys, [2, 3, 6, 7], [0, 5])
    assert found == {0: [2, 6], 5: [3, 7]}
    joined = merges.group_means(features, found)
    np.testing.assert_allclose(joined[[0, 5]], [(4, 2), (10, 2)])


# Vector 22.8.
OBJECTS = np.zeros(16, np.float32)
OBJECTS[[7, 2]] = 0.9, 0.5
DEEP = np.array([3, 14, 5, 9, 12, 1, 7, 16, 2, 11, 8, 15, 6, 13, 4, 10], np.float32) / 100


@pytest.mark.parametrize(
    ("count", "alpha", "neighbours", "expected"),
    [
        (8, Fraction(5, 8), "flat", [1, 3, 4, 6, 7, 8, 11, 13]),
        (8, Fraction(5, 8), "grid", [1, 3, 4, 6, 7, 9, 11, 13]),
        (10, Fraction(1), "flat", [0, 1, 2, 3, 4, 6, 7, 8, 11, 13]),
    ],
)
def test_hiprune(count, alpha, neighbours, expected):
    features = np.arange(32, dtype=np.float32).reshape(1, 16, 2)
    tower = Given((4, 4), features=features, objects=OBJECTS[None], registers=DEEP[None])
    assert kept(HiPrune(count=count, alpha=alpha, neighbours=neighbours), tower)[0] == expected


@pytest.mark.parametrize("merge", [DivPrune(Fraction(1, 3)), HiPrune(Fraction(1, 2)), VisionZip(Fraction(1, 2))])
def test_random_images_of_two_grids(merge):
    """Each image of a padded batch as the reference has it alone."""
    rng, grids, slots = np.random.default_rng(1), [(5, 7), (3, 4)], 35
    parts = {"features": (2, slots, 6), "keys": (2, slots, 4), "metric": (2, slots)}
    parts |= {"objects": (2, slots), "registers": (2, slots)}
    made = {name: rng.random(shape).astype(np.float32) for name, shape in parts.items()}
    features, index = compiled(merge, Given(grids[0], **made), grids)
    for image, grid in enumerate(grids):
        size = grid[0] * grid[1]
        alone = Given(grid, **{name: torch.tensor(part[image, :size]) for name, part in made.items()})
        expected = merges.reduced(merge, alone)
        left = merge.anchors(size, grid)
        assert index[image, :left].tolist() == expected.index.tolist()
        np.testing.assert_allclose(features[image, :left], expected.features, atol=1e-5)


def test_asking():
    sizes = {"num_layers": 32, "visual": 576, "grid": (24, 24)}
    assert plan("divprune", **sizes, keep=64).merge == DivPrune(count=64)
    assert plan("divprune", **sizes, keep=64).label == "divprune keep=64"
    assert plan("visionzip", **sizes, budget=128).merge == VisionZip(Fraction(2, 9))
    flat = plan("hiprune", **sizes, keep=Fraction(1, 9), neighbours="flat")
    assert flat.merge == HiPrune(Fraction(1, 9), neighbours="flat") and Schedule.from_record(flat.to_record()) == flat
    assert set(MERGES) == {"NuwaMerge", "PoolMerge", "Downsample", "DivPrune", "HiPrune", "VisionZip"}


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: DivPrune(), "either a share or a count"),
        (lambda: HiPrune(Fraction(3, 2)), "a share of 3/2"),
        (lambda: HiPrune(count=3, neighbours="ring"), "expected one of: grid, flat"),
        (lambda: VisionZip(count=4).anchors(5, (2, 3)), "2 x 3 does not hold 5"),
        (lambda: VisionZip(count=2, cls="keep").anchors(6, (2, 3)), "leaves 2 tokens, expected at least 3"),
        (lambda: Schedule.from_decisions((), (), 4, merge=VisionZip(count=4, cls="keep")), "no place in the image"),
        (lambda: Tower().class_features(), "no class token to keep"),
        (lambda: plan("divprune", num_layers=4, visual=4, grid=(2, 2), keep=(1, 2)), "one number of tokens, not 1,2"),
    ],
)
def test_refusals(ask, said):
    with pytest.raises(RerouteError, match=said):
        ask()
