"""Qwen3-VL: its table against transformers' own parameters, all sizes, both spellings, a folder; the crosscheck."""

import math

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import reroute_jax
from benchmarks import random_checkpoint
from convert import __main__ as cli
from convert.crosscheck.command import main as crosscheck
from convert.families import abstract_params, table_of
from convert.table import hf_shapes, match, to_hf
from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.errors import RerouteError
from reroute_jax.models import read_config
from tests.convert.test_convert_qwen import assert_same, load
from tests.tiny_qwen3 import load_torch, tiny_qwen3

CONFIG = read_config(SHAPES["qwen3-tiny"].config("float32"))
TABLE, TARGET = table_of(CONFIG), {path: value.shape for path, value in abstract_params(CONFIG).items()}
HUB = hf_shapes(TABLE, TARGET)
PARAMETERS = {
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "qwen3-vl-32b": 33_357_390_064,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_sizes_have_transformers_keys_and_shapes(name):
    """Nothing is allocated: abstract parameters here, the meta device there. Layers are alike: three are compared."""
    written = SHAPES[name].config("bfloat16")
    depth, written["text_config"]["num_hidden_layers"] = written["text_config"]["num_hidden_layers"], 3
    config = read_config(written)
    target = {path: value.shape for path, value in abstract_params(config).items()}
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(written))
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if written["tie_word_embeddings"]:
        del state["lm_head.weight"]
    assert hf_shapes(table_of(config), target) == state
    sizes = {path: math.prod(shape) for path, shape in target.items()}
    layer = sum(size for path, size in sizes.items() if path.startswith("decoder.layers.0."))
    assert sum(sizes.values()) + (depth - 3) * layer == PARAMETERS[name]


@pytest.mark.parametrize(("spelling", "tied"), [("hub", False), ("v5", True)])
def test_both_spellings_and_a_tied_head_load_what_torch_loads(tmp_path, spelling, tied):
    tiny_qwen3(tmp_path, layers=3, spelling=spelling, tied=tied, shards=2)
    state = {key: value.numpy() for key, value in load_torch(tmp_path).state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    config = reroute_jax.load(tmp_path).config
    assert config.decoder.tied_head == tied
    assert_same(dict(to_hf(table_of(config), load(tmp_path))), state)


@pytest.mark.slow
def test_a_random_checkpoint_converts_and_answers(tmp_path):
    hf, out = tmp_path / "hf", tmp_path / "out"
    random_checkpoint.write(SHAPES["qwen3-tiny"], hf, dtype="float32")
    assert cli.main([str(hf), str(out)]) == 0
    assert_same(load(hf), load(out))
    scene = Image.effect_noise((40, 30), 80).convert("RGB")
    assert reroute_jax.load(out).generate([(scene, "Locate the cup.")], max_new_tokens=2)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda given: given | {"model.visual.deepstack_merger_list.2.norm.weight": (96,)},
            "unknown: model.visual.deepstack_merger_list.2.norm.weight",
        ),
        (
            lambda given: {key: shape for key, shape in given.items() if key != "model.visual.patch_embed.proj.bias"},
            "missing: model.visual.patch_embed.proj.bias (for vision.patch_embed.bias)",
        ),
        (
            lambda given: given | {"model.visual.deepstack_merger_list.1.norm.weight": (24,)},
            "mis-shaped: model.visual.deepstack_merger_list.1.norm.weight is [24], expected [96]",
        ),
        (
            lambda given: given | {"model.language_model.layers.0.self_attn.q_norm.weight": (8,)},
            "mis-shaped: model.language_model.layers.0.self_attn.q_norm.weight is [8], expected [12]",
        ),
        (
            lambda given: given | {"model.language_model.layers.1.self_attn.q_proj.bias": (48,)},
            "unknown: model.language_model.layers.1.self_attn.q_proj.bias",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_misfits_are_named(change, line):
    source = [(key, "F32", shape) for key, shape in change(dict(HUB)).items()]
    with pytest.raises(RerouteError) as caught:
        match(TABLE, source, TARGET, "tiny")
    assert str(caught.value).splitlines()[1:] == ["  " + line]


@pytest.mark.slow
def test_the_crosscheck_agrees(tmp_path, capsys):
    """Layers behind DeepStack's additions, a routed run whose decisions fall between them, Nuwa's merge of both."""
    folder = tiny_qwen3(tmp_path, layers=5)
    assert crosscheck([str(folder), "--prompts", "1", "--max-new-tokens", "3", "--method", "nuwa"]) == 0
    out = capsys.readouterr().out
    for quantity in ("image features", "layer 3 on the same input", "logits, all positions", "greedy tokens"):
        assert f"\n{quantity} " in out
    for quantity in ("merged image features", "anchors", "layer 2: selected", "layer 2: scores", "greedy tokens"):
        assert f"nuwa reroute 128: {quantity} " in out
    assert "DIFFERENT" not in out
