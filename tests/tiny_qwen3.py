"""Tiny random Qwen3-VL checkpoints on disk, as strong as the others; prompts and patches as of `tiny_qwen.py`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from reroute_jax.models.qwen3_vl import CHAT_TEMPLATE
from tests import tiny_qwen
from tests.tiny import strengthen, write_shards

LAYERS = 6
TABLE_SIDE = 5  # larger and smaller than the images' sides in patches
DEEPSTACK = (0, 2, 3)


def tiny_qwen3(
    folder: Path, *, spelling: str = "hub", tied: bool = False, shards: int = 1, layers: int = LAYERS, seed: int = 0
) -> Path:
    """Write a checkpoint with tokenizer and image processor to `folder` (made if absent) and return it.

    spelling: of config.json; "hub" as sparse as the hub's, with `rope_scaling`, "v5" as transformers 5 writes it. Six
    layers, a head size that is not the width over the heads, three levels of DeepStack, one of them behind the tower's
    last block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = _config(tied, layers)
    config = Qwen3VLConfig.from_dict(json.loads(json.dumps(written)))
    model = Qwen3VLForConditionalGeneration(config)
    strengthen(model, np.random.default_rng(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.mul_(1.7)  # the norms undo what `strengthen` does to the projections
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    write_shards(folder, tensors, shards)
    if spelling == "v5":
        written = config.to_dict()
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    generation = {"eos_token_id": [tiny_qwen.IM_END, tiny_qwen.PAD], "pad_token_id": tiny_qwen.PAD, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tiny_qwen.tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=tiny_qwen.PATCH,
        merge_size=tiny_qwen.MERGE,
        temporal_patch_size=2,
        min_pixels=4 * tiny_qwen.TOKEN**2,
        max_pixels=64 * tiny_qwen.TOKEN**2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    return folder


def load_torch(folder: Path) -> Qwen3VLForConditionalGeneration:
    """The checkpoint as transformers loads it, in evaluation mode."""
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def _config(tied: bool, layers: int) -> dict:
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": tiny_qwen.IMAGE,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "bos_token_id": tiny_qwen.PAD,
            "dtype": "float32",
            "eos_token_id": tiny_qwen.IM_END,
            "head_dim": 24,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 128,
            "max_position_embeddings": 4096,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 4,
            "num_hidden_layers": layers,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            # Uneven, and a tail of temporal pairs behind the interleaved ones.
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 2, 4], "rope_type": "default"},
            "rope_theta": 5000000,
            "vocab_size": tiny_qwen.VOCAB_SIZE,
        },
        "tie_word_embeddings": tied,
        "video_token_id": tiny_qwen.VIDEO,
        "vision_config": {
            "deepstack_visual_indexes": list(DEEPSTACK),
            "depth": 4,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 48,
            "in_channels": 3,
            "intermediate_size": 72,
            "model_type": "qwen3_vl",
            "num_heads": 4,
            "num_position_embeddings": TABLE_SIDE**2,
            "out_hidden_size": 64,
            "patch_size": tiny_qwen.PATCH,
            "spatial_merge_size": tiny_qwen.MERGE,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": tiny_qwen.VISION_END,
        "vision_start_token_id": tiny_qwen.VISION_START,
    }
