"""What a run's answers depend on shows in its settings, so that a resume with anything else is refused."""

import io
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals import gqa, pope, refcoco, table
from evals.harness import identity, vqa
from evals.harness.columns import open_table
from evals.harness.data import REFCOCO
from evals.harness.identity import checkpoint_identity, files_digest, fingerprint, images_digest, sources_digest
from tests.evals.harness.test_benchmark_runs import stand_in, write_lines
from tests.evals.harness.test_data import encoded, photo, row, write
from tests.evals.stub import StubModel
from tests.marks import cases


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StubModel:
    stub = StubModel()
    for module in (refcoco, vqa, table):
        monkeypatch.setattr(module, "load_model", lambda *arguments, **options: stub)
    monkeypatch.setattr(table, "draw", lambda sheets, files: None)
    monkeypatch.chdir(tmp_path)
    return stub


def test_fingerprint_sees_names_sizes_and_every_byte(tmp_path: Path) -> None:
    content = bytearray(300_000)

    def write(name: str = "a.safetensors") -> str:
        for old in tmp_path.iterdir():
            old.unlink()
        (tmp_path / name).write_bytes(content)
        return fingerprint(tmp_path)

    seen = [write(), write("b.safetensors")]
    assert write() == seen[0]
    for position in (0, 123_457, 299_999):
        content[position] = 1
        seen.append(write())
    content.append(0)
    seen.append(write())
    assert len(set(seen)) == 6
    assert fingerprint(tmp_path / "a.safetensors")


def test_large_files_are_sampled_everywhere_and_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_READ_WHOLE", 0)
    file, content = tmp_path / "x", bytearray(3_000_000)

    def digest() -> str:
        file.write_bytes(content)
        return files_digest({"x": file})

    seen = [digest()]
    for start in range(0, len(content), 300_000):  # a stretch of a tenth never falls between the blocks
        content[start : start + 300_000] = np.random.default_rng(start).bytes(300_000)
        seen.append(digest())
    assert len(set(seen)) == len(seen)
    monkeypatch.setattr(identity, "open", CountedReads, raising=False)
    CountedReads.read_bytes = 0
    assert files_digest({"x": file}) == seen[-1]
    assert CountedReads.read_bytes == 16 * 4096


class CountedReads(io.FileIO):
    """Counts the bytes that are read from all such files."""

    read_bytes = 0

    def read(self, size: int = -1) -> bytes:
        found = super().read(size)
        CountedReads.read_bytes += len(found)
        return found


def test_digest_does_not_hang_on_the_order_and_counts_absent_files(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("a", "b", "c\0")}
    files["a"].write_text("1")
    missing = files_digest(files)
    assert files_digest(dict(reversed(files.items()))) == missing
    files["b"].write_text("")
    assert files_digest(files) != missing


def test_sources_are_in_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        __name__, __path__ = "package", [str(tmp_path)]

    (tmp_path / "deep").mkdir()
    monkeypatch.setattr(identity, "SOURCES", (Package,))
    found = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "deep" / "module.py").write_text(text)
        found.append(sources_digest.__wrapped__())
    assert found[0] != found[1]
    monkeypatch.undo()
    assert {package.__name__ for package in identity.SOURCES} == {"reroute_jax", "convert", "evals"}


def test_hub_checkpoints_are_their_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    assert checkpoint_identity(Path("owner/name"), snapshot) == {"model_files": None, "model_revision": commit}
    (snapshot / "config.json").write_text("{}")
    local = checkpoint_identity(snapshot, snapshot)
    assert (local["model_files"], local["model_revision"]) == (fingerprint(snapshot), None)


def run(command: Any, *arguments: object, code: int = 0) -> None:
    assert command.main(list(map(str, arguments))) == code


def refused(capsys: pytest.CaptureFixture, command: Any, *arguments: object) -> str:
    capsys.readouterr()
    run(command, *arguments, code=2)
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("error: ")
    return said.err.splitlines()[-1]


@pytest.mark.parametrize("out", [[], ["--out", "o"]])
def test_pictures_replaced_behind_json_lines_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, out: list[str]
) -> None:
    """Same names, sizes and times."""
    rows = [{**one, "image": photo(seed=index)} for index, one in enumerate(stand_in("pope"))]
    command = (pope, "--data", write_lines(tmp_path / "d" / "x.jsonl", rows), "--method", "none", "--limit", 4, *out)
    run(*command)
    run(*command)
    for number, counts in ((5, False), (2, True)):  # the sixth is beyond the limit
        picture = tmp_path / "d" / "images" / f"{number}.png"
        content = bytearray(picture.read_bytes())
        content[len(content) // 2] ^= 1
        picture.write_bytes(content)
        if counts:
            said = refused(capsys, *command)
            assert "identity.data_images: " in said
            assert "--fresh to start anew" in said
        else:
            run(*command)


def test_pictures_beside_parquet_count_and_are_not_read_from_it(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(encoded(photo(), "PNG"))
    beside = row("q0", None, ["a"]) | {"image": {"bytes": None, "path": "a.png"}}
    inside = row("q1", encoded(photo(), "PNG"), ["a"])
    table = open_table(str(write(tmp_path / "x.parquet", [beside, inside])), None, REFCOCO, ("answer",))
    assert list(table.images()) == [picture, None]
    before = images_digest(table.images())
    picture.write_bytes(encoded(photo(seed=1), "PNG"))
    assert images_digest(table.images()) != before


def test_pictures_of_a_table_of_their_own_count_by_question(tmp_path: Path) -> None:
    def lines(folder: str, rows: list[dict[str, str]]) -> None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "testdev.jsonl").write_text("\n".join(map(json.dumps, rows)))

    lines("testdev_balanced_instructions", [{"id": "0", "imageId": "b"}, {"id": "1", "imageId": "a"}])
    lines("testdev_balanced_images", [{"id": name, "image": f"{name}.png"} for name in "abc"])
    table = open_table(str(tmp_path), None, gqa.HUB, ("id", "imageId"))
    apart = tmp_path / "testdev_balanced_images"
    assert list(table.images()) == [apart / "b.png", apart / "a.png"]
    assert [file.parent.name for file in table.files] == ["testdev_balanced_instructions", "testdev_balanced_images"]


OTHERS = {
    "jax": "0.0.1",
    "sources": "0",
    "python": "2.7",
    "device": "NVIDIA H100",
    "model_revision": "abc",
    "data_revision": "abc",
}


@pytest.mark.parametrize("what", cases(OTHERS, {"python", "device", "model_revision", "data_revision"}))
def test_anything_else_that_changed_is_refused_by_name_until_fresh(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture, model: StubModel
) -> None:
    small = ("--limit", 4, "--out", tmp_path / "o")
    commands = {
        "settings.json": (refcoco, "--method", "none", *small),
        "scenes-llava/refcoco/full/settings.json": (table, "--methods", "uniform", "--budgets", "64", *small),
    }
    for name, command in commands.items():
        run(*command)
        file = tmp_path / "o" / name
        settings = json.loads(file.read_text())
        settings["identity"][what] = OTHERS[what]
        file.write_text(json.dumps(settings))
        assert f"identity.{what}: '{OTHERS[what]}' there" in refused(capsys, *command)
        asked = len(model.prompts)
        run(*command, "--fresh")
        assert len(model.prompts) > asked
        assert json.loads((file.parent / "before-1" / "settings.json").read_text()) == settings


def test_every_version_that_matters_is_in_the_settings(tmp_path: Path) -> None:
    run(refcoco, "--limit", 1, "--method", "none", "--out", tmp_path)
    found = json.loads((tmp_path / "settings.json").read_text())["identity"]
    assert {package: found[package] for package in identity.PACKAGES} == identity.versions()
    assert found["numpy"] == metadata.version("numpy")
    assert (found["device"], found["backend"]) == ("cpu", "cpu")


def test_what_only_some_runs_depend_on_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_x=1")
    monkeypatch.setattr(identity.metadata, "version", lambda package: f"{package} 9")
    found = identity.software()
    assert (found["qwix"], found["x64"], found["libtpu_init_args"]) == ("qwix 9", False, "--xla_tpu_x=1")
    monkeypatch.undo()
    assert identity._version_if_any("no-such-package") is None
