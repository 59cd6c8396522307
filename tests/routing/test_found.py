"""Schedules that ship with a checkpoint: found for exactly the asked budget, and nothing else."""

from __future__ import annotations

import argparse
import json
from fractions import Fraction

import pytest

from convert.embedded import CHECKPOINTS
from evals.harness.identity import fingerprint
from evals.harness.routes import Routes, beside_found, check_routes, named_run, plan_routes
from reroute_jax.commandline.routes import SWITCH_ARGUMENTS
from reroute_jax.errors import RerouteError
from reroute_jax.routing.cost import visual_per_layer
from reroute_jax.routing.found import FOUND, found_schedule
from reroute_jax.routing.plan import Schedule
from tests.evals.stub import StubModel

SHARES = ("1/3", "2/9", "1/9")


class Found(StubModel):
    """With a schedule for 2/9 in its folder."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.folder = folder
        Schedule.from_decisions((1, 5), (0.3, 0.1), 12, label="found 2/9").to_file(folder / "found_2-9.json")

    def plan(self, method: str, **options) -> Schedule:
        return found_schedule(self.folder, **options) if method == FOUND else super().plan(method, **options)


def arguments(**given) -> argparse.Namespace:
    names = ("method", "action", "budget", "preset", "schedule", *SWITCH_ARGUMENTS)
    return argparse.Namespace(**{**dict.fromkeys(names), "seed": 0, "compare": False, "controls": False, **given})


def runs(model: Found, **given) -> list[str]:
    args = arguments(**given)
    check_routes(args)
    return [run.name for run in beside_found(plan_routes(args, model), args, model).runs]


@pytest.mark.parametrize("budget", [128, "128", "2/9", Fraction(2, 9)])
def test_it_is_found_by_its_exact_budget(tmp_path, budget):
    assert Found(tmp_path).plan(FOUND, budget=budget).label == "found 2/9"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"budget": "1/9"}, r"found for a budget of 1/9 \(it has 2/9\)"),
        ({"budget": 0.22}, r"found for a budget of 11/50 \(it has 2/9\)"),
        ({"budget": None}, "budget is None"),
        ({"budget": 128, "decisions": "every"}, "no use for decisions"),
    ],
)
def test_anything_else_is_refused(tmp_path, asked, said):
    with pytest.raises(RerouteError, match=said):
        Found(tmp_path).plan(FOUND, **asked)


def test_it_stands_under_the_method_that_was_asked_for(tmp_path):
    model = Found(tmp_path)
    assert runs(model, method="nuwa") == ["full", "nuwa-reroute-128", "found-2-9"]
    assert runs(model, method="pdrop", budget=64) == ["full", "pdrop-reroute-64"]
    assert runs(model, method=FOUND) == ["full", "found-2-9"]
    assert runs(model, method="none") == ["full"]
    assert "found-2-9" not in runs(model, method="nuwa", compare=True)
    with pytest.raises(RerouteError, match="leave out --action"):
        runs(model, method=FOUND, action="delete")


def test_what_was_found_is_no_part_of_a_checkpoints_identity(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    Found(tmp_path)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("model", ["scenes-llava", "scenes-qwen"])
@pytest.mark.parametrize("share", SHARES)
def test_the_embedded_models_come_with_theirs(model, share):
    folder = CHECKPOINTS / model
    schedule = found_schedule(folder, share)
    about = json.loads((folder / f"found_{share.replace('/', '-')}.json").read_text())
    assert (about["kept"], about["model"], schedule.label) == ("found", model, f"found {share}")
    assert sum(visual_per_layer(schedule, 64)) <= Fraction(share) * 12 * 64
    assert about["model_files"] == fingerprint(folder)


def test_a_schedule_is_no_run_of_all_tokens_by_its_name(tmp_path):
    """Both would be one file of answers."""
    schedule = Schedule.from_decisions((1, 5), (0.3, 0.1), 12)
    for name in ("full", "Full", "mine"):
        schedule.to_file(tmp_path / f"{name}.json")
    assert runs(Found(tmp_path), schedule=str(tmp_path / "mine.json")) == ["full", "mine"]
    for name in ("full", "Full"):
        with pytest.raises(RerouteError, match=r"two runs are called full: .* or other labels"):
            runs(Found(tmp_path), schedule=str(tmp_path / f"{name}.json"))


def test_two_runs_have_two_names():
    """1/3 and 0.3333 read alike, and the second would be given the answers of the first."""
    runs = tuple(named_run(StubModel().plan("pdrop", budget=budget)) for budget in ("1/3", "0.3333"))
    assert runs[0].schedule != runs[1].schedule
    with pytest.raises(RerouteError, match=r"two runs are called pdrop-reroute-0.3333: give budgets that differ"):
        Routes(runs, ())
