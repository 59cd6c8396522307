"""Schedules as JSON and back."""

import json
from fractions import Fraction

import pytest

from reroute_jax.errors import RerouteError
from reroute_jax.routing.methods import METHODS, plan
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.stages import ACTIONS

ROUTES = [
    (name, action)
    for name, method in METHODS.items()
    for action in ACTIONS
    if action == "reroute" or method.has_actions
]
SIZES = {"num_layers": 28, "visual": 576, "grid": (24, 24)}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(("method", "action"), ROUTES)
def test_a_schedule_survives_its_record(method, action, family):
    budget = None if method == "none" else 128
    schedule = plan(method, **SIZES, family=family, budget=budget, action=action)
    assert Schedule.from_record(json.loads(json.dumps(schedule.to_record()))) == schedule


def test_a_schedule_survives_its_file(tmp_path):
    keep = (Fraction(1, 3), 0.1, 5)
    schedule = Schedule.from_decisions((0, 2, 5), keep, 8, ("delete", "reroute", "layout"), label="2/9")
    schedule.to_file(tmp_path / "one.json", {"seed": 3})
    assert Schedule.from_file(tmp_path / "one.json") == schedule
    written = json.loads((tmp_path / "one.json").read_text())
    assert written["seed"] == 3
    assert [stage["ratio"] for stage in written["schedule"]["stages"]] == ["1/3", 0.1, None]


@pytest.mark.parametrize("record", [{}, {"stages": [], "merge": None}, {"stages": [{"lo": 0}], "merge": None}])
def test_what_is_no_schedule_is_refused(record):
    with pytest.raises(RerouteError):
        Schedule.from_record(record)


FILES = {
    "not json": ("{", "is not a schedule file"),
    "without one": ('{"seed": 3}', "is not a schedule file .*'schedule'"),
    "surplus": ('{"schedule": {"stages": [{"lo": 0, "hi": 4}], "speed": 2}}', "unexpected keyword argument 'speed'"),
    "bad": ('{"schedule": {"stages": [{"lo": 0, "hi": 4, "count": 0}]}}', "keeps 0 visual tokens"),
    "unknown merge": ('{"schedule": {"stages": [{"lo": 0, "hi": 4}], "merge": {"kind": "Mix"}}}', "KeyError: 'Mix'"),
    "text": ('{"schedule": "pdrop"}', "cannot be read from 'pdrop'"),
    "deep": ("[" * 100_000, "is not a schedule file"),
    "half a layer": ('{"schedule": {"stages": [{"lo": 0, "hi": 3.5}]}}', "hi of a Stage is 3.5, expected int"),
    "half a token": (
        '{"schedule": {"stages": [{"lo": 0, "hi": 4, "count": 2.5, "action": "delete", "score": "last_token"}]}}',
        "count of a Stage is 2.5, expected int",
    ),
    "a ratio as text": ('{"schedule": {"stages": [{"lo": 0, "hi": 4, "ratio": "0.5"}]}}', "ratio of a Stage is '0.5'"),
    "a fraction of 0": ('{"schedule": {"stages": [{"lo": 0, "hi": 4, "ratio": "2/0"}]}}', "ratio of a Stage is '2/0'"),
    "a switch as text": (
        '{"schedule": {"stages": [{"lo": 0, "hi": 4}], "first_image_only": "no"}}',
        "first_image_only of a schedule is 'no', expected bool",
    ),
    "a merge of true": (
        '{"schedule": {"stages": [{"lo": 0, "hi": 4}], "merge": {"kind": "PoolMerge", "share": true}}}',
        "share of a PoolMerge is True, expected Fraction",
    ),
    "a layer that is not there": (
        '{"schedule": {"stages": [{"lo": 0, "hi": 4}], "bidirectional_layer": 4}}',
        r"expected a layer in 0\.\.3",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_gives_one_line_that_names_it(name, tmp_path):
    text, message = FILES[name]
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(RerouteError, match=f"bad.json.*{message}") as caught:
        Schedule.from_file(tmp_path / "bad.json")
    assert "\n" not in str(caught.value)
