"""Tiny random Qwen2.5-VL checkpoints on disk, and inputs for them; as strong as the LLaVA ones of `tiny.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from tests.tiny import WORDS, strengthen, write_shards

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL += ("<|vision_start|>", "<|vision_end|>", "<unk>", "\n")
PAD, IM_END, IMAGE, VIDEO, VISION_START, VISION_END, UNK = 0, 2, 3, 4, 5, 6, 7
VOCAB_SIZE = 160
PATCH, MERGE, WINDOW = 7, 2, 56
TOKEN = PATCH * MERGE  # pixels a side of a visual token; a window is 4 x 4 of them

# In-memory prefix (transformers 5) -> prefix on disk. `hub` is Qwen/Qwen2.5-VL-7B-Instruct's spelling.
SPELLINGS = {"hub": {"model.visual.": "visual.", "model.language_model.": "model."}, "v5": {}}

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_qwen(
    folder: Path,
    *,
    kv_heads: int = 2,
    layers: int = 8,
    hidden: int = 64,
    heads: int = 4,
    vision_layers: int = 6,
    spelling: str = "hub",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with tokenizer and image processor to `folder` (made if absent) and return it.

    `spelling` is a key of SPELLINGS; `hub` has a flat config with `rope_scaling`, as sparse as the hub's, `v5` the
    nested one of transformers 5. Blocks 2 and the last of the tower see the whole image. `tied` leaves the head out,
    as transformers does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = _flat_config(kv_heads, layers, hidden, heads, vision_layers, tied)
    flat["torch_dtype"] = str(dtype).removeprefix("torch.")
    config = Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(flat)))
    model = Qwen2_5_VLForConditionalGeneration(config)
    strengthen(model, np.random.default_rng(seed))
    tensors = {_spell(key, spelling): value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    write_shards(folder, tensors, shards)
    written = flat if spelling == "hub" else config.to_dict()
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    # Stops and penalty as the hub's generation config has them.
    generation = {"bos_token_id": PAD, "eos_token_id": [IM_END, PAD], "pad_token_id": PAD, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, min_pixels=4 * TOKEN**2, max_pixels=64 * TOKEN**2
    ).save_pretrained(folder)
    return folder


def load_torch(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen2_5_VLForConditionalGeneration:
    """The checkpoint as transformers loads it, in evaluation mode."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def random_patches(grids: Sequence[tuple[int, int]], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """pixel_values `[P, values]`, fp32, and image_grid_thw `[I, 3]` of images with (rows, cols) visual tokens: noise on
    a smooth gradient, so that neighbouring patches are alike and distant ones are not."""
    rng, pixels = np.random.default_rng(seed), []
    for rows, cols in grids:
        y, x = (np.linspace(-1, 1, side * TOKEN) for side in (rows, cols))
        slopes = rng.normal(size=(3, 2, 1, 1))
        image = slopes[:, 0] * y[:, None] + slopes[:, 1] * x + 0.7 * rng.normal(size=(3, rows * TOKEN, cols * TOKEN))
        blocks = image.reshape(3, rows, MERGE, PATCH, cols, MERGE, PATCH).transpose(1, 4, 2, 5, 0, 3, 6)
        frames = np.repeat(blocks[:, :, :, :, :, None], 2, axis=5)
        pixels.append(frames.reshape(rows * cols * MERGE**2, -1).astype(np.float32))
    return np.concatenate(pixels), np.array([(1, MERGE * rows, MERGE * cols) for rows, cols in grids])


def random_ids(length: int, grids: Sequence[tuple[int, int]] = (), *, start: int = 1, seed: int = 0) -> np.ndarray:
    """One prompt `[length]`, int64, of text ids; images with (rows, cols) visual tokens stand from index `start` on,
    each between its marks."""
    ids = np.random.default_rng(seed).integers(len(SPECIAL), len(SPECIAL) + len(WORDS), size=length)
    images = [token for rows, cols in grids for token in (VISION_START, *[IMAGE] * (rows * cols), VISION_END)]
    if start + len(images) >= length:
        raise ValueError(f"{len(images)} image tokens from index {start} do not fit {length} tokens")
    ids[start : start + len(images)] = images
    return ids


def _flat_config(kv_heads: int, layers: int, hidden: int, heads: int, vision_layers: int, tied: bool) -> dict:
    pairs = hidden // heads // 2
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": PAD,
        "eos_token_id": IM_END,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "image_token_id": IMAGE,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 4096,
        "max_window_layers": layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        # Uneven sections, so that no two channels can change places unnoticed.
        "rope_scaling": {"type": "mrope", "mrope_section": [pairs // 4, pairs // 2, pairs - pairs // 4 - pairs // 2]},
        "rope_theta": 1000000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": VIDEO,
        "vision_config": {
            "depth": vision_layers,
            "fullatt_block_indexes": [2, vision_layers - 1],
            "hidden_act": "silu",
            "hidden_size": 48,
            "in_chans": 3,
            "intermediate_size": 72,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": WINDOW,
        },
        "vision_end_token_id": VISION_END,
        "vision_start_token_id": VISION_START,
        "vocab_size": VOCAB_SIZE,
    }


def _spell(key: str, spelling: str) -> str:
    for prefix, written in SPELLINGS[spelling].items():
        if key.startswith(prefix):
            return written + key.removeprefix(prefix)
    return key


def tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
    vocabulary |= {f"<extra_{index}>": index for index in range(len(vocabulary), VOCAB_SIZE)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" +"), "removed"),
            pre_tokenizers.Split(Regex(r"[A-Za-z]+|\n|."), "isolated"),
        ]
    )
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL[:-2]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=chat_template,
    )
