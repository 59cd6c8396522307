"""What `benchmarks.deepstack` asks and tells."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import deepstack
from benchmarks.deepstack import PAIRS, ROUTES, markdown, runs_of, silenced, summary_of
from benchmarks.found_schedules import FULL
from evals.scenes.spec import model_config
from reroute_jax.engine.model import Model
from reroute_jax.errors import RerouteError
from reroute_jax.models.qwen3_vl import Qwen3VL
from reroute_jax.nn.params import named_parameters


class Planned(Model):
    """A model of the embedded one's shape without weights, whose reference image has 11 x 11 tokens."""

    @property
    def reference_grid(self):
        return 11, 11


@pytest.fixture(scope="module")
def model() -> Model:
    config = model_config("qwen3_vl")
    shapes = nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    return Planned(config, shapes, Path("nowhere"))


def test_every_schedule_spends_the_budget(model):
    runs = runs_of(model, [Fraction(1, 3)])
    assert [run.name for run in runs] == [FULL, *(f"{name} 1/3" for name in ROUTES)]
    for run in runs[1:]:
        average = model.cost(run.schedule, text=0, grid=(11, 11)).average
        assert 38 <= average <= 41, run.name
        late = run.name.startswith("late")
        assert (run.schedule.decisions[0].lo >= 3) == run.name.startswith(("late", "every"))
        assert run.schedule.deepstack == ("running" if "running" in run.name else "late" if late else "all")
    known = {*ROUTES, "found"}
    assert {name for pair in PAIRS for name in pair} <= known


def test_nothing_is_added_by_a_silenced_model(model):
    small = replace(model, module=jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), model.module))
    before, after = named_parameters(small.module), named_parameters(silenced(small).module)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {f"vision.deepstack.{level}.fc2.{part}" for level in range(3) for part in ("kernel", "bias")}
    assert not any(np.any(after[name]) for name in changed)


def test_a_summary_compares_the_same_questions(model):
    runs = runs_of(model, [Fraction(1, 3)])
    right = {"reroute 1/3": (1, 1, 0, 1), "delete 1/3": (1, 0, 0, 0)}
    lines = [
        {"scene": str(at), "metrics": {run.name: dict.fromkeys(deepstack.METRICS, 0.0) for run in runs}}
        for at in range(4)
    ]
    for name, hits in right.items():
        for line, hit in zip(lines, hits, strict=True):
            line["metrics"][name]["ACC@0.5"] = float(hit)
    found = summary_of(model, runs, lines, lines, Counter({(11, 11): 4}))
    pair = found["differences"]["reroute 1/3 minus delete 1/3"]["ACC@0.5"]
    assert (found["runs"]["reroute 1/3"]["ACC@0.5"]["value"], pair["value"]) == (0.75, 0.5)
    assert pair["low"] >= 0  # no question that deletion gets right and reroute does not
    assert "| reroute 1/3 minus delete 1/3 | +50.0 (" in markdown(found)


def test_a_model_without_deepstack_is_refused(monkeypatch, model):
    plain = replace(model.config, decoder=replace(model.config.decoder, deepstack=0))
    monkeypatch.setattr(deepstack, "load_model", lambda *arguments: replace(model, config=plain))
    with pytest.raises(RerouteError, match="has no DeepStack"):
        deepstack.measure(deepstack._parser().parse_args([]))
