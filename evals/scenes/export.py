"""Write a trained embedded model as a Hugging Face LLaVA checkpoint, half precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax import Array
from safetensors.numpy import save_file
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from convert.llava import table
from convert.table import to_hf
from evals.scenes.spec import PATCH, hf_config, model_config
from evals.scenes.tokenizer import build_tokenizer
from evals.scenes.world import CANVAS


def export(params: Mapping[str, Array], folder: Path) -> None:
    """`params`: the model's parameters by dotted path. Writes config, weights (fp16), tokenizer and image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {path: np.asarray(value).astype(np.float16) for path, value in params.items()}
    tensors = {key: np.ascontiguousarray(value) for key, value in to_hf(table(model_config()), half)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(), indent=2) + "\n")
    side = {"height": CANVAS, "width": CANVAS}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": CANVAS}, crop_size=side),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
