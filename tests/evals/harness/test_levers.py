"""Levers of a schedule taken apart."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from evals import levers as command
from evals.harness.lever_figure import draw
from evals.harness.levers import LEVERS, Cell, cells, effects
from evals.harness.matrix import Outcome
from evals.harness.metrics import Resampler
from evals.harness.report import Scored
from evals.harness.routes import FULL, named_run
from reroute_jax.errors import RerouteError
from reroute_jax.routing.cost import visual_per_layer
from reroute_jax.routing.floors import stride_grid

QUESTIONS = 40
RESAMPLER = Resampler(tuple(str(number // 2) for number in range(QUESTIONS)))


def made(levers=LEVERS, share=Fraction(2, 9)):
    return cells(levers, 12, (8, 8), share, "2/9", found_layers=(1, 2, 5))


def test_every_combination_is_there_once_and_spends_the_same():
    found = made()
    assert len(found) == len({cell.schedule.label for cell in found}) == 2 * 2 * 3 * 3 * 3
    for layers in LEVERS["layers"]:
        spent = {tuple(visual_per_layer(cell.schedule, 64)) for cell in found if cell.level("layers") == layers}
        [tokens] = spent
        assert 0 <= 64 * 2 / 9 - np.mean(tokens) < 1


def test_levels_reach_the_schedule():
    cell = next(
        cell for cell in made() if {level for _, level in cell.levels} >= {"renumber", "grid", "every", "layout"}
    )
    decisions = cell.schedule.decisions
    assert cell.schedule.position_mode == "renumber"
    assert {stage.action for stage in decisions} == {"layout"}
    assert [stage.lo for stage in decisions] == list(range(1, 12))
    assert decisions[0].floor is not None
    assert 2 * stride_grid((8, 8), decisions[0].floor.stride).sum() <= decisions[0].keep(64)


def test_a_grid_without_room_is_refused():
    with pytest.raises(RerouteError, match="keeps 1 tokens has no room"):
        made(share=Fraction(1, 10))


def test_an_effect_is_the_mean_difference_of_its_pairs():
    """Reroute is worth .2 and a grid .1, which reroute triples."""
    levers = {"coverage": ("none", "grid"), "layers": ("released", "every"), "action": ("delete", "reroute")}
    noise = np.random.default_rng(0).normal(size=QUESTIONS)
    template = made()[0]
    found = {}
    for coverage in levers["coverage"]:
        for layers in levers["layers"]:
            for action in levers["action"]:
                grid, reroute = coverage == "grid", action == "reroute"
                cell = replace(template, levels=(("coverage", coverage), ("layers", layers), ("action", action)))
                found[cell] = noise + 0.1 * grid + 0.2 * reroute + 0.2 * grid * reroute
    worth = {(e.lever, e.level, e.within): (e.pairs, e.worth.value) for e in effects(found, levers, RESAMPLER)}
    assert worth["coverage", "grid", "all"] == (4, pytest.approx(0.2))
    assert worth["coverage", "grid", "delete"] == (2, pytest.approx(0.1))
    assert worth["coverage", "grid", "reroute"] == (2, pytest.approx(0.3))
    assert worth["coverage", "grid", "reroute minus delete"] == (2, pytest.approx(0.2))
    assert worth["action", "reroute", "all"] == (4, pytest.approx(0.3))
    assert worth["layers", "every", "all"] == (4, pytest.approx(0))


def test_intervals_are_of_questions_not_of_cells():
    levers = {"action": ("delete", "reroute")}
    template = made()[0]
    one, two = (Cell((("action", action),), template.schedule) for action in levers["action"])
    gain = np.random.default_rng(1).normal(0.5, 1, QUESTIONS)
    [effect] = effects({one: np.zeros(QUESTIONS), two: gain}, levers, RESAMPLER)
    assert effect.worth.low < gain.mean() < effect.worth.high
    assert effect.worth.high - effect.worth.low == pytest.approx(4 / QUESTIONS**0.5, rel=0.5)


def test_worth_of_levels_reads_what_runs_scored_and_spent():
    """Two runs of two questions, one of which deletion gets wrong."""
    levers = {lever: levels[:1] for lever, levels in LEVERS.items()} | {"action": ("delete", "reroute")}
    runs = {named_run(cell.schedule): cell for cell in made(levers)}
    names = [run.name for run in runs]
    columns = dict(zip([FULL, *names], np.array([[[1.0], [1]], [[1], [0]], [[1], [1]]]), strict=True))
    scored = Scored([command.METRIC], columns, lambda found: found, Resampler(("0", "1")), {}, 2, {})
    spent = {name: {"cost": {"average_visual_tokens": tokens}} for name, tokens in zip(names, (14, 13.5), strict=True)}
    done = Outcome("refcoco", "grounding", command.METRIC, 100, {"runs": spent}, scored)
    [row] = command.worth_of_levels(done, runs, levers)
    assert row["worth"]["value"] == 50
    assert [row[what] for what in ("questions", "tokens_least", "tokens_most", "full", "mean")] == [
        2,
        13.5,
        14,
        1,
        0.75,
    ]


def test_the_table_has_a_line_for_each_level():
    row = {"model": "m", "budget": "2/9", "lever": "coverage", "level": "grid", "against": "none", "within": "all"}
    text = command.table([row | {"worth": {"value": 1.26, "low": -0.5, "high": 3}}])
    assert text.splitlines()[-1] == "| m | 2/9 | coverage | grid | none | +1.3 (-0.5 to +3.0) |  |  |  |"
    text = command.table([row | {"worth": {"value": 1.26, "low": None, "high": None}}])
    assert text.splitlines()[-1] == "| m | 2/9 | coverage | grid | none | +1.3 |  |  |  |"


def test_the_figure_has_every_level_and_budget(tmp_path):
    worth = {"value": 1.26, "low": -0.5, "high": 3}
    row = {"model": "m", "lever": "coverage", "level": "grid", "worth": worth}
    rows = [row | {"budget": budget, "within": within} for budget in ("2/9", "1/9") for within in ("all", "reroute")]
    draw(rows, tmp_path / "levers.svg")
    drawn = (tmp_path / "levers.svg").read_text()
    for text in ("coverage: grid", "m, 2/9", "m, 1/9", "reroute"):
        assert f"<!-- {text} -->" in drawn
    draw([row | {"worth": {"value": 1.26, "low": None, "high": None}} for row in rows], tmp_path / "levers.svg")


@pytest.mark.parametrize(
    ("given", "message"),
    [("speed=fast", "'speed' is not one of"), ("action=drop", "'drop' is not one of delete, reroute, layout")],
)
def test_unknown_levers_and_levels_are_refused(given, message, capsys):
    with pytest.raises(SystemExit):
        command.main(["--levels", given])
    assert message in capsys.readouterr().err
