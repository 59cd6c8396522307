"""Answers from prefixes that were kept: those without a cache. What is kept, for how long, and what cannot be."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import reroute_jax
from reroute_jax.engine import programs
from reroute_jax.engine.batching import Question, lay_out
from reroute_jax.engine.compilation import compilations
from reroute_jax.engine.image_cache import ImageCache, Prefix, prefix_length
from reroute_jax.errors import RerouteError
from reroute_jax.prefix import Opening, PrefixStates
from reroute_jax.routing.plan import Schedule
from tests.checkpoints import qwen3_pair, qwen_pair, small, smallest
from tests.compiling import xla_programs
from tests.marks import cases


def int8_cache():
    return reroute_jax.load(small().folder, "float32", kv_cache="int8")


MODELS = {"llava": small, "qwen": lambda: qwen_pair()[1], "qwen3": lambda: qwen3_pair()[1], "int8": int8_cache}
# The states of each: of all layers; hidden states too; the last layer's; DeepStack's features, of layers that come.
ROUTES = {
    "llava-none": {"method": "none"},
    "llava-reroute": {"method": "pdrop", "action": "reroute"},
    "llava-merge-delete": {"method": "nuwa", "action": "delete"},
    "llava-change": {"method": "v2drop", "action": "reroute"},
    "qwen-layout": {"method": "layout"},
    "qwen-delete": {"method": "pdrop", "action": "delete"},
    "qwen3-deepstack": {"method": "pdrop", "action": "reroute"},
    "int8-delete": {"method": "pdrop", "action": "delete"},
}
FAST = {"llava-reroute"}


def picture(seed: int, size: tuple[int, int] = (84, 84)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


FIRST, SECOND = picture(0), picture(1, (84, 112))


@pytest.mark.parametrize("route", cases(ROUTES, slow={*ROUTES} - FAST))
def test_answers_from_kept_images_are_those_of_a_fresh_run(route, monkeypatch):
    """Questions about two images, one of them twice, and one without; then one more, which runs no image. Each decides
    by itself: of the first image the two questions select other tokens."""
    model = MODELS[route.partition("-")[0]]()
    options = {} if route == "llava-none" else {"budget": "1/2"}
    schedule = model.plan(**ROUTES[route], **options)
    items = [(FIRST, "where is the red cup ?"), (SECOND, "how many ?"), (FIRST, "is it a dog ?"), (None, "yes ?")]
    how = {"schedule": schedule, "max_new_tokens": 3, "logprobs": True, "batch_size": 4}
    cache = model.image_cache(2**30)
    wanted = model.answer(items, trace=True, **how)
    found = model.answer(items, trace=True, image_cache=cache, **how)
    assert (cache.hits, cache.misses, len(cache)) == (1, 2, 2) and cache.nbytes > 0
    for fresh, kept in zip(wanted, found, strict=True):
        check(fresh, kept)
        for ours, theirs in zip(kept.trace.selected, fresh.trace.selected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for ours, theirs in zip(kept.trace.scores, fresh.trace.scores, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(kept.trace.anchors, fresh.trace.anchors)
    if schedule.decisions and route != "llava-change":  # which ranks by the image alone
        first, third = (found[number].trace.selected[0].tolist() for number in (0, 2))
        assert first != third
    monkeypatch.setattr(programs, "encode", None)
    monkeypatch.setattr(programs, "run_prefix", None)
    for fresh, kept in zip(wanted, model.answer(items, image_cache=cache, **how), strict=True):
        check(fresh, kept)
    if route not in FAST:
        streamed = model.stream(items[0], schedule=schedule, max_new_tokens=3, image_cache=cache)
        assert "".join(streamed) == wanted[0].text


def check(fresh, kept):
    assert kept.token_ids == fresh.token_ids and kept.usage == fresh.usage
    np.testing.assert_allclose(kept.logprobs, fresh.logprobs, atol=1e-4, rtol=1e-5)


def test_warm_up_compiles_what_answers_from_a_cache_need(unchecked_annotations):
    """Of a first question and of later ones, alone and two at a time. The text of both takes a bucket of 32, but what
    stands behind the image one of 16 or of 32."""
    model = smallest()
    schedule = Schedule.from_decisions((1,), (0.4,), 2)  # nobody else's
    short, long = ((FIRST, " ".join(["cup"] * words)) for words in (12, 20))
    cache = model.image_cache(2**30)
    options = {"schedule": schedule, "max_new_tokens": 2, "batch_size": 2, "image_cache": cache}
    with compilations() as compiled:
        model.warm_up([long], **options)
    assert sum("prefill behind" in one for one in compiled) == 4
    assert (len(cache), cache.hits, cache.misses) == (0, 0, 0)
    with compilations() as compiled, xla_programs() as built:
        for items in ([short], [long], [long, short], [(SECOND, long[1]), (picture(2), short[1])]):
            model.answer(items, **options)
    assert compiled == [] and (cache.hits, cache.misses) == (3, 3)
    assert built == []


def test_the_new_images_of_a_batch_run_together(monkeypatch):
    """Three of four rows, filled up; then two, beside two that are known."""
    model, sizes, run = smallest(), [], programs.run_prefix

    def spy(decoder, prompt, *given):
        sizes.append(len(prompt.ids))
        return run(decoder, prompt, *given)

    monkeypatch.setattr(programs, "run_prefix", spy)
    how = {"schedule": model.plan("fastv", budget="3/4", first_decision=1), "max_new_tokens": 3, "batch_size": 4}
    cache = model.image_cache(2**30)
    seeds, text = (0, 3, 4, 0, 5, 3, 6, 4), ("where is the red cup ?", "is it a dog ?")
    items = [(picture(seed), text[number % 2]) for number, seed in enumerate(seeds)]
    wanted = [answer.token_ids for answer in model.answer(items, **how)]
    assert [answer.token_ids for answer in model.answer(items, image_cache=cache, **how)] == wanted
    assert sizes == [4, 2] and (len(cache), cache.hits, cache.misses) == (5, 3, 5)
    assert len(set(wanted)) > 2


def prefix(numbers: int) -> Prefix:
    hidden = jnp.zeros((1, numbers, 1))
    return Prefix(PrefixStates((), (), hidden, None, None), np.zeros(numbers, int))


def test_the_least_recently_used_leave():
    cache, made = ImageCache(smallest().weights, max_bytes=40), []

    def run(names, numbers):
        made.extend(names)
        return {name: prefix(numbers) for name in names}

    def ask(*names, numbers=4):
        return cache.prefixes(names, lambda new: run(new, numbers))[0]

    first = ask("a")
    ask("b")
    assert ask("a") is first and made == ["a", "b"]
    ask("c")  # 48 bytes, so that one leaves: b was asked for before a
    assert (len(cache), cache.nbytes) == (2, 32)
    ask("a")
    ask("b")
    assert made == ["a", "b", "c", "b"] and (cache.hits, cache.misses) == (2, 4)
    assert len(ask("large", numbers=11).index) == 11 and (len(cache), cache.nbytes) == (0, 0)
    cache.clear()
    assert (len(cache), cache.nbytes, cache.hits, cache.misses) == (0, 0, 0, 0)
    ask("d", "e", "d")
    assert made[-2:] == ["d", "e"] and (len(cache), cache.nbytes, cache.hits, cache.misses) == (2, 32, 1, 2)
    ask("f", "e", "g")  # more than there is room for: those that were asked for last stay
    ask("e", "g")
    assert made[-2:] == ["f", "g"] and (len(cache), cache.nbytes, cache.hits, cache.misses) == (2, 32, 4, 4)


def test_what_an_image_is_kept_by(monkeypatch):
    """Its pixels, the text in front of it, and what of the plan matters before the first decision."""
    model, keys = small(), []

    def no_prefix(cache, asked, run):
        keys.extend(asked)
        raise RerouteError("enough")

    def key(item, **options):
        with pytest.raises(RerouteError, match="enough"):
            model.answer([item], schedule=model.plan(**options), image_cache=model.image_cache(1))
        return keys[-1]

    monkeypatch.setattr(ImageCache, "prefixes", no_prefix)
    routed = {"method": "pdrop", "budget": "1/2"}
    known = key((FIRST, "where ?"), **routed)
    assert key((picture(0), "how many cups are in this image and where are they ?"), **routed) == known
    assert key((FIRST, "where ?"), **routed | {"budget": "1/3", "action": "delete"}) == known
    others = [
        key((picture(2), "where ?"), **routed),
        key([("system", "red"), ("user", [FIRST, "where ?"])], **routed),
        key((FIRST, "where ?"), method="none"),
        key((FIRST, "where ?"), method="fastv", budget="1/2", action="delete", score_source="previous_layer"),
        key((FIRST, "where ?"), method="nuwa", budget="1/2"),
    ]
    assert len({known, *others}) == 6


def test_what_cannot_be_kept():
    model = small()
    schedule = model.plan("fastv", budget="3/4", first_decision=2)
    plan = replace(schedule, bidirectional_layer=1).resolve(36)
    with pytest.raises(RerouteError, match="layer 1 runs without the causal mask before the first decision"):
        Opening.of(plan, deepstack=0)
    assert Opening.of(replace(plan, bidirectional_layer=2), deepstack=0).layers == 2
    ids = model.question((FIRST, "where ?")).ids
    question = Question(ids[: int(np.flatnonzero(ids == model.config.image_token)[-1]) + 1], ((6, 6),))
    with pytest.raises(RerouteError, match="the prompt ends with its image: ask something behind it"):
        prefix_length(lay_out(question, model.config, schedule))
    with pytest.raises(RerouteError, match="the image cache is another model's"):
        model.answer([(FIRST, "where ?")], image_cache=smallest().image_cache(1))
    with pytest.raises(RerouteError, match="an image cache of 0 bytes, expected a whole number of at least 1"):
        model.image_cache(0)
