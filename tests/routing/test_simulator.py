"""The simulator against the walker: what was selected, logits, and greedy tokens."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reroute_jax
from reroute_jax.decoder import Decoder
from reroute_jax.engine import programs
from reroute_jax.engine.model import Model
from reroute_jax.engine.sampling import Sampling, row_sampling
from reroute_jax.engine.segments import decode_segments
from reroute_jax.errors import RerouteError
from reroute_jax.routing import simulator
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.repair import REPAIRS
from reroute_jax.routing.stages import ACTIONS
from tests import tiny_qwen
from tests.checkpoints import qwen_pair, small, small_qwen3, smallest
from tests.ragged import padded
from tests.tiny import random_ids, random_pixels

MASKED = jax.jit(simulator.masked)
LOGITS = jax.jit(Decoder.logits)
NEW = 4  # tokens of an answer
REPAIR_NAMES = tuple(filter(None, REPAIRS))
ROWS = ((90, 6, 0), (60, 0, 1), (47, None, 2))  # length, where the image stands, seed: ragged, and one without image


def given_rows() -> dict:
    ids, mask = padded([random_ids(length, start=at, seed=seed) for length, at, seed in ROWS], left=False)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": random_pixels(2, seed=1)}


def started(model: Model, prompts: dict, answers=(), slots: int = 0, kept=(0,)) -> simulator.Started:
    batch = model.inputs(**prompts)
    features, anchors = programs.encode(model.weights, batch.images)
    return simulator.start(model.module.decoder, batch.prompt, features, anchors, answers, slots, kept)


def test_quantised_weights_are_simulated_as_they_are():
    pytest.importorskip("qwix")
    model = reroute_jax.load(smallest().folder, "float32", quantise="int8")
    schedule = Schedule.from_decisions((1,), (0.5,), 2, "reroute")
    run = started(model, given_rows())
    found = LOGITS(run.decoder, simulator.simulate(run, schedule).final)
    np.testing.assert_allclose(found[:, 0], model.prefill(**given_rows(), schedule=schedule).logits, atol=1e-4)


def check(model: Model, prompts: dict, schedule: Schedule) -> None:
    """Both forms, one of which knows no repairs, and answers decoded from the simulated prefill."""
    walked = model.prefill(**prompts, schedule=schedule, trace=True)
    tokens = model.generate_ids(**prompts, schedule=schedule, max_new_tokens=NEW)
    run = started(model, prompts, tokens[:, :-1].tolist(), NEW - 1, kept=(0, 2))
    found = simulator.simulate(run, schedule)
    logits = np.asarray(LOGITS(run.decoder, found.final))
    np.testing.assert_allclose(logits[:, 0], walked.logits, atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(axis=-1), tokens)
    for decision, selected in zip(found.decisions, walked.trace.selected, strict=True):
        for row, chosen in zip(np.asarray(decision.selected), selected, strict=True):
            np.testing.assert_array_equal(np.flatnonzero(row), chosen[chosen >= 0])
    assert decoded(model, prompts, schedule) == tokens.tolist()
    if not any(stage.repair for stage in schedule.decisions[:-1]):
        check_masked(run, schedule, logits)


def check_masked(run: simulator.Started, schedule: Schedule, logits: np.ndarray) -> None:
    arrays = simulator.schedule_arrays(schedule, run.visual)
    x, selected = MASKED(run.decoder, run.rows, run.last, run.prompt.feature, run.features, arrays)
    slots = run.last[:, None] + np.arange(NEW)
    final = np.take_along_axis(np.asarray(x), np.asarray(slots)[..., None], axis=1)
    np.testing.assert_allclose(LOGITS(run.decoder, final), logits, atol=1e-4)
    assert np.asarray(selected).sum() == arrays.keep.sum()


def decoded(model: Model, prompts: dict, schedule: Schedule) -> list[list[int]]:
    """With room for forced tokens, which stays empty: the programs are those that ran with them."""
    batch, run = model.inputs(**prompts), started(model, prompts, slots=NEW - 1)
    prefilled = simulator.prefill(run, schedule)
    rows = row_sampling(Sampling(limit=NEW), range(len(batch.live)))
    segments = decode_segments(model.weights.decoder, prefilled, batch.seen, batch.live, rows)
    return np.concatenate([segment.tokens for segment in segments], axis=1)[:, :NEW].tolist()


@st.composite
def schedules(draw, repairs: bool) -> Schedule:
    """Of the 4 layers of `small`. A decision after one that narrows keeps no more than that one. repairs: behind every
    reroute, of which there is one that others come after."""
    layers = sorted(draw(st.sets(st.integers(0, 3), min_size=1 + repairs)))
    actions = [draw(st.sampled_from(ACTIONS)) for _ in layers]
    if repairs:
        actions[draw(st.integers(0, len(layers) - 2))] = "reroute"
    keep, repair, most = [], [], 36
    for action in actions:
        repair.append(draw(st.sampled_from(REPAIR_NAMES)) if repairs and action == "reroute" else None)
        keep.append(draw(st.integers(1, most)))
        most = keep[-1] if action != "reroute" else most
    return Schedule.from_decisions(layers, keep, 4, action=actions, repair=repair)


@pytest.mark.slow
def test_equals_the_walker():
    actions = ("reroute", "layout", "delete")
    check(small(), given_rows(), Schedule.from_decisions((0, 1, 3), (16, 9, 9), 4, action=actions))


def test_repairs_equal_the_walker():
    """Two repairs in turn, and tokens that wait through both; a program whose limit leaves no room for proxies beside
    all other tokens; rows of one proxy and of two."""
    repairs = ("proxy_offset", "mean_offset", None)
    schedule = Schedule.from_decisions((0, 1, 3), (0.92, 9, 12), 4, repair=repairs)
    ids, mask = padded([random_ids(110, visual=72, start=9, seed=1), random_ids(70, start=0, seed=2)], left=False)
    prompts = {"input_ids": ids, "attention_mask": mask, "pixel_values": random_pixels(3, seed=5)}
    run = started(small(), prompts)
    assert run.caps[-2:] == (64, 72) and (schedule.keep_counts(run.visual)[0] == (66, 33)).all()
    check(small(), prompts, schedule)
    with pytest.raises(RerouteError, match="repair='proxy_offset' cannot be simulated"):
        simulator.schedule_arrays(schedule, np.array([36]))


@pytest.mark.slow
@pytest.mark.parametrize("repairs", [False, True])
@settings(max_examples=8, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_equals_the_walker_whatever_the_schedule(repairs, data):
    check(small(), given_rows(), data.draw(schedules(repairs)))


PROXIES = ("proxy_offset", None, None, None)


@pytest.mark.parametrize(
    ("loaded", "repair"),
    [
        pytest.param(lambda: qwen_pair()[1], PROXIES, marks=pytest.mark.slow, id="qwen-repair"),
        pytest.param(small_qwen3, None, id="qwen3"),
        pytest.param(small_qwen3, PROXIES, marks=pytest.mark.slow, id="qwen3-repair"),
    ],
)
def test_equals_the_walker_under_m_rope(loaded, repair):
    """Three positions a token, and answers at positions of their own; decisions before, between and behind what
    DeepStack adds, with every action; a row without an image."""
    model = loaded()
    grids = (((5, 6),), ((3, 4),), ())
    rows = [tiny_qwen.random_ids(size, own, start=4, seed=size) for size, own in zip((70, 40, 30), grids, strict=True)]
    ids, mask = padded(rows, left=False)
    pixels, sizes = tiny_qwen.random_patches([grid for own in grids for grid in own])
    prompts = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": sizes}
    actions, depth = ("reroute", "delete", "layout", "reroute"), model.config.num_layers
    layers, keep = (0, 1, 2, depth - 1), (0.5, 0.5, 0.4, 0.4)
    schedule = Schedule.from_decisions(layers, keep, depth, action=actions, repair=repair)
    check(model, prompts, schedule)


@pytest.mark.parametrize(
    ("what", "schedule"),
    [
        ("score='previous_layer'", Schedule.from_decisions((2,), (5,), 4, score="previous_layer")),
        ("position_mode='renumber'", Schedule.from_decisions((2,), (5,), 4, position_mode="renumber")),
        ("deepstack='running'", Schedule.from_decisions((2,), (5,), 4, deepstack="running")),
        ("bidirectional_layer=1", Schedule.from_decisions((2,), (5,), 4, bidirectional_layer=1)),
    ],
)
def test_what_cannot_be_simulated_is_refused(what, schedule):
    with pytest.raises(RerouteError, match=what):
        simulator.simulate(started(small(), given_rows()), schedule)


def test_an_answer_needs_its_slots():
    with pytest.raises(RerouteError, match="3 tokens, expected at most the 2 slots"):
        started(small(), given_rows(), [[1, 2, 3]], 2)


def test_bytes_of_a_7b_model():
    """LLaVA-1.5-7B, a prompt of 64 text slots, 576 visual ones and 16 forced ones, in bf16."""
    config = replace(small().config.decoder, hidden_size=4096)
    assert simulator.bytes_kept(config, 1, 1, 656, 2) == 5_373_952
    assert simulator.bytes_kept(config, 32, 1, 656, 2) == 171_966_464
