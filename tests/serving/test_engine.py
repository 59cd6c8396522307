"""Answers from slots: those of `Model.answer`, whoever else is answered; who enters, who leaves, who waits."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from queue import SimpleQueue

import jax
import numpy as np
import pytest
from PIL import Image

import reroute_jax
from reroute_jax.engine.batching import BatchShape, lay_out
from reroute_jax.engine.compilation import compilations
from reroute_jax.engine.sampling import Sampling
from reroute_jax.errors import RerouteError
from reroute_jax.serving.buckets import Limits, Pools, Unplaced, kinds, make_pool
from reroute_jax.serving.engine import Busy, Engine, Stopping
from reroute_jax.serving.pool import Pool
from reroute_jax.serving.requests import News, Request
from tests.checkpoints import qwen_pair, smallest
from tests.compiling import xla_programs

LIMITS = Limits(slots=2, token_budget=52, text=(16,), images=1, image_sizes=((84, 84), (30, 30)), new_tokens=40)


def where(number: int) -> tuple[None, str]:
    return None, f"where is {number} ?"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (84, 84, 3), np.uint8))


@pytest.fixture(scope="module")
def plans():
    model = smallest()
    return {"all": model.plan("none"), "routed": model.plan("fastv", budget="3/4", first_decision=1)}


@pytest.fixture(scope="module")
def pools(plans):
    """One for questions without an image, which enter two at a time as well, and one for those that are routed."""
    model = smallest()
    asked = kinds(model, [plans["routed"]], LIMITS)
    return Pools(model, LIMITS, tuple(make_pool(model, kind, LIMITS) for kind in asked))


@pytest.fixture
def engine(pools):
    started = Engine(pools.all, LIMITS.token_budget, most_waiting=64)
    yield started
    started.close()


class Asked:
    """A request with what it was told so far."""

    def __init__(self, engine, pools, item, schedule, number=0, log=None, **sampling):
        self.news, self.told = SimpleQueue(), []
        log = [] if log is None else log
        sampling = Sampling(stop=pools.model.config.eos_tokens, **sampling)
        pool, layout = pools.place(pools.model.question(item), schedule)

        def tell(news):
            log.append((self, news))
            self.news.put(news)

        self.request = Request(layout, sampling, number, tell)
        engine.take_places(1)
        engine.submit(pool, [self.request])

    def next(self) -> News:
        self.told.append(self.news.get(timeout=60))
        return self.told[-1]

    def all(self) -> list[News]:
        while not self.told or not self.told[-1].last:
            self.next()
        return self.told

    @property
    def tokens(self):
        return tuple(token for news in self.all() for token in news.tokens)


def test_answers_are_those_of_answer_whatever_runs_beside_them(engine, pools, plans):
    """Two pools at work, greedy and drawn, more than there are slots; the late ones join while others decode."""
    model = smallest()
    cases = [
        ("all", (None, "where is the red cup ?"), {"limit": 40}),
        ("routed", (picture(1), "what is left of the dog ?"), {"limit": 33}),
        ("routed", (picture(2), "how many cups"), {"limit": 9, "temperature": 1.5, "top_p": 0.9, "seed": 4}),
        ("routed", (None, "name the colour"), {"limit": 25, "repetition_penalty": 1.3}),
        ("routed", (picture(1), "is it a cat or not ?"), {"limit": 12, "temperature": 2.0, "seed": 9}),
        ("routed", (picture(0), "yes or no ?"), {"limit": 1}),
    ]

    def expected(plan, item, sampling):
        named = {"max_new_tokens" if name == "limit" else name: value for name, value in sampling.items()}
        return model.answer([item], schedule=plans[plan], logprobs=True, **named)[0]

    wanted = [expected(*case) for case in cases]
    log = []
    with compilations() as compiled, xla_programs() as built:
        early = [Asked(engine, pools, item, plans[plan], log=log, **how) for plan, item, how in cases[:2]]
        for one in early:
            one.next()
        late = [Asked(engine, pools, item, plans[plan], log=log, **how) for plan, item, how in cases[2:]]
        for one, answer in zip([*early, *late], wanted, strict=True):
            assert one.tokens == answer.token_ids
            last = one.told[-1]
            assert last.finish_reason == answer.finish_reason and last.usage == answer.usage
            logprobs = [value for news in one.told for value in news.logprobs]
            np.testing.assert_allclose(logprobs, answer.logprobs, atol=1e-4)
    assert compiled == built == []
    firsts = [next(place for place, (who, _) in enumerate(log) if who is one) for one in late]
    ends = [place for place, (_, news) in enumerate(log) if news.last]
    assert min(firsts) < max(ends[:2]), "the late ones waited for the early ones to end"


@pytest.mark.slow
@pytest.mark.parametrize("image_cache", [0, 2**24])
def test_answers_from_8_bits_are_those_of_answer(image_cache, unchecked_annotations):
    """Weights and KV cache in int8: the third request enters the slot that the first one left, while the second still
    runs, and asks about an image that was there."""
    pytest.importorskip("qwix")
    model = reroute_jax.load(smallest().folder, "float32", quantise="int8", kv_cache="int8")
    schedule = model.plan("fastv", budget="3/4", first_decision=1)
    limits = replace(LIMITS, image_sizes=((84, 84),), image_cache=image_cache)
    cache = model.image_cache(image_cache) if image_cache else None
    kind = next(kind for kind in kinds(model, [schedule], limits) if kind.shape.images)
    pools = Pools(model, limits, (make_pool(model, kind, limits, cache),))
    items = [(picture(0), "where is the red cup ?"), (picture(1), "how many ?"), (picture(0), "a dog ?")]
    limited = list(zip(items, (3, 33, 9), strict=True))
    engine = Engine(pools.all, limits.token_budget, most_waiting=8)
    asked = [Asked(engine, pools, item, schedule, limit=limit) for item, limit in limited]
    for one, (item, limit) in zip(asked, limited, strict=True):
        wanted = model.answer([item], schedule=schedule, max_new_tokens=limit)[0]
        assert one.tokens == wanted.token_ids and one.told[-1].usage == wanted.usage
    engine.close()
    held = {part.dtype.name for part in jax.tree.leaves(pools.all[0].state.cache.stages[0].keys)}
    assert held == {"int8", "float32"}, "numbers and scales"
    assert cache is None or cache.hits > 0


def test_the_answers_to_one_question_are_those_of_its_copies(engine, pools, plans):
    item, how = (picture(3), "what is it ?"), {"temperature": 1.5, "seed": 7}
    wanted = smallest().answer([item] * 3, schedule=plans["routed"], max_new_tokens=6, batch_size=1, **how)
    asked = [Asked(engine, pools, item, plans["routed"], number, limit=6, **how) for number in range(3)]
    assert [one.tokens for one in asked] == [answer.token_ids for answer in wanted]
    assert len({one.tokens for one in asked}) > 1


def test_who_is_cancelled_makes_room(engine, pools, plans):
    """Both slots are taken; the third request begins when the first is cancelled, while the second still runs."""
    log = []
    first, second, third = (Asked(engine, pools, where(n), plans["all"], log=log, limit=40) for n in range(3))
    first.next()
    second.next()
    first.request.cancelled = True
    wanted = smallest().answer([where(2)], schedule=plans["all"], max_new_tokens=40)[0]
    assert third.tokens == wanted.token_ids and len(second.tokens) == 40
    places = {id(who): [at for at, (one, _) in enumerate(log) if one is who] for who in (first, second, third)}
    assert places[id(third)][0] < places[id(second)][-1]
    assert len(first.told) + first.news.qsize() < len(second.told)
    assert engine.waiting == 0


def test_who_waits_may_be_cancelled_too(engine, pools, plans):
    running = [Asked(engine, pools, where(number), plans["all"], limit=40) for number in range(2)]
    waiting = Asked(engine, pools, where(2), plans["all"], limit=40)
    waiting.request.cancelled = True
    for one in running:
        one.all()
    after = Asked(engine, pools, where(3), plans["all"], limit=2)
    after.all()
    assert waiting.news.empty() and engine.waiting == 0


def test_places_are_bounded(engine):
    engine.take_places(63)
    with pytest.raises(Busy, match="63 requests wait and 64 may: try again later"):
        engine.take_places(2)
    engine.take_places(1)
    engine.give_places(64)
    assert engine.waiting == 0


def test_a_program_that_fails_ends_its_own_pool_and_no_other(engine, pools, plans, monkeypatch):
    routed = next(pool for pool in pools.all if pool.schedule == plans["routed"])
    advance = type(routed).advance

    def fail_once(pool):
        monkeypatch.setattr(Pool, "advance", advance)
        if pool is not routed:
            return advance(pool)
        for array in jax.tree.leaves(pool.state):
            array.delete()  # as a donated buffer is
        raise RuntimeError("boom")

    fine = Asked(engine, pools, where(0), plans["all"], limit=20)
    fine.next()
    monkeypatch.setattr(routed, "advance", lambda: fail_once(routed))
    wrong = Asked(engine, pools, (picture(0), "where ?"), plans["routed"], limit=20)
    assert str(wrong.all()[-1].error) == "the device failed on this question (RuntimeError)"
    assert fine.all()[-1].error is None and len(fine.tokens) == 20
    monkeypatch.undo()
    again = Asked(engine, pools, (picture(0), "where ?"), plans["routed"], limit=20)
    wanted = smallest().answer([(picture(0), "where ?")], schedule=plans["routed"], max_new_tokens=20)[0]
    assert again.tokens == wanted.token_ids


def test_nothing_grows_with_the_number_of_requests(engine, pools, plans):
    def ask(count):
        for number in range(count):
            one = Asked(engine, pools, (None, "how many cups"), plans["all"], number % 2, limit=2)
            one.all()

    ask(3)
    gc.collect()
    before = len(jax.live_arrays())
    ask(60)
    for _ in range(100):  # the engine's thread may still hold what it told last
        gc.collect()
        if len(jax.live_arrays()) <= before:
            return
        time.sleep(0.05)
    raise AssertionError(f"{len(jax.live_arrays())} arrays after 60 requests, {before} before")


def test_the_end_is_told(pools, plans):
    engine = Engine(pools.all, LIMITS.token_budget, most_waiting=8)
    asked = [Asked(engine, pools, where(number), plans["all"], limit=40) for number in range(3)]
    asked[0].next()
    engine.close()
    assert not engine.alive
    with pytest.raises(Stopping, match="the server stops"):
        Asked(engine, pools, (None, "where ?"), plans["all"], limit=2)
    assert "the server stops" in str(asked[-1].all()[-1].error)
    for pool in pools.all:
        pool.reset()


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ((None, "cup " * 40), "text tokens, this server takes up to 16"),
        (([picture(0)] * 2, "where ?"), "the prompt has 2 images, this server takes up to 1"),
    ],
    ids=["text", "images"],
)
def test_what_is_too_large_has_no_place(pools, plans, item, said):
    with pytest.raises(Unplaced, match=said):
        pools.place(smallest().question(item), plans["all"])


def test_a_pool_with_an_image_cache_answers_the_same_and_compiles_nothing_later(plans, unchecked_annotations):
    """Alone and two at a time, of images that are new and of one that is not."""
    model, limits = smallest(), replace(LIMITS, token_budget=104, image_cache=2**20)
    cache = model.image_cache(limits.image_cache)
    kind = next(kind for kind in kinds(model, [plans["routed"]], limits) if kind.shape.images)
    pools = Pools(model, limits, (make_pool(model, kind, limits, cache),))
    cache.clear()
    engine = Engine(pools.all, limits.token_budget, most_waiting=64)
    items = [(picture(0), "where ?"), (picture(0), "is it a dog ?"), (picture(1), "where ?"), (picture(0), "how ?")]
    alone = model.answer(items, schedule=plans["routed"], max_new_tokens=4, batch_size=1)
    wanted = [answer.token_ids for answer in alone]
    with compilations() as compiled:
        first = Asked(engine, pools, items[0], plans["routed"], limit=4)
        assert first.tokens == wanted[0]
        others = [Asked(engine, pools, item, plans["routed"], limit=4) for item in items[1:]]
        assert [one.tokens for one in others] == wanted[1:]
        engine.close()
        together = [pools.place(model.question((picture(seed), "where ?")), plans["routed"])[1] for seed in (2, 3)]
        pools.all[0].enter([Request(layout, Sampling(limit=1), 0, lambda news: None) for layout in together])
    assert compiled == [] and (cache.hits, cache.misses) == (2, 4)


def test_a_kind_is_a_plan_a_number_of_images_and_a_bucket(plans):
    """Every image of LLaVA has as many tokens, so that two sizes are one kind."""
    found = kinds(smallest(), tuple(plans.values()), replace(LIMITS, text=(16, 32), images=2))
    assert len({(kind.schedule, kind.shape) for kind in found}) == len(found) == 2 + 2 * 2 * 2


def test_a_server_that_holds_no_prompt_does_not_start(plans):
    with pytest.raises(RerouteError, match="--max-text 4 holds no prompt"):
        kinds(smallest(), [plans["all"]], replace(LIMITS, text=(4,)))


class Recorded(Pool):
    """One slot, three segments an answer; `order` gets who enters."""

    def __init__(self, order):
        self.order, self.rows, self.size, self.segments = order, [], None, 0

    shape = BatchShape(16, 0, 1, 0, 0)
    running = property(lambda self: self.rows)

    def joining(self, waiting):
        return min(waiting, 1 - len(self.rows))

    def enter(self, requests):
        self.order += [request.number for request in requests]
        self.rows, self.segments = list(requests), 0

    def advance(self):
        self.segments += 1
        if self.segments == 3:
            self.rows.pop().tell(News(finish_reason="stop"))

    def leave_cancelled(self):
        pass


def test_the_oldest_enters_first_and_a_busy_pool_holds_nobody_else_up():
    """Ten for one pool came before two for another. In each pool they keep their order; the two enter while the first
    ones of the ten run."""
    order, done, layout = [], SimpleQueue(), pools_layout()
    crowded, other = Recorded(order), Recorded(order)
    engine = Engine([crowded, other], token_budget=16, most_waiting=64)
    requests = [Request(layout, Sampling(), number, done.put) for number in range(12)]
    engine.take_places(12)
    engine.submit(crowded, requests[:10])
    engine.submit(other, requests[10:])
    for _ in requests:
        done.get(timeout=10)
    engine.close()
    assert [number for number in order if number < 10] == list(range(10))
    assert [number for number in order if number >= 10] == [10, 11]
    assert order.index(11) <= 5
    assert engine.waiting == 0


def pools_layout():
    return lay_out(smallest().question((None, "where ?")), smallest().config, smallest().plan("none"))


class Held(Pool):
    """A pool that runs nothing."""

    def __init__(self, kind):
        self.schedule, self.shape = kind.schedule, kind.shape


def test_images_of_other_sizes_than_the_server_was_started_for_are_refused():
    """Qwen2.5-VL sees each in its own size. A wide one has as many tokens as its examples and other windows, for which
    another program would be compiled."""
    model = qwen_pair()[1]
    limits = replace(LIMITS, text=(32,), image_sizes=((112, 112), (448, 28)))
    schedule = model.plan("none")
    asked = kinds(model, [schedule], limits)
    square, wide = [kind for kind in asked if kind.shape.images]
    assert replace(square.shape, windows=0) == replace(wide.shape, windows=0)
    pools = Pools(model, limits, tuple(map(Held, asked)))

    def windows(pools, size):
        return pools.place(model.question((Image.new("RGB", size), "where ?")), schedule)[0].shape.windows

    assert windows(pools, (126, 98)) == square.shape.windows < windows(pools, (28, 448)) == wide.shape.windows
    without = replace(pools, all=tuple(Held(kind) for kind in asked if kind is not wide))
    for size, grid in (((448, 28), "2 x 32"), ((56, 56), "4 x 4")):
        with pytest.raises(Unplaced, match=f"images of {grid} visual tokens, this server was not started for their"):
            windows(without, size)
