"""Batches, buckets, caches, and what bad input says."""

from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from reroute_jax.buckets import TEXT_BUCKETS
from reroute_jax.decoder import prefill
from reroute_jax.engine import programs
from reroute_jax.engine.batching import Question, lay_out, make_batch
from reroute_jax.engine.compilation import compilations
from reroute_jax.errors import RerouteError
from reroute_jax.nn.cache import ROOM
from reroute_jax.routing.plan import Schedule
from tests.checkpoints import small, smallest
from tests.compiling import xla_programs
from tests.ragged import padded
from tests.tiny import BOS, WORDS, random_ids, random_pixels


def test_padding_side_and_bucket_do_not_matter():
    """The same prompt alone, right-padded, left-padded, and beside a row that needs a larger bucket."""
    model = smallest()
    schedule = Schedule.from_decisions((1,), (0.5,), 2, "reroute")
    short, long = random_ids(60, start=1), random_ids(300, start=9, seed=1)
    pixels = random_pixels(2)
    alone = model.generate_ids(input_ids=short[None], pixel_values=pixels[:1], schedule=schedule, max_new_tokens=10)
    for left in (True, False):
        ids, mask = padded([short, long], left=left)
        both = model.generate_ids(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, schedule=schedule, max_new_tokens=10
        )
        np.testing.assert_array_equal(both[0], alone[0])


def test_several_images_are_one_pool():
    """Two images in one row: both are routed, and a later image keeps its own positions."""
    model = small()
    ids = np.concatenate([random_ids(44, start=4), random_ids(60, start=0, bos=False, seed=2)])[None]
    schedule = Schedule.from_decisions((1, 3), (0.5, 0.25), 4, "reroute")
    trace = model.prefill(input_ids=ids, pixel_values=random_pixels(2), schedule=schedule, trace=True).trace
    assert [selected.shape[1] for selected in trace.selected] == [36, 18]
    assert trace.scores[0].shape == (1, 72)
    assert (trace.selected[0] >= 36).any()


def test_one_program_per_bucket():
    model = smallest()
    schedule = Schedule.from_decisions((1,), (0.45,), 2)  # nobody else's
    model.generate_ids(
        input_ids=random_ids(70)[None], pixel_values=random_pixels(1), schedule=schedule, max_new_tokens=3
    )
    with compilations() as compiled:
        for length in (72, 75, 80):
            ids, pixels = random_ids(length, seed=length)[None], random_pixels(1, seed=length)
            model.generate_ids(input_ids=ids, pixel_values=pixels, schedule=schedule, max_new_tokens=3)
    assert compiled == []
    ids = random_ids(36 + TEXT_BUCKETS[4], start=2)[None]
    with compilations() as compiled:
        model.prefill(input_ids=ids, pixel_values=random_pixels(1), schedule=schedule)
        model.generate_ids(input_ids=ids, pixel_values=random_pixels(1), schedule=schedule, max_new_tokens=1)
    assert sum("prefill" in one for one in compiled) == 1  # logits and answers share it


def test_cache_of_each_stage_has_its_own_length():
    """Section 8.3: text slots + kept visual tokens + room for new ones, and not a slot more."""
    model = small()
    schedule = Schedule.from_decisions((1, 2, 3), (0.3, 0.3, 0.15), 4, "reroute")
    layout = lay_out(Question(random_ids(52, start=3), ((6, 6),)), model.config, schedule)
    batch = make_batch([layout], model.config, schedule, pixels=random_pixels(1))
    features, anchors = jax.ShapeDtypeStruct((1, 36, 64), np.float32), jax.ShapeDtypeStruct((1, 36), np.int32)

    def keys(module, prompt, features, anchors):
        cache = prefill(module.decoder, prompt, features, anchors, batch.plan).cache
        return [layer for stage in cache.stages for layer in stage.keys]

    lengths = [layer.shape for layer in jax.eval_shape(keys, model.module, batch.prompt, features, anchors)]
    assert lengths == [(1, 2, 16 + kept + ROOM, 16) for kept in (36, 10, 10, 5)]


def test_spec_vector_5_cache_lengths():
    """Section 11.5 at S = 24, n = 16, on our grid scaled: kept counts 0.3 -> 4, (.6, .4, .2) -> 9, 6, 3."""
    fastv = Schedule.from_decisions((3,), (0.3,), 8, "delete").keep_counts([16])
    pdrop = Schedule.from_decisions((2, 4, 6), (0.6, 0.4, 0.2), 8, "delete").keep_counts([16])
    reroute = Schedule.from_decisions((2, 4, 6), (0.3, 0.3, 0.15), 8, "reroute").keep_counts([16])
    assert [(counts[:, 0] + 8).tolist() for counts in (fastv, pdrop, reroute)] == [[12], [17, 14, 11], [12, 12, 10]]


def test_eos_ends_a_row_and_pads_the_rest():
    model = smallest()
    ids, pixels = random_ids(64)[None], random_pixels(1)
    free = model.generate_ids(input_ids=ids, pixel_values=pixels, max_new_tokens=12)[0]
    stop = int(free[5])
    first = free.tolist().index(stop)
    found = model.generate_ids(input_ids=ids, pixel_values=pixels, max_new_tokens=12, eos_token_id=stop)[0]
    np.testing.assert_array_equal(found[: first + 1], free[: first + 1])
    assert (found[first + 1 :] == model.config.pad_token).all()


@pytest.mark.slow
def test_generate_keeps_order_whatever_the_batch(tmp_path):
    model = small()
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (90, 130, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    questions = ["what colour is the cup ?", "locate the red circle", "is there a dog ? yes or no", "how many"]
    pairs = [(image, questions[0]), (tmp_path / "a.png", questions[1]), (None, questions[2]), (image, questions[3])]
    schedule = model.plan("nuwa", budget=192)
    alone = [model.generate([pair], schedule=schedule, max_new_tokens=6)[0] for pair in pairs]
    assert model.generate(pairs, schedule=schedule, max_new_tokens=6, batch_size=3) == alone
    ready = [model.question(pair) for pair in pairs[:3]]
    assert model.generate(ready, schedule=schedule, max_new_tokens=6) == alone[:3]
    assert len(set(alone)) > 1


def refusals():
    ids, pixels = random_ids(60), random_pixels(1)
    return {
        "a partial image": ({"input_ids": ids[None, :20], "pixel_values": pixels}, "image tokens"),
        "pixels without a place": (
            {"input_ids": random_ids(9, start=None)[None], "pixel_values": pixels},
            "there are 1 images and the prompts have places for 0",
        ),
        "a place without pixels": (
            {"input_ids": ids[None]},
            "row 0 has 36 image tokens and the images left for it fill 0",
        ),
        "pixels of another size": (
            {"input_ids": ids[None], "pixel_values": pixels[:, :, :70, :70]},
            "expected [images, 3,",
        ),
        "ids of one dimension": ({"input_ids": ids, "pixel_values": pixels}, "[B, S]"),
        "a mask of another shape": (
            {"input_ids": ids[None], "pixel_values": pixels, "attention_mask": np.ones((1, 4))},
            "[B, S]",
        ),
        "a mask of other numbers": (
            {"input_ids": random_ids(9, start=None)[None], "attention_mask": np.array([[0.0] * 8 + [-np.inf]])},
            "attention_mask is not all 1 (a token) and 0 (padding)",
        ),
        "rows of several lengths": ({"input_ids": [[1, 2], [1, 2, 3]]}, "rows of several lengths: pad them"),
        "no row": ({"input_ids": np.zeros((0, 4), int)}, "no row"),
        "pixels that are no numbers": ({"input_ids": ids[None], "pixel_values": pixels * np.nan}, "not finite"),
        "pixels without a shape": ({"input_ids": ids[None], "pixel_values": pixels[0, 0, 0]}, "expected [images, 3,"),
        "an empty row": ({"input_ids": ids[None], "attention_mask": np.zeros((1, 60))}, "all padding"),
        "another model's schedule": (
            {"input_ids": ids[None], "pixel_values": pixels, "schedule": Schedule.from_decisions((3,), (0.5,), 32)},
            "32 layers",
        ),
        "a grid": ({"input_ids": ids[None], "pixel_values": pixels, "image_grid_thw": [[1, 6, 6]]}, "image_grid_thw"),
        "a prompt beyond the last bucket": ({"input_ids": np.full((1, 5000), BOS)}, "at most 4096"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refusals(case):
    given, telling = refusals()[case]
    with pytest.raises(RerouteError) as caught:
        small().prefill(**given)
    assert telling in str(caught.value) and "\n" not in str(caught.value)


def test_the_name_of_a_method_is_no_schedule(unchecked_annotations):
    for ask in (lambda **how: small().answer([(None, "what ?")], **how), lambda **how: small().stream("", **how)):
        with pytest.raises(RerouteError, match="schedule is 'pdrop', expected a Schedule, such as `plan` makes"):
            ask(schedule="pdrop")


def test_unreadable_images_are_named(tmp_path):
    model = small()
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    for path in (tmp_path / "cut.png", tmp_path / "absent.png"):
        with pytest.raises(RerouteError, match=path.name):
            model.generate([(path, "what is this ?")])


def test_generate_compiles_one_program_a_bucket_and_keeps_the_token_budget(monkeypatch):
    """36 questions of three lengths in one call: as many prefills as buckets, full batches, nothing over the budget."""
    model = smallest(kv_heads=1)  # nobody else's
    picture = Image.fromarray(np.zeros((80, 70, 3), np.uint8))
    texts = ["red cup " * (length * 8) for length in (1, 3, 7)] * 12
    pairs = [(picture, f"{text} {WORDS[number]}") for number, text in enumerate(texts)]
    sizes, how = [], {"max_new_tokens": 1, "logprobs": True}

    def spy(decoder, prompt, *rest):
        sizes.append(prompt.ids.shape)
        return original(decoder, prompt, *rest)

    original = programs.prefill
    monkeypatch.setattr(programs, "prefill", spy)
    with compilations() as compiled:
        answers = model.answer(pairs, batch_size=4, token_budget=300, **how)
    assert Counter(sizes) == {(4, 68): 3, (3, 100): 4, (1, 164): 12}
    assert sum("prefill" in one for one in compiled) == 3
    monkeypatch.undo()
    alone = [model.answer([pair], **how)[0] for pair in pairs]
    assert [one.token_ids for one in answers] == [one.token_ids for one in alone]
    found, wanted = (np.array([one.logprobs[0] for one in of]) for of in (answers, alone))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.diff(np.sort(wanted)).min() > 2e-4  # so that no answer is taken for another


def test_a_prompt_beyond_the_token_budget_is_refused():
    model = small()
    with pytest.raises(RerouteError, match=r"a prompt takes \d+ slots and token_budget is 10: raise it"):
        model.generate([(None, "how many")], token_budget=10)
    with pytest.raises(RerouteError, match="token_budget is -1, expected a whole number of at least 1"):
        model.generate([(None, "how many")], token_budget=-1)
    with pytest.raises(RerouteError, match="batch_size is 0, expected a whole number of at least 1"):
        model.generate([(None, "how many")], batch_size=0)
    with pytest.raises(RerouteError, match="batch_size is 0, expected a whole number of at least 1"):
        model.warm_up([(None, "how many")], batch_size=0)


def test_warm_up_compiles_what_generate_needs(unchecked_annotations):
    model = smallest()
    schedule = Schedule.from_decisions((1,), (0.35,), 2)  # nobody else's
    picture = Image.fromarray(np.zeros((90, 70, 3), np.uint8))
    pairs = [(picture, "red cup left"), (picture, "where is the small blue cup " * 6)]
    options = {"schedule": schedule, "max_new_tokens": 2, "batch_size": 2}
    with compilations() as compiled:
        model.warm_up(pairs, **options)
    # Two buckets of text, at 1 and 2 rows.
    assert sum("prefill" in one for one in compiled) == 4
    with compilations() as compiled, xla_programs() as built:
        for rows in (1, 2):
            model.generate(pairs[:rows], **options)
    assert compiled == built == []


@pytest.mark.slow
def test_warm_up_covers_several_images_a_row_and_long_answers(unchecked_annotations):
    model = smallest()
    picture = Image.fromarray(np.zeros((90, 70, 3), np.uint8))
    pairs = [([picture, picture], f"what differs {number}") for number in range(4)]
    options = {"batch_size": 4, "max_new_tokens": 2 * ROOM}
    model.warm_up(pairs[:1], **options)
    with compilations() as compiled:
        for rows in (4, 3, 1):
            model.answer(pairs[:rows], **options)
    assert compiled == []
