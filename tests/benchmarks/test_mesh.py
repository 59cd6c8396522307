"""A model on a mesh of devices that the CPU plays, in a process that was started with eight of them."""

import json
import subprocess

from evals.speed.collectives import Collective, collectives
from tests.processes import module_without_torch

LAYERS, DECISIONS = 4, 3


def test_a_mesh_answers_as_one_device_does_and_tells_no_more_than_it_must(tmp_path):
    """Two KV heads for four devices. In the prefill there are two all-reduces a layer, one for the embeddings, and a
    small one for each decision."""
    case = ["--families", "qwen2.5", "--meshes", "data=2,model=4", "--methods", "pdrop", "--actions", "reroute"]
    command = module_without_torch("benchmarks.mesh", *case, "--out", str(tmp_path / "mesh.jsonl"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "mesh.jsonl").read_text())
    assert found["collectives"] == {"all-reduce": 1 + 2 * LAYERS + DECISIONS}
    assert found["largest"] == 0.5, "the hidden states of its own half of the rows"


def test_collectives_are_read_from_the_text_of_a_program():
    text = """
  %all-reduce.3 = f32[8,40]{1,0} all-reduce(%x), channel_id=1, to_apply=%add, metadata={op_name="jit(f)/layer/dot"}
  %ag = (bf16[4,2]{1,0}, bf16[16,2]{1,0}) all-gather-start(%y), dimensions={0}, metadata={op_name="jit(f)/gather"}
  %done = bf16[16,2]{1,0} all-gather-done(%ag)
  %add.1 = f32[] add(%all-reduce.3, %b)
"""
    assert list(collectives(text)) == [
        Collective("all-reduce", ((8, 40),), "jit(f)/layer/dot"),
        Collective("all-gather", ((4, 2), (16, 2)), "jit(f)/gather"),
    ]
