"""The programs of every family, lowered for a GPU and a TPU on a machine that has neither."""

import re
from functools import cache

import pytest

from evals.speed.checkpoint_shapes import SHAPES
from evals.speed.programs import trace_programs
from evals.speed.subjects import Subject, random_model, sample

ROUTES = {"none": {}, "pdrop": {"action": "reroute", "budget": 192}, "nuwa": {"action": "delete", "budget": 64}}
GRIDS = {"llava-tiny-gqa": (4, 4), "qwen-tiny": (4, 6)}
DTYPES = ("float32", "bfloat16")
pytestmark = pytest.mark.usefixtures("unchecked_annotations")


@cache
def subject(shape, dtype):
    return Subject(shape, *random_model(SHAPES[shape], dtype, shapes_only=True), GRIDS[shape], 16)


@cache
def traced(shape, dtype, method):
    one = subject(shape, dtype)
    return trace_programs(one, one.plan(method, **ROUTES[method]), sample(one, 2))


def products(program, platform):
    """(operand dtypes, precisions) of every matrix product and convolution."""
    text = program.lower(lowering_platforms=(platform,)).as_text()
    found = []
    for line in re.findall(r".*stablehlo\.(?:dot_general|convolution).*", text):
        operands = re.search(r": \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", line)
        found.append((set(operands.groups()), set(re.findall(r"DEFAULT|HIGHEST|HIGH", line))))
    return found


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    ("shape", "method", "dtype"),
    [
        ("qwen-tiny", "pdrop", "float32"),
        pytest.param("qwen-tiny", "pdrop", "bfloat16", marks=pytest.mark.slow),
        ("qwen-tiny", "nuwa", "float32"),
        ("qwen-tiny", "nuwa", "bfloat16"),
        ("llava-tiny-gqa", "pdrop", "float32"),
        ("llava-tiny-gqa", "pdrop", "bfloat16"),
        *(pytest.param("llava-tiny-gqa", "nuwa", dtype, marks=pytest.mark.slow) for dtype in DTYPES),
        *(pytest.param(shape, "none", dtype, marks=pytest.mark.slow) for shape in GRIDS for dtype in DTYPES),
    ],
)
def test_lowers_and_multiplies_fp32_in_full(shape, method, dtype, platform):
    """fp32 operands, in whatever program they stand, are never TF32 or one bf16 pass; 16-bit ones take one pass."""
    for name, program in traced(shape, dtype, method).items():
        found = products(program, platform)
        assert found or name == "begin", name
        for operands, precisions in found:
            assert precisions == ({"HIGHEST"} if "f32" in operands else {"DEFAULT"}), (name, operands)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_scores_are_fp32(platform):
    """In bf16 the routed prefill has fp32 products, the plain one has none."""
    plain = products(traced("llava-tiny-gqa", "bfloat16", "none")["prefill"], platform)
    routed = products(traced("llava-tiny-gqa", "bfloat16", "pdrop")["prefill"], platform)
    assert all("f32" not in operands for operands, _ in plain)
    assert any(operands == {"f32"} for operands, _ in routed)
