"""Processes that share the questions of a run, one of which is killed."""

import socket
import subprocess
import sys
import time

import pytest

from evals import refcoco
from evals.harness.parts import Parts
from evals.harness.processes import Processes
from tests.evals import slow_run


def started(folder, count):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    told = ["--out", str(folder), "--coordinator", address, "--processes", str(count)]
    command = [sys.executable, "-m", "tests.evals.slow_together", *told]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, "--process", str(index)], **piped) for index in range(count)]


def lines(folder):
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("parts-*/*.jsonl"))


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_the_same_command_goes_on(tmp_path):
    """Put together, the lines are those of a single process, byte for byte; lost is what the killed one was at."""
    single, together = tmp_path / "single", tmp_path / "together"
    single.mkdir()
    slow_run.run(slow_run.MixedModel(), single)

    first, killed = started(together, 2)
    while not list(together.glob("parts-*/full.1.jsonl")) and first.poll() is None:
        time.sleep(0.05)
    killed.kill()
    _, said = first.communicate()
    assert first.returncode == 2, said
    assert said.splitlines()[-1].startswith("error: process 1 of 2 ended before its questions were answered")
    killed.communicate()
    kept = lines(together)
    assert 0 < kept < slow_run.TOTAL and not (together / "full.jsonl").exists()

    ended = [process.communicate() for process in started(together, 2)]
    again = sum(int(out.split()[-1]) for out, _ in ended)
    assert kept + again == slow_run.TOTAL, ended
    assert (together / "full.jsonl").read_bytes() == (single / "full.jsonl").read_bytes()
    assert not list(together.glob("parts-*"))


def test_shares_are_whole_windows_side_by_side(tmp_path):
    for count in (1, 2, 3, 8):
        shares = [
            list(Parts(Processes(0, count, tmp_path), 43, 3, ["full"], tmp_path / "parts").share(number))
            for number in range(count)
        ]
        assert [number for share in shares for number in share] == list(range(43))
        assert all(share[0] % 12 == 0 for share in shares if share)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--processes", "2"], "belong to --distributed"),
        (["--distributed"], "--distributed needs an --out of its own"),
        (["--distributed", "--out", "runs/x", "--fresh"], "and no --fresh"),
    ],
)
def test_what_is_no_place_among_processes(arguments, reason, capsys):
    assert refcoco.main(arguments) == 2
    assert reason in capsys.readouterr().err
