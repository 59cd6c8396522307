"""Decision layers and ratios of sections 7.1 and 7.2."""

from fractions import Fraction

import pytest

from reroute_jax.errors import RerouteError
from reroute_jax.routing.solver import OFFICIAL_RATIOS, decision_layers, pool_grid, solve

# 7.1: shape, average -> ratios rounded to the decimals that are printed there.
SOLVED_32 = [
    ("flat", 192, (0.2644,) * 4),
    ("flat", 128, (0.1418,) * 4),
    ("flat", 64, (0.01916,) * 4),
    ("pyramid", 192, (0.4502, 0.4502, 0.2251, 0.1126)),
    ("pyramid", 128, (0.2655, 0.2655, 0.1328, 0.0664)),
    ("pyramid", 64, (0.0808, 0.0808, 0.0404, 0.0202)),
    ("geometric", 192, (0.5965, 0.3558, 0.2123, 0.1266)),
    ("geometric", 128, (0.4570, 0.2088, 0.0954, 0.0436)),
    ("geometric", 64, (0.2162, 0.0467, 0.0101, 0.0022)),
]


@pytest.mark.parametrize(("shape", "average", "expected"), SOLVED_32)
def test_solved_ratios_at_the_official_size(shape, average, expected):
    ratios = solve(shape, decision_layers(shape, 32), 32, 576, Fraction(average))
    decimals = 5 if (shape, average) == ("flat", 64) else 4
    assert tuple(round(float(r), decimals) for r in ratios) == expected


def test_one_flat_decision_keeps_as_much_as_four():
    assert solve("flat", (3,), 32, 576, Fraction(192)) == (Fraction(23, 87),)
    assert solve("flat", (3, 7, 15, 23), 32, 576, Fraction(192)) == (Fraction(23, 87),) * 4


@pytest.mark.parametrize("shape", ["flat", "pyramid", "geometric"])
@pytest.mark.parametrize(("num_layers", "visual"), [(12, 64), (24, 576), (28, 345), (40, 576), (32, 1000)])
@pytest.mark.parametrize("share", [Fraction(1, 3), Fraction(2, 9), Fraction(3, 20)])
def test_solved_ratios_meet_the_budget(shape, num_layers, visual, share):
    layers = decision_layers(shape, num_layers)
    ratios = solve(shape, layers, num_layers, visual, share * visual)
    lengths = [b - a for a, b in zip(layers, (*layers[1:], num_layers), strict=True)]
    average = (layers[0] + sum(n * float(r) for n, r in zip(lengths, ratios, strict=True))) / num_layers
    assert average == pytest.approx(float(share), abs=1e-12)
    assert list(ratios) == sorted(ratios, reverse=True)


def test_official_ratios_where_no_rule_makes_them():
    assert OFFICIAL_RATIOS["pyramid"][64] == (0.1392, 0.1392, 0.0696, 0.0348)
    assert OFFICIAL_RATIOS["geometric"][64] == (0.2789, 0.0937, 0.0315, 0.0106)


# 7.2; below 16 layers by its rule, worked out by hand.
@pytest.mark.parametrize(
    ("num_layers", "flat", "pyramid"),
    [
        (24, (3, 5, 11, 17), (2, 5, 11, 17)),
        (28, (3, 6, 13, 20), (2, 6, 13, 20)),
        (32, (3, 7, 15, 23), (2, 7, 15, 23)),
        (36, (3, 7, 16, 25), (2, 7, 16, 25)),
        (40, (3, 8, 18, 28), (2, 8, 18, 28)),
        (16, (3, 4, 7, 11), (2, 3, 7, 11)),
        (12, (1, 2, 5, 8), (1, 2, 5, 8)),
        (8, (1, 2, 3, 5), (1, 2, 3, 5)),
        (3, (1, 2), (1, 2)),
        (2, (1,), (1,)),
    ],
)
def test_decision_layers(num_layers, flat, pyramid):
    assert decision_layers("flat", num_layers) == flat
    assert decision_layers("pyramid", num_layers) == decision_layers("geometric", num_layers) == pyramid


def test_one_layer_has_no_decision():
    with pytest.raises(RerouteError, match="1 layers leaves no layer"):
        decision_layers("flat", 1)


@pytest.mark.parametrize(
    ("shape", "num_layers", "minimum"),
    [("flat", 32, 54.0), ("pyramid", 32, 36.0), ("geometric", 32, 36.0), ("flat", 28, 61.7), ("pyramid", 28, 41.1)],
)
def test_feasible_minimum(shape, num_layers, minimum):
    layers = decision_layers(shape, num_layers)
    with pytest.raises(RerouteError, match=f"more than {minimum} "):
        solve(shape, layers, num_layers, 576, Fraction(layers[0] * 576, num_layers))
    solve(shape, layers, num_layers, 576, Fraction(layers[0] * 576, num_layers) + 3)


def test_feasible_maximum():
    # The pyramid's late stages hold at most a half and a quarter: (19.25 + 2) / 32 of the tokens.
    with pytest.raises(RerouteError, match=r"pyramid shape reaches at most 382\.5"):
        solve("pyramid", (2, 7, 15, 23), 32, 576, Fraction(383))
    assert solve("pyramid", (2, 7, 15, 23), 32, 576, Fraction(765, 2))[0] == 1
    with pytest.raises(RerouteError, match="below all visual tokens"):
        solve("geometric", (2, 7), 32, 576, Fraction(576))


def test_fewer_than_one_token():
    with pytest.raises(RerouteError, match=r"fewer than one token \(0\.33\) at the decision at layer 3"):
        solve("flat", (3,), 32, 576, Fraction(543, 10))


@pytest.mark.parametrize(
    ("grid", "tokens", "expected"),
    [
        ((24, 24), 64, (8, 8)),
        ((24, 24), 128, (11, 11)),
        ((24, 24), 192, (12, 16)),
        ((8, 8), 7, (2, 3)),
        ((8, 8), 1, (1, 1)),
        ((10, 20), 22, (3, 7)),
        ((10, 20), 18, (3, 6)),
        ((3, 2), 5, (2, 2)),
        # 72 cells are 12 x 6, 9 x 8 or 8 x 9; the second is nearest 16 x 12.
        ((16, 12), 72, (9, 8)),
    ],
)
def test_pool_grid(grid, tokens, expected):
    assert pool_grid(grid, tokens) == expected


def test_pool_grid_is_the_largest_allowed():
    for grid in [(6, 9), (7, 7), (5, 12)]:
        for tokens in range(4, grid[0] * grid[1] + 1):
            rows, cols = pool_grid(grid, tokens)
            stretch = Fraction(rows * grid[1], cols * grid[0])
            assert Fraction(2, 3) <= stretch <= Fraction(3, 2) and rows * cols <= tokens
            for r in range(1, grid[0] + 1):
                for c in range(1, grid[1] + 1):
                    allowed = Fraction(2, 3) <= Fraction(r * grid[1], c * grid[0]) <= Fraction(3, 2)
                    assert not (allowed and rows * cols < r * c <= tokens)


def test_pool_grid_that_would_distort():
    with pytest.raises(RerouteError, match="at most 2 cells resembles a 3 x 20 grid"):
        pool_grid((3, 20), 2)
