"""Whatever a user's machine does, a command ends with one line and a code, and `--debug` shows where."""

import errno
import io
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax
import pytest

from reroute_jax.commandline.failures import one_line
from reroute_jax.commandline.parsing import BAD_INPUT, Parser, exit_code
from reroute_jax.errors import RerouteError
from tests.marks import cases

ROOT = Path(__file__).parents[2]


def test_a_report_keeps_its_lines():
    report = "2 keys do not fit:\n  unknown: a\n  missing: b"
    assert one_line(RerouteError(report)) == report


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RerouteError("no such file"), "no such file"),
        (PermissionError(errno.EACCES, "Permission denied", "o"), "[Errno 13] Permission denied: 'o'"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "o"), "[Errno 21] Is a directory: 'o'"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device: free some space, what"),
        (OSError(), "OSError"),
        (MemoryError(), "out of memory: give a smaller --batch-size"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nof 9"),
            "out of memory: give a smaller --batch-",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA out of memory"), "out of memory: give a smaller --batch-size"),
        (jax.errors.JaxRuntimeError("INTERNAL: odd\nstack"), "XLA failed: INTERNAL: odd"),
        (
            ModuleNotFoundError("x", name="matplotlib.figure"),
            "matplotlib is not installed: pip install '",
        ),
        (ModuleNotFoundError("x", name="datasets"), "pip install 'reroute_jax[hub]'"),
        (ModuleNotFoundError("x", name="torch"), "pip install 'reroute_jax[torch]'"),
        (ModuleNotFoundError("x", name="flax"), "flax is not installed: pip install flax"),
        (BrokenProcessPool("x"), "a worker process was killed"),
        (UnicodeEncodeError("ascii", "\xfc", 0, 1, "not in range"), "set PYTHONUTF8=1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_foreseen_errors_are_one_line(error: Exception, expected: str, capsys: pytest.CaptureFixture) -> None:
    def fails() -> None:
        raise error

    assert exit_code(fails) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert expected in said
    assert exit_code(fails, debug=True) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "in fails" in said
    assert said.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "error", [KeyError("x"), AssertionError(), RuntimeError("x"), ModuleNotFoundError("x", name="reroute_jax.absent")]
)
def test_defects_keep_their_traceback(error: Exception) -> None:
    assert one_line(error) is None

    def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        exit_code(fails)


def test_every_parser_has_debug() -> None:
    assert Parser("x", "y").parse_args(["--debug"]).debug
    assert not Parser("x", "y").parse_args([]).debug


def ascii_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")


def test_ascii_terminals_get_what_they_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = ascii_stream(), ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def speaks() -> None:
        print("N\xfcwa \u2192 \ud800")
        raise RerouteError("\xfc")

    assert exit_code(speaks) == BAD_INPUT
    err.flush()
    assert out.buffer.getvalue() == b"N\\xfcwa \\u2192 \\ud800\n"
    assert err.buffer.getvalue() == b"error: \\xfc\n"


def test_help_on_ascii_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    out = ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit):
        Parser("x", "N\xfcwa").parse_args(["--help"])
    out.flush()
    assert b"N\\xfcwa" in out.buffer.getvalue()


def script(body: str) -> list[str]:
    head = "import sys, jax; from reroute_jax.commandline.parsing import exit_code\n"
    return [sys.executable, "-c", head + body]


def test_a_reader_that_leaves_is_no_error() -> None:
    body = "sys.exit(exit_code(lambda: [print('x' * 99) for _ in range(9999)] and None))"
    process = subprocess.Popen(script(body), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            script("sys.exit(exit_code(lambda: print('x')))"), cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == BAD_INPUT
    assert done.stderr.startswith(f"error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: free some space")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("platform", cases(["cuda", "nonsense"], {"nonsense"}))
def test_a_device_that_is_not_there(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    done = subprocess.run(
        script("sys.exit(exit_code(lambda: jax.devices() and None))"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == BAD_INPUT
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: JAX finds no device with JAX_PLATFORMS={platform!r} (")
    assert "Traceback" not in done.stderr
