"""Write a trained embedded model as a Hugging Face checkpoint, half precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from jax import Array
from safetensors.numpy import save_file
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from convert.families import table_of
from convert.table import to_hf
from evals.scenes.spec import IMAGE_SLOTS, hf_config, model_config
from evals.scenes.tokenizer import build_tokenizer
from evals.scenes.training.packing import HALF
from evals.scenes.world import CANVAS, GRIDS, TOKEN


def export(params: Mapping[str, Array], folder: Path, family: str = "llava") -> None:
    """`params`: the model's parameters by dotted path. Writes config, weights (fp16), tokenizer and image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {path: np.asarray(value).astype(np.float16) for path, value in params.items()}
    tensors = {key: np.ascontiguousarray(value) for key, value in to_hf(table_of(model_config(family)), half)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(family), indent=2) + "\n")
    if family in _GENERATION:
        (folder / "generation_config.json").write_text(json.dumps(_GENERATION[family], indent=2) + "\n")
    _SAVE_PROCESSOR[family](folder)


# As the hub's checkpoint of the family has it.
_GENERATION = {"qwen2_5_vl": {"repetition_penalty": 1.05}}


def _save_llava_processor(folder: Path) -> None:
    side = {"height": CANVAS, "width": CANVAS}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": CANVAS}, crop_size=side),
        tokenizer=build_tokenizer("llava"),
        patch_size=TOKEN,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def _save_qwen_processor(folder: Path, family: str, **normalisation) -> None:
    """Tokenizer and image processor apart: the processor that joins them cannot be made without torchvision."""
    fewest = min(rows * cols for rows, cols in GRIDS[family])
    Qwen2VLImageProcessorPil(
        min_pixels=fewest * TOKEN**2,
        max_pixels=IMAGE_SLOTS[family] * TOKEN**2,
        patch_size=TOKEN // 2,
        merge_size=2,
        temporal_patch_size=2,
        **normalisation,
    ).save_pretrained(folder)
    build_tokenizer(family).save_pretrained(folder)


_SAVE_PROCESSOR = {
    "llava": _save_llava_processor,
    "qwen2_5_vl": partial(_save_qwen_processor, family="qwen2_5_vl"),
    "qwen3_vl": partial(_save_qwen_processor, family="qwen3_vl", image_mean=HALF.tolist(), image_std=HALF.tolist()),
}
