"""Where arrays lie on a mesh, by shapes alone."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

import reroute_jax
from evals.speed.checkpoint_shapes import SHAPES
from evals.speed.subjects import Subject, random_model, sample
from reroute_jax.engine import programs
from reroute_jax.errors import RerouteError
from reroute_jax.mesh import mesh_sizes, open_mesh
from reroute_jax.models import read_config
from reroute_jax.nn.sharding import AXES, on_mesh, spec

MESH = AbstractMesh((2, 4, 2), AXES)


@pytest.mark.parametrize(
    "size, axis, split",
    [
        (6, "rows", ("data",)),
        (3, "rows", None),
        (16, "heads", ("kv", "group")),
        (4, "kv_heads", ("kv",)),
        (3420, "mlp", ("kv",)),
        (2, "heads", None),
        (64, "embed", None),
    ],
)
def test_a_dimension_is_split_over_the_longest_run_of_axes_that_divides_it(size, axis, split):
    assert spec((size, 5), (axis,), MESH) == PartitionSpec(split)


@pytest.mark.parametrize(
    "name, gigabytes",
    [("qwen2.5-vl-32b", 8.37), pytest.param("qwen2.5-vl-72b", 18.36, marks=pytest.mark.slow)],
)
def test_what_a_device_holds_of_a_large_model(name, gigabytes):
    """bf16 parameters at model=8, where 32B has 40 heads and 8 KV heads: an eighth of all but the norms, the position
    tables and the tower's embedding."""
    config = read_config(SHAPES[name].config("bfloat16"))
    module = reroute_jax.abstract_params(config, "bfloat16")
    placed = on_mesh(module, AbstractMesh((1, 8, 1), AXES))
    own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(placed))
    assert 2e-9 * own == pytest.approx(gigabytes, abs=0.01)
    assert own < sum(leaf.size for leaf in jax.tree.leaves(module)) / 8 * 1.01


@pytest.mark.parametrize(
    "name, layers, action",
    [("qwen2.5-vl-32b", 64, "reroute"), pytest.param("qwen2.5-vl-72b", 80, "delete", marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_large_models_end_to_end_without_memory(name, layers, action):
    subject = Subject(name, *random_model(SHAPES[name], "bfloat16", shapes_only=True), (24, 24), 64)
    schedule = subject.plan("pdrop", budget=192, action=action)
    weights, batch = subject.model.weights, sample(subject, 1).batch(subject.model, schedule)
    features = programs.encode.jitted().eval_shape(weights, batch.images)
    found = programs.prefill.jitted().eval_shape(weights.decoder, batch.prompt, *features, batch.plan)
    assert found.logits.shape == (1, 152064)
    keys = [keys.shape for stage in found.cache.stages for keys in stage.keys]
    assert len(keys) == layers and {(shape[1], shape[3]) for shape in keys} == {(8, 128)}
    assert keys[-1][2] < keys[0][2]


def test_meshes_are_read():
    assert mesh_sizes("model=8") == {"data": 1, "model": 8} and mesh_sizes("model=2,data=4") == {"data": 4, "model": 2}


@pytest.mark.parametrize("text", ["", "model", "model=0", "model=2,model=2", "tensor=2", "data=2 model=2"])
def test_what_is_no_mesh(text):
    with pytest.raises(RerouteError, match="expected such as data=2,model=4"):
        mesh_sizes(text)


@pytest.mark.parametrize(
    "shape, mesh, reason",
    [
        ("qwen2.5-vl-7b", {"data": 1, "model": 8}, "model=8 does not divide the decoder's heads of 28"),
        ("llava-1.5-7b", {"data": 1, "model": 3}, "model=3 does not divide the decoder's heads of 32"),
        ("qwen2.5-vl-7b", {"data": 1, "tensor": 4}, "axes .'data', 'tensor'., expected 'data' and 'model'"),
    ],
)
def test_a_mesh_that_a_model_does_not_fit_on(shape, mesh, reason):
    decoder = read_config(SHAPES[shape].config("bfloat16")).decoder
    devices = np.full(tuple(mesh.values()), jax.devices()[0])
    with pytest.raises(RerouteError, match=reason):
        open_mesh(Mesh(devices, tuple(mesh)), decoder)


def test_more_devices_than_there_are():
    decoder = read_config(SHAPES["llava-1.5-7b"].config("bfloat16")).decoder
    with pytest.raises(RerouteError, match=r"takes 32 devices, there are 1 \(cpu\): make it smaller"):
        open_mesh("model=32", decoder)
