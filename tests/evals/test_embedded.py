"""The embedded checkpoints: what transformers makes of them, and what we do."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import evals
import reroute_jax
from evals import prompts
from evals.boxes import iou, parse_box
from evals.data import rec_docs, rec_source
from evals.scenes.data import TRAINING_QUESTIONS
from evals.scenes.losses import pixels
from evals.scenes.packing import pack
from reroute_jax.models.llava import chat_prompt
from reroute_jax.vision.clip import nuwa_inputs

CHECKPOINTS = Path(evals.__file__).parent / "scenes" / "checkpoints"
NAMES = ("scenes-llava", "scenes-llava-bypass")


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_it_unchanged_and_answers_the_same(name):
    folder = CHECKPOINTS / name
    theirs, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    processor = LlavaProcessor.from_pretrained(folder, backend="pil")
    ours = reroute_jax.load(folder, "float32")
    docs = list(rec_docs(rec_source("scenes", "val"), 0, 6, 0))
    answers = ours.generate([(doc.image, prompts.rec(doc.text, "full")) for doc in docs], max_new_tokens=8)
    for doc, answer in zip(docs, answers, strict=True):
        question = prompts.rec(doc.text, "full")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert text == chat_prompt(question, 1)
        inputs = processor(images=doc.image, text=text, return_tensors="pt")
        np.testing.assert_array_equal(inputs["input_ids"][0].numpy(), ours.prompt_ids(question, 1))
        with torch.no_grad():
            tokens = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(tokens, skip_special_tokens=True) == answer


@pytest.mark.parametrize("name", NAMES)
def test_it_is_trained(name):
    """Far above chance on 48 validation questions: a broken conversion or prompt would not be."""
    model = reroute_jax.load(CHECKPOINTS / name, "float32")
    docs = list(rec_docs(rec_source("scenes", "val"), 0, 48, 0))
    answers = model.generate([(doc.image, prompts.rec(doc.text, "full")) for doc in docs], max_new_tokens=8)
    hits = [iou(parse_box(text), doc.truth) >= 0.5 for text, doc in zip(answers, docs, strict=True)]
    assert np.mean(hits) > 0.6


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small(name):
    assert sum(file.stat().st_size for file in (CHECKPOINTS / name).iterdir()) < 12e6


@pytest.mark.parametrize("name", NAMES)
def test_class_attention_falls_on_objects(name):
    """Nuwa ranks patches by it. On objects: more attention a patch than on the background, over 50 scenes."""
    model = reroute_jax.load(CHECKPOINTS / name, "float32")
    packed = pack("val", 0, 50, TRAINING_QUESTIONS)
    inputs = nuwa_inputs(model.module.vision, pixels(jnp.asarray(packed.images)), model.config.feature_layer)
    on = packed.patch_thing >= 0
    metric = np.asarray(inputs.metric)
    assert metric[on].mean() > 1.5 * metric[~on].mean()
