"""Shape of the embedded models, as the HF configuration they are saved with."""

from __future__ import annotations

from evals.scenes.tokenizer import vocabulary
from evals.scenes.world import CANVAS
from reroute_jax.config import ModelConfig

PATCH = 14
GRID = CANVAS // PATCH


def hf_config() -> dict:
    """`config.json` of the embedded LLaVA: 64 visual tokens, a tower of 5 blocks (the last one unread by LLaVA, but
    read by Nuwa's similarity), 12 decoder layers, 3.5 M parameters."""
    vocab = vocabulary()
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
            "patch_size": PATCH,
            "projection_dim": 128,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": len(vocab),
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bos_token_id": vocab["<s>"],
            "eos_token_id": vocab["</s>"],
            "pad_token_id": vocab["<pad>"],
        },
    }


def model_config() -> ModelConfig:
    return ModelConfig.from_hf(hf_config())
