"""What the embedded models are trained on is what they are asked later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evals import prompts
from evals.scenes.data import TRAINING_QUESTIONS, training_scene
from evals.scenes.losses import shared_prefix_layer
from evals.scenes.packing import MAX_THINGS, PREFIX, SLOTS, _prompt_ids, _subjects, answer_text, pack, prefix_ids
from evals.scenes.questions import REFERRING
from evals.scenes.spec import model_config
from evals.scenes.tokenizer import build_tokenizer, vocabulary
from evals.scenes.train import phases, random_bypass
from evals.scenes.world import scene_seed
from reroute_jax.layers import DecoderLayer
from reroute_jax.models.llava import chat_prompt, expand_image_tokens
from reroute_jax.positions import rope_tables


class Full:
    """A generator that always asks with the whole referring prompt."""

    def random(self) -> float:
        return 1.0


def test_prompts_are_the_tokenizers():
    """Packed ids of prefix and question equal the tokenizer's ids of the evaluation prompt."""
    tokenizer, vocab = build_tokenizer(), vocabulary()
    for index in range(20):
        _, _, asked = training_scene(scene_seed("train", index))
        for question in asked:
            referring = question.kind in REFERRING
            text = prompts.rec(question.text, "full") if referring else prompts.single_word(question.text)
            ids = expand_image_tokens(tokenizer(chat_prompt(text, 1))["input_ids"], vocab["<image>"], 64)
            assert ids == [*prefix_ids(), *_prompt_ids(question, Full())]
            assert vocab["<unk>"] not in ids


def test_answers_survive_the_tokenizer():
    tokenizer = build_tokenizer()
    for index in range(20):
        _, scene, asked = training_scene(scene_seed("train", index))
        for question in asked:
            text = answer_text(scene, question)
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_subjects_of_questions():
    for index in range(200):
        _, scene, asked = training_scene(scene_seed("train", index), {**TRAINING_QUESTIONS, "yesno": 8})
        for question in asked:
            about = _subjects(scene, question)
            if question.kind == "count":
                assert len(about) == int(question.answer)
            elif question.text.startswith("Is there"):
                assert bool(about) == (question.answer == "yes")


@pytest.mark.parametrize("bypassed", [False, True])
def test_shared_prefix_equals_the_plain_layer(bypassed):
    """A question behind the shared prefix comes out as it does in one sequence of its own."""
    config = model_config().decoder
    layer = DecoderLayer(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(1), 3)
    prefix, x = jax.random.normal(keys[0], (2, PREFIX, 128)), jax.random.normal(keys[1], (2, 3 * SLOTS, 128))
    runs = jnp.ones((2, PREFIX), bool)
    if bypassed:
        runs = runs.at[:, 2:].set(jax.random.uniform(keys[2], (2, PREFIX - 2)) < 0.5)
    positions = jnp.arange(PREFIX + SLOTS)[None].repeat(2, axis=0)
    rope = rope_tables(positions, config)
    ropes = (
        rope_tables(positions[:, :PREFIX], config),
        rope_tables(jnp.tile(positions[:, PREFIX:], (1, 3)), config),
    )
    passed, found = shared_prefix_layer(layer, prefix, x, ropes, runs, 3)
    seen = jnp.concatenate([runs, jnp.ones((2, SLOTS), bool)], axis=1)
    mask = jnp.tril(jnp.ones((PREFIX + SLOTS,) * 2, bool)) & seen[:, None]
    for question in range(3):
        own = slice(question * SLOTS, (question + 1) * SLOTS)
        expected, _, _ = layer.prefill(jnp.concatenate([prefix, x[:, own]], axis=1), rope, mask)
        np.testing.assert_allclose(found[:, own], expected[:, PREFIX:], atol=2e-5)
        np.testing.assert_allclose(passed, jnp.where(runs[..., None], expected[:, :PREFIX], prefix), atol=2e-5)


def test_batches_depend_on_their_number_alone():
    a, b = pack("train", 40, 3, TRAINING_QUESTIONS), pack("train", 41, 1, TRAINING_QUESTIONS)
    for whole, one in zip(a, b, strict=True):
        np.testing.assert_array_equal(whole[1], one[0])
    assert (a.subjects.any(axis=-1) == (a.weight.sum(axis=-1) > 0)).all()
    assert a.subjects.shape[-1] == MAX_THINGS + 1


def test_phases_tile_the_steps():
    vision, joint, plain, bypass = phases(10, 30)
    assert (joint.start, joint.stop, plain.start, plain.stop) == (0, 20, 20, 30)
    assert (bypass.start, bypass.stop, bypass.after) == (plain.start, plain.stop, "joint")
    assert vision.after is None


def test_random_bypass_spares_the_first_layer_and_some_rows():
    drawn = np.stack([random_bypass(step, 12, 8) for step in range(50)])
    assert not drawn[:, 0].any()
    touched = drawn.any(axis=(1, 3)).mean()
    assert 0.55 < touched < 0.75
    assert 0.35 < drawn[:, 1:].mean() / touched < 0.6
