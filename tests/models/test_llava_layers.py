"""LLaVA whose projector sees several hidden states of the tower side by side, against transformers."""

import json

import numpy as np
import pytest
import torch

import reroute_jax
from reroute_jax.errors import RerouteError
from tests.tiny import load_torch, random_ids, random_pixels, tiny_llava


@pytest.mark.parametrize(
    ("layers", "method"),
    [
        ([-2, -4], "nuwa"),
        ([0, -1, 3], None),
        (-1, None),
        pytest.param([-3], "nuwa", marks=pytest.mark.slow),
        pytest.param([0, -1, 3], "nuwa", marks=pytest.mark.slow),
        pytest.param(-1, "nuwa", marks=pytest.mark.slow),
    ],
)
def test_features_of_several_layers(tmp_path, layers, method):
    folder = tiny_llava(tmp_path, kv_heads=2, layers=3, feature_layers=layers)
    model, pixels = reroute_jax.load(folder, "float32"), random_pixels(1)
    ids = random_ids(60, start=5)
    expected = transformers_logits(folder, ids, pixels)
    found = model.prefill(input_ids=ids[None], pixel_values=pixels).logits
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if method is not None:
        schedule = model.plan(method, budget=192, action="delete")
        assert np.isfinite(model.prefill(input_ids=ids[None], pixel_values=pixels, schedule=schedule).logits).all()


def transformers_logits(folder, ids, pixels):
    with torch.no_grad():
        out = load_torch(folder)(input_ids=torch.tensor(ids)[None], pixel_values=torch.tensor(pixels))
    return out.logits[:, -1].numpy()


def test_the_class_token_as_a_visual_token_is_refused(tmp_path):
    folder = tiny_llava(tmp_path, kv_heads=2, layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": "full"}))
    with pytest.raises(RerouteError, match=r"only 'default' .patches. is supported"):
        reroute_jax.load(folder)
