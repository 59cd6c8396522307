"""Schedules come back from a run folder's JSON as they were."""

import json

import pytest

from evals.harness.routes import Routes, named_run
from evals.harness.schedules import read_schedule
from reroute_jax.errors import RerouteError
from reroute_jax.routing.methods import METHODS, plan
from reroute_jax.routing.plan import ACTIONS

ROUTES = [
    (name, action)
    for name, method in METHODS.items()
    for action in ACTIONS
    if action == "reroute" or method.has_actions
]
SIZES = {"num_layers": 28, "visual": 576, "grid": (24, 24)}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(("method", "action"), ROUTES)
def test_a_schedule_survives_its_folder(method, action, family):
    budget = None if method == "none" else 128
    schedule = plan(method, **SIZES, family=family, budget=budget, action=action)
    written = json.loads(json.dumps(Routes((named_run(schedule),), ()).settings))
    assert [read_schedule(record) for record in written.values()] == [schedule]


@pytest.mark.parametrize("record", [{}, {"stages": [], "merge": None}, {"stages": [{"lo": 0}], "merge": None}])
def test_what_is_no_schedule_is_refused(record):
    with pytest.raises(RerouteError):
        read_schedule(record)
