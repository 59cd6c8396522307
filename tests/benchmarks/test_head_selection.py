"""Decisions that rank by some heads, and how they are chosen."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from benchmarks.head_selection import (
    ALL_HEADS,
    CHOSEN,
    METRICS,
    accuracies,
    greedy,
    markdown,
    options,
    told_choice,
    weights_of,
    with_heads,
)
from reroute_jax.engine import programs
from reroute_jax.routing import simulator
from reroute_jax.routing.plan import Schedule
from tests.checkpoints import smallest
from tests.tiny import random_ids, random_pixels

SCHEDULE = Schedule.from_decisions((0, 1), (0.5, 0.25), 2, "reroute")


def asking(choice):
    model = smallest()
    chosen = jax.tree.map(lambda leaf: leaf, model.module)
    chosen.decoder = with_heads(model.module.decoder, choice)
    return replace(model, module=chosen)


def given() -> dict:
    return {"input_ids": np.array([random_ids(60, start=6, seed=0)]), "pixel_values": random_pixels(1, seed=1)}


def scores_of(model) -> np.ndarray:
    return np.stack([scores[0] for scores in model.prefill(**given(), schedule=SCHEDULE, trace=True).trace.scores])


def test_a_decision_ranks_by_the_mean_of_its_heads():
    plain = scores_of(smallest())
    np.testing.assert_array_equal(scores_of(asking({})), plain)
    # Layer 0 sees the same rows whatever is chosen there.
    alone = np.stack([scores_of(asking({0: (head,)}))[0] for head in range(4)])
    assert np.abs(alone - plain[0]).max(axis=1).min() > 1e-3
    # Measured 1.2e-7: means in fp32, summed in other orders.
    np.testing.assert_allclose(alone.mean(axis=0), plain[0], rtol=1e-6)
    np.testing.assert_allclose(scores_of(asking({0: (0, 2, 3)}))[0], alone[[0, 2, 3]].mean(axis=0), rtol=1e-6)


def test_the_simulator_and_the_walker_take_the_same_heads():
    model = asking({0: (1,), 1: (0, 2, 3)})
    walked = model.prefill(**given(), schedule=SCHEDULE, trace=True)
    batch = model.inputs(**given())
    features, anchors = programs.encode(model.weights, batch.images)
    run = simulator.start(model.module.decoder, batch.prompt, features, anchors, (), 0)
    simulated = simulator.simulate(run, SCHEDULE)
    for one, selected in zip(simulated.decisions, walked.trace.selected, strict=True):
        assert np.flatnonzero(one.selected[0]).tolist() == selected[0].tolist()
    # Measured 2.4e-6 of logits up to 8: fp32, rows in other places.
    np.testing.assert_allclose(run.decoder.logits(simulated.final)[:, 0], walked.logits, atol=2e-5)


@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (2,), (0, 1, 3)])
def test_weights_make_the_mean_over_all_that_over_some(heads):
    values = np.array([1.0, 2.0, 4.0, 8.0])
    assert (weights_of(heads, 4) * values).mean() == pytest.approx(values[list(heads)].mean())


def test_each_head_and_all_but_each():
    assert options(4) == [(0,), (1,), (2,), (3,), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]
    assert options(2) == [(0,), (1,)]


def test_a_choice_rests_on_those_before_it_and_keeps_all_heads_where_nothing_is_better():
    def objective(choice):
        value = 1.0 - 0.2 * (choice.get(1) == (2,)) - 0.1 * (choice.get(1) == (0, 1, 3)) + 0.1 * (3 in choice)
        return value - 0.3 * (choice.get(1) == (2,) and choice.get(5) == (0,)) + 0.1 * (choice.get(5) == (1,))

    asked = []
    choice, told = greedy((1, 3, 5), 4, objective, lambda: asked.append(1))
    assert choice == {1: (2,), 5: (0,)} and len(asked) == 24
    assert [one["before"] for one in told] == pytest.approx([1.0, 0.8, 0.8])
    assert told_choice(choice) == "1:2 5:0" and told_choice({}) == ALL_HEADS


def test_answers_are_compared_on_the_same_questions():
    runs, hits = {ALL_HEADS: ALL_HEADS, CHOSEN: "1:2"}, {ALL_HEADS: (1, 0, 0, 0), CHOSEN: (1, 1, 0, 1)}
    lines = {
        name: [{"scene": str(at), "metrics": {runs[name]: dict.fromkeys(METRICS, hit)}} for at, hit in enumerate(own)]
        for name, own in hits.items()
    }
    found = accuracies(lines, runs)
    assert (found["ACC@0.5"][ALL_HEADS], found["ACC@0.5"][CHOSEN]) == (0.25, 0.75)
    assert found["ACC@0.5"]["difference"]["value"] == 0.5 and found["ACC@0.5"]["difference"]["low"] >= 0
    about = {"schedule": "1:9d", "choice": "1:2", "divergence": {}, "accuracy": found}
    assert "| ACC@0.5 | 25.0 | 75.0 | +50.0 (" in markdown(about)
