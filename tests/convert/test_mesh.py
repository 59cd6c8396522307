"""Loading on a mesh: every device gets its own part of a checkpoint, and nobody reads more of it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.processes import python_without_torch
from tests.tiny_qwen import tiny_qwen

# Of eight devices that the CPU plays: this process has one.
LOADING = """
import importlib.util, json, sys
import numpy as np
import jax
import tensorstore
from orbax.checkpoint import v1 as ocp
import reroute_jax
from convert import __main__ as convert, checkpoint
from reroute_jax.engine.running import run_prefill
from reroute_jax.nn.params import named_parameters

def orbax_reads():
    (found,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return found["values"][0]["value"]

hf, converted = sys.argv[1:]
device = jax.devices()[5]
assert convert.main([hf, converted]) == 0
read, part, whole = [], checkpoint.read_part, checkpoint.read

def counted(tensor, shape, index):
    values = part(tensor, shape, index)
    read.append(values.nbytes)
    return values

checkpoint.read_part = counted
def int8(mesh):
    return named_parameters(reroute_jax.load(hf, quantise="int8", mesh=mesh).module)["decoder.layers.1.mlp.down.kernel"]

def int8_cache(mesh):
    model, ids = reroute_jax.load(hf, kv_cache="int8", mesh=mesh), np.random.default_rng(0).integers(10, 150, (4, 12))
    stage = run_prefill(model.weights, model.inputs(input_ids=ids))[1].cache.stages[0]
    own = [part.addressable_shards[0].data.shape for part in jax.tree.leaves(stage.keys[0])]
    return model.generate_ids(input_ids=ids, max_new_tokens=5).tolist(), own

alone = named_parameters(reroute_jax.load(hf).module)
with_qwix = importlib.util.find_spec("qwix")
one = int8(None) if with_qwix else None
tokens, _ = int8_cache(None)
checkpoint.read = None  # nobody reads a whole tensor
split = named_parameters(reroute_jax.load(hf, mesh="data=2,model=4").module)
counts = {"read": sum(read), "largest": max(read)}
before = orbax_reads()
restored = named_parameters(reroute_jax.load(converted, mesh="data=2,model=4").module)
own = {path: next(one.data.shape for one in value.addressable_shards if one.device == device)
       for path, value in split.items()}
(piece,) = (checkpoint.Path(converted) / "params").iterdir()
chunks = {path: value.storage_metadata.chunk_shape for path, value in ocp.metadata(piece).metadata.items()}
small = None
if with_qwix:
    many = int8("data=2,model=4")
    small = {"equal": np.array_equal(one.qvalue, many.qvalue) and np.array_equal(one.scale, many.scale),
             "own": many.qvalue.addressable_shards[0].data.shape}
tokens_on_mesh, own_cache = int8_cache("data=2,model=4")
print(json.dumps({
    "quantised": small,
    "int8_cache": {"equal": tokens == tokens_on_mesh, "own": own_cache},
    "equal": all(np.array_equal(alone[path], value) and np.array_equal(alone[path], restored[path])
                 for path, value in split.items()),
    "same_places": all(value.sharding == restored[path].sharding for path, value in split.items()),
    **counts, "bytes": sum(value.nbytes for value in alone.values()),
    "restored": orbax_reads() - before, "own": own, "chunks": chunks,
}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    tiny_qwen(folder / "hf", heads=8, kv_heads=2, hidden=64, layers=2, vision_layers=3)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        python_without_torch(LOADING, str(folder / "hf"), str(folder / "converted")),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": flags},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_all_parts_together_are_the_checkpoint(told):
    assert told["equal"] and told["same_places"]


def test_each_number_is_read_once(told):
    """Where devices hold copies, the first one's read serves them all. No read is a large part of the model."""
    assert told["read"] == told["bytes"]
    assert told["largest"] < told["bytes"] / 10


def test_orbax_reads_each_device_its_own_chunks(told):
    """Every number once, and beside them the names and places of the chunks."""
    assert told["bytes"] < told["restored"] < 1.25 * told["bytes"]
    for path, own in told["own"].items():
        whole = all(size % part == 0 for size, part in zip(own, told["chunks"][path], strict=True))
        assert whole or path.startswith("vision"), path
    assert told["chunks"]["decoder.layers.0.mlp.down.kernel"] == [64, 16]


def test_what_a_device_holds(told):
    """Of four devices a quarter of the heads; of two KV heads one, which it shares with another."""
    own = told["own"]
    assert own["decoder.layers.0.attn.q.kernel"] == [2, 8, 64]
    assert own["decoder.layers.0.attn.k.kernel"] == [1, 8, 64]
    assert own["decoder.layers.0.attn.o.kernel"] == [64, 2, 8]
    assert own["decoder.layers.0.mlp.down.kernel"] == [64, 32]
    assert own["decoder.embed.table"] == [40, 64]
    assert own["vision.layers.0.attn.qkv.kernel"] == [3, 1, 12, 48]
    assert own["decoder.norm.scale"] == [64]


def test_weights_are_quantised_where_they_lie(told):
    """The scales of a kernel that is split along them are those of the whole."""
    pytest.importorskip("qwix")
    assert told["quantised"] == {"equal": True, "own": [64, 32]}


def test_an_int8_cache_lies_with_its_heads(told):
    """Of four rows two, and of two KV heads one, with its scales, at 16 slots and room for 32 more."""
    assert told["int8_cache"] == {"equal": True, "own": [[2, 1, 48, 8], [2, 1, 48]]}
