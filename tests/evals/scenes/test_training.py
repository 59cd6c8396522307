"""What the embedded models are trained on is what they are asked later."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from evals.harness import prompts
from evals.harness.boxes import parse_box
from evals.scenes import spec, train
from evals.scenes.data import TRAINING_QUESTIONS, training_scene
from evals.scenes.questions import REFERRING
from evals.scenes.spec import IMAGE_SLOTS, model_config
from evals.scenes.tokenizer import DIALECTS, build_tokenizer, vocabulary
from evals.scenes.train import random_bypass
from evals.scenes.training import losses, recipes
from evals.scenes.training.export import _SAVE_PROCESSOR, export
from evals.scenes.training.losses import AuxiliaryHeads, answer_loss, shared_prefix_layer, targets
from evals.scenes.training.packing import (
    MAX_THINGS,
    SLOTS,
    _subjects,
    answer_text,
    corners,
    image_prefix,
    pack,
    prompt_ids,
)
from evals.scenes.training.recipes import phases
from evals.scenes.training.towers import look
from evals.scenes.training.warm import OFFSETS, local_biases, with_layers, with_words
from evals.scenes.world import TOKEN, scene_seed
from reroute_jax.decoder import forward
from reroute_jax.engine.chat import ChatLayout
from reroute_jax.functional import abstract_params
from reroute_jax.models import qwen2_5_vl, qwen3_vl
from reroute_jax.nn.layers import DecoderLayer, rotate
from reroute_jax.nn.mrope import mrope_positions
from reroute_jax.nn.params import named_parameters
from reroute_jax.nn.positions import rope_tables
from reroute_jax.vision.qwen_layers import rotary

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")
STYLE = {"llava": "full", "qwen2_5_vl": "nuwa", "qwen3_vl": "qwen3"}
QWENS = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


def random_parameters(family: str, seed: int) -> dict[str, np.ndarray]:
    """Of a model of the shipped size, by name."""
    rng, names = np.random.default_rng(seed), named_parameters(abstract_params(model_config(family)))
    return {name: rng.standard_normal(value.shape, np.float32) for name, value in names.items()}


class Full:
    """A generator that always asks with the whole referring prompt."""

    def random(self) -> float:
        return 1.0


def grid_of(scene) -> tuple[int, int]:
    return scene.height // TOKEN, scene.width // TOKEN


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_the_tokenizers(family):
    """Packed ids of prefix and question, less padding, equal the tokenizer's ids of the evaluation prompt."""
    tokenizer, vocab, config = build_tokenizer(family), vocabulary(family), model_config(family)
    for index in range(20):
        _, scene, asked = training_scene(scene_seed("train", index), family=family)
        rows, cols = grid_of(scene)
        prefix = image_prefix(family, (rows, cols))
        for question in asked:
            referring = question.kind in REFERRING
            text = prompts.rec(question.text, STYLE[family]) if referring else prompts.single_word(question.text)
            ids = ChatLayout(tokenizer, DIALECTS[family].chat_template, config.image_token).question_ids(
                text, [(rows, cols)]
            )
            assert list(ids) == [*prefix.ids[prefix.runs], *prompt_ids(question, Full(), family)]
            assert vocab["<unk>"] not in ids


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_survive_the_tokenizer(family):
    tokenizer = build_tokenizer(family)
    for index in range(20):
        _, scene, asked = training_scene(scene_seed("train", index), family=family)
        for question in asked:
            text = answer_text(scene, question, family)
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_answers_of_the_qwen_family_are_json_in_pixels():
    for index in range(50):
        _, scene, asked = training_scene(scene_seed("train", index), {"attribute": 3, "place": 3}, "qwen2_5_vl")
        for question in asked:
            text = answer_text(scene, question, "qwen2_5_vl")
            x, y, width, height = scene.things[question.target].box
            assert json.loads(text) == [{"bbox_2d": [x, y, x + width, y + height]}]
            assert parse_box(text) == (x, y, x + width, y + height)
            assert len(text.split()) == 4  # tokens


def test_answers_of_qwen3_are_json_in_thousandths():
    """Of the image each way, whatever its form, to the nearest ten."""
    for index in range(50):
        _, scene, asked = training_scene(scene_seed("train", index), {"attribute": 3, "place": 3}, "qwen3_vl")
        for question in asked:
            text = answer_text(scene, question, "qwen3_vl")
            x, y, width, height = scene.things[question.target].box
            shares = (x / scene.width, y / scene.height, (x + width) / scene.width, (y + height) / scene.height)
            (answer,) = json.loads(text)
            np.testing.assert_allclose(answer["bbox_2d"], np.array(shares) * 1000, atol=5.001)
            assert parse_box(text) == tuple(answer["bbox_2d"]) and len(text.split()) == 4


@pytest.mark.parametrize("family", QWENS)
def test_chat_template_of_the_qwen_families(family):
    content = [{"type": "image"}, {"type": "text", "text": "Locate it."}]
    render = build_tokenizer(family).apply_chat_template
    user = {"role": "user", "content": content}
    built_in = render([user], chat_template=QWENS[family].CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False)
    assert render([user], add_generation_prompt=True, tokenize=False) == built_in
    told = render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hm?"}], tokenize=False)
    assert told == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHm?<|im_end|>\n"


@pytest.mark.parametrize("family, most", [("qwen2_5_vl", 80), ("qwen3_vl", 128)])
def test_patches_are_the_image_processors(family, most, tmp_path):
    """Training packs its own patches; they are what the exported processor makes of the stored image."""
    config = model_config(family)
    _SAVE_PROCESSOR[family](tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    packed = pack("train", 0, 6, TRAINING_QUESTIONS, family)
    assert packed.images.patches.shape == (6, 4 * most, config.vision.patch_values)
    for index in range(6):
        image, scene, _ = training_scene(scene_seed("train", index), family=family)
        found = processor(images=Image.fromarray(image), return_tensors="np")
        rows, cols = grid_of(scene)
        np.testing.assert_array_equal(found["image_grid_thw"], [[1, 2 * rows, 2 * cols]])
        assert packed.images.count[index] == 4 * rows * cols
        np.testing.assert_allclose(packed.images.patches[index, : 4 * rows * cols], found["pixel_values"], atol=1e-5)


@pytest.mark.parametrize("family, most", [("qwen2_5_vl", 80), ("qwen3_vl", 128)])
def test_positions_of_the_prefix_are_the_models(family, most):
    config = model_config(family)
    for grid in ((8, 8), (6, 12), (11, 7)):
        prefix = image_prefix(family, grid)
        positions, start = mrope_positions(prefix.ids[prefix.runs], config.image_token, [grid])
        np.testing.assert_array_equal(prefix.position[:, prefix.runs], positions)
        assert prefix.start == start and (~prefix.runs).sum() == most - grid[0] * grid[1]


def test_the_prefix_of_one_position():
    flat = image_prefix("llava", (8, 8))
    assert flat.start == 66 and flat.runs.all()
    np.testing.assert_array_equal(flat.position, np.arange(66)[None])


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_targets_name_the_object_under_a_token(family):
    packed, first = pack("train", 0, 12, TRAINING_QUESTIONS, family), targets(family).first_image
    for index in range(12):
        _, scene, _ = training_scene(scene_seed("train", index), family=family)
        rows, cols = grid_of(scene)
        shown = packed.patch_thing[index]
        assert (shown[rows * cols :] == -1).all() and (shown >= 0).any()
        assert packed.prefix.runs[index, first : first + IMAGE_SLOTS[family]].sum() == rows * cols
        for token, thing in enumerate(shown[: rows * cols]):
            x, y = (token % cols + 0.5) * TOKEN, (token // cols + 0.5) * TOKEN
            under = [i for i, one in enumerate(scene.things) if max(abs(x - one.cx), abs(y - one.cy)) < one.r]
            assert under == ([thing] if thing >= 0 else [])
        for thing in range(len(scene.things)):
            np.testing.assert_allclose(packed.boxes[index, thing], corners(scene, thing, family), rtol=1e-6)


def test_subjects_of_questions():
    for index in range(200):
        _, scene, asked = training_scene(scene_seed("train", index), {**TRAINING_QUESTIONS, "yesno": 8})
        for question in asked:
            about = _subjects(scene, question)
            if question.kind == "count":
                assert len(about) == int(question.answer)
            elif question.text.startswith("Is there"):
                assert bool(about) == (question.answer == "yes")


@pytest.mark.parametrize(
    "family, bypassed",
    [
        ("llava", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llava", False), ("qwen2_5_vl", True))),
        ("qwen3_vl", False),
    ],
)
def test_shared_prefix_equals_the_plain_layer(family, bypassed):
    """A question behind the shared prefix comes out as it does in one sequence of its own."""
    config, slots = model_config(family).decoder, SLOTS[family]
    layer = DecoderLayer(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    image, rng = image_prefix(family, (8, 8)), np.random.default_rng(1)
    length = len(image.ids)
    prefix, x = (rng.standard_normal((2, rows, 128), np.float32) for rows in (length, 3 * slots))
    runs = np.tile(image.runs, (2, 1))
    if bypassed:
        runs[:, 2:66] = rng.random((2, 64)) < 0.5
    channels = len(image.position)
    after = np.broadcast_to(image.start + np.arange(slots), (channels, slots))
    positions = np.concatenate([image.position, after], axis=1)[:, None].repeat(2, axis=1)

    def tables(places):
        return rope_tables(places if channels > 1 else places[0], config)

    @jax.jit
    def shared(prefix, x, runs):
        ropes = tables(positions[:, :, :length]), tables(np.tile(positions[:, :, length:], (1, 1, 3)))
        return shared_prefix_layer(layer, prefix, x, ropes, runs, 3)

    @jax.jit
    def plain(x, mask):
        return layer.prefill(x, tables(positions), mask)[0]

    passed, found = map(np.asarray, shared(prefix, x, runs))
    seen = np.concatenate([runs, np.ones((2, slots), bool)], axis=1)
    mask = np.tri(length + slots, dtype=bool) & seen[:, None]
    for question in range(3):
        own = slice(question * slots, (question + 1) * slots)
        expected = np.asarray(plain(np.concatenate([prefix, x[:, own]], axis=1), mask))
        np.testing.assert_allclose(found[:, own], expected[:, length:], atol=2e-5)
        np.testing.assert_allclose(passed, np.where(runs[..., None], expected[:, :length], prefix), atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_depend_on_their_number_alone(family):
    a, b = (pack("train", start, count, TRAINING_QUESTIONS, family) for start, count in ((40, 3), (41, 1)))
    for whole, one in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(whole[1], one[0])
    assert (a.subjects.any(axis=-1) == (a.weight.sum(axis=-1) > 0)).all()
    assert a.subjects.shape[-1] == MAX_THINGS + 1


def test_phases_tile_the_steps():
    vision, joint, plain, bypass = phases("llava", 10, 30)
    assert (joint.start, joint.stop, plain.start, plain.stop) == (0, 20, 20, 30)
    assert (bypass.start, bypass.stop, bypass.after) == (plain.start, plain.stop, "joint")
    assert vision.after is None and plain.branches and not joint.branches
    assert [phase.checkpoint for phase in phases("llava", 10, 30)][2:] == ["scenes-llava", "scenes-llava-bypass"]
    for family, checkpoint in (("qwen2_5_vl", "scenes-qwen"), ("qwen3_vl", "scenes-qwen3")):
        first, second = phases(family, 10, 30)
        assert (first.stop, second.start, second.stop, second.after) == (10, 0, 30, "vision")
        assert second.checkpoint == checkpoint


def test_random_bypass_spares_the_first_layer_and_some_rows():
    drawn = np.stack([random_bypass(step, 12, 8, 64) for step in range(50)])
    assert not drawn[:, 0].any()
    touched = drawn.any(axis=(1, 3)).mean()
    assert 0.55 < touched < 0.75
    assert 0.35 < drawn[:, 1:].mean() / touched < 0.6


def test_training_starts_from_known_words():
    """Words and nearest coordinates get their rows; nothing else changes."""
    old = random_parameters("llava", 1)
    fresh = {f"model.{name}": value for name, value in random_parameters("qwen2_5_vl", 2).items()}
    warm = jax.tree.map(np.asarray, with_words(*jax.tree.map(jnp.asarray, (old, fresh)), "qwen2_5_vl"))
    table, head = "decoder.embed.table", "decoder.head.kernel"
    assert {name for name in fresh if (warm[name] != fresh[name]).any()} == {f"model.{table}", f"model.{head}"}
    words, theirs = vocabulary("qwen2_5_vl"), vocabulary("llava")
    pairs = {"red": "red", "<|im_end|>": "</s>", "84,": "0.50,", "168]}]": "1.00]", '[{"bbox_2d":[0,': "[0.00,"}
    for token, other in pairs.items():
        np.testing.assert_array_equal(warm[f"model.{table}"][words[token]], old[table][theirs[other]])
        np.testing.assert_array_equal(warm[f"model.{head}"][words[token]], old[head][theirs[other]])
    np.testing.assert_array_equal(warm[f"model.{table}"][words["Locate"]], fresh[f"model.{table}"][words["Locate"]])


def test_training_starts_from_known_layers():
    """Each three of LLaVA's layers become four: the first is there twice, in front with faint outputs."""
    old = random_parameters("llava", 1)
    fresh = {f"model.{name}": value for name, value in random_parameters("qwen3_vl", 2).items()}
    warm = jax.tree.map(np.asarray, with_layers(*jax.tree.map(jnp.asarray, (old, fresh))))
    changed = {name for name in fresh if (warm[name] != fresh[name]).any()}
    assert changed == {name for name in fresh if ".decoder.layers." in name} | {"model.decoder.norm.scale"}
    for number, source in enumerate((0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11)):
        for part in ("attn.q.kernel", "attn.o.kernel", "mlp.up.kernel", "mlp.down.kernel"):
            faint = 0.1 if number % 4 == 0 and part in ("attn.o.kernel", "mlp.down.kernel") else 1
            name = f"decoder.layers.{number}.{part}"
            np.testing.assert_array_equal(warm[f"model.{name}"], faint * old[f"decoder.layers.{source}.{part}"])


def test_towers_attend_locally_before_they_have_learnt_anything():
    """Each head most of all to the patch at its offset, and hardly to any that is not near it."""
    place = np.stack(np.indices((22, 22)), axis=-1).reshape(1, -1, 2)
    queries, keys, values = (np.asarray(part)[None, :, None] for part in local_biases(32))
    assert not values.any()
    shape = (1, len(OFFSETS), 484, 32)

    @jax.jit
    def probabilities(queries, keys):
        q, k = (rotate(jnp.broadcast_to(part, shape), rotary(jnp.asarray(place), 32)) for part in (queries, keys))
        return jax.nn.softmax(jnp.einsum("bnth,bnsh->bnts", q, k) / 32**0.5)[0]

    seen = np.asarray(probabilities(queries, keys)).reshape(-1, 22, 22, 22, 22)
    for head, (down, right) in enumerate(OFFSETS):
        row, col = 11 + down, 11 + right
        near = seen[head, 11, 11, row - 2 : row + 3, col - 2 : col + 3]
        assert near.sum() > 0.9 and near[2, 2] == seen[head, 11, 11].max()


def test_deepstack_is_trained_as_the_decoder_runs_it(monkeypatch):
    """The first question of a scene, beside the others behind the shared prefix and alone in the model's decoder."""
    config = spec.hf_config("qwen3_vl")
    config["text_config"]["num_hidden_layers"], config["vision_config"]["depth"] = 3, 2
    config["vision_config"]["deepstack_visual_indexes"] = [0, 1]
    monkeypatch.setitem(spec._HF_CONFIGS, "qwen3_vl", lambda: config)
    model = qwen3_vl.Qwen3VL(model_config("qwen3_vl"), rngs=nnx.Rngs(0), dtype=jnp.float32)
    heads, asked = AuxiliaryHeads("qwen3_vl", 96, 128, rngs=nnx.Rngs(1)), targets("qwen3_vl")
    packed = pack("train", 0, 1, TRAINING_QUESTIONS, "qwen3_vl")
    runs = np.asarray(packed.prefix.runs[0])

    @jax.jit
    def trained(batch):
        seen = look(model, batch.images)
        bypass = jnp.zeros((3, 1, seen.features.shape[1]), bool)
        soft = jnp.eye(model.config.decoder.vocab_size)
        return seen, answer_loss(model, heads, seen, batch, bypass, asked, soft)[-1]

    seen, predicted = trained(packed)
    predicted, decoder = np.asarray(predicted), model.decoder
    shown = slice(asked.first_image, asked.first_image + seen.features.shape[1])
    prefix, question = packed.prefix, packed.ids[:1, 0]

    def spread(features):
        rows = jnp.zeros((1, len(runs), features.shape[-1])).at[:, shown].set(features)[:, runs]
        return jnp.concatenate([rows, jnp.zeros((1, question.shape[1], features.shape[-1]))], axis=1)

    ids = np.concatenate([prefix.ids[:, runs], question], axis=1)
    image = (ids == model.config.image_token)[..., None]
    behind = np.broadcast_to(prefix.start[0] + np.arange(question.shape[1]), (3, 1, question.shape[1]))
    positions = np.concatenate([np.swapaxes(prefix.position, 0, 1)[..., runs], behind], axis=-1)

    @jax.jit
    def answers(features, deepstack):
        x = jnp.where(image, spread(features), decoder.embed(jnp.asarray(ids)))
        rope, mask = rope_tables(positions, decoder.config), jnp.tri(ids.shape[1], dtype=bool)[None]
        whole = decoder.logits(forward(decoder, x, rope, mask, [spread(added) for added in deepstack]))
        return whole[0, runs.sum() :].argmax(axis=-1)

    used = int(packed.ask[0, 0]) + 1
    expected = np.asarray(answers(seen.features, seen.deepstack))
    np.testing.assert_array_equal(predicted[0, 0, :used], expected[:used])
    without = np.asarray(answers(seen.features, [jnp.zeros_like(added) for added in seen.deepstack]))
    assert (without[:used] != expected[:used]).any()  # DeepStack makes a difference


@pytest.fixture
def short(monkeypatch):
    """Training of towers of one or two blocks and decoders of two or four layers, of few matrices with Muon, on
    batches that are packed in the same process."""
    qwen, qwen3 = spec.hf_config("qwen2_5_vl"), spec.hf_config("qwen3_vl")
    qwen["text_config"]["num_hidden_layers"], qwen["vision_config"]["depth"] = 2, 1
    qwen["vision_config"]["fullatt_block_indexes"] = [0]
    qwen3["vision_config"]["depth"] = 2
    qwen3["text_config"]["num_hidden_layers"] = 4
    qwen3["vision_config"]["deepstack_visual_indexes"] = [0, 1]
    for family, config in (("qwen2_5_vl", qwen), ("qwen3_vl", qwen3)):
        monkeypatch.setitem(spec._HF_CONFIGS, family, partial(dict, config))
    for name, layers in (
        ("POINTER_LAYERS", {"qwen2_5_vl": (0, 1), "qwen3_vl": ()}),
        ("PLACE_LAYER", 0),
        ("CORNER_LAYER", 1),
    ):
        monkeypatch.setattr(losses, name, layers)
    monkeypatch.setitem(recipes.MUON, ("qwen2_5_vl", "vision"), ("model.vision.merger.",))
    monkeypatch.setitem(recipes.MUON, ("qwen2_5_vl", "joint"), ("model.decoder.layers.1.attn.",))
    monkeypatch.setattr(train, "VALIDATION_SCENES", 2)

    def batches(phase, first):
        for step in range(first, phase.stop):
            yield step, pack("train", step * 2, 2, phase.mix(step), phase.family)

    monkeypatch.setattr(train, "batches", batches)


@pytest.mark.parametrize(
    "family, still, architecture",
    [
        ("qwen2_5_vl", True, Qwen2_5_VLForConditionalGeneration),
        pytest.param("qwen3_vl", False, Qwen3VLForConditionalGeneration, marks=pytest.mark.slow),
    ],
)
def test_two_steps_of_each_phase(family, still, architecture, short, tmp_path, caplog):
    """Vision moves no layer of the decoder, the joint phase no block of a tower that stands still; one program serves
    all steps; the end can be exported and read."""
    first, second = (replace(phase, stop=2, rows=2) for phase in phases(family, 200, 200))
    fresh = train.warm_start(family, named_parameters(train.Trainee(family, rngs=nnx.Rngs(train.SEED))))
    with jax.log_compiles():
        seen = train.run_phase(first, tmp_path)
        learnt = train.run_phase(second, tmp_path)
    assert sum(message.startswith("Compiling jit(update)") for message in caplog.messages) == 2
    fresh, seen, learnt = (jax.tree.map(np.asarray, params) for params in (fresh, seen, learnt))

    def moved(before, after, part: str) -> list[bool]:
        return [bool((before[name] != after[name]).any()) for name in before if name.startswith(part)]

    assert all(moved(fresh, seen, "model.vision.layers.")) and not any(moved(fresh, seen, "model.decoder.layers."))
    assert any(moved(seen, learnt, "model.vision.layers.")) != still
    assert all(moved(seen, learnt, "model.decoder.layers."))
    assert all(moved(seen, learnt, "model.vision.merger.fc2."))
    again = jax.tree.map(np.asarray, train.run_phase(second, tmp_path))  # nothing is left to do
    assert all(not moved(learnt, again, name)[0] for name in learnt)
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [2, 2] and np.isfinite([line["dense"] for line in curve]).all()
    assert {"ACC@0.5", "yesno", "colour", "count"} <= set(curve[1])
    export(
        {name.removeprefix("model."): value for name, value in learnt.items() if "model." in name},
        tmp_path / "out",
        family,
    )
    model, info = architecture.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float16)
    assert not any(info.values()), info
    keys = model.model.language_model.layers[1].self_attn.k_proj.weight
    np.testing.assert_array_equal(
        keys.detach().numpy(), np.asarray(learnt["model.decoder.layers.1.attn.k.kernel"], np.float16).reshape(-1, 128)
    )


def test_states_that_were_made_otherwise_are_refused(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(train, "run_phase", lambda phase, out: ran.append(phase.name) or {})
    monkeypatch.setattr(train, "export", lambda *arguments: None)

    def command(steps: int, *more: str) -> int:
        return train.main(["--family", "qwen2_5_vl", "--vision-steps", str(steps), "--out", str(tmp_path), *more])

    assert command(2) == command(2) == 0
    assert command(3) == 2
    assert "was made with other settings (phases: " in capsys.readouterr().err
    (tmp_path / "vision").mkdir()
    assert command(3, "--fresh") == 0
    assert (tmp_path / "before-1" / "vision").is_dir() and not (tmp_path / "vision").exists()
    assert ran == ["vision", "joint"] * 3
