"""An unrouted run in transformers itself, for the cross-check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from reroute_jax.config import ModelConfig


@dataclass(frozen=True)
class Plain:
    """features: `[n, D]` of all images, DeepStack's behind them, or None. hidden: `[L, S, D]`, the input of the first
    layer and each but the last one's output, before DeepStack adds to it; logits: `[S, vocab]`, all positions; tokens:
    the greedy continuation."""

    features: np.ndarray | None
    hidden: np.ndarray
    logits: np.ndarray
    tokens: np.ndarray


def open_model(folder: Path, config: ModelConfig, max_new_tokens: int) -> PreTrainedModel:
    """The checkpoint in fp32, set to generate as ours does for its family."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(config.eos_tokens),
        pad_token_id=config.pad_token,
        repetition_penalty=config.repetition_penalty,
    )
    return model


@torch.no_grad()
def plain_run(
    model: PreTrainedModel, ids: np.ndarray, pixels: np.ndarray | None, image_grid_thw: np.ndarray | None
) -> Plain:
    """One unpadded prompt `ids [S]` with its images as the processor gives them."""
    tokens = torch.tensor(ids)[None]
    image = {} if pixels is None else {"pixel_values": torch.tensor(pixels)}
    kinds = {}
    if image_grid_thw is not None:
        image["image_grid_thw"] = torch.tensor(image_grid_thw)
        # Without them transformers gives every token one position, silently.
        kinds["mm_token_type_ids"] = (tokens == model.config.image_token_id).int()
    out = model(input_ids=tokens, output_hidden_states=True, **image, **kinds)
    made = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **image, **kinds)
    features = image_features(model, image).numpy() if image else None
    hidden = np.stack([state[0].numpy() for state in out.hidden_states[:-1]])
    return Plain(features, hidden, out.logits[0].numpy(), made[0, len(ids) :].numpy())


def image_features(model: PreTrainedModel, image: dict[str, torch.Tensor]) -> torch.Tensor:
    """[n, D] of all images as transformers makes them; those of DeepStack's levels stand behind each token's own."""
    found = model.get_image_features(**image)
    levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
    return torch.cat([torch.cat(list(level)) for level in levels], dim=1)
