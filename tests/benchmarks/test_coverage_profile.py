"""The profile, the starts that are made of it, and what searches from there are compared by."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from benchmarks import coverage_profile
from benchmarks.coverage_profile import BY_HAND, coverage, peaks, profile_of, shapes
from evals.searching.calibration import ask, calibrate
from evals.searching.candidates import Candidate
from reroute_jax.engine.batching import lay_out
from reroute_jax.engine.groups import batch_of
from reroute_jax.engine.running import run_prefill
from reroute_jax.routing.plan import Schedule
from tests.checkpoints import smallest
from tests.evals.searching.stand_ins import SPACE, Planner, Prompts, budget

PROFILE = (0.6, 0.48, 0.42, 0.52, 0.65, 0.42, 0.26, 0.45, 0.39, 0.84, 0.81, 0.8)


def test_coverage_is_of_this_and_all_later_layers_over_the_best_possible():
    scores, paid = np.zeros((2, 1, 20)), np.zeros((2, 1, 20))
    scores[0, 0, :8] = scores[1, 0, 4:12] = 1
    paid[0, 0, :8], paid[1, 0, 8:16] = 1, 3
    np.testing.assert_allclose(coverage(scores, paid)[:, 0], [8 / 24, 12 / 24])


def test_the_profile_is_what_the_walker_scores_by_of_the_prompt_and_of_every_answer_token():
    model = smallest()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 84, 84, 3), np.uint8)
    texts = ("where is the red cup ?", "where ?")
    questions = [model.question((Image.fromarray(one), text)) for one, text in zip(pixels, texts, strict=True)]
    asked = ask(model, [(one, "refcoco", str(at)) for at, one in enumerate(questions)], 2)
    # Answers of unequal length: padding of the short one must count for nothing.
    asked[1] = replace(asked[1], answer=asked[1].answer[:1], counted=2)
    found = profile_of(calibrate(model, asked, 2, (0, 1), lambda count: None))

    schedule, expected = Schedule.from_decisions((0, 1), (1.0, 1.0), 2, "reroute"), []
    for one in asked:
        texts = [one.question.ids.tolist() + list(one.answer[:count]) for count in range(one.counted)]
        layouts = [lay_out(replace(one.question, ids=np.array(ids)), model.config, schedule) for ids in texts]
        shape = max(layouts, key=lambda layout: layout.shape.text).shape
        batch = batch_of(layouts, model.files, schedule, len(layouts), shape)
        scores = np.stack([one.scores for one in run_prefill(model.weights, batch)[1].decisions])
        expected.append(coverage(scores[:, :1], scores.sum(axis=1, keepdims=True)))
    # Measured 6e-8: shares in fp32, of prompts that are padded otherwise.
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1).mean(axis=1), atol=1e-6)
    assert found.min() > 0 and found.max() < 1


def test_peaks_are_layers_that_no_neighbour_is_above():
    assert peaks(PROFILE) == [9, 4, 0, 7]
    assert peaks((0.1, 0.2, 0.3)) == [2]


@pytest.mark.parametrize(
    ("share", "layers"),
    [("1/3", {(0, 9), (0, 4, 9), (0, 4, 7, 9)}), ("1/9", {(0, 9), (0, 4, 9), (0, 4, 7, 9)})],
)
def test_starts_decide_at_the_best_peaks_and_spend_the_budget(share, layers):
    limit = budget(Fraction(share))
    made = shapes(PROFILE, SPACE, limit)
    assert {one.layers for one in made} == layers
    for one in made:
        assert limit.share - Fraction(12, SPACE.token_layers) < limit.spent(one) <= limit.share
        reroutes = one.actions[0] == "reroute"
        assert reroutes == (max(one.keep) - min(one.keep) <= 1)
        assert reroutes or list(one.keep) == sorted(one.keep, reverse=True)


def test_the_first_decision_is_where_the_budget_lets_it_be():
    """Before layer 3 twelve layers at 2/9 would have run more than they may."""
    rising = tuple(np.linspace(0, 1, 12))
    assert {one.layers for one in shapes(rising, SPACE, budget(Fraction(2, 9)))} == {(2, 11)}


def test_the_command_tells_profile_and_searches(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(coverage_profile, "load_model", lambda *arguments: Planner())
    monkeypatch.setattr(coverage_profile, "calibrations", lambda *arguments: (Prompts(), Prompts()))
    monkeypatch.setattr(coverage_profile, "profile_of", lambda calibration: np.array(PROFILE))
    command = ["--budgets", "2/9,64", "--seeds", "2", "--rounds", "2", "--out", str(tmp_path / "out")]
    assert coverage_profile.main(command) == 0
    told = json.loads((tmp_path / "out" / "coverage_scenes-llava_2-9_1-9.json").read_text())
    assert told["profile"] == list(PROFILE) and told["versions"]["jax"]
    for share, kinds in told["searches"].items():
        assert list(kinds) == ["by hand", "profile", "both"]
        first = np.mean([one["fresh"] for one in kinds[BY_HAND]["found"]])
        for kind in kinds.values():
            own = [one["fresh"] for one in kind["found"]]
            assert len(own) == 2 and kind["minus"]["value"] == pytest.approx(np.mean(own) - first)
            for one in kind["found"]:
                assert one["calibration"] <= kind["best_start"]["calibration"]
                assert budget(Fraction(share)).holds(Candidate.parsed(one["schedule"]))
        assert set(kinds["both"]["starts"]) == {*kinds["by hand"]["starts"], *kinds["profile"]["starts"]}
    printed = capsys.readouterr().out
    assert "| 9 | 0.84 peak |" in printed and "| 1/9 | profile | `" in printed
