"""Decoding in segments: exactness, growth, and rows that each stand where they stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reroute_jax.decoder import decode_step
from reroute_jax.engine import segments
from reroute_jax.engine.batching import Question, lay_out, make_batch
from reroute_jax.engine.compilation import compilations
from reroute_jax.engine.generation import SEGMENT
from reroute_jax.engine.running import run_prefill
from reroute_jax.engine.sampling import Sampling, row_sampling
from reroute_jax.errors import RerouteError
from reroute_jax.nn.cache import ROOM, grown
from reroute_jax.routing.plan import Schedule
from tests.checkpoints import smallest
from tests.compiling import xla_programs
from tests.marks import cases
from tests.tiny import random_ids, random_pixels


def given(length=60, seed=0):
    return {"input_ids": random_ids(length, seed=seed)[None], "pixel_values": random_pixels(1, seed=seed)}


def test_decode_equals_prefill():
    """Teacher-forced: the token after each prefix is what decode chose, for an unrouted prompt."""
    model = smallest()
    one = given()
    tokens = model.generate_ids(**one, max_new_tokens=8)
    for step in range(8):
        longer = np.concatenate([one["input_ids"], tokens[:, :step]], axis=1)
        logits = model.prefill(input_ids=longer, pixel_values=one["pixel_values"]).logits
        assert logits[0].argmax() == tokens[0, step]


@pytest.mark.parametrize("action", cases(["none", "reroute"], {"none"}))
def test_a_long_answer_crosses_segments_and_room_unchanged(action):
    """Tokens with a room of 32 that grows twice are those of one that never has to."""
    model = smallest()
    schedule = unrouted(model) if action == "none" else Schedule.from_decisions((1,), (0.5,), 2, action)
    limit = 3 * ROOM + 5
    found = model.generate_ids(**given(), schedule=schedule, max_new_tokens=limit)[0]
    short = [model.generate_ids(**given(), schedule=schedule, max_new_tokens=n)[0] for n in (1, 2, ROOM, ROOM + 2)]
    for tokens in short:
        np.testing.assert_array_equal(tokens, found[: len(tokens)])
    layout = lay_out(Question(given()["input_ids"][0], ((6, 6),)), model.config, schedule)
    batch = make_batch([layout], model.config, schedule, pixels=given()["pixel_values"])
    _, prefilled = run_prefill(model.weights, batch)
    logits, cache, stepwise = prefilled.logits, grown(prefilled.cache, limit), []
    step = jax.jit(lambda token, cache: decode_step(model.module.decoder, token, cache, jnp.ones(1, bool)))
    for _ in range(limit):
        stepwise.append(int(logits[0].argmax()))
        logits, cache = step(jnp.array([stepwise[-1]], jnp.int32), cache)
    assert found.tolist() == stepwise


def test_no_limit_and_no_value_of_sampling_compiles_anything():
    model = smallest()
    model.generate_ids(**given(), max_new_tokens=5)
    model.generate_ids(**given(), max_new_tokens=5, temperature=1.0)
    values = (
        {"max_new_tokens": 16},
        {"max_new_tokens": ROOM + 1},
        {"max_new_tokens": 4, "temperature": 0.3, "top_p": 0.7, "repetition_penalty": 1.3, "seed": 9},
        {"max_new_tokens": 7, "eos_token_id": [3, 5, 11]},
    )
    with compilations() as compiled:
        for one in values:
            model.generate_ids(**given(), **one)
    assert compiled == []


def test_warm_up_compiles_what_drawn_answers_take(unchecked_annotations):
    model, items = smallest(), [(None, "how many cups")]
    model.warm_up(items, batch_size=1, temperature=1.0, max_new_tokens=ROOM + 4)
    with compilations() as compiled, xla_programs() as built:
        (found,) = model.answer(items, temperature=0.4, top_p=0.8, max_new_tokens=ROOM + 4, seed=7)
    assert len(found.token_ids) > ROOM, "the cache grew"
    assert compiled == built == []


def test_cost_follows_the_answer_and_not_the_limit():
    """A few tokens take a few steps, whatever the limit: no cache grows and no later segment is asked for."""
    model = smallest()
    free = model.generate_ids(**given(), max_new_tokens=8)[0]
    count = next(n for n in range(2, 9) if free[n - 1] not in free[: n - 1])
    with compilations() as compiled:
        for limit in (16, 128, 1024):
            tokens = model.generate_ids(**given(), max_new_tokens=limit, eos_token_id=int(free[count - 1]))[0]
            np.testing.assert_array_equal(tokens[:count], free[:count])
            assert (tokens[count:] == model.config.pad_token).all()
    assert compiled == []


def test_rows_that_are_done_leave_the_batch_where_it_grows():
    """Three of four rows end early: what goes on behind the first room is a batch of one, and its answer is its own."""
    model = smallest()
    ids = np.stack([random_ids(60, seed=seed) for seed in range(4)])
    pixels = random_pixels(4)
    limit = ROOM + 20
    free = model.generate_ids(input_ids=ids, pixel_values=pixels, max_new_tokens=limit)
    layouts = [lay_out(Question(row, ((6, 6),)), model.config, unrouted(model)) for row in ids]
    batch = make_batch(layouts, model.config, unrouted(model), pixels=pixels)
    sampling = row_sampling(Sampling(limit=limit), [0, 1, 2, 3])
    sampling.limit[:3] = (2, 5, 9)
    _, prefilled = run_prefill(model.weights, batch)
    tokens, sizes = [[] for _ in ids], []
    for one in segments.decode_segments(model.weights.decoder, prefilled, batch.seen, batch.live, sampling):
        sizes.append(len(one.rows))
        for row, chosen in zip(one.rows, one.tokens, strict=True):
            tokens[row] += chosen[chosen >= 0].tolist()
    assert sizes == [4, 4, 1]
    for row, (found, count) in enumerate(zip(tokens, (2, 5, 9, limit), strict=True)):
        assert found == free[row, :count].tolist()


def unrouted(model):
    return Schedule.from_decisions((), (), model.config.num_layers)


def test_filler_rows_are_done_from_the_start():
    model = smallest()
    schedule = unrouted(model)
    layout = lay_out(Question(random_ids(60), ((6, 6),)), model.config, schedule)
    batch = make_batch([layout], model.config, schedule, size=4, pixels=random_pixels(1))
    assert batch.live.tolist() == [True, False, False, False]
    _, prefilled = run_prefill(model.weights, batch)
    found = list(
        segments.decode_segments(
            model.weights.decoder, prefilled, batch.seen, batch.live, row_sampling(Sampling(limit=6), [0] * 4)
        )
    )
    assert [one.done.tolist() for one in found] == [[False, True, True, True], [True] * 4]
    assert all((one.tokens[1:] == -1).all() for one in found)


def test_each_row_writes_at_its_own_slot_and_a_done_row_stands_still():
    """Rows of 60 and 50 tokens: new keys stand behind each row's own prompt."""
    model = smallest()
    decoder = model.module.decoder
    schedule = unrouted(model)
    rows = [random_ids(60), random_ids(50, seed=1)]
    layouts = [lay_out(Question(row, ((6, 6),)), model.config, schedule) for row in rows]
    batch = make_batch(layouts, model.config, schedule, pixels=random_pixels(2))
    _, prefilled = run_prefill(model.weights, batch)
    before = prefilled.cache.stages[0]
    token = jnp.array([5, 6], jnp.int32)
    _, cache = jax.jit(decode_step)(decoder, token, prefilled.cache, jnp.array([True, False]))
    after = cache.stages[0]
    changed = (np.asarray(before.keys[0]) != np.asarray(after.keys[0])).any(axis=(1, 3))
    assert [np.flatnonzero(row).tolist() for row in changed] == [[60], [50]]
    assert after.length.tolist() == [61, 50]
    assert (after.next_position - before.next_position).tolist() == [1, 0]


def test_a_sampled_answer_depends_on_its_number_alone():
    """Twelve copies of a prompt: they differ, and at any batch size each is what it is."""
    model = smallest()
    items = [(None, "where is the red cup ?")] * 12
    how = {"max_new_tokens": 8, "temperature": 2.0, "seed": 3}
    by_four = [found.token_ids for found in model.answer(items, batch_size=4, **how)]
    assert len(set(by_four)) > 10
    assert [found.token_ids for found in model.answer(items, batch_size=1, **how)] == by_four
    assert [found.token_ids for found in model.answer(items, batch_size=12, **how)] == by_four
    other = [found.token_ids for found in model.answer(items, batch_size=4, **how | {"seed": 4})]
    assert other != by_four


def test_seed_decides_what_is_drawn():
    model = smallest()
    options = {**given(), "max_new_tokens": 12, "temperature": 1.5}
    first, again, other = (model.generate_ids(**options, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -2.0},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": float("inf")},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**9},
        {"seed": -1},
    ],
    ids=str,
)
def test_numbers_that_mean_nothing_are_refused(wrong):
    model = smallest()
    with pytest.raises(RerouteError, match=next(iter(wrong))):
        model.answer([(None, "how many")], **wrong)


def test_the_smallest_temperature_is_greedy():
    model = smallest()
    greedy = model.generate_ids(**given(), max_new_tokens=6)
    for temperature in (1e-40, 1e-30, 1e-12):
        np.testing.assert_array_equal(model.generate_ids(**given(), max_new_tokens=6, temperature=temperature), greedy)


def test_logprobs_are_those_of_the_models_own_logits():
    model = smallest()
    pairs = [(None, "how many cups")]
    found = model.answer(pairs, max_new_tokens=3, logprobs=True, repetition_penalty=1.3)[0]
    ids = model.prompt_ids("how many cups", ())
    for count, (token, logprob) in enumerate(zip(found.token_ids, found.logprobs, strict=True)):
        logits = model.prefill(input_ids=np.array([[*ids, *found.token_ids[:count]]])).logits[0]
        expected = jax.nn.log_softmax(jnp.asarray(logits))[token]
        np.testing.assert_allclose(logprob, expected, atol=1e-4)


def test_a_segment_fits_the_room_that_a_prefill_leaves():
    """So that short answers grow nothing."""
    assert SEGMENT <= ROOM
