"""The embedded checkpoints: what transformers makes of them, and what we do."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

import evals
import reroute_jax
from evals.harness import prompts
from evals.harness.boxes import iou, normalise_box, parse_box
from evals.harness.data import rec_docs, rec_source
from evals.scenes.data import TRAINING_QUESTIONS
from evals.scenes.training.losses import targets
from evals.scenes.training.packing import pack
from evals.scenes.training.towers import pixels
from reroute_jax.models import FAMILIES
from reroute_jax.models.family import expand_image_tokens
from reroute_jax.vision import clip, qwen2_5, qwen3
from tests.marks import cases

CHECKPOINTS = Path(evals.__file__).parent / "scenes" / "checkpoints"
LLAVAS = ("scenes-llava", "scenes-llava-bypass")
QWENS = {
    "scenes-qwen": (Qwen2_5_VLForConditionalGeneration, qwen2_5.QwenImages),
    "scenes-qwen3": (Qwen3VLForConditionalGeneration, qwen3.Qwen3Images),
}
NAMES = (*LLAVAS, *QWENS)
QUESTIONS, SCENES = 24, 16


@cache
def model_of(name: str):
    return reroute_jax.load(CHECKPOINTS / name, "float32")


@cache
def questions(family: str):
    return list(rec_docs(rec_source("scenes", "val", family), 0, QUESTIONS, 0))


@cache
def answers_of(name: str) -> list[str]:
    """To all questions, in one batch, in the words that the family is asked in."""
    model, family = model_of(name), model_of(name).config.family
    style = FAMILIES[family].evaluation.rec_style
    asked = [(doc.image, prompts.rec(doc.text, style)) for doc in questions(family)]
    return model.generate(asked, max_new_tokens=8, batch_size=QUESTIONS)


def hits(docs, answers, family: str) -> list[bool]:
    """Whether each answer names at least half of the right box."""
    spoken = FAMILIES[family].evaluation.coord_format
    shares = [normalise_box(parse_box(text), spoken, doc.size) for text, doc in zip(answers, docs, strict=True)]
    return [iou(box, doc.truth) >= 0.5 for box, doc in zip(shares, docs, strict=True)]


@pytest.mark.parametrize("name", cases(LLAVAS, {"scenes-llava-bypass"}))
def test_transformers_reads_it_unchanged_and_answers_the_same(name):
    folder = CHECKPOINTS / name
    theirs, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    processor = LlavaProcessor.from_pretrained(folder, backend="pil")
    ours = model_of(name)
    for doc, answer in list(zip(questions("llava"), answers_of(name), strict=True))[:3]:
        question = prompts.rec(doc.text, "full")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert text == f"USER: <image>\n{question} ASSISTANT:"
        inputs = processor(images=doc.image, text=text, return_tensors="pt")
        np.testing.assert_array_equal(inputs["input_ids"][0].numpy(), ours.prompt_ids(question, [(8, 8)]))
        with torch.no_grad():
            tokens = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(tokens, skip_special_tokens=True) == answer


@pytest.mark.slow
@pytest.mark.parametrize("name", QWENS)
def test_transformers_reads_qwen_unchanged_and_answers_the_same(name):
    """Through the checkpoint's own tokenizer, chat template and image processor, which leaves every size as it is."""
    folder, (architecture, _) = CHECKPOINTS / name, QWENS[name]
    theirs, info = architecture.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    ours = model_of(name)
    family, penalty = ours.family, ours.config.repetition_penalty
    for doc, answer in list(zip(questions(family.name), answers_of(name), strict=True))[:3]:
        image, question = doc.image, prompts.rec(doc.text, family.evaluation.rec_style)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        seen = processor(images=image, return_tensors="pt")
        rows, cols = (int(side) // 2 for side in seen["image_grid_thw"][0, 1:])
        assert (cols * 14, rows * 14) == image.size
        ids = list(expand_image_tokens(tokenizer(text)["input_ids"], ours.config.image_token, [rows * cols]))
        np.testing.assert_array_equal(ids, ours.prompt_ids(question, [(rows, cols)]))
        inputs = {
            "input_ids": torch.tensor([ids]),
            "mm_token_type_ids": torch.tensor([ids]) == ours.config.image_token,
            **seen,
        }
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"].int()
        with torch.no_grad():
            tokens = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, repetition_penalty=penalty)
        assert tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True) == answer


@pytest.mark.parametrize("name", NAMES)
def test_it_is_trained(name):
    """Far above chance on the first validation questions: a broken conversion or prompt would not be."""
    family = model_of(name).config.family
    assert np.mean(hits(questions(family), answers_of(name), family)) > 0.6


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small(name):
    assert sum(file.stat().st_size for file in (CHECKPOINTS / name).iterdir()) < 12e6


@jax.jit
def class_metric(module, images):
    layers = module.config.vision.feature_layers
    return clip.ClipImages(module.vision, module.projector, images, layers).metric()


@partial(jax.jit, static_argnums=0)
def received_metric(read, tower, images):
    return read(tower, images).metric()


@cache
def scenes(family: str):
    return pack("val", 0, SCENES, TRAINING_QUESTIONS, family)


@pytest.mark.parametrize("name", LLAVAS)
def test_class_attention_falls_on_objects(name):
    """Nuwa ranks patches by it. On objects: more attention a patch than on the background, over all scenes."""
    model = model_of(name)
    packed = scenes("llava")
    metric = class_metric(model.module, pixels(jnp.asarray(packed.images)))
    on = packed.patch_thing >= 0
    metric = np.asarray(metric)
    assert metric[on].mean() > 1.5 * metric[~on].mean()


@pytest.mark.parametrize("name", QWENS)
def test_received_attention_falls_on_objects(name):
    """Nuwa ranks the Qwen families' tokens by what they receive in the last block, over all scenes."""
    model, (_, read) = model_of(name), QWENS[name]
    packed, first = scenes(model.config.family), targets(model.config.family).first_image
    metric = np.asarray(received_metric(read, model.module.vision, packed.images))
    on, real = packed.patch_thing >= 0, packed.prefix.runs[:, first : first + metric.shape[1]]
    assert metric[on].mean() > 1.5 * metric[real & ~on].mean()
