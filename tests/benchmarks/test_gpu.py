"""The command that measures on a GPU: what it runs, where it stops, and where it goes on."""

import importlib
import json

import pytest

from benchmarks import gpu
from benchmarks.gpu import Step, run_logged, run_steps, steps
from reroute_jax.errors import RerouteError


def test_without_a_gpu_it_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "backend", lambda: "cpu")
    assert gpu.main(["--peak-tflops", "989", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: JAX finds no GPU, its backend is cpu") and "--rehearsal" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("scale", [gpu.FULL, gpu.REHEARSAL])
def test_every_step_is_a_command_that_its_module_takes(scale, tmp_path):
    made = steps(scale, 989.0, tmp_path)
    modules = [step.command[0] for step in made]
    assert modules == ["evals.bench"] * 2 + ["benchmarks.attention"] + ["evals.profile"] * 2
    assert len({step.name for step in made}) == len({step.out for step in made}) == 5
    for step in made:
        flag, module, *arguments = step.arguments
        args = importlib.import_module(module)._parser().parse_args(arguments)
        assert flag == "-m" and args.out == step.out and args.dtype == scale.dtype
        if module == "evals.bench":
            assert (args.peer, args.peak_tflops) == ("torch", 989) and "XLA_CLIENT_MEM_FRACTION" in step.environment
            assert args.methods == ["fastv", "pdrop", "nuwa"] and args.actions == ["delete", "reroute"]
        if module == "evals.profile":
            assert step.environment["XLA_FLAGS"] == "--xla_gpu_enable_command_buffer="
        assert step.environment.get("JAX_PLATFORMS") == ("cpu" if scale is gpu.REHEARSAL else None)


def test_the_full_size_is_that_of_the_issue(tmp_path):
    llava, qwen, *_ = steps(gpu.FULL, 989.0, tmp_path)
    assert llava.command[:5] == ("evals.bench", "--random", "llava-1.5-7b", "--dtype", "bfloat16")
    assert qwen.command[2] == "qwen2.5-vl-7b"
    assert llava.command[5:9] == ("--batch-sizes", "1", "8", "32") and "--budgets" not in llava.command


def test_a_failing_step_stops_the_run_which_then_goes_on_with_it(tmp_path, capsys):
    todo = [Step(name, ("module", name), tmp_path / name) for name in "abc"]
    ran, broken = [], {"b"}

    def run(step, log):
        ran.append(step.name)
        return 3 if step.name in broken else 0

    with pytest.raises(RerouteError, match=rf"step b ended with status 3: see {tmp_path / 'b.log'}"):
        run_steps(todo, tmp_path, run)
    assert ran == ["a", "b"]
    assert capsys.readouterr().out.splitlines()[0] == f"[1/3] a: python -m module a --out {tmp_path / 'a'}"
    broken.clear()
    run_steps(todo, tmp_path, run)
    assert ran == ["a", "b", "b", "c"]
    assert capsys.readouterr().out.startswith("[1/3] a: finished before\n[2/3] b: python -m module b")
    run_steps(todo, tmp_path, run)
    assert len(ran) == 4
    with pytest.raises(RerouteError, match="is of another command, module a, expected module z: give another --out"):
        run_steps([Step("a", ("module", "z"), tmp_path / "a")], tmp_path, run)
    assert json.loads((tmp_path / "a.finished").read_text())["command"] == ["module", "a"]


def test_a_step_is_a_process_with_its_own_log_and_environment(tmp_path):
    (tmp_path / "one_step.py").write_text(
        "import os, sys\nprint(sys.argv[1:], os.environ['MARK'])\nsys.exit('broken' if 'fail' in sys.argv else 0)\n"
    )
    environment = {"MARK": "set", "PYTHONPATH": str(tmp_path)}
    log = tmp_path / "log"
    assert run_logged(Step("good", ("one_step", "x"), tmp_path / "o", environment), log) == 0
    assert log.read_text() == f"['x', '--out', '{tmp_path / 'o'}'] set\n"
    assert run_logged(Step("bad", ("one_step", "fail"), tmp_path / "o", environment), log) == 1
    assert "broken" in log.read_text()
