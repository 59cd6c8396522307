"""Processes that share the questions of a run, one of which is killed."""

import re
import socket
import subprocess
import sys
import time

import pytest

from evals import refcoco
from evals.harness.parts import Parts
from evals.harness.processes import Processes
from evals.harness.runner import append, cut_off
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
@pytest.mark.parametrize("count", [2, 4])
def test_a_killed_process_stops_the_others_and_the_same_command_goes_on(count, tmp_path):
    """Put together, the lines are those of a single process, byte for byte; lost is what the killed one was at."""
    single, together = tmp_path / "single", tmp_path / "together"
    single.mkdir()
    slow_run.run(slow_run.MixedModel(), single)

    *others, killed = started(together, count)
    last = f"full.{count - 1}.jsonl"
    while not list(together.glob(f"parts-*/{last}")) and others[0].poll() is None:
        time.sleep(0.05)
    killed.kill()
    for other in others:
        _, said = other.communicate()
        assert other.returncode == 2, said
        assert re.search(rf"error: process \d of {count} ended before its questions were answered", said)
    killed.communicate()
    kept = lines(together)
    assert 0 < kept < slow_run.TOTAL and not (together / "full.jsonl").exists()

    ended = [process.communicate() for process in started(together, count)]
    again = sum(int(out.split()[-1]) for out, _ in ended)
    assert kept + again == slow_run.TOTAL, ended
    assert (together / "full.jsonl").read_bytes() == (single / "full.jsonl").read_bytes()
    assert not list(together.glob("parts-*"))


def test_a_file_is_read_on_from_where_it_was(tmp_path):
    """Of a line only when it is whole. One that a kill cut off goes before the next one is written."""
    parts = Parts(Processes(0, 2, tmp_path), 12, 3, ["full"], tmp_path / "parts")
    own = parts.file("full")
    assert parts.missing(range(3)) == [0, 1, 2]
    append(own, [{"doc_id": 1}])
    assert parts.missing(range(3)) == [0, 2]
    with own.open("ab") as file:
        file.write(b'{"doc_')
    assert parts.missing(range(3)) == [0, 2]
    cut_off(own)
    append(own, [{"doc_id": 0}])
    append(own.with_name("full.1.jsonl"), [{"doc_id": 2}])
    own.write_bytes(b" " * own.stat().st_size)  # which nobody reads again
    assert parts.missing(range(3)) == [0], "the line of question 0 was new, and is gone"
    append(own, [{"doc_id": 0}])
    assert parts.missing(range(3)) == []


def test_a_run_gets_no_answers_of_one_whose_name_begins_like_its_own(tmp_path):
    """A schedule's file may be called full.v2.json."""
    parts = Parts(Processes(0, 1, tmp_path), 1, 3, ["full", "full.v2"], tmp_path / "parts")
    append(parts.file("full.v2"), [{"doc_id": 0, "text": "routed"}])
    assert parts.missing(range(1)) == [0]
    append(parts.file("full"), [{"doc_id": 0, "text": "all"}])
    parts.merge()
    assert "all" in (tmp_path / "full.jsonl").read_text() and "routed" in (tmp_path / "full.v2.jsonl").read_text()


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
