"""The torch reference, on LLaVA, against transformers and the method specification's vectors (section 11)."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from convert.crosscheck.layers import RaggedRows
from convert.crosscheck.llava import clip_tower
from convert.crosscheck.nuwa import nuwa_stage_one, pool
from convert.crosscheck.reference import keep_count, penalised, route, run, select
from convert.crosscheck.scores import head_mean
from reroute_jax.routing.nuwa import NuwaMerge
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.pool import PoolMerge
from reroute_jax.routing.stages import Stage
from tests.tiny import load_torch, random_ids, random_pixels, tiny_llava

VISUAL = 36
LLAVA = {"quantile": Fraction(11, 20), "self_weight_override": True}


@pytest.fixture(scope="module", params=[4, 2], ids=["mha", "gqa"])
def model(request, tmp_path_factory):
    return load_torch(tiny_llava(tmp_path_factory.mktemp("tiny"), kv_heads=request.param))


@pytest.fixture(scope="module")
def pixels():
    return random_pixels(1)


def _schedule(layers, keep, action, **more):
    return Schedule.from_decisions(layers, keep, 8, action, **more)


# --- Without routing: transformers itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 9], ids=["image-first", "after-bos", "later"])
def test_no_routing_equals_transformers(model, pixels, start):
    ids = random_ids(60, start=start, bos=start > 0)
    ours = run(model, ids, pixels, max_new_tokens=32)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids)[None], pixel_values=torch.tensor(pixels), output_hidden_states=True)
        features = model.get_image_features(torch.tensor(pixels)).pooler_output[0]
        tokens = model.generate(
            input_ids=torch.tensor(ids)[None],
            attention_mask=torch.ones(1, 60, dtype=torch.long),
            pixel_values=torch.tensor(pixels),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
        )[0, 60:]
    np.testing.assert_allclose(ours.logits, theirs.logits[0, -1], atol=5e-5)
    np.testing.assert_allclose(ours.features, features, atol=1e-5)
    for layer in range(7):
        np.testing.assert_allclose(ours.hidden[layer], theirs.hidden_states[layer + 1][0], atol=5e-5)
    assert ours.tokens == tokens.tolist()
    assert len(set(ours.tokens)) > 4, "constant tokens would prove nothing"


def test_clip_tower_equals_transformers(model, pixels):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        states, attention = clip_tower(model.model.vision_tower, torch.tensor(pixels))
        theirs = model.model.vision_tower(torch.tensor(pixels), output_hidden_states=True, output_attentions=True)
    for ours, expected in zip(states, theirs.hidden_states, strict=True):
        np.testing.assert_allclose(ours, expected[0], atol=1e-5)
    for ours, expected in zip(attention, theirs.attentions, strict=True):
        np.testing.assert_allclose(ours, expected[0], atol=1e-5)


def test_text_only_prompt_is_not_routed(model):
    ids = random_ids(20, start=None)
    routed = run(model, ids, None, _schedule((2, 5), (0.3, 0.2), "delete"), max_new_tokens=4)
    plain = run(model, ids, max_new_tokens=4)
    assert routed.decisions == [] and routed.tokens == plain.tokens
    np.testing.assert_array_equal(routed.logits, plain.logits)


def test_repetition_penalty_equals_transformers(model, pixels):
    np.testing.assert_allclose(
        penalised(torch.tensor([2.0, -1.0, 1.95]), {0, 1}, 1.05), [1.90476, -1.05, 1.95], atol=1e-5
    )
    ids = random_ids(60)
    with torch.no_grad():
        tokens = model.generate(
            input_ids=torch.tensor(ids)[None],
            attention_mask=torch.ones(1, 60, dtype=torch.long),
            pixel_values=torch.tensor(pixels),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            repetition_penalty=1.3,
        )[0, 60:].tolist()
    assert run(model, ids, pixels, max_new_tokens=24, repetition_penalty=1.3).tokens == tokens
    assert run(model, ids, pixels, max_new_tokens=24).tokens != tokens


def test_generation_stops_after_a_stop_token(model, pixels):
    ids = random_ids(60)
    free = run(model, ids, pixels, max_new_tokens=12).tokens
    stop = free[5]
    assert run(model, ids, pixels, max_new_tokens=12, eos_tokens=(stop,)).tokens == free[: free.index(stop) + 1]


def test_image_tokens_must_match_the_image(model, pixels):
    with pytest.raises(ValueError, match=r"runs of \[36\] image tokens"):
        run(model, random_ids(60, visual=35), pixels)
    with pytest.raises(ValueError, match=r"runs of \[\] image tokens"):
        run(model, random_ids(60))


# --- Vectors of section 11 --------------------------------------------------------------------------------------------


def test_vector_1_keep_counts():
    for ratio, count in [(0.2644, 152), (0.01916, 11), (0.4502, 259), (0.1266, 72), (0.0106, 6)]:
        assert keep_count(Stage(1, 2, ratio=ratio, action="delete", score="last_token"), 576) == count
    assert keep_count(Stage(1, 2, ratio=0.01, action="delete", score="last_token"), 10) == 1
    assert keep_count(Stage(1, 2, ratio=0.142857, action="delete", score="last_token"), 112) == 15
    assert keep_count(Stage(1, 2, ratio=16 / 112, action="delete", score="last_token"), 112) == 16


def test_vector_2_score():
    mean = head_mean(torch.tensor([[0.0, 1, 2, 0, 1, 0], [1.0, 0, 0, 3, 0, 1]]))
    expected = [0.079247, 0.103413, 0.250983, 0.383699, 0.103413, 0.079247]
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    assert select(mean[1:5], 2).tolist() == [1, 2]
    assert select(mean[1:5], 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "action, second, final, third_cache",
    [
        ("reroute", [0, 2], [6, 4, 3, 4, 3, 3, 1, 6], [0, 1, 3, 7]),
        ("delete", [3, 4], [6, None, None, None, 6, 6, None, 6], [0, 4, 5, 7]),
    ],
)
def test_vector_3_routing_semantics(action, second, final, third_cache):
    injected = {1: [0.1, 0.6, 0.2, 0.5, 0.4, 0.3], 3: [0.9, 0.1, 0.8, 0.2, 0.3, 0.0]}
    origin = torch.arange(8)
    rows = RaggedRows(torch.zeros(8, 1), origin[None], origin, torch.tensor([-1, 0, 1, 2, 3, 4, 5, -1]))
    schedule = Schedule.from_decisions((1, 3), (3, 2), 6, action)
    left, walk = route(
        rows,
        schedule,
        lambda layer, rows: (rows.hidden + 1, None),
        lambda given: torch.tensor(injected[given.stage.lo])[given.rows.visual],
        original=6,
        next_position=8,
    )
    assert [decision.selected.tolist() for decision in walk.decisions] == [[1, 3, 4], second]
    values = dict(zip(left.origin.tolist(), left.hidden[:, 0].tolist(), strict=True))
    assert [values.get(row) for row in range(8)] == final
    assert [len(ran) for ran in walk.ran] == [8, 5, 5, 4, 4, 4]
    assert walk.ran[1].tolist() == [0, 2, 4, 5, 7]
    assert walk.ran[3].tolist() == third_cache
    candidates = np.isfinite(walk.decisions[1].scores).nonzero()[0].tolist()
    assert candidates == (list(range(6)) if action == "reroute" else [1, 3, 4])


def test_vector_4_one_decision_deletes_as_it_reroutes(model, pixels):
    deleted, rerouted = (
        run(model, random_ids(60, start=5), pixels, _schedule((3,), (0.25,), action), max_new_tokens=8)
        for action in ("delete", "reroute")
    )
    np.testing.assert_array_equal(deleted.decisions[0].selected, rerouted.decisions[0].selected)
    np.testing.assert_allclose(deleted.logits, rerouted.logits, atol=1e-5)
    for ours, theirs in zip(deleted.ran, rerouted.ran, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert deleted.tokens == rerouted.tokens
    plain = run(model, random_ids(60, start=5), pixels)
    assert np.abs(plain.logits - deleted.logits).max() > 0.1, "routing must matter"


@pytest.mark.parametrize(
    "layers, keep, action, lengths",
    [
        ((3,), (0.3,), "delete", [24, 24, 24, 12, 12, 12, 12, 12]),
        ((2, 4, 6), (0.6, 0.4, 0.2), "delete", [24, 24, 17, 17, 14, 14, 11, 11]),
        ((2, 4, 6), (0.3, 0.3, 0.15), "reroute", [24, 24, 12, 12, 12, 12, 10, 10]),
    ],
)
def test_vector_5_cache_lengths(tmp_path, layers, keep, action, lengths):
    model = load_torch(tiny_llava(tmp_path, kv_heads=2, image_size=56))
    result = run(model, random_ids(24, visual=16, start=3), random_pixels(1, 56), _schedule(layers, keep, action))
    assert [len(ran) for ran in result.ran] == lengths


def test_vector_6_nuwa_merge():
    metric = torch.tensor([0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 0.6, 0.05, 0.15, 0.35, 0.25, 0.45, 0.12, 0.55, 0.65])
    patches = torch.arange(16.0)
    similarity = torch.stack([(patches * torch.pi / 10).cos(), (patches * torch.pi / 10).sin()], dim=1)
    features = torch.stack([patches, torch.ones(16)], dim=1)
    given = {"columns": 4, "radius": 8**0.5, **LLAVA}
    merged, anchors, _ = nuwa_stage_one(metric, features, similarity, top_n=1, keep=3, **given)
    assert anchors.tolist() == [0, 6, 15]
    np.testing.assert_allclose(merged, [[0, 1], [10.3068, 1.7240], [21.7682, 1.5126]], atol=1e-4)
    merged, _, _ = nuwa_stage_one(
        metric, features, similarity, top_n=1, keep=3, **{**given, "self_weight_override": False}
    )
    np.testing.assert_allclose(merged, [[0, 1], [5.9627, 1], [14.0798, 1]], atol=1e-4)
    merged, anchors, _ = nuwa_stage_one(metric, features, similarity, top_n=2, keep=6, **given)
    assert anchors.tolist() == [0, 5, 6, 7, 14, 15]
    expected = [[0, 1], [8.6573, 1.7240], [6, 1], [11.4699, 1.6316], [22.5428, 1.6622], [15, 1]]
    np.testing.assert_allclose(merged, expected, atol=1e-4)


@pytest.mark.parametrize("keep, top_n, high", [(112, 1, 50), (224, 2, 101), (336, 3, 151)])
def test_vector_7_nuwa_high_counts(keep, top_n, high):
    generator = torch.Generator().manual_seed(0)
    metric = torch.randperm(576, generator=generator).float()
    features = torch.rand(576, 4, generator=generator)
    merged, anchors, _ = nuwa_stage_one(
        metric,
        features,
        torch.rand(576, 4, generator=generator),
        columns=24,
        top_n=top_n,
        keep=keep,
        radius=280**0.5,
        **LLAVA,
    )
    assert len(anchors) == keep
    assert int((merged == features[anchors]).all(dim=1).sum()) == high


def test_nuwa_candidates_are_the_best_of_each_region():
    """One region holds the four largest values; the anchor at the threshold itself counts as high."""
    metric = torch.tensor([9.0, 8, 1, 2, 7, 6, 3, 4, 0.4, 0.3, 0.2, 0.1, 0.8, 0.7, 0.6, 0.5])
    merged, anchors, _ = nuwa_stage_one(
        metric, torch.eye(16), torch.ones(16, 2), columns=4, top_n=2, keep=5, radius=8**0.5, **LLAVA
    )
    assert anchors.tolist() == [0, 1, 6, 7, 12]
    # Index 0.55 * 4 = 2.2 of the sorted .8, 3, 4, 8, 9 is 4.8.
    assert [int((row > 0).sum()) == 1 for row in merged] == [True, True, False, False, False]
    _, odd, _ = nuwa_stage_one(
        metric[:15], torch.eye(15), torch.ones(15, 2), columns=5, top_n=1, keep=9, radius=9, **LLAVA
    )
    assert odd.tolist() == [0, 4, 7, 10, 12, 14]
    assert _high_anchors(21) == 10, "index 0.55 * 20 = 11 is the 12th of 21 values: it and the 9 above are high"


def _high_anchors(keep):
    """A 2 x 42 grid with one candidate a region."""
    metric = torch.arange(84.0)
    merged, _, _ = nuwa_stage_one(
        metric, torch.eye(84), torch.ones(84, 2), columns=42, top_n=1, keep=keep, radius=9, **LLAVA
    )
    return sum(int((row > 0).sum()) == 1 for row in merged)


def test_vector_8_nuwa_positions():
    position = torch.tensor([0, 1, 2, 3, 4, 5, 30, 580, 581, 582, 583])
    visual = torch.tensor([-1] * 5 + [0, 25, 575] + [-1] * 3)
    rows = RaggedRows(torch.zeros(11, 1), position[None], position, visual)
    seen = []

    def layer(number, rows):
        seen.append(rows.position[0].tolist())
        return rows.hidden, None

    stages = (Stage(0, 1), Stage(1, 2, count=1, action="delete", score="last_token"))
    middle_best = lambda given: (given.rows.visual == 25).float()  # noqa: E731
    _, walk = route(rows, Schedule(stages), layer, middle_best, original=576, next_position=584)
    assert seen == [position.tolist(), [0, 1, 2, 3, 4, 30, 581, 582, 583]]
    assert walk.next_position == [584, 584]
    assert walk.decisions[0].selected.tolist() == [25]


# --- Whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["delete", "reroute"])
def test_keeping_everything_changes_nothing(model, pixels, action):
    ids = random_ids(60, start=3)
    kept = run(model, ids, pixels, _schedule((0, 2, 7), (1.0, 1.0, 1.0), action), max_new_tokens=8)
    plain = run(model, ids, pixels, max_new_tokens=8)
    np.testing.assert_allclose(kept.logits, plain.logits, atol=1e-5)
    assert kept.tokens == plain.tokens


def test_selection_depends_on_the_prompt_and_recovers(model, pixels):
    first, other = random_ids(60, start=5), random_ids(60, start=5, seed=1)
    schedule = _schedule((1, 3, 5, 6), (0.4, 0.4, 0.2, 0.1), "reroute")
    ours, theirs = (run(model, ids, pixels, schedule) for ids in (first, other))
    assert any((a.selected != b.selected).any() for a, b in zip(ours.decisions, theirs.decisions, strict=True))
    chosen = [set(decision.selected.tolist()) for decision in ours.decisions]
    assert not all(later <= earlier for earlier, later in pairwise(chosen)), "nothing came back"
    layout = run(model, first, pixels, _schedule((1, 3, 5, 6), (0.4, 0.4, 0.2, 0.1), "layout"))
    chosen = [set(decision.selected.tolist()) for decision in layout.decisions]
    assert all(later <= earlier for earlier, later in pairwise(chosen))
    assert [np.isfinite(decision.scores).sum() for decision in layout.decisions] == [36, 14, 14, 7]


@pytest.mark.parametrize("action", ["delete", "reroute"])
def test_decode_equals_a_longer_prefill(model, pixels, action):
    """Text is always kept, so when scores do not depend on the prompt a longer prompt selects the same tokens."""
    schedule = _schedule((1, 4), (0.3, 0.2), action, score="prior", prior="uniform")
    prior = np.stack([np.random.default_rng(d).permutation(VISUAL) for d in range(2)]).astype(np.float32)
    ids = random_ids(50, start=2)
    result = run(model, ids, pixels, schedule, prior=prior, max_new_tokens=6)
    decoded, (first, second) = result.tokens, result.decisions
    assert first.selected.tolist() == sorted(np.argsort(-prior[0])[:10])
    candidates = first.selected if action == "delete" else np.arange(VISUAL)
    assert second.selected.tolist() == sorted(candidates[np.argsort(-prior[1][candidates])[:7]])
    for step in range(6):
        prefilled = run(model, [*ids, *decoded[:step]], pixels, schedule, prior=prior)
        assert int(prefilled.logits.argmax()) == decoded[step]


@pytest.mark.parametrize("action", ["delete", "reroute"])
def test_previous_layer_score_is_that_layers_attention(model, pixels, action):
    ids = random_ids(60, start=5)
    result = run(model, ids, pixels, _schedule((4,), (0.25,), action, score="previous_layer"))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids)[None], pixel_values=torch.tensor(pixels), output_attentions=True)
    np.testing.assert_allclose(result.decisions[0].scores, out.attentions[3][0, :, -1, 5:41].mean(dim=0), atol=1e-5)
    own = run(model, ids, pixels, _schedule((4,), (0.25,), action))
    np.testing.assert_allclose(own.decisions[0].scores, out.attentions[4][0, :, -1, 5:41].mean(dim=0), atol=1e-5)


def test_nuwa_places_anchors_at_their_patches(model, pixels):
    ids = random_ids(60, start=5)
    schedule = _schedule((4,), (2,), "delete", score="previous_layer", merge=NuwaMerge(Fraction(7, 36), top_n=1))
    result = run(model, ids, pixels, schedule, max_new_tokens=4)
    assert len(result.anchors) == 7 and result.features.shape == (7, 64)
    assert [len(ran) for ran in result.ran] == [31] * 4 + [26] * 4
    np.testing.assert_array_equal(result.ran[0], [*range(5), *(5 + result.anchors), *range(41, 60)])
    assert set(result.decisions[0].selected) <= set(result.anchors)
    np.testing.assert_array_equal(np.isfinite(result.decisions[0].scores).nonzero()[0], result.anchors)
    plain = run(model, ids, pixels)
    distance = np.abs(result.features - plain.features[result.anchors]).max(axis=1)
    assert (distance < 1e-5).sum() == 3, "anchors at or above the 0.55 quantile of 7 stay as they are"


def test_nuwa_reads_the_tower_where_the_specification_says(model, pixels):
    """4.2, 4.7: attention of the second-to-last block, similarity from two thirds of the depth on, in units of 24."""
    merge = NuwaMerge(Fraction(7, 18), top_n=2)
    result = run(model, random_ids(60), pixels, Schedule((Stage(0, 8),), merge=merge))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        tower = model.model.vision_tower(torch.tensor(pixels), output_hidden_states=True, output_attentions=True)
        merged, anchors, _ = nuwa_stage_one(
            tower.attentions[4][0, :, 0, 1:].sum(dim=0),
            tower.hidden_states[5][0, 1:],
            sum(tower.hidden_states[i][0, 1:] for i in (4, 5, 6)) / 3,
            columns=6,
            top_n=2,
            keep=14,
            radius=280**0.5 / 4,
            **LLAVA,
        )
        features = model.model.multi_modal_projector(merged)
    assert result.anchors.tolist() == anchors.tolist()
    np.testing.assert_allclose(result.features, features, atol=1e-5)


def test_pool_averages_cells(model, pixels):
    features = torch.arange(36.0)[:, None]
    cells, index = pool(features, (6, 6), (2, 3))
    np.testing.assert_allclose(cells[:, 0], [6.5, 8.5, 10.5, 24.5, 26.5, 28.5])
    assert index.tolist() == [6, 8, 10, 24, 26, 28]
    result = run(model, random_ids(60, start=5), pixels, Schedule((Stage(0, 8),), merge=PoolMerge(Fraction(1, 6))))
    assert [len(ran) for ran in result.ran] == [30] * 8 and result.anchors.tolist() == index.tolist()


@pytest.mark.parametrize("action", ["delete", "reroute"])
def test_renumbering_counts_what_runs(action):
    origin = torch.arange(8)
    rows = RaggedRows(torch.zeros(8, 1), origin[None], origin, torch.tensor([-1, 0, 1, 2, 3, 4, 5, -1]))
    seen, scored = [], []

    def layer(number, rows):
        seen.append(rows.position[0].tolist())
        return rows.hidden, None

    def score(given):
        scored.append(given.rows.position[0].tolist())
        return -given.rows.visual.float()

    schedule = Schedule.from_decisions((1, 2), (3, 2), 3, action, position_mode="renumber")
    _, walk = route(rows, schedule, layer, score, original=6, next_position=8)
    assert seen == [list(range(8)), list(range(5)), list(range(4))]
    assert walk.next_position == [8, 5, 4]
    assert scored[1] == list(range(8 if action == "reroute" else 5)), "deferred rows are scored where they stood"
