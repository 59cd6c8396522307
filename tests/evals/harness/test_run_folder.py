import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evals.harness.run_folder import locked, run_folder
from reroute_jax.errors import RerouteError

HOLDER = """
import sys, time
from pathlib import Path
from evals.harness.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def open_once(folder: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
    with run_folder(folder, settings, fresh):
        pass


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {".lock"}


def test_a_folder_takes_the_same_settings_only(tmp_path: Path) -> None:
    settings = {"budget": 64, "runs": {"full": {"stages": [0, 1]}}}
    folder = tmp_path / "a" / "b"
    open_once(folder, settings)
    open_once(folder, {"runs": {"full": {"stages": (0, 1)}}, "budget": 64})
    with pytest.raises(RerouteError, match=r"other settings \(budget: 64 there, 128 now\): .*--out.*--fresh"):
        open_once(folder, settings | {"budget": 128})
    with pytest.raises(RerouteError, match=r"extra: None there, 1 now"):
        open_once(folder, settings | {"extra": 1})


def test_parts_of_a_setting_are_named_alone(tmp_path: Path) -> None:
    open_once(tmp_path, {"identity": {"jax": "0.10.1", "numpy": "2.4"}})
    with pytest.raises(RerouteError, match=r"settings \(identity\.jax: '0\.10\.1' there, '0\.10\.2' now\): give"):
        open_once(tmp_path, {"identity": {"jax": "0.10.2", "numpy": "2.4"}})


def test_fresh_moves_what_is_there_aside(tmp_path: Path) -> None:
    for number in (1, 2):
        with run_folder(tmp_path, {"budget": number}, fresh=True):
            assert not (tmp_path / "full.jsonl").exists()
            (tmp_path / "full.jsonl").write_text(f"answers {number}")
            (tmp_path / "notes.txt").write_text("somebody's own")
    with run_folder(tmp_path, {"budget": 3}, fresh=True):
        assert names(tmp_path) == {"settings.json", "notes.txt", "before-1", "before-2"}
    assert names(tmp_path / "before-2") == {"settings.json", "full.jsonl"}
    assert [(tmp_path / f"before-{n}" / "full.jsonl").read_text() for n in (1, 2)] == ["answers 1", "answers 2"]
    open_once(tmp_path, {"budget": 3})  # without --fresh it goes on


def test_fresh_in_a_new_folder_moves_nothing(tmp_path: Path) -> None:
    open_once(tmp_path / "new", {}, fresh=True)
    assert names(tmp_path / "new") == {"settings.json"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "is no object"),
        (b'{"model": "\xe9"}', "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "byte order mark of UTF-16"),
        (b'{"a": \0}', "NUL bytes"),
        (b"[" * 99_999, "is not JSON"),
    ],
)
def test_a_folder_that_is_not_a_run_folder_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "full.jsonl").write_text("{}\n")
    with pytest.raises(RerouteError, match=r"holds answers but no settings\.json"):
        open_once(tmp_path, {})
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(RerouteError, match=rf"settings\.json.* {expected}.*: give another --out, or --fresh") as caught:
        open_once(tmp_path, {})
    assert "\n" not in str(caught.value)
    open_once(tmp_path, {}, fresh=True)


def test_a_second_process_is_refused_at_once_and_a_killed_one_does_not_block(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RerouteError, match=r"another process works on .*: wait for it, or give another --out"):
        open_once(tmp_path, {})
    assert names(tmp_path) == set()  # nothing was touched
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    open_once(tmp_path, {})


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "o").touch()
    with pytest.raises(RerouteError, match="is a file: give a folder as --out"), locked(tmp_path / "o"):
        pass


def test_an_error_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass
