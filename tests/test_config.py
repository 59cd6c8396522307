"""Configurations, and the wiring of the real sizes without their weights."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import reroute_jax
from reroute_jax.decoder import prefill
from reroute_jax.engine.batching import Question, lay_out, make_batch
from reroute_jax.errors import RerouteError
from reroute_jax.models import read_config
from reroute_jax.models.llava import encode_images
from reroute_jax.nn.cache import ROOM
from reroute_jax.nn.params import named_parameters
from reroute_jax.routing.merge import merge_arrays
from reroute_jax.routing.methods import plan

HUB_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
SIZES_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40}


def config_13b(**sizes):
    return {**HUB_7B, "text_config": {**HUB_7B["text_config"], **SIZES_13B, "num_key_value_heads": 40, **sizes}}


@cache
def abstract(config):
    """The module without memory."""
    return reroute_jax.abstract_params(config, jnp.bfloat16)


def test_sparse_hub_config():
    config = read_config(HUB_7B)
    text = config.decoder
    assert (text.hidden_size, text.mlp_dim, text.num_layers, text.num_heads, text.num_kv_heads, text.head_dim) == (
        4096,
        11008,
        32,
        32,
        32,
        128,
    )
    assert (text.rope_theta, text.norm_eps, config.vision.feature_layers, config.vision.grid) == (
        10000.0,
        1e-5,
        (23,),
        (24, 24),
    )
    assert (config.image_token, config.eos_tokens, config.pad_token) == (32000, (2,), 32001)


QWEN = {
    "model_type": "qwen2_5_vl",
    "eos_token_id": 151645,
    "bos_token_id": 151643,
    "vision_config": {"out_hidden_size": 3584},
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}


def test_without_a_pad_token_the_end_token_pads():
    assert read_config({k: v for k, v in HUB_7B.items() if k != "pad_token_id"}).pad_token == 2


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"model_type": "blip"}, "unknown architecture 'blip'"),
        ({"model_type": None}, "unknown architecture None"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        (
            {"vision_feature_layer": [-2, -26]},
            "vision_feature_layer is [-2, -26], expected hidden states from -25",
        ),
        ({"vision_feature_layer": 25}, "vision_feature_layer is 25"),
        ({"vision_feature_layer": []}, "vision_feature_layer is []"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type"),
        ({"text_config": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}}, "rope_type"),
        ({"text_config": {"model_type": "llama", "attention_bias": True}}, "attention_bias"),
        ({"text_config": 5}, "config.json cannot be read"),
    ],
)
def test_refusals(change, telling):
    assert_refused({**HUB_7B, **change}, telling)


def assert_refused(config, telling, generation=None):
    with pytest.raises(RerouteError) as caught:
        read_config(config, generation or {})
    assert telling in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 20]}}, "mrope_section is [16, 24, 20]"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [32, 32]}}, "add up to the 64 rotary pairs"),
        (
            {"hidden_size": 3584, "num_attention_heads": 56, "rope_scaling": None},
            "mrope_section is [16, 24, 24], expected three numbers that add up to the 32",
        ),
        *(
            ({"rope_scaling": {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 128}}, "rope_type")
            for kind in ("yarn", "linear", "dynamic", "llama3")
        ),
    ],
)
def test_rotary_settings_of_qwen_that_are_refused(change, telling):
    assert_refused({**QWEN, **change}, telling)


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"vision_config": {"rope_parameters": {"rope_type": "axial", "rope_theta": 20000.0}}}, "rope_theta = 20000.0"),
        ({"text_config": {**QWEN, "layer_types": ["sliding_attention"] * 28}}, "layer_types = 'sliding_attention'"),
        ({"text_config": {**QWEN, "rope_theta": 0}}, "rope_theta is 0, expected a finite number above 1"),
        ({"text_config": {**QWEN, "num_attention_heads": 0}}, "config.json cannot be read"),
        ({"vision_config": {"patch_size": [14, 14]}}, "config.json cannot be read"),
        ({"vision_config": {"spatial_merge_size": 0}}, "config.json cannot be read"),
        ({"model_type": []}, "unknown architecture []"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_settings_of_qwen_that_would_be_overlooked_or_raise_are_refused(change, telling):
    assert_refused({**QWEN, **change}, telling)


@pytest.mark.parametrize("change", [{}, {"rope_scaling": None}])
def test_qwen_without_sections_has_those_of_transformers(change):
    config = {key: value for key, value in QWEN.items() if key != "rope_scaling"}
    assert read_config(config | change).decoder.rope_sections == (16, 24, 24)


@pytest.mark.parametrize(
    ("generation", "stops", "pad", "penalty"),
    [
        ({}, (2,), 32001, 1.0),
        ({"eos_token_id": 5}, (5,), 32001, 1.0),
        ({"eos_token_id": [5, 2], "pad_token_id": 7}, (5, 2), 7, 1.0),
        ({"eos_token_id": None, "pad_token_id": None, "repetition_penalty": None}, (2,), 32001, 1.0),
        ({"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.1, "top_p": 0.001}, (2,), 32001, 1.3),
        ({"pad_token_id": 0, "eos_token_id": 0}, (0,), 0, 1.0),
    ],
)
def test_generation_config(generation, stops, pad, penalty):
    config = read_config(HUB_7B, generation)
    assert (config.eos_tokens, config.pad_token, config.repetition_penalty) == (stops, pad, penalty)


@pytest.mark.parametrize(
    ("generation", "telling"),
    [
        ({"eos_token_id": 32064}, "eos_token_id is 32064, expected ids from 0 to 32063"),
        ({"eos_token_id": [2, -1]}, "eos_token_id is -1"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is '</s>'"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"repetition_penalty": "high"}, "repetition_penalty is 'high'"),
    ],
)
def test_generation_configs_that_are_refused(generation, telling):
    assert_refused(HUB_7B, telling, generation)


@pytest.mark.parametrize(
    ("hf", "billions", "route"),
    [
        pytest.param(HUB_7B, 7.063, ("pdrop", "reroute"), id="7b-pdrop", marks=pytest.mark.slow),
        pytest.param(HUB_7B, 7.063, ("nuwa", "delete"), id="7b-nuwa", marks=pytest.mark.slow),
        # 13.351 with its 40 layers, of which each has 0.317.
        pytest.param(config_13b(num_hidden_layers=8), 3.200, ("nuwa", "reroute"), id="8-layers-of-13b-nuwa"),
    ],
)
def test_full_size_wiring(hf, billions, route):
    """The real shapes end to end, without memory."""
    config = read_config(hf)
    module = abstract(config)
    assert sum(value.size for value in named_parameters(module).values()) / 1e9 == pytest.approx(billions, abs=1e-3)
    depth = config.num_layers
    schedule = plan(route[0], num_layers=depth, visual=576, grid=(24, 24), budget=128, action=route[1])
    ids = [np.r_[1:6, np.full(576, 32000), 100:140], np.r_[np.full(576, 32000), 7:20]]
    layouts = [lay_out(Question(one, ((24, 24),)), config, schedule) for one in ids]
    batch = make_batch(layouts, config, schedule, pixels=np.zeros((2, 3, 336, 336), np.float32))

    arrays = merge_arrays(schedule.merge, [(24, 24)] * 2, 2, 576)

    def run(module, prompt, pixels):
        features, anchors = encode_images(module, pixels, arrays, schedule.merge)
        result = prefill(module.decoder, prompt, features, anchors, batch.plan)
        return features, result.logits, [keys for stage in result.cache.stages for keys in stage.keys]

    features, logits, keys = jax.eval_shape(
        run, module, batch.prompt, jax.ShapeDtypeStruct((2, 3, 336, 336), jnp.float32)
    )
    assert features.shape == (2, schedule.merged_count(576, (24, 24)), config.decoder.hidden_size)
    assert logits.shape == (2, 32064) and logits.dtype == jnp.float32
    merged = schedule.merged_count(576, (24, 24))
    kept = [merged if s.cap is None else s.cap for s in batch.plan.stages for _ in range(s.lo, s.hi)]
    assert [layer.shape[2] for layer in keys] == [batch.prompt.text_slots + count + ROOM for count in kept]


def test_every_parameter_names_its_axes():
    module = abstract(read_config(HUB_7B))
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        assert len(leaf.axes) == leaf.get_value().ndim, path


@pytest.mark.parametrize(
    "setting",
    [{"num_beams": 4}, {"no_repeat_ngram_size": 3}, {"suppress_tokens": [5]}, {"min_new_tokens": 2}],
    ids=str,
)
def test_generation_settings_that_change_greedy_answers_are_refused(setting):
    (name,) = setting
    with pytest.raises(RerouteError, match=f"generation_config.json: {name} = .* is not implemented"):
        read_config(HUB_7B, setting)


def test_generation_settings_that_change_nothing_pass():
    neutral = {"num_beams": 1, "guidance_scale": 1.0, "min_length": 0, "suppress_tokens": None, "temperature": 0.1}
    assert read_config(HUB_7B, neutral | {"do_sample": True, "max_length": 20}) == read_config(HUB_7B)


def test_a_placeholder_does_not_pad():
    """Rows that fill a batch up would hold an image that is not there."""
    assert read_config({**HUB_7B, "pad_token_id": HUB_7B["image_token_index"]}).pad_token == 2
    assert read_config(HUB_7B, {"pad_token_id": HUB_7B["image_token_index"], "eos_token_id": [7, 2]}).pad_token == 7


def test_the_mapping_that_is_read_stays_as_it_is():
    config = {**QWEN, "rope_theta": 5e5, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    assert read_config(config).decoder.rope_theta == 5e5
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [16, 24, 24]}
