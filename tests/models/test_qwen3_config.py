"""config.json of Qwen3-VL: both spellings, what is refused, and its options."""

import copy

import pytest

import reroute_jax
from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.errors import RerouteError
from reroute_jax.models import read_config
from reroute_jax.routing.methods import plan
from tests.tiny_qwen3 import tiny_qwen3

HUB = SHAPES["qwen3-vl-4b"].config("bfloat16")


def test_both_spellings_read_alike():
    nested = copy.deepcopy(HUB)
    text, vision = nested["text_config"], nested["vision_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    vision |= {"model_type": "qwen3_vl_vision", "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0}}
    config = read_config(HUB)
    assert config == read_config(nested)
    decoder = config.decoder
    assert (decoder.hidden_size, decoder.num_heads, decoder.head_dim, decoder.rope_theta) == (2560, 32, 128, 5e6)
    assert (decoder.rope_sections, decoder.deepstack, decoder.tied_head) == ((24, 20, 20), 3, True)
    assert (config.vision.table_side, config.vision.deepstack) == (48, (5, 11, 17))
    assert (config.image_token, config.eos_tokens, config.pad_token) == (151655, (151645,), 151643)
    assert config.repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ("text_config", {"rope_scaling": {"rope_type": "default", "mrope_section": [32, 32]}}, "mrope_section"),
        ("text_config", {"num_hidden_layers": 2}, "no more than the 2 decoder layers"),
        ("vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act"),
        ("vision_config", {"out_hidden_size": 2048}, "out_hidden_size"),
        ("vision_config", {"num_position_embeddings": 2300}, "num_position_embeddings is 2300"),
        ("vision_config", {"deepstack_visual_indexes": [5, 24]}, "blocks from 0 to 23"),
        ("vision_config", {"deepstack_visual_indexes": [11, 5]}, "ascending"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(part, change, said):
    config = copy.deepcopy(HUB)
    config[part] |= change
    with pytest.raises(RerouteError) as caught:
        read_config(config)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_options_of_other_families_are_refused(tmp_path):
    folder = tiny_qwen3(tmp_path, layers=3)
    with pytest.raises(RerouteError, match="mrope_compat is for qwen2_5_vl, this model is qwen3_vl"):
        reroute_jax.load(folder, mrope_compat="hf-5.4")
    sizes = {"num_layers": 36, "visual": 576, "grid": (24, 24), "family": "qwen3_vl", "budget": 192}
    with pytest.raises(RerouteError, match="keep_ratio of method 'nuwa' is for qwen2_5_vl"):
        plan("nuwa", **(sizes | {"budget": None}), keep_ratio=0.5)
    assert [stage.lo for stage in plan("nuwa", **sizes, action="delete").decisions] == [19]
