"""int8 and int4 weights: what is quantised, by how much it is off, and that everything computes with just these."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reroute_jax
from benchmarks import random_checkpoint
from convert import __main__ as cli
from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.errors import RerouteError
from reroute_jax.models import read_config
from reroute_jax.nn.params import named_parameters, with_parameters
from reroute_jax.nn.quantised import plain, quantised, with_quantised

pytest.importorskip("qwix")


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    random_checkpoint.write(SHAPES["llava-tiny-gqa"], folder, dtype="float32")
    return folder


@pytest.mark.parametrize(("kind", "levels"), [("int8", 127), ("int4", 7)])
def test_every_weight_is_within_half_a_step(hf, kind, levels):
    exact = named_parameters(reroute_jax.load(hf).module)
    found = named_parameters(reroute_jax.load(hf, quantise=kind).module)
    changed = {path for path, value in found.items() if not isinstance(value, jax.Array)}
    assert changed == {path for path in exact if path.startswith("decoder.") and path.endswith((".kernel", ".table"))}
    for path, value in exact.items():
        if path not in changed:
            np.testing.assert_array_equal(found[path], value)
            continue
        numbers, scale = found[path].qvalue, np.asarray(found[path].scale)
        assert numbers.dtype == kind and np.abs(numbers.astype(np.int8)).max() <= levels + (kind == "int4")
        steps = np.repeat(scale, value.shape[-1] // scale.shape[-1], axis=-1)
        assert (np.abs(np.asarray(plain(found[path])) - value) <= 0.5001 * steps).all(), path


def test_a_model_computes_with_the_quantised_weights(hf):
    model = reroute_jax.load(hf, quantise="int4")
    values = {path: plain(value) for path, value in named_parameters(model.module).items()}
    same = with_parameters(reroute_jax.abstract_params(model.config), values)
    ids = np.random.default_rng(0).integers(10, 300, size=(1, 12))
    found = model.prefill(input_ids=ids).logits
    expected = type(model)(model.config, same, model.folder).prefill(input_ids=ids).logits
    np.testing.assert_allclose(found, expected, atol=1e-5)  # fp32: dequantised inside the program and before it
    assert np.abs(found - reroute_jax.load(hf).prefill(input_ids=ids).logits).max() > 1e-3


def test_a_quantised_folder_is_what_loading_makes(hf, tmp_path):
    for dtype, kind in (("bfloat16", "int8"), ("float32", "int4")):
        out = tmp_path / kind
        assert cli.main([str(hf), str(out), "--dtype", dtype, "--quantise", kind]) == 0
        expected, found = reroute_jax.load(hf, dtype, quantise=kind), reroute_jax.load(out)
        assert found.dtype == dtype
        pairs = zip(*(jax.tree.leaves(named_parameters(one.module)) for one in (expected, found)), strict=True)
        assert all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in pairs)
        other = {"int8": "int4", "int4": "int8"}[kind]
        with pytest.raises(RerouteError, match=f"holds {kind} weights, not {other}: leave it out"):
            reroute_jax.load(out, quantise=other)


def test_without_qwix_and_with_another_kind(hf, monkeypatch):
    with pytest.raises(RerouteError, match="quantise is 'int2'"):
        reroute_jax.load(hf, quantise="int2")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(RerouteError, match=r"need qwix: pip install 'reroute-jax\[quantise\]'"):
        quantised(jnp.ones((2, 3)), "int8")


@pytest.mark.parametrize(("name", "most"), [("llava-1.5-7b", 7.5e9), ("qwen2.5-vl-7b", 9.5e9)])
def test_a_7b_leaves_half_of_a_16_gb_card(name, most):
    """Of which eight rows of LLaVA's 576 visual tokens, 64 of text and 32 new ones take 2.8 GB as a bf16 cache."""
    config = read_config(SHAPES[name].config("bfloat16"))
    module = with_quantised(reroute_jax.abstract_params(config, "bfloat16"), "int8")
    assert sum(value.size * value.dtype.itemsize for value in jax.tree.leaves(named_parameters(module))) < most
