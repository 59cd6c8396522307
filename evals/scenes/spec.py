"""Shapes of the embedded models, as the HF configurations they are saved with."""

from __future__ import annotations

from evals.scenes.tokenizer import vocabulary
from evals.scenes.world import CANVAS, GRIDS, TOKEN
from reroute_jax.config import ModelConfig
from reroute_jax.models import read_config

GRID = CANVAS // TOKEN
# Visual tokens at most.
IMAGE_SLOTS = {
    "llava": GRID * GRID,
    **{family: max(rows * cols for rows, cols in grids) for family, grids in GRIDS.items()},
}
# Real Qwen2.5-VL has 1,000,000 for grids of 20 and more a side. M-RoPE gives columns the slowest third of the
# frequencies: at this base the fastest of them still turns by 0.7 over 12 columns, and the slowest by less than 1 over
# a prompt, so that words are matched with tokens wherever both stand.
QWEN_ROPE_THETA = 100.0


def hf_config(family: str = "llava") -> dict:
    """`config.json` of an embedded model."""
    return _HF_CONFIGS[family]()


def model_config(family: str = "llava") -> ModelConfig:
    return read_config(hf_config(family))


def _llava() -> dict:
    """64 visual tokens, a tower of 5 blocks (the last one unread by LLaVA, but read by Nuwa's similarity), 12 decoder
    layers, 3.5 M parameters."""
    vocab = vocabulary("llava")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float16",
        "image_token_index": vocab["<image>"],
        "image_seq_length": GRID * GRID,
        "pad_token_id": vocab["<pad>"],
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": CANVAS,
            "patch_size": TOKEN,
            "projection_dim": 128,
        },
        "text_config": {
            "model_type": "llama",
            **_decoder(len(vocab)),
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bos_token_id": vocab["<s>"],
            "eos_token_id": vocab["</s>"],
            "pad_token_id": vocab["<pad>"],
        },
    }


def _qwen() -> dict:
    """48 to 80 visual tokens of 14 pixels (4 patches of 7), a tower of 4 blocks that attend in windows of 4x4 tokens
    and, in blocks 1 and 3, everywhere, 12 decoder layers, 4 query and 2 KV heads."""
    vocab = vocabulary("qwen2_5_vl")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": "float16",
        "image_token_id": vocab["<|image_pad|>"],
        "video_token_id": vocab["<|video_pad|>"],
        "vision_start_token_id": vocab["<|vision_start|>"],
        "vision_end_token_id": vocab["<|vision_end|>"],
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": TOKEN // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 4 * TOKEN,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1, 3],
        },
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **_decoder(len(vocab)),
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": QWEN_ROPE_THETA,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": vocab["<|endoftext|>"],
            "eos_token_id": vocab["<|im_end|>"],
            "pad_token_id": vocab["<|endoftext|>"],
        },
    }


def _qwen3() -> dict:
    """108 to 128 visual tokens of 14 pixels (4 patches of 7), a tower of 4 blocks, DeepStack from the first three into
    the first three of 16 decoder layers, which have the shapes of LLaVA's 12, norms of queries and keys aside; 4.3 M
    parameters."""
    vocab = vocabulary("qwen3_vl")
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "float16",
        "image_token_id": vocab["<|image_pad|>"],
        "video_token_id": vocab["<|video_pad|>"],
        "vision_start_token_id": vocab["<|vision_start|>"],
        "vision_end_token_id": vocab["<|vision_end|>"],
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 4,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 3,
            "in_channels": 3,
            "patch_size": TOKEN // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 256,
            "out_hidden_size": 128,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        "text_config": {
            "model_type": "qwen3_vl_text",
            **_decoder(len(vocab), layers=16),
            "num_key_value_heads": 4,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "bos_token_id": vocab["<|endoftext|>"],
            "eos_token_id": vocab["<|im_end|>"],
            "pad_token_id": vocab["<|endoftext|>"],
        },
    }


def _decoder(words: int, layers: int = 12) -> dict:
    return {
        "vocab_size": words,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }


_HF_CONFIGS = {"llava": _llava, "qwen2_5_vl": _qwen, "qwen3_vl": _qwen3}
