"""The command: what it writes and prints, on a stand-in for model and prompts."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from evals import search
from reroute_jax.routing.divprune import DivPrune
from reroute_jax.routing.plan import Schedule
from tests.evals.searching.stand_ins import Planner, Prompts


@pytest.fixture
def stand_ins(monkeypatch):
    def install(calibration: Prompts, fresh: Prompts) -> None:
        monkeypatch.setattr(search, "load_model", lambda *args, **options: Planner())
        monkeypatch.setattr(search, "_prompts", lambda args, model, merge: (calibration, fresh))

    return install


def told(path):
    return json.loads(path.read_text())


def test_the_file_says_how_the_schedule_was_found(stand_ins, tmp_path, capsys):
    stand_ins(Prompts(), Prompts())
    out = tmp_path / "found.json"
    command = ["--budget", "1/3,64", "--rounds", "2", "--seeds", "2", "--seed", "5", "--out", str(out)]
    assert search.main(command) == 0
    files = [tmp_path / "found_1-3.json", tmp_path / "found_1-9.json"]
    for path, share in zip(files, ("1/3", "1/9"), strict=True):
        found, schedule = told(path), Schedule.from_file(path)
        assert (found["budget"], found["constraint"], found["kept"]) == (share, "tokens", "found")
        assert schedule.label == f"found {share}"
        best = found["searches"][found["best_search"]]
        assert best["calibration"] == min(one["calibration"] for one in found["searches"])
        assert [one["seed"] for one in found["searches"]] == [5, 6]
        assert [stage.lo for stage in schedule.decisions] == best["layers"]
        assert found["objective"]["calibration"] < found["objective"]["calibration_hand_set"]
        assert found["fresh"]["found_minus_hand_set"]["high"] < 0
        assert found["cost"]["spent"] <= eval(share) and found["cost"]["scoring_macs"] > 0
        assert found["cost"]["average_visual_tokens"] == pytest.approx(found["cost"]["average_on_calibration"])
        assert found["cost"]["kv_bytes"] > 0 and found["tried"] > 30
        assert found["prompts"] == {"calibration": 96, "fresh": 96}
        assert len(found["model_files"]) == 16 and found["versions"]["jax"]
        assert (found["data"], found["split"], found["tasks"]) == ("scenes", "val", ["refcoco"])
    printed = capsys.readouterr().out
    assert "1/9" in printed and str(files[1]) in printed
    before = [path.read_bytes() for path in files]
    assert search.main(command) == 0
    assert [path.read_bytes() for path in files] == before


def test_a_search_behind_a_reduction(stand_ins, tmp_path):
    """What was found and what is set by hand both stand behind it."""
    stand_ins(Prompts(), Prompts())
    out = tmp_path / "found.json"
    command = ["--budget", "2/9", "--behind", "divprune:1/2", "--rounds", "2", "--out", str(out)]
    assert search.main(command) == 0
    found, schedule = told(out), Schedule.from_file(out)
    assert (found["behind"], schedule.merge) == ("divprune:1/2", DivPrune(Fraction(1, 2)))
    assert max(found["searches"][0]["keep"]) <= 32
    assert 2 / 9 - 1 / 64 < found["cost"]["spent"] <= 2 / 9 and found["cost"]["merging_macs"] > 0
    assert found["cost"]["average_visual_tokens"] == pytest.approx(64 * found["cost"]["spent"])
    assert found["cost"]["average_visual_tokens"] == pytest.approx(found["cost"]["average_on_calibration"])


def test_a_schedule_that_does_not_win_on_fresh_prompts_is_not_kept(stand_ins, tmp_path):
    class Same(Prompts):
        def divergences(self, schedule, first=0, last=None):
            return 0 * super().divergences(schedule, first, last) + 0.5

    stand_ins(Prompts(), Same())
    out = tmp_path / "found.json"
    assert search.main(["--budget", "1/9", "--rounds", "2", "--out", str(out)]) == 0
    found = told(out)
    assert found["kept"] == "hand-set" and Schedule.from_file(out).label == "hand-set 1/9"
    layers = [int(part.split(":")[0]) for part in found["hand_set"].split()]
    assert [stage.lo for stage in Schedule.from_file(out).decisions] == layers


def test_where_nothing_set_by_hand_fits_what_was_found_is_kept_and_said(stand_ins, tmp_path, capsys):
    """All tokens in the layer before a first decision at layer 1 are already more than 1/16 of twelve layers."""
    stand_ins(Prompts(), Prompts())
    out = tmp_path / "found.json"
    assert search.main(["--budget", "1/16", "--rounds", "2", "--out", str(out)]) == 0
    found = told(out)
    assert (found["kept"], found["hand_set"], found["objective"]["calibration_hand_set"]) == ("found", None, None)
    assert (found["fresh"]["hand_set"], found["fresh"]["found_minus_hand_set"]) == (None, None)
    printed = capsys.readouterr().out
    assert "1/16: no schedule that is set by hand fits" in printed and "none fits" in printed


def test_the_time_that_all_searches_may_take_is_told(stand_ins, tmp_path, capsys):
    stand_ins(Prompts(), Prompts())
    command = ["--budget", "1/3,1/9", "--rounds", "1", "--seeds", "2", "--minutes", "1.5"]
    assert search.main([*command, "--out", str(tmp_path / "found.json")]) == 0
    assert "seeds: 2, budgets: 2, rounds of each: 1; none starts" in (said := capsys.readouterr().out)
    assert "after 1.5 minutes of each, so some 6 minutes at most" in said


def test_ctrl_c_keeps_the_best(stand_ins, tmp_path, capsys):
    stand_ins(Prompts(interrupt_after=120), Prompts())
    out = tmp_path / "found.json"
    assert search.main(["--budget", "1/9", "--rounds", "400", "--out", str(out)]) == 0
    assert told(out)["searches"][0]["stopped"] == "Ctrl-C"
    assert told(out)["kept"] == "found"


def test_ctrl_c_before_anything_was_found(stand_ins, tmp_path, capsys):
    stand_ins(Prompts(interrupt_after=3), Prompts())
    out = tmp_path / "found.json"
    assert search.main(["--budget", "1/9", "--out", str(out)]) == 130
    assert not out.exists() and "stopped before anything was found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--budget", "2"], "budget is 2"),
        (["--budget", "1/9", "--tasks", "refcoco,poem"], "'poem' is not one of"),
        (["--budget", "1/9", "--constraint", "kv"], "one visual token in every layer spends 0.212 of what"),
        (["--budget", "1/9", "--out", "nowhere/found.json"], "there is no folder nowhere"),
        (["--budget", "1/9", "--behind", "fastv:1/2"], "fastv:1/2 is no reduction before the decoder alone"),
        (
            ["--budget", "1/9,2/3", "--behind", "divprune:1/2"],
            "behind divprune:1/2 1/2 of the tokens are left",
        ),
        (["--budget", "1/9", "--out", "."], ". is a folder: give a file as --out"),
    ],
)
def test_what_cannot_be_searched_is_told(stand_ins, tmp_path, capsys, given, said):
    stand_ins(Prompts(), Prompts())
    out = [] if "--out" in given else ["--out", str(tmp_path / "found.json")]
    try:
        code = search.main([*given, *out])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err
