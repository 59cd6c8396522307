"""Host-made scores of the controls."""

import numpy as np
import pytest

from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.prior import prior_scores, uniform_rank


def schedule(prior, action, seed=0):
    return Schedule.from_decisions((1, 2, 4), (0.5, 0.5, 0.25), 6, action, score="prior", prior=prior, seed=seed)


def test_random_reroute_draws_afresh_and_deletion_once():
    fresh = prior_scores(schedule("random", "reroute"), [(4, 5)], 7)
    once = prior_scores(schedule("random", "delete"), [(4, 5)], 7)
    assert fresh.shape == once.shape == (3, 20)
    assert fresh.dtype == once.dtype == np.float32
    assert len({row.tobytes() for row in fresh}) == 3
    assert len({row.tobytes() for row in once}) == 1
    assert all(len(set(row)) == 20 for row in fresh)


def test_random_depends_on_both_seeds_alone():
    def draw(seed, row):
        return prior_scores(schedule("random", "reroute", seed), [(8, 8)], row).tobytes()

    assert draw(1, 5) == draw(1, 5)
    assert len({draw(0, 5), draw(1, 5), draw(5, 1), draw(1, 6), draw(5, 0)}) == 5
    # Neither the decisions' ratios nor the other decisions move a draw.
    short = Schedule.from_decisions((3,), (0.1,), 6, "reroute", score="prior", prior="random", seed=1)
    assert prior_scores(short, [(8, 8)], 5)[0].tobytes() == draw(1, 5)[: 64 * 4]


def test_random_is_uniform():
    once = schedule("random", "delete")
    rows = np.array([prior_scores(once, [(4, 4)], row)[0] for row in range(2000)])
    kept = (rows >= 12).mean(axis=0)
    # Four of sixteen, standard error 0.01.
    assert np.abs(kept - 0.25).max() < 0.05


def top(rank, count):
    return {tuple(cell) for cell in np.argwhere(rank < count)}


def is_regular(cells, step):
    rows, cols = ({cell[axis] for cell in cells} for axis in (0, 1))
    spaced = all(np.diff(sorted(side)).tolist() == [step] * (len(side) - 1) for side in (rows, cols))
    return spaced and len(cells) == len(rows) * len(cols)


@pytest.mark.parametrize(
    ("grid", "counts"),
    [((8, 8), {1: 8, 4: 4, 16: 2, 64: 1}), ((24, 24), {9: 8, 36: 4, 144: 2}), ((4, 12), {3: 4, 12: 2})],
)
def test_uniform_is_a_regular_grid_at_quarters(grid, counts):
    rank = uniform_rank(*grid)
    for count, step in counts.items():
        assert is_regular(top(rank, count), step)


@pytest.mark.parametrize(("grid", "count", "step"), [((8, 8), 32, 1), ((8, 8), 8, 2), ((24, 24), 288, 1)])
def test_uniform_is_a_checkerboard_at_halves(grid, count, step):
    cells = top(uniform_rank(*grid), count)
    assert len({sum(cell) // step % 2 for cell in cells}) == 1


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (5, 7), (1, 9), (15, 23)])
def test_uniform_is_an_order_of_all_cells(grid):
    rank = uniform_rank(*grid)
    assert sorted(rank.ravel()) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize("grid", [(24, 24), (15, 23), (12, 12)])
def test_uniform_is_even_at_every_count(grid):
    """However the grid is cut into quadrants, each holds its share within a few cells; and it leans to no side."""
    rank = uniform_rank(*grid)
    middle = (grid[0] // 2, grid[1] // 2)
    for count in range(8, grid[0] * grid[1], 7):
        chosen = rank < count
        share = count / (grid[0] * grid[1])
        for part in (chosen[: middle[0]], chosen[middle[0] :], chosen[:, : middle[1]], chosen[:, middle[1] :]):
            assert abs(part.sum() - share * part.size) <= 3 + 0.1 * count
        centre = np.argwhere(chosen).mean(axis=0)
        assert np.abs(centre - (np.array(grid) - 1) / 2).max() <= 0.12 * max(grid)


def test_uniform_scores_pick_the_order():
    scores = prior_scores(schedule("uniform", "reroute"), [(5, 7)], 0)
    assert scores.dtype == np.float32
    assert (scores == scores[0]).all()
    assert np.argsort(-scores[0]).tolist() == np.argsort(uniform_rank(5, 7).ravel()).tolist()
    assert (scores == prior_scores(schedule("uniform", "delete", 4), [(5, 7)], 9)).all()


def test_refusals():
    with pytest.raises(RerouteError, match="no prior"):
        prior_scores(Schedule.from_decisions((1,), (0.5,), 6), [(4, 4)], 0)


def test_two_images_give_up_their_share_at_one_pace():
    scores = prior_scores(schedule("uniform", "reroute"), [(4, 4), (8, 8)], 0)[0]
    kept = np.argsort(-scores)[:20]
    assert (kept < 16).sum() == 4
    assert sorted(kept[kept < 16]) == sorted(np.argsort(uniform_rank(4, 4).ravel())[:4])
