"""Names, budgets and switches to schedules."""

from fractions import Fraction

import pytest

from reroute_jax.errors import RerouteError
from reroute_jax.routing.cost import visual_per_layer
from reroute_jax.routing.methods import METHODS, plan
from reroute_jax.routing.nuwa import NuwaMerge
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.pool import PoolMerge


def made(method, budget=None, action="reroute", num_layers=32, grid=(24, 24), **switches) -> Schedule:
    return plan(
        method, num_layers=num_layers, visual=grid[0] * grid[1], grid=grid, budget=budget, action=action, **switches
    )


def layers(schedule):
    return [stage.lo for stage in schedule.decisions]


def counts(schedule, grid=(24, 24)):
    return schedule.keep_counts([schedule.merged_count(grid[0] * grid[1], grid)])[:, 0].tolist()


def scores(schedule):
    return [stage.score for stage in schedule.decisions]


# Solved at the official size: the table of 7.3, but true 64 for the pyramid and the geometric shape.
@pytest.mark.parametrize(
    ("method", "action", "budget", "where", "keep"),
    [
        ("fastv", "delete", 192, [3], [152]),
        ("fastv", "delete", 64, [3], [11]),
        ("fastv", "reroute", 128, [3, 7, 15, 23], [81] * 4),
        ("pdrop", "delete", 192, [2, 7, 15, 23], [343, 204, 122, 72]),
        ("pdrop", "delete", 64, [2, 7, 15, 23], [124, 26, 5, 1]),
        ("pdrop", "reroute", 128, [2, 7, 15, 23], [152, 152, 76, 38]),
        ("pdrop", "reroute", 64, [2, 7, 15, 23], [46, 46, 23, 11]),
        ("random", "delete", 192, [3], [152]),
        ("random", "reroute", 192, [3, 7, 15, 23], [152] * 4),
        ("uniform", "delete", 128, [3], [81]),
        ("uniform", "reroute", 128, [3, 7, 15, 23], [81] * 4),
        ("layout", "reroute", 192, [2, 7, 15, 23], [259, 259, 129, 64]),
        ("nuwa", "delete", 64, [16], [16]),
        ("nuwa", "delete", 128, [16], [32]),
        ("nuwa", "delete", 192, [16], [48]),
        ("nuwa", "reroute", 64, [16, 23], [16, 16]),
        ("nuwa", "reroute", 128, [16, 23], [32, 32]),
        ("nuwa", "reroute", 192, [16, 23], [48, 48]),
    ],
)
def test_official_size(method, action, budget, where, keep):
    schedule = made(method, budget, action)
    assert (layers(schedule), counts(schedule)) == (where, keep)
    assert {stage.action for stage in schedule.decisions} == {"layout" if method == "layout" else action}
    assert schedule.label == (f"{method} {budget}" if method == "layout" else f"{method} {action} {budget}")


def test_official_ratios():
    assert counts(made("pdrop", 64, ratios="official")) == [80, 80, 40, 20]
    assert counts(made("pdrop", 64, "delete", ratios="official")) == [160, 53, 18, 6]
    # Another depth moves the layers and keeps the ratios (7.2).
    qwen = made("fastv", 192, num_layers=28, ratios="official")
    assert (layers(qwen), counts(qwen)) == ([3, 6, 13, 20], [152] * 4)
    assert counts(made("fastv", 192, num_layers=28)) == [145] * 4
    assert qwen.label == "fastv reroute 192 official"


# Section 6.
@pytest.mark.parametrize(
    ("budget", "flat", "pyramid"),
    [
        (64, [59] * 4, [94, 94, 47, 23]),
        (128, [118] * 4, [189, 189, 94, 47]),
        (192, [177] * 4, [284, 284, 142, 71]),
    ],
)
def test_nuwa_variants(budget, flat, pyramid):
    one, two = made("nuwa", budget, variant="flat"), made("nuwa", budget, variant="pyramid")
    assert (layers(one), counts(one)) == ([3, 7, 15, 23], flat)
    assert (layers(two), counts(two)) == ([2, 7, 15, 23], pyramid)
    assert scores(one) == ["last_token"] * 4
    assert one.label == f"nuwa reroute {budget} flat"


def test_nuwa_scores():
    assert scores(made("nuwa", 64, "delete")) == ["previous_layer"]
    assert scores(made("nuwa", 64, "delete", score_source="own_layer")) == ["last_token"]
    assert scores(made("nuwa", 64)) == ["last_token", "last_token"]
    assert scores(made("nuwa", 64, nuwa_first_score="host")) == ["previous_layer", "last_token"]


def test_nuwa_merge():
    assert made("nuwa", 128).merge == NuwaMerge(Fraction(7, 18), 2)
    apart = made("nuwa", 0.15, self_weight_override=False).merge
    assert apart == NuwaMerge(Fraction(21, 80), 2, self_weight_override=False)
    assert made("nuwa", 1 / 3).merge == NuwaMerge(Fraction(7, 12), 3)
    assert made("nuwa", 0.34).merge.top_n == 4


def qwen(*arguments, num_layers=28, **switches):
    return made(*arguments, num_layers=num_layers, family="qwen2_5_vl", **switches)


# Section 5.1: the released ratios, and the tiers with an exact average.
@pytest.mark.parametrize(
    ("ratio", "share", "kept", "top_n"), [(0.25, 35, 84, 3), (0.5, 60, 228, 3), (0.75, 85, 343, 4)]
)
def test_released_nuwa_of_qwen(ratio, share, kept, top_n):
    schedule = qwen("nuwa", action="delete", keep_ratio=ratio)
    expected = NuwaMerge(Fraction(share, 100), top_n, Fraction(1, 10), True, False)
    assert (schedule.merge, layers(schedule), counts(schedule)) == (expected, [15], [kept])
    assert scores(schedule) == ["previous_layer_last_three"]
    assert (layers(qwen("nuwa", keep_ratio=ratio)), counts(qwen("nuwa", keep_ratio=ratio))) == ([15, 20], [kept] * 2)


@pytest.mark.parametrize(("tier", "first", "second"), [(64, 112, 8), (128, 224, 17), (192, 336, 25)])
def test_tiers_of_nuwa_on_qwen(tier, first, second):
    schedule = qwen("nuwa", tier, "delete")
    assert (schedule.merged_count(576, (24, 24)), counts(schedule)) == (first, [second])
    assert (15 * first + 13 * second) / 28 == pytest.approx(tier, abs=0.5)
    # Counts of an image follow its own size.
    assert schedule.keep_counts([91, 13]).tolist() == [[7, 1]]


def test_nuwa_variants_of_qwen():
    assert layers(qwen("nuwa", 64, variant="flat")) == [3, 6, 13, 20]
    pyramid = qwen("nuwa", 128, variant="pyramid")
    mean = sum(length * kept for length, kept in zip((4, 7, 7, 8), counts(pyramid), strict=True))
    assert (2 * 224 + mean) / 28 == pytest.approx(128, abs=1)


def test_defects_of_the_qwen_release():
    official = qwen("nuwa", 64, "delete", qwen_sim_order="window", qwen_layer14_causal=False)
    assert (official.merge.sim_order, official.bidirectional_layer) == ("window", 14)
    assert (qwen("nuwa", 64).merge.sim_order, qwen("nuwa", 64).bidirectional_layer) == ("raster", None)


def test_nuwa_at_another_size():
    small = made("nuwa", 64, num_layers=12, grid=(8, 8))
    # N1 = ceil(1.75 / 9 * 64) = 13, N2 = round(13 / 7) = 2, layers 12 / 2 and floor(23 * 12 / 32).
    assert (layers(small), counts(small, (8, 8))) == ([6, 8], [2, 2])


def test_score_source():
    assert scores(made("fastv", 64, "delete")) == ["last_token"]
    assert scores(made("fastv", 64, "delete", score_source="previous_layer")) == ["previous_layer"]
    assert scores(made("pdrop", 64, "delete", score_source="previous_layer")) == ["previous_layer"] * 4
    assert scores(made("fastv", 64, score_source="own_layer")) == ["last_token"] * 4


def test_controls():
    random = made("random", 64, seed=3)
    assert (random.prior, random.seed, set(scores(random))) == ("random", 3, {"prior"})
    assert made("uniform", 64).prior == "uniform"
    assert made("pool", 192).resolve(192) == made("pool", 192, "delete").resolve(192)
    assert made("pool", 128).merge == PoolMerge(Fraction(2, 9))
    assert made("pool", 128).merge.cells(576, (24, 24)) == (11, 11)
    assert made("pool", 128).decisions == ()
    full = made("none")
    assert (full.decisions, full.merge, full.label) == ((), None, "none")


def test_position_mode():
    for method in ("fastv", "pdrop", "nuwa", "random", "uniform", "pool", "layout"):
        assert made(method, 128).position_mode == "original"
        assert made(method, 128, position_mode="renumber").position_mode == "renumber"
    assert made("pdrop", 128, "delete", position_mode="renumber").label == "pdrop delete 128 renumber"


@pytest.mark.parametrize("action", ["delete", "reroute"])
def test_decisions_at_every_layer(action):
    every = made("fastv", 192, action, decisions="every")
    assert layers(every) == list(range(3, 32))
    assert counts(every) == [152] * 29
    assert {stage.action for stage in every.decisions} == {action}
    pairs = made("pdrop", 192, action, decisions="every:2")
    # Flat from layer 2 on: (192 * 32 / 576 - 2) / 30 of 576 tokens.
    assert layers(pairs) == list(range(2, 32, 2))
    assert counts(pairs) == [166] * 15
    assert pairs.label == f"pdrop {action} 192 every:2"


def test_nuwa_decisions_at_every_layer():
    every = made("nuwa", 64, decisions="every", nuwa_first_score="host")
    assert layers(every) == list(range(16, 32))
    # 112 * (64 * 32 / 112 - 16) / 16 is exactly 16; floats would say 15.
    assert counts(every) == [16] * 16
    assert scores(every) == ["previous_layer"] + ["last_token"] * 15
    assert scores(made("nuwa", 64, "delete", decisions="every:4")) == ["previous_layer"] * 4


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
@pytest.mark.parametrize("budget", [192, 128, 64, 0.2])
@pytest.mark.parametrize(("num_layers", "grid"), [(32, (24, 24)), (40, (24, 24)), (12, (12, 12)), (14, (9, 13))])
def test_average_is_near_the_budget(method, budget, num_layers, grid):
    """At most one token a layer below, or half a token above where a count is held at one or rounded up."""
    schedule = made(method, budget, num_layers=num_layers, grid=grid)
    visual = grid[0] * grid[1]
    entering = schedule.merged_count(visual, grid)
    average = sum(visual_per_layer(schedule, entering)) / num_layers
    wanted = {192: 1 / 3, 128: 2 / 9, 64: 1 / 9}.get(budget, budget) * visual
    # Whole grids, and squares.
    slack = {"pool": 0.15 * wanted, "downsample": 2 * wanted**0.5}.get(method, 1)
    assert wanted - slack <= average <= wanted + 0.6


def test_budget_is_relative_to_the_image():
    assert counts(made("fastv", 192, "delete", grid=(15, 23)), (15, 23)) == [91]
    assert made("fastv", 1 / 3, "delete").decisions == made("fastv", 192, "delete").decisions
    assert made("fastv", Fraction(1, 4), "delete").label == "fastv delete 0.25"


ERRORS = {
    "method": (dict(method="dart", budget=64), "'dart', expected one of: none, fastv, pdrop, nuwa, random"),
    "action": (dict(method="fastv", budget=64, action="drop"), "'drop', expected one of: delete, reroute"),
    "switch": (dict(method="fastv", budget=64, speed=3), "expected one of: decisions, first_decision, ratios"),
    "no budget": (dict(method="fastv"), r"budget is None, expected one of 192, 128, 64 or a share in \(0, 1\)"),
    "budget 65": (dict(method="fastv", budget=65), r"budget is 65, expected one of 192, 128, 64"),
    "budget 1": (dict(method="fastv", budget=1.0), "budget is 1.0"),
    "budget 0": (dict(method="fastv", budget=0), "budget is 0"),
    "budget negative": (dict(method="fastv", budget=-0.5), "budget is -0.5"),
    "no token": (dict(method="pool", budget=64, grid=(2, 4)), "leaves fewer than one of 8 visual tokens"),
    "infeasible": (dict(method="fastv", budget=0.09), r"more than 54\.0 \(0\.0938 of the tokens\)"),
    "infeasible pdrop": (dict(method="pdrop", budget=0.06), r"more than 36\.0 \(0\.0625 of the tokens\)"),
    "too much for the pyramid": (dict(method="pdrop", budget=0.8), "at most 382.5"),
    "too much for nuwa": (dict(method="nuwa", budget=0.6), "at most 4/7"),
    "decisions": (dict(method="fastv", budget=64, decisions="often"), "'often', expected 'every' or 'every:K'"),
    "decisions 0": (dict(method="fastv", budget=64, decisions="every:0"), "'every:0', expected"),
    "ratios": (dict(method="fastv", budget=64, ratios="old"), "'old', expected one of: solved, official"),
    "official share": (dict(method="fastv", budget=0.3, ratios="official"), "budgets 192, 128, 64 only"),
    "official every": (dict(method="fastv", budget=64, ratios="official", decisions="every"), "use ratios='solved'"),
    "official first": (dict(method="fastv", budget=64, ratios="official", first_decision=1), "use ratios='solved'"),
    "first decision": (dict(method="fastv", budget=64, first_decision=32), r"layer 32, expected one of 0\.\.31"),
    "first decision of nuwa": (dict(method="nuwa", budget=64, first_decision=1), "no use for first_decision=1"),
    "official nuwa": (dict(method="nuwa", budget=64, ratios="official"), "ratios='official', it is for 'fastv'"),
    "source": (dict(method="fastv", budget=64, score_source="last"), "expected one of: own_layer, previous_layer"),
    "source of reroute": (dict(method="fastv", budget=64, score_source="previous_layer"), "layer 7: after a decision"),
    "source of nuwa reroute": (dict(method="nuwa", budget=64, score_source="own_layer"), "belongs to action='delete'"),
    "source of control": (dict(method="random", budget=64, score_source="own_layer"), "no use for score_source"),
    "position mode": (dict(method="fastv", budget=64, position_mode="gap"), "expected one of: original, renumber"),
    "variant": (dict(method="nuwa", budget=64, variant="steep"), "expected one of: flat, pyramid"),
    "variant of fastv": (dict(method="fastv", budget=64, variant="flat"), "variant='flat', it is for 'nuwa'"),
    "variant of deletion": (dict(method="nuwa", budget=64, action="delete", variant="flat"), "action='reroute'"),
    "variant and every": (dict(method="nuwa", budget=64, variant="flat", decisions="every"), "give one of them"),
    "first score": (dict(method="nuwa", budget=64, nuwa_first_score="x"), "expected one of: own_layer, host"),
    "first score of deletion": (
        dict(method="nuwa", budget=64, action="delete", nuwa_first_score="host"), "action='reroute'"),
    "override of pdrop": (dict(method="pdrop", budget=64, self_weight_override=False), "it is for 'nuwa'"),
    "seed of fastv": (dict(method="fastv", budget=64, seed=1), "no use for seed=1, it is for 'random'"),
    "decisions of none": (dict(method="none", decisions="every"), "no use for decisions='every'"),
    "decisions of pool": (dict(method="pool", budget=64, decisions="every"), "no use for decisions='every'"),
    "layout deletion": (dict(method="layout", budget=64, action="delete"), "no action='delete'"),
    "shallow nuwa": (dict(method="nuwa", budget=64, num_layers=2), "needs two decisions"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_gives_one_line(name):
    asked, message = ERRORS[name]
    with pytest.raises(RerouteError, match=message) as caught:
        made(**asked)
    assert "\n" not in str(caught.value)


def test_grid_must_hold_the_tokens():
    with pytest.raises(RerouteError, match="4 x 4 does not hold 17 visual tokens"):
        plan("fastv", num_layers=32, visual=17, grid=(4, 4), budget=192)
