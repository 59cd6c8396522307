"""FLOPs and cached bytes by theory and by the compiled program, and what the trace's names are read as."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import jaxtyping
import pytest

from evals import profile
from evals.speed.checkpoint_shapes import DecoderShape, LlavaShape
from evals.speed.subjects import Subject, random_model, sample
from reroute_jax.routing.cost import visual_per_layer
from reroute_jax.routing.plan import Schedule
from tests.marks import cases

# Wide enough that norms, rotations and softmax are few of all operations.
SHAPE = LlavaShape(DecoderShape(384, 256, 688, 3, 4, 4), 16, 32, 2, 2, 112)


@pytest.fixture(autouse=True)
def unchecked_annotations():
    """Lowering ahead of time puts shapes where the annotations of `Prompt` want arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def opened(shapes_only: bool) -> Subject:
    model, hf_config = random_model(SHAPE, "float32", shapes_only=shapes_only)
    return Subject("small", model, hf_config, (8, 8), 32)


@pytest.fixture(scope="module")
def subject():
    return opened(shapes_only=True)


@pytest.fixture(scope="module")
def costs_of(subject) -> Callable[[Schedule], list[profile.StageCost]]:
    """Of two rows, from programs that are compiled once a schedule."""
    return cache(lambda schedule: profile.stage_costs(subject, schedule, batch=2))


@pytest.mark.parametrize("action", cases(["delete", "reroute"], {"delete"}))
def test_formula_and_compiler_agree(subject, costs_of, action):
    schedule = subject.plan("pdrop", budget=0.6, action=action)
    costs = costs_of(schedule)
    assert [(cost.lo, cost.hi) for cost in costs] == [(0, 1), (1, 2), (2, 3)]
    for cost in costs:
        assert cost.xla == pytest.approx(cost.expected, rel=0.03)
    theory = subject.account(schedule)
    assert [cost.reused > 0 for cost in costs] == [False, True, True]
    assert sum(cost.formula for cost in costs) == pytest.approx(4e-12 * theory.prompt.gqa)
    assert sum(cost.scoring for cost in costs) == pytest.approx(4e-12 * theory.prompt.scoring)


@pytest.mark.parametrize("method", ["none", "pdrop", "nuwa"])
def test_buffers_hold_what_the_plan_says(subject, costs_of, method):
    schedule = subject.plan(method, budget={"none": None, "pdrop": 0.6, "nuwa": 0.5}[method])
    costs = costs_of(schedule)
    per_layer = [(cost.kv_tokens, cost.kv_bytes) for cost in costs for _ in range(cost.lo, cost.hi)]
    visual = visual_per_layer(schedule, schedule.merged_count(64, (8, 8)))
    assert [tokens for tokens, _ in per_layer] == [2 * (32 + count) for count in visual]
    assert sum(nbytes for _, nbytes in per_layer) == 2 * subject.account(schedule).kv_bytes


def test_names_of_operations():
    hlo = """
    %fusion.1 = f32[3]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(prefill)/layers_0_2/mlp/dot_general" stack=2}
    ROOT %copy = f32[3]{0} copy(%fusion.1), metadata={op_name="jit(prefill)/scatter/vmap()/scatter"}
    %plain = f32[3]{0} add(%a, %a)
    """
    scopes = profile.operation_scopes(hlo)
    assert {name: profile.part_of(scope) for name, scope in scopes.items()} == {"fusion.1": "mlp", "copy": "scatter"}
    assert profile.part_of("jit(prefill)/scoring/attention/mul") == "scoring" and profile.part_of("") == "other"


def test_on_a_gpu_an_operation_counts_in_its_stream_alone():
    """As its profiler lays a trace out: launches on the host, kernels in streams, and what is derived from them."""

    def plane(name, *lines):
        return SimpleNamespace(name=name, lines=[SimpleNamespace(name=line) for line in lines])

    host = plane("/host:CPU", "python", "launches")
    gpu = plane("/device:GPU:0", "Stream #7(Compute)", "XLA Ops", "Stream #9(MemcpyD2D)")
    assert [line.name for line in profile.operation_lines([host, gpu])] == [
        "Stream #7(Compute)",
        "Stream #9(MemcpyD2D)",
    ]
    assert [line.name for line in profile.operation_lines([host])] == ["python", "launches"]


def test_every_part_of_a_reroute_is_named_in_its_program(subject):
    schedule = subject.plan("pdrop", budget=0.6)
    given = sample(subject, 1).batch(subject.model, schedule)
    text = profile.lower_prefill(subject, given)(given.plan).compile().as_text()
    found = {profile.part_of(scope) for scope in profile.operation_scopes(text).values()}
    assert found >= set(profile.PARTS)


def test_traced_time_is_of_named_parts():
    subject = opened(shapes_only=False)
    seconds = profile.part_seconds(subject, subject.plan("pdrop", budget=0.6), batch=1, repetitions=2)
    assert set(seconds) == {*profile.PARTS, profile.OTHER}
    assert seconds["mlp"] > 0 and seconds["attention"] > 0 and seconds["scoring"] > 0
    assert "| mlp |" in profile.part_table(seconds)
