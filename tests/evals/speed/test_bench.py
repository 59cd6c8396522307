"""The arithmetic of the speed report, and a whole run of it on tiny models."""

import json
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest

from evals import bench
from evals.speed import bench_torch
from evals.speed.bench_report import TimingRecord, figure, rows_of, table
from evals.speed.checkpoint_shapes import SHAPES
from evals.speed.programs import compile_programs, compile_tower
from evals.speed.roofline import Machine, NumberSizes, decode_bound, layer_weights, prefill_bound
from evals.speed.subjects import Subject, random_model, sample
from reroute_jax.config import DecoderConfig
from reroute_jax.errors import RerouteError
from reroute_jax.nn.cache import ROOM
from reroute_jax.routing.plan import Schedule
from tests.marks import cases

CONFIG = DecoderConfig(
    vocab_size=100,
    hidden_size=8,
    mlp_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    rope_sections=(),
    tied_head=False,
)


@pytest.fixture(autouse=True)
def unchecked_annotations():
    """Lowering ahead of time puts shapes where the annotations of `Prompt` want arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def record(variant, prefill, batch=1, action=None, peer=False, macs=1000, scoring=0, **more):
    return TimingRecord(
        variant=variant,
        method=variant.split()[0],
        action=action,
        budget=None,
        batch=batch,
        peer=peer,
        seconds=[(0.01, one, 0.3) for one in prefill],
        new_tokens=4,
        average=1.0,
        macs=macs,
        scoring_macs=scoring,
        merging_macs=more.pop("merging", 0),
        bound_seconds=more.pop("bound", 0.1),
        decode_bound_seconds=0.05,
        kv_bytes=more.pop("kv", 4000),
        cache_bytes=None if peer else 5000,
        compile_seconds=None if peer else 1.5,
        memory_bytes=None if peer else 10**6,
        **more,
    )


def test_ratios_are_of_medians_and_to_the_run_with_all_tokens():
    full = record("none", [1.0, 3.0, 2.0])
    delete = record("fastv delete 64", [0.5, 0.5, 9.0], action="delete", macs=200, scoring=50, bound=0.04, kv=1000)
    reroute = record("fastv reroute 64", [0.6, 0.6, 0.6], action="reroute", macs=200, scoring=50)
    torch = record("torch", [3.0], peer=True)
    reference = record("torch reference: fastv reroute 64", [1.5], peer=True)
    rows = {row["variant"]: row for row in rows_of([full, delete, reroute, torch, reference])}
    row = rows["fastv delete 64"]
    assert row["prefill_ms"] == pytest.approx(500) and row["prefill_best_ms"] == pytest.approx(500)
    assert row["prefill_p99_ms"] == pytest.approx(1e3 * (0.5 + 0.98 * 8.5))
    assert row["speedup"] == pytest.approx(4)
    assert (row["theory_without_scoring"], row["theory"]) == pytest.approx((5, 4))
    assert row["roofline"] == pytest.approx(2.5)
    assert row["realised_over_theory"] == pytest.approx(1) and row["realised_over_roofline"] == pytest.approx(1.6)
    assert row["best_over_theory"] == pytest.approx(0.5)
    assert row["kv_ratio"] == pytest.approx(0.25)
    assert row["decode_ms_per_token"] == pytest.approx(100)  # three steps follow the prefill's token
    assert row["tokens_per_s"] == pytest.approx(4 / 0.81) and row["images_per_s"] == pytest.approx(1 / 0.81)
    assert rows["fastv reroute 64"]["reroute_over_delete"] == pytest.approx(1.2)
    assert rows["fastv reroute 64"]["torch_over_ours"] == pytest.approx(2.5)
    assert rows["none"]["torch_over_ours"] == pytest.approx(1.5)
    assert "speedup" not in rows["torch"] and "reroute_over_delete" not in row


def test_ratios_stay_within_a_batch_size():
    rows = rows_of([record("none", [1.0]), record("none", [6.0], batch=8), record("fastv", [2.0], batch=8)])
    assert rows[2]["speedup"] == pytest.approx(3) and rows[2]["images_per_s"] == pytest.approx(8 / 2.31)


def test_table_leaves_out_what_nobody_has():
    rows = rows_of([record("none", [1.0]), record("torch", [2.0], peer=True)])
    first, _, full, torch = table(rows).splitlines()
    assert "rows unchanged" not in first and "reroute / delete" not in first
    assert full.startswith("| none | 1 | 1.0 | 1000 |") and "| 2.00 |" in full
    assert all(line.count("|") == first.count("|") for line in (full, torch))


def test_what_comes_before_the_decoder_stands_beside_the_ratios():
    full, merged = rows_of([record("none", [1.0]), record("nuwa delete 64", [0.5], macs=200, merging=1_230_000_000)])
    assert (full["merging_gmacs"], merged["merging_gmacs"]) == (None, 1.23) and merged["theory"] == 5
    assert "| merging GMACs |" in table([full, merged]) and "| 1.23 |" in table([full, merged])
    assert "merging" not in table([full])


def test_utilisation_by_hand():
    """8 rows of 1,000 multiply-accumulates are 16,000 FLOPs: in the median 0.5 s 32,000 a second, of 100,000."""
    records = [record("none", [0.4, 9.0, 0.5], batch=8, scoring=700), record("torch", [1.0], batch=8, peer=True)]
    full, torch = rows_of(records, peak_tflops=1e-7)
    assert (full["mfu"], torch["mfu"]) == pytest.approx((0.32, 0.16))
    assert "| MFU |" in table([full, torch]) and "| 0.32 |" in table([full, torch])
    assert "MFU" not in table(rows_of(records)) and "mfu" not in rows_of(records)[0]


def test_a_peer_without_the_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(bench_torch.torch.cuda, "is_available", lambda: False)
    bench_torch.check_device("cpu")
    with pytest.raises(RerouteError, match=r"JAX runs on a GPU and PyTorch .* sees none"):
        bench_torch.check_device("cuda")


def test_bounds_by_hand():
    machine = Machine(flops=100.0, bandwidth=10.0)
    assert machine.seconds(macs=1000, nbytes=10) == 20 and machine.seconds(macs=1000, nbytes=300) == 30
    # Two projections of 8 x 8, two of 8 x 4, three of 8 x 16.
    assert layer_weights(CONFIG) == 2 * 64 + 2 * 32 + 3 * 128
    delete = Schedule.from_decisions((1,), (2,), 2, "delete")
    fp32, bits = NumberSizes(4, 4, 4), NumberSizes(4, 1.5, 1.25)
    prompts = {"visual": 5, "text": 3, "batch": 1}
    slow_memory, slow_arithmetic = Machine(1e30, 1.0), Machine(2.0, 1e30)
    rows = 8 * 2 * (8 + 4) + 5 * 2 * (8 + 4)
    scoring = 8 * (8 + 4) + 8 * (8 + 4)
    found = prefill_bound(slow_memory, delete, CONFIG, **prompts, sizes=fp32)
    assert found == 4 * (2 * 576 + rows + scoring + 800)
    weights, hidden, cached = 2 * 576 + 8 * (8 + 4) + 800, (8 + 5) * 2 * 8 + 8 * (8 + 4), (8 + 5) * 2 * 4
    found = prefill_bound(slow_memory, delete, CONFIG, **prompts, sizes=bits)
    assert found == 1.5 * weights + 4 * hidden + 1.25 * cached
    macs = sum(t * 576 + 2 * t * t * 8 for t in (8, 5)) + (8 * 8 * 4 + 64 + 64) + 800
    assert prefill_bound(slow_arithmetic, delete, CONFIG, **prompts, sizes=bits) == macs
    # 160 cached numbers, each read by two query heads.
    for sizes, kv_bytes in ((fp32, 640), (bits, 200)):
        held = {"kv_bytes": kv_bytes, "batch": 3, "sizes": sizes}
        assert decode_bound(slow_memory, CONFIG, **held) == sizes.weight * (2 * 576 + 800) + kv_bytes
        assert decode_bound(slow_arithmetic, CONFIG, **held) == 3 * (2 * 576 + 800) + 320


def test_what_a_number_takes_in_8_bits():
    """Kernels have an fp32 scale for 8 to 48 numbers, a cache one for 8."""
    pytest.importorskip("qwix")
    model, _ = random_model(SHAPES["llava-tiny-gqa"], "float32", quantise="int8", kv_cache="int8")
    plain, _ = random_model(SHAPES["llava-tiny-gqa"], "float32")
    assert NumberSizes.of(plain) == NumberSizes(4, 4, 4)
    found = NumberSizes.of(model)
    assert 1 < found.weight < 1.5 and (found.activation, found.cached) == (4, (8 + 4) / 8)


def shallow(name):
    """The shape of two decoder layers."""
    return replace(SHAPES[name], decoder=replace(SHAPES[name].decoder, layers=2))


def tiny(name, shape=None, **more):
    model, hf_config = random_model(shape or SHAPES[name], "float32", **more)
    return Subject(name, model, hf_config, model.config.vision.grid if "llava" in name else (4, 4), 7)


def parse(*arguments):
    return bench._parser().parse_args(arguments)


def test_variants():
    subject = tiny("llava-tiny", shapes_only=True)
    args = parse("--methods", "fastv", "pdrop:every", "pool", "--budgets", "0.65", "7/10", "--first-decision", "2")
    names = [variant.name for variant in bench.plan_variants(subject, args)]
    assert names[:4] == ["none", "fastv delete 13/20", "fastv reroute 13/20", "fastv delete 7/10"]
    assert names[-2:] == ["pool 13/20", "pool 7/10"] and len(names) == 11
    made = bench.plan_variants(subject, args)
    assert [stage.lo for stage in made[5].schedule.decisions] == [2, 3] and not made[-1].schedule.decisions
    with pytest.raises(RerouteError, match="method is 'fast', expected one of: none"):
        bench.plan_variants(subject, parse("--methods", "fast"))


@pytest.mark.parametrize("name", cases(["llava-tiny-gqa", "qwen-tiny"], {"llava-tiny-gqa"}))
def test_peers_run_the_same_weights(name):
    """Tokens of transformers unrouted, and of the eager reference routed, are ours."""
    subject = tiny(name, shallow(name))
    given = sample(subject, 2)
    model = bench_torch.torch_model(subject, "cpu", threads=1)
    full, routed = subject.plan("none"), subject.plan("fastv", action="reroute", budget=0.6)
    tower = compile_tower(subject, full, given)
    ours = compile_programs(subject, full, given, tower, 6)
    seconds, tokens = bench_torch.unrouted(subject, model, given, 6)()
    assert len(seconds) == 3 and min(seconds) > 0
    np.testing.assert_array_equal(tokens, ours.run(ours.prepare(given))[1])
    ours = compile_programs(subject, routed, given, tower, 6)
    _, tokens = bench_torch.routed(subject, model, given.row(1), routed, 6)()
    np.testing.assert_array_equal(tokens, ours.run(ours.prepare(given))[1][1:])


def test_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_machine", lambda dtype: Machine(1e11, 1e10))
    monkeypatch.setitem(SHAPES, "llava-tiny", shallow("llava-tiny"))
    arguments = ["--random", "llava-tiny", "--text", "7", "--methods", "fastv", "--actions", "reroute"]
    arguments += [
        "--budgets",
        "0.6",
        "--batch-sizes",
        "1",
        "2",
        "--repetitions",
        "2",
        "--new-tokens",
        "3",
        "--out",
        str(tmp_path),
    ]
    assert bench.main(arguments) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["command"].startswith("python -m evals.bench --random llava-tiny")
    rows = {(row["variant"], row["batch"]): row for row in result["rows"]}
    assert len(rows) == 4 and rows["fastv reroute 3/5", 2]["rows_unchanged"] == "2 of 2"
    assert len(result["seconds"]["none, batch 2"]) == 2
    # Two layers, keys and values of 32 numbers: 16 + 7 prompt tokens in a bucket of 16 + 16, and 3 new ones.
    assert rows["none", 1]["kv_mb"] == 2 * 2 * 32 * 4 * 23 / 1e6
    assert rows["none", 1]["cache_mb"] == 2 * 2 * 32 * 4 * (32 + ROOM) / 1e6
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    figure(result["rows"], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.slow
def test_compiling_without_weights(capsys):
    arguments = ["--random", "qwen-tiny", "--text", "7", "--grid", "4", "4", "--methods", "nuwa", "--actions", "delete"]
    assert (
        bench.main([*arguments, "--budgets", "128", "--new-tokens", "3", "--compile-only", "--compile-threads", "2"])
        == 0
    )
    full, routed = capsys.readouterr().out.splitlines()[2:]
    assert full.startswith("| none | 1 | ") and routed.startswith("| nuwa delete 128 | 1 | ")
    assert bench.main(["--compile-only"]) == 2
    assert capsys.readouterr().err == "error: only a --random model can do without its weights, name one\n"
