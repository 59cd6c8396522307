"""Qwen2.5-VL: its table against transformers' own parameters, both spellings, all sizes, and whole folders."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import reroute_jax
from benchmarks import random_checkpoint
from convert import __main__ as cli
from convert.checkpoint import load_params, save_hf
from convert.families import abstract_params, table_of
from convert.safetensors import list_folder, read
from convert.source import open_source
from convert.table import hf_shapes, match, to_hf
from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.errors import RerouteError
from reroute_jax.models import read_config
from tests.tiny_qwen import SPELLINGS, load_torch, tiny_qwen

PARAMETERS = {
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
}


def shapes_in_hub_spelling(state):
    return {hub_key(key): tuple(value.shape) for key, value in state.items()}


def hub_key(key):
    for prefix, written in SPELLINGS["hub"].items():
        if key.startswith(prefix):
            return written + key.removeprefix(prefix)
    return key


def load(folder, dtype=None):
    config = read_config(open_source(folder).config)
    return load_params(open_source(folder), abstract_params(config), table_of(config), dtype)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(right[path]), err_msg=path)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    random_checkpoint.write(SHAPES["qwen-tiny"], folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def converted(hf, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    assert cli.main([str(hf), str(out)]) == 0
    return out


CONFIG = read_config(SHAPES["qwen-tiny"].config("float32"))
TABLE, TARGET = table_of(CONFIG), {path: value.shape for path, value in abstract_params(CONFIG).items()}
HUB = hf_shapes(TABLE, TARGET)


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_sizes_have_transformers_keys_and_shapes(name):
    """Nothing is allocated: abstract parameters here, the meta device there. Two layers and blocks of each; the others
    have the same shapes."""
    whole = SHAPES[name].config("bfloat16")
    written = whole | {"num_hidden_layers": 2, "max_window_layers": 2}
    written["vision_config"] = whole["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1]}
    config = read_config(written)
    target = {path: value.shape for path, value in abstract_params(config).items()}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(written))
    state = model.state_dict()
    if written["tie_word_embeddings"]:
        assert "decoder.head.kernel" not in target
        del state["lm_head.weight"]
    assert hf_shapes(table_of(config), target) == shapes_in_hub_spelling(state)

    def numbers(part=""):
        return sum(int(np.prod(shape)) for path, shape in target.items() if path.startswith(part))

    more = (whole["num_hidden_layers"] - 2) * numbers("decoder.layers.1.")
    more += (whole["vision_config"]["depth"] - 2) * numbers("vision.layers.1.")
    assert numbers() + more == PARAMETERS[name]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_both_spellings_and_a_tied_head_load_what_torch_loads(tmp_path, spelling, tied):
    tiny_qwen(tmp_path, layers=2, vision_layers=3, spelling=spelling, tied=tied, shards=2)
    config = read_config(open_source(tmp_path).config)
    assert config.decoder.rope_sections == (2, 4, 2) and config.decoder.tied_head == tied
    state = {hub_key(key): value.numpy() for key, value in load_torch(tmp_path).state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    assert_same(dict(to_hf(table_of(config), load(tmp_path))), state)


@pytest.mark.parametrize("original_format", [True, False], ids=["saved", "in-memory"])
def test_the_forms_that_transformers_saves_load_alike(hf, tmp_path, original_format):
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(hf, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path, save_original_format=original_format)
    names = {tensor.key.split(".")[0] for tensor in list_folder(tmp_path)}
    assert names == ({"model", "visual", "lm_head"} if original_format else {"model", "lm_head"})
    assert_same(load(hf), load(tmp_path))


def test_hf_to_jax_to_hf_is_exact(hf, tmp_path):
    save_hf(tmp_path, load(hf), TABLE, "float32", shards=2)
    assert_same(
        {tensor.key: read(tensor) for tensor in list_folder(hf)}, {t.key: read(t) for t in list_folder(tmp_path)}
    )


@pytest.mark.slow
def test_orbax_round_trip_is_exact_and_the_folder_answers(hf, converted):
    assert_same(load(hf), load(converted))
    scene = Image.effect_noise((90, 60), 80).convert("RGB")
    answers = [
        reroute_jax.load(folder, "float32").generate([(scene, "Locate the cup.")], max_new_tokens=4)
        for folder in (hf, converted)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("spelling", ["visual.{}", "model.visual.{}"])
def test_each_key_is_used_once(spelling):
    """The second spelling has the decoder under `model.language_model` too."""
    nested = spelling.startswith("model")
    source = []
    for key, shape in HUB.items():
        if nested and key.startswith("visual."):
            key = "model." + key
        elif nested and key.startswith("model."):
            key = "model.language_model." + key.removeprefix("model.")
        source.append((key, "BF16", shape))
    assignments = match(TABLE, source, TARGET, "tiny")
    assert sorted(one.key for one in assignments) == sorted(key for key, _, _ in source)
    assert sorted(one.path for one in assignments) == sorted(TARGET)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda given: given | {"visual.blocks.0.attn.q.weight": (24, 24)}, "unknown: visual.blocks.0.attn.q.weight"),
        (lambda given: given | {"visual.blocks.4.norm1.weight": (24,)}, "unknown: visual.blocks.4.norm1.weight"),
        (
            lambda given: {key: shape for key, shape in given.items() if key != "visual.merger.mlp.2.bias"},
            "missing: visual.merger.mlp.2.bias (for vision.merger.fc2.bias)",
        ),
        (
            lambda given: {key: shape for key, shape in given.items() if key != "model.layers.1.self_attn.k_proj.bias"},
            "missing: model.layers.1.self_attn.k_proj.bias (for decoder.layers.1.attn.k.bias)",
        ),
        (
            lambda given: given | {"model.language_model.norm.weight": (32,)},
            "duplicate: decoder.norm.scale is set by model.norm.weight and by model.language_model.norm.weight",
        ),
        (
            lambda given: given | {"visual.patch_embed.proj.weight": (24, 3, 14, 14)},
            "mis-shaped: visual.patch_embed.proj.weight is [24, 3, 14, 14], expected [24, 3, 2, 14, 14]",
        ),
        (
            lambda given: given | {"visual.blocks.1.attn.qkv.weight": (24, 72)},
            "mis-shaped: visual.blocks.1.attn.qkv.weight is [24, 72], expected [72, 24]",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_misfits_are_named(change, line):
    source = [(key, "F32", shape) for key, shape in change(dict(HUB)).items()]
    with pytest.raises(RerouteError) as caught:
        match(TABLE, source, TARGET, "tiny")
    assert str(caught.value).splitlines()[1:] == ["  " + line]


def test_a_tied_head_is_not_read():
    tied = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tied_head=True))
    target = {path: value.shape for path, value in abstract_params(tied).items()}
    source = [(key, "F32", shape) for key, shape in HUB.items()]
    assert "decoder.head.kernel" not in target and "lm_head.weight" in HUB
    for given in (source, [entry for entry in source if entry[0] != "lm_head.weight"]):
        assert {one.path for one in match(table_of(tied), given, target, "tiny")} == set(target)
