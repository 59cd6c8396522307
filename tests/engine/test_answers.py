"""What comes back of a call: answers, their costs, errors beside them, pieces of text."""

import io
from base64 import b64decode
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import reroute_jax
from reroute_jax.engine.answers import AnswerError
from reroute_jax.engine.text import pieces
from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import Schedule
from tests.checkpoints import small, smallest

BY_HAND = Schedule.from_decisions((1, 3), (0.5, 0.25), 4, "reroute", label="by hand")


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (70, 70, 3), dtype=np.uint8))


PAIRS = [(picture(1), "where is it ?"), (picture(2), "where is it ?")]


@pytest.fixture(scope="module")
def answered():
    return small().answer(PAIRS, schedule=BY_HAND, trace=True, max_new_tokens=4)


def arrays(model, *items) -> dict:
    """Questions of one length as the HF processor returns them."""
    questions = [model.question(item) for item in items]
    pixels, _ = model.family.pixels([image for one in questions for image in one.images], model.image_processor)
    return {"input_ids": np.stack([one.ids for one in questions]), "pixel_values": pixels}


def test_an_answer_says_why_it_ended_and_what_it_cost(answered):
    model, schedule, found = small(), BY_HAND, answered[0]
    assert found.finish_reason == "length" and len(found.token_ids) == 4
    ids = model.prompt_ids("where is it ?", [(6, 6)])
    assert found.usage.prompt_tokens == len(ids) and found.usage.visual_tokens == 36 and found.usage.new_tokens == 4
    cost = model.cost(schedule, text=len(ids) - 36)
    assert str(cost).startswith("by hand: 20.25 of 36 visual tokens per layer (nominal 20.25)")
    assert sum(found.usage.visual_tokens_per_layer) == cost.kv_visual
    # The keys and values of three more tokens: the last one is chosen and not fed.
    each = cost.kv_bytes // cost.kv_tokens
    assert found.usage.kv_bytes == cost.kv_bytes + 3 * model.config.num_layers * each


def test_usage_counts_what_is_cached_of_cut_caches():
    """Layers before the decision ran all tokens and keep what it selected (15.1)."""
    model = smallest()
    schedule = Schedule.from_decisions((1,), (12,), 2, "delete", score="value_similarity", cut_caches="all")
    found = model.answer([(picture(), "where is it ?")], schedule=schedule, max_new_tokens=4)[0].usage
    assert found.visual_tokens_per_layer == (36, 12)
    cost = model.cost(schedule, text=found.prompt_tokens - 36)
    each = cost.kv_bytes // cost.kv_tokens
    assert cost.kv_visual == 24 and found.kv_bytes == cost.kv_bytes + 3 * 2 * each


def test_the_id_that_ends_an_answer_is_no_part_of_it():
    model = smallest()
    free = model.answer([(None, "how many")], max_new_tokens=6)[0]
    stop = free.token_ids[3]
    model = replace(model, config=replace(model.config, eos_tokens=(stop,)))
    found = model.answer([(None, "how many")], max_new_tokens=6)[0]
    assert found.finish_reason == "stop"
    assert found.token_ids == free.token_ids[: free.token_ids.index(stop)]


def test_a_trace_of_an_answer_is_that_of_its_prompt_alone():
    model = smallest()
    schedule = model.plan("nuwa", action="delete", budget="1/2")
    pairs = [(picture(seed), f"question number {seed} " * (1 + seed)) for seed in range(2)]
    for found, one in zip(model.answer(pairs, schedule=schedule, trace=True, max_new_tokens=2), pairs, strict=True):
        alone = model.prefill(**arrays(model, one), schedule=schedule, trace=True).trace
        np.testing.assert_array_equal(found.trace.anchors, alone.anchors)
        for mine, its in zip(found.trace.selected, alone.selected, strict=True):
            np.testing.assert_array_equal(mine, its)
        np.testing.assert_array_equal(found.trace.kv_tokens, alone.kv_tokens)
        np.testing.assert_array_equal(found.trace.members, alone.members)
        (anchors,), (members,) = alone.anchors, alone.members
        assert all(anchor in own for anchor, own in zip(anchors, members, strict=True))
        assert members.shape[1] > 1 and members.max() < 36
        assert running(figure(found.trace))[0] == found.trace.anchors[0].tolist()


def figure(trace) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{trace.show()._repr_html_()}</div>")


def running(root: ElementTree.Element) -> list[list[int]]:
    """The tokens that a picture shows as run or returned, by stage."""
    states = [svg.get("data-states") for svg in root.iter("svg") if svg.get("class") == "rj-map"]
    return [[token for token, state in enumerate(of_stage) if state in "01"] for of_stage in states]


def test_the_picture_of_a_trace_shows_what_ran_where(answered):
    """Of the second of two questions: its image, the tokens of every stage, and how many each layer had."""
    model, found = small(), answered[1]
    root, kept = figure(found.trace), [selected[0].tolist() for selected in found.trace.selected]
    assert running(root) == [list(range(36)), *kept] and [len(tokens) for tokens in kept] == [18, 9]
    captions = ["".join(caption.itertext()) for caption in root.iter("figcaption")]
    assert captions == ["layer 0 36 of 36 run", "layers 1 to 2 18 of 36 run", "layer 3 9 of 36 run"]
    text = found.usage.prompt_tokens - 36
    bars = [title.text for title in root.iter("title")]
    visual = enumerate([36, 18, 18, 9])
    assert bars == [f"layer {layer}: {count} visual and {text} text tokens" for layer, count in visual]
    (shown,) = {image.get("href") for image in root.iter("image")}
    stored = Image.open(io.BytesIO(b64decode(shown.partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(stored), model.question(PAIRS[1]).images[0])


def test_the_picture_of_given_pixels_is_the_image_that_they_were_made_of():
    model = small()
    trace = model.prefill(**arrays(model, *PAIRS), schedule=BY_HAND, trace=True).trace
    for row, one in enumerate(PAIRS):
        np.testing.assert_array_equal(trace.seen.views(row)[0].pixels, model.question(one).images[0])


def test_one_bad_question_takes_no_other_down(tmp_path):
    model = smallest()
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    items = [(picture(), "one"), (tmp_path / "cut.png", "two"), (None, "<image>"), (None, "four"), "no pair"]
    items.append((None, "half \ud800"))
    found = model.answer(items, max_new_tokens=3, on_error="return")
    assert [one.error is None for one in found] == [True, False, False, True, False, False]
    assert "question 1: " in str(found[1].error) and "cut.png" in str(found[1].error)
    assert "question 2: " in str(found[2].error) and "question 4: " in str(found[4].error)
    assert "half of a surrogate pair" in str(found[5].error)
    assert [found[0].text, found[3].text] == model.generate([items[0], items[3]], max_new_tokens=3)
    with pytest.raises(AnswerError, match=r"question 1: .*4 of 6 questions") as caught:
        model.answer(items, max_new_tokens=3)
    assert [one.text for one in caught.value.answers] == [one.text for one in found]


def test_a_chat_of_one_turn_is_the_pair():
    model = smallest()
    one = picture()
    chat = [("user", [one, "where is it ?"])]
    assert model.generate([chat], max_new_tokens=4) == model.generate([(one, "where is it ?")], max_new_tokens=4)
    longer = [*chat, ("assistant", "there"), ("user", "and now ?")]
    assert len(model.question(longer).ids) > len(model.question(chat).ids)


def test_numbers_that_overflow_are_told_with_dtype_row_and_layers():
    """One MLP's kernels times 100,000 in float16: what comes behind that stage is not a number."""
    model = reroute_jax.load(smallest().folder, "float16")
    mlp = model.module.decoder.layers[1].mlp
    mlp.up.kernel[...] = mlp.up.kernel[...] * 60000
    mlp.gate.kernel[...] = mlp.gate.kernel[...] * 60000
    schedule = Schedule.from_decisions((1,), (0.5,), 2, "reroute")
    found = model.answer([(picture(), "one"), (None, "two")], schedule=schedule, max_new_tokens=2, on_error="return")
    for number, one in enumerate(found):
        assert f"question {number}: hidden states are not finite in float16" in str(one.error)
        assert "use bfloat16 or float32" in str(one.error)
    assert "layers 1 to 1" in str(found[0].error)
    with pytest.raises(RerouteError, match=r"row 0: .*float16"):
        model.prefill(**arrays(model, (picture(), "one")))


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_out_of_range_are_refused(wrong):
    model = smallest()
    with pytest.raises(RerouteError, match=rf"row 1 has id {wrong}, expected 0 to \d+"):
        model.prefill(input_ids=np.array([[1, 2, 3], [1, wrong, 3]]))


def test_a_stream_is_the_answer_in_pieces():
    model = smallest()
    one = (picture(), "tell me more about the cup")
    found = list(model.stream(one, max_new_tokens=20))
    assert len(found) > 3
    assert "".join(found) == model.generate([one], max_new_tokens=20)[0]
    begun = model.stream(one, max_new_tokens=20)
    assert next(begun) == found[0]
    begun.close()


class Bytes:
    """A tokenizer whose tokens are single bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "👩‍👩‍👧 ok", "plain", ""])
def test_pieces_are_cut_at_characters(text):
    found = list(pieces(Bytes(), text.encode()))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_an_answer_that_ends_inside_a_character_is_whole_text():
    cut = "caf\u00e9".encode()[:-1]
    assert "".join(pieces(Bytes(), cut)) == cut.decode(errors="replace")
