"""A family that the project has never heard of, registered here alone: its entry and its conversion table are all that
loading, planning and running it need."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from transformers import CONFIG_MAPPING, LlavaConfig

import convert.llava
import reroute_jax
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.routing.methods import METHODS
from tests.tiny import random_ids, random_pixels, tiny_llava


class ToyConfig(LlavaConfig):
    model_type = "toy"


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A LLaVA under another name, for which nothing was released: no rules of Nuwa, no configurations, no options."""
    llava = FAMILIES["llava"]
    family = replace(
        llava,
        name="toy",
        options=(),
        nuwa=None,
        released=None,
        read_config=lambda hf: replace(llava.read_config(hf), family="toy"),
    )
    monkeypatch.setitem(FAMILIES, "toy", family)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "toy", ToyConfig)
    monkeypatch.setitem(sys.modules, "convert.toy", convert.llava)
    folder = tiny_llava(tmp_path / "toy", kv_heads=2, layers=4, vision_layers=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "toy"}))
    return folder


def test_a_new_family_runs_by_its_entry_alone(toy):
    model = reroute_jax.load(toy, "float32")
    assert model.config.family == "toy"
    schedules = [model.plan(name, budget=0.5) for name in METHODS if name not in ("none", "nuwa")]
    assert len({schedule.label for schedule in schedules}) == len(METHODS) - 2
    result = model.prefill(
        input_ids=random_ids(60)[None], pixel_values=random_pixels(1), schedule=model.plan("fastv", budget=0.5)
    )
    assert np.isfinite(result.logits).all()
    with pytest.raises(RerouteError, match="method 'nuwa' has no rules for the model family toy"):
        model.plan("nuwa", budget=0.5)
    with pytest.raises(RerouteError, match="vicuna_system is for llava, this model is toy"):
        reroute_jax.load(toy, vicuna_system=True)


def test_what_an_entry_names_exists():
    from evals.harness.boxes import COORD_FORMATS
    from evals.harness.prompts import REC_STYLES

    for name, family in FAMILIES.items():
        assert name == family.name
        assert family.evaluation.rec_style in REC_STYLES and family.evaluation.coord_format in COORD_FORMATS
