"""The torch reference, on Qwen2.5-VL, against transformers and the method specification's vectors (section 11)."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf

from convert.crosscheck.nuwa import nuwa_stage_one
from convert.crosscheck.qwen2_5_vl import vision_tower, window_of
from convert.crosscheck.reference import run
from convert.crosscheck.scores import last_three
from reroute_jax.routing.nuwa import NuwaMerge
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.pool import PoolMerge
from reroute_jax.routing.stages import Stage
from tests.tiny_qwen import IMAGE, PAD, VISION_START, load_torch, random_ids, random_patches, tiny_qwen

# Neither is a multiple of the window, 4 x 4; the first has an odd side each way.
GRIDS = ((5, 7), (6, 3))
COUNT, FIRST = 53, 35
PROMPT = random_ids(100, GRIDS, start=4)
PIXELS, THW = random_patches(GRIDS)
NUWA = {"quantile": Fraction(1, 10), "diagonal_radius": True, "self_weight_override": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_torch(tiny_qwen(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def maps(model, monkeypatch):
    """Post-softmax attention [N, T, S] of every eager attention call of transformers, in order."""
    found, original = [], hf.eager_attention_forward

    def recording(*args, **kwargs):
        output, weights = original(*args, **kwargs)
        found.append(weights[0])
        return output, weights

    monkeypatch.setattr(hf, "eager_attention_forward", recording)
    model.set_attn_implementation("eager")
    return found


def given(ids=PROMPT, pixels=PIXELS, thw=THW):
    tokens = torch.tensor(ids)[None]
    kinds = (tokens == IMAGE).int()
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.tensor(pixels),
        "image_grid_thw": torch.tensor(thw),
        "mm_token_type_ids": kinds,
    }


def decisions(layers, keep, action, **more):
    return Schedule.from_decisions(layers, keep, 8, action, **more)


# fp32 sums in other orders, of numbers of about 10: one tower, or as many layers of decoder behind it (at most 9e-6 and
# 2e-5 were measured). The specification's vectors are written with four decimals.
TOWER, DECODER, WRITTEN = {"atol": 1e-5}, {"atol": 5e-5}, {"atol": 1e-4}


# --- Without routing: transformers itself -----------------------------------------------------------------------------


def test_no_routing_equals_transformers(model):
    ours = run(model, PROMPT, PIXELS, image_grid_thw=THW, max_new_tokens=16, repetition_penalty=1.05)
    with torch.no_grad():
        theirs = model(**given(), output_hidden_states=True)
        features = torch.cat(model.get_image_features(torch.tensor(PIXELS), torch.tensor(THW)).pooler_output)
        tokens = model.generate(**given(), max_new_tokens=16, do_sample=False, eos_token_id=None)[0, 100:]
    np.testing.assert_allclose(ours.features, features, **TOWER)
    np.testing.assert_allclose(ours.logits, theirs.logits[0, -1], **DECODER)
    for layer in range(7):
        np.testing.assert_allclose(ours.hidden[layer], theirs.hidden_states[layer + 1][0], **DECODER)
    assert model.generation_config.repetition_penalty == 1.05
    assert ours.tokens == tokens.tolist() and len(set(ours.tokens)) > 4
    plain = run(model, PROMPT, PIXELS, image_grid_thw=THW, max_new_tokens=16)
    assert plain.tokens != ours.tokens, "a penalty that changes nothing proves nothing"


def test_text_only_equals_transformers_and_is_not_routed(model):
    ids = random_ids(30)
    tokens = torch.tensor(ids)[None]
    with torch.no_grad():
        expected = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, eos_token_id=None
        )[0, 30:].tolist()
    schedule = decisions((2, 5), (0.3, 0.2), "delete")
    for one in (None, schedule):
        result = run(model, ids, None, one, max_new_tokens=8, repetition_penalty=1.05)
        assert result.tokens == expected and result.decisions == []


def test_tower_equals_transformers_block_by_block(model, maps):
    """Their patches stand in window order: ours, put in that order, are theirs."""
    tower, grid = model.model.visual, GRIDS[0]
    patches = torch.tensor(PIXELS[: 4 * FIRST])
    outputs, hooks = [], []
    for block in tower.blocks:
        hooks.append(block.register_forward_hook(lambda module, inputs, output: outputs.append(output)))
    with torch.no_grad():
        tower(patches, grid_thw=torch.tensor(THW[:1]))
        states, attention = vision_tower(tower, patches, grid)
    for hook in hooks:
        hook.remove()
    order = window_of(tower, grid).repeat_interleave(4).argsort(stable=True)
    assert order.tolist() != sorted(order.tolist())
    for ours, theirs in zip(states, outputs, strict=False):
        np.testing.assert_allclose(ours[order], theirs, **TOWER)
    # 6 blocks of which 2 see the image whole, the others in 2 x 2 windows.
    assert len(maps) == 2 + 4 * 4
    np.testing.assert_allclose(attention[-1][:, order][..., order], maps[-1], **TOWER)


@pytest.mark.parametrize("start", [1, 9])
def test_image_tokens_must_match_the_images(model, start):
    with pytest.raises(ValueError, match=r"runs of \[35, 18\] image tokens in the prompt, found 52"):
        broken = PROMPT.copy()
        broken[np.flatnonzero(broken == IMAGE)[-1]] = PAD
        run(model, broken, PIXELS, image_grid_thw=THW)
    with pytest.raises(ValueError, match="expected runs of"):
        gap = random_ids(100, GRIDS, start=start)
        place = np.flatnonzero(gap == IMAGE)[3]
        gap[[place, -1]] = gap[[-1, place]]
        run(model, gap, PIXELS, image_grid_thw=THW)


# --- Vectors of section 11 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "share, top_n, anchors, merged",
    [
        (35, 3, [3, 6, 9, 10, 12, 14], {6: 6.1158}),
        (60, 3, [0, 3, 6, 7, 8, 9, 10, 12, 14], {0: 2.1747}),
        (85, 4, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14], {1: 2.8036, 2: 3.4573}),
    ],
    ids=["0.25", "0.5", "0.75"],
)
def test_vector_9_stage_one(share, top_n, anchors, merged):
    patches = torch.arange(15.0)
    kept, found, _ = nuwa_stage_one(
        torch.tensor([5, 1, 2, 9, 4, 3, 8, 7, 6, 10, 11, 0.5, 12, 0.25, 13]),
        torch.stack([patches, torch.ones(15)], dim=1),
        torch.stack([(patches * math.pi / 16).cos(), (patches * math.pi / 16).sin()], dim=1),
        columns=5,
        top_n=top_n,
        keep=math.ceil(Fraction(share, 100) * 15),
        radius=0.8 * math.sqrt(34),
        quantile=Fraction(1, 10),
        self_weight_override=False,
    )
    assert found.tolist() == anchors
    expected = [[merged.get(anchor, anchor), 1] for anchor in anchors]
    np.testing.assert_allclose(kept, expected, **WRITTEN)


def test_vector_10_stage_two_score():
    head = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.1, 0.4], [0.2, 0.2, 0.2, 0.4]])
    other = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.1, 0.6, 0.1, 0.2], [0.5, 0.1, 0.1, 0.3]])
    earlier = torch.full((2, 1, 4), 9.0)
    weights = torch.cat([earlier, torch.stack([head, other])], dim=1)
    np.testing.assert_allclose(last_three(weights), [0.3, 0.333333, 0.2, 0.4], atol=1e-6)  # six digits are given


# --- Whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["raster", "window"])
def test_nuwa_reads_the_tower_where_the_specification_says(model, maps, order):
    """5.2 of transformers' own maps and states: their tower works in window order, `merged[rev]` is raster order."""
    tower, grid = model.model.visual, GRIDS[0]
    ids = random_ids(60, GRIDS[:1])
    schedule = Schedule((Stage(0, 8),), merge=NuwaMerge(Fraction(3, 5), 3, sim_order=order, **NUWA))
    outputs, hooks = [], []
    for block in tower.blocks:
        hooks.append(block.register_forward_hook(lambda module, inputs, output: outputs.append(output)))
    with torch.no_grad():
        features = tower(torch.tensor(PIXELS[: 4 * FIRST]), grid_thw=torch.tensor(THW[:1])).pooler_output
        rev = window_of(tower, grid).argsort(stable=True).argsort()
        metric = maps[-1].mean(dim=0).sum(dim=0).reshape(-1, 4).mean(dim=1)[rev]
        # Of 6 blocks: floor(7 * 6 / 32) = 1 to floor(23 * 6 / 32) = 4.
        similarity = tower.merger(torch.stack(outputs[1:5]).mean(dim=0))
        merged, anchors, _ = nuwa_stage_one(
            metric,
            features,
            similarity[rev] if order == "raster" else similarity,
            columns=7,
            top_n=3,
            keep=21,
            radius=0.8 * math.sqrt(5**2 + 7**2),
            quantile=Fraction(1, 10),
            self_weight_override=False,
        )
    for hook in hooks:
        hook.remove()
    result = run(model, ids, PIXELS[: 4 * FIRST], schedule, image_grid_thw=THW[:1])
    assert result.anchors.tolist() == anchors.tolist() and len(anchors) == 21
    np.testing.assert_allclose(result.features, merged, atol=1e-5)  # fp32: measured 2.5e-6
    plain = features[anchors].numpy()
    assert (np.abs(result.features - plain).max(axis=1) > 1e-3).sum() == 2, "the lowest tenth of 21 is merged"


def test_orders_of_similarity_differ_in_the_merged_features_only(model):
    found = [
        run(
            model,
            PROMPT,
            PIXELS,
            Schedule((Stage(0, 8),), merge=NuwaMerge(Fraction(3, 5), 3, sim_order=order, **NUWA)),
            image_grid_thw=THW,
        )
        for order in ("raster", "window")
    ]
    assert found[0].anchors.tolist() == found[1].anchors.tolist() and len(found[0].anchors) == 21 + 11
    assert np.abs(found[0].features - found[1].features).max() > 1e-3


def test_tokens_keep_the_positions_of_the_unpruned_prompt(model, monkeypatch):
    """5.5, through the tables that the decoder gets; generation goes on behind the largest position."""
    seen, original = [], type(model.model.language_model.rotary_emb).forward

    def recording(self, x, position_ids):
        seen.append(position_ids[:, 0])
        return original(self, x, position_ids)

    monkeypatch.setattr(type(model.model.language_model.rotary_emb), "forward", recording)
    merge = NuwaMerge(Fraction(7, 20), 3, **NUWA)
    schedule = decisions((4,), (0.42,), "delete", score="previous_layer_last_three", merge=merge)
    result = run(model, PROMPT, PIXELS, schedule, image_grid_thw=THW, max_new_tokens=2)
    with torch.no_grad():
        whole, delta = model.model.get_rope_index(
            torch.tensor(PROMPT)[None], given()["mm_token_type_ids"], torch.tensor(THW)
        )
    whole = whole[:, 0]
    assert whole[:, VISION_START].tolist() == whole[0, VISION_START].expand(3).tolist()
    for layer in (0, 7):
        assert any(
            one.shape == (3, len(result.ran[layer])) and (one == whole[:, result.ran[layer]]).all() for one in seen
        )
    assert len(result.ran[0]) == 47 + 13 + 7 and len(result.ran[7]) == 47 + int(20 * 0.42)
    assert seen[-1].tolist() == [[100 + int(delta)]] * 3 == [[int(whole.max()) + 1]] * 3


@pytest.mark.parametrize("bidirectional", [None, 3])
def test_last_three_scores_are_that_layers_attention(model, maps, bidirectional):
    schedule = decisions((4,), (0.25,), "delete", score="previous_layer_last_three", bidirectional_layer=bidirectional)
    result = run(model, PROMPT, PIXELS, schedule, image_grid_thw=THW)
    if bidirectional is not None:
        forward = model.model.language_model.layers[3].self_attn.forward
        model.model.language_model.layers[3].self_attn.forward = lambda *args, **more: forward(
            *args, **{**more, "attention_mask": None}
        )
    try:
        with torch.no_grad():
            out = model(**given(), output_hidden_states=True)
    finally:
        if bidirectional is not None:
            del model.model.language_model.layers[3].self_attn.forward
    visual = np.flatnonzero(PROMPT == IMAGE)
    expected = maps[-8 + 3][:, -3:].mean(dim=1).max(dim=0).values[visual]
    # fp32, torch's attention against explicit products: measured 2.4e-7 of scores, and 1.1e-5 of states up to 8.
    np.testing.assert_allclose(result.decisions[0].scores, expected, atol=1e-6)
    np.testing.assert_allclose(result.hidden[3], out.hidden_states[4][0], atol=3e-5)
    causal = np.triu(maps[-8 + 3][0], 1).max() == 0
    assert causal == (bidirectional is None)


def test_all_images_are_one_pool_unless_only_the_first_is_routed(model):
    keep = (0.5, 0.25)
    both, first = (
        run(model, PROMPT, PIXELS, decisions((2, 5), keep, "reroute", first_image_only=only), image_grid_thw=THW)
        for only in (False, True)
    )
    assert [len(one.selected) for one in both.decisions] == [26, 13]
    assert [len(one.selected) for one in first.decisions] == [17, 8]
    assert np.isfinite(both.decisions[0].scores).all() and both.decisions[0].selected.max() >= FIRST
    assert np.isfinite(first.decisions[1].scores).nonzero()[0].tolist() == list(range(FIRST))
    second = 4 + FIRST + 2 + 1 + np.arange(18)
    assert set(second) <= set(first.ran[7]) and not set(second) <= set(both.ran[7])


@pytest.mark.parametrize("action", ["delete", "reroute"])
def test_keeping_everything_changes_nothing(model, action):
    kept = run(model, PROMPT, PIXELS, decisions((0, 2, 7), (1.0,) * 3, action), image_grid_thw=THW, max_new_tokens=4)
    plain = run(model, PROMPT, PIXELS, image_grid_thw=THW, max_new_tokens=4)
    np.testing.assert_allclose(kept.logits, plain.logits, atol=1e-6)  # measured: equal
    assert kept.tokens == plain.tokens


@pytest.mark.parametrize("action", ["delete", "reroute"])
def test_decode_equals_a_longer_prefill(model, action):
    """Text is always kept, so when scores do not depend on the prompt a longer prompt selects the same tokens."""
    schedule = decisions((1, 4), (0.3, 0.2), action, score="prior", prior="uniform")
    prior = np.stack([np.random.default_rng(d).permutation(COUNT) for d in range(2)]).astype(np.float32)
    more = {"image_grid_thw": THW, "prior": prior}
    decoded = run(model, PROMPT, PIXELS, schedule, max_new_tokens=4, **more).tokens
    for step in range(4):
        prefilled = run(model, [*PROMPT, *decoded[:step]], PIXELS, schedule, **more)
        assert int(prefilled.logits.argmax()) == decoded[step]


def test_every_image_is_pooled_by_itself(model):
    result = run(model, PROMPT, PIXELS, Schedule((Stage(0, 8),), merge=PoolMerge(Fraction(1, 3))), image_grid_thw=THW)
    plain = run(model, PROMPT, PIXELS, image_grid_thw=THW)
    assert len(result.ran[0]) == 47 + len(result.features)
    # 6 x 3 tokens to at most 6: 3 x 2 cells of 2 x 2 tokens, columns overlapping.
    last = plain.features[FIRST:].reshape(6, 3, -1)
    np.testing.assert_allclose(result.features[-1], last[4:, 1:].mean(axis=(0, 1)), atol=1e-5)
