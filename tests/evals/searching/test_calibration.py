"""What calibration runs, and what it keeps in memory."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from evals.searching.calibration import ask, calibrate, kept_layers
from evals.searching.candidates import merge_of
from reroute_jax.engine.batching import lay_out
from reroute_jax.engine.groups import batch_of
from reroute_jax.engine.running import run_prefill
from reroute_jax.errors import RerouteError
from reroute_jax.routing import simulator
from reroute_jax.routing.plan import Schedule
from tests.checkpoints import smallest
from tests.evals.searching.stand_ins import Planner
from tests.marks import cases

OTHERS = {"hiprune", "visionzip", "pool", "downsample"}  # than the reduction that was measured
ONE = 10 * 100 * 128 * 4  # bytes before one layer of 10 prompts with 100 slots: hidden size 128, fp32


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(12 * ONE, tuple(range(12))), (3 * ONE, (0, 4, 8)), (11 * ONE, (0, 2, 4, 6, 8, 10)), (ONE, (0,))],
)
def test_as_many_layers_as_fit_evenly_spaced_from_0_on(limit, kept):
    assert kept_layers(Planner(), 10, 100, limit) == kept


def test_a_limit_that_holds_no_layer_is_told():
    with pytest.raises(RerouteError, match="10 prompts of 100 slots take"):
        kept_layers(Planner(), 10, 100, ONE - 1)


@pytest.mark.parametrize("method", cases(["divprune", "hiprune", "visionzip", "pool", "downsample"], slow=OTHERS))
def test_behind_a_reduction_schedules_run_on_what_it_leaves_and_are_held_against_all_tokens(method):
    model = smallest()
    merge = merge_of(model, f"{method}:1/2")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 84, 84, 3), np.uint8)
    texts = ("where is the red cup ?", "where ?")
    questions = [model.question((Image.fromarray(one), text)) for one, text in zip(pixels, texts, strict=True)]
    asked = ask(model, [(one, "refcoco", str(number)) for number, one in enumerate(questions)], 2)
    prompts = calibrate(model, asked, 2, (0,), lambda count: None, merge)
    schedule = replace(Schedule.from_decisions((1,), (Fraction(1, 3),), 2, "reroute"), merge=merge)
    (started,), (whole,) = prompts.chunks, prompts.whole
    final = simulator.simulate(started, schedule).final
    for found, wanted in ((final, schedule), (whole, model.plan("none"))):
        batch = batch_of([lay_out(one, model.config, wanted) for one in questions], model.files, wanted, 2)
        expected = run_prefill(model.weights, batch)[1].logits
        np.testing.assert_allclose(model.module.decoder.logits(found[:, 0]), expected, atol=1e-4)
    assert (prompts.divergences(schedule) > 0).all()
