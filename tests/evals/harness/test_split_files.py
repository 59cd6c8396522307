from collections.abc import Sequence
from pathlib import Path

import pytest

from evals.harness.split_files import split_files
from reroute_jax.errors import RerouteError


def make(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    "names",
    [
        ["testA.parquet"],
        ["testA.jsonl"],
        ["testA-00000-of-00001.parquet"],
        ["data/testA-00000-of-00002.parquet", "data/testA-00001-of-00002.parquet"],
        ["testA-00000-of-00002-0123456789abcdef.parquet", "testA-00001-of-00002-fedcba9876543210.parquet"],
        ["testA-0.parquet"],
        ["testA-1.parquet", "testA-2.parquet"],
        ["testA-cats.parquet", "testA-dogs.parquet"],
    ],
)
def test_whole_splits(tmp_path: Path, names: list[str]) -> None:
    make(tmp_path, [*names, "val-00000-of-00001.parquet", "testA.txt", "testB/readme.txt"])
    assert split_files(tmp_path, "testA") == [tmp_path / name for name in names]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["testA-00000-of-00003.parquet", "testA-00002-of-00003.parquet"],
            "lacks testA-00001-of-00003.parquet: ",
        ),
        (["testA-00001-of-00002.parquet"], "lacks testA-00000-of-00002.parquet"),
        (["data/testA-00000-of-00003.parquet"], "lacks testA-00001-of-00003.parquet, testA-00002-of-00003.parquet"),
        (["testA-00000-of-00090.parquet"], "testA-00008-of-00090.parquet and 81 more: it has 1 of 90 shards"),
        (["testA-00000-of-00002.jsonl"], "lacks testA-00001-of-00002.jsonl"),
        (["testA-0.parquet", "testA-2.parquet"], "lacks testA-1.parquet"),
        (["testA-00000-of-00003.parquet", "testA-00000-of-00002.parquet"], "mixes sets of 2 and 3 shards"),
        (
            ["testA-00000-of-00001.parquet", "testA-00000-of-00002.parquet", "testA-00001-of-00002.parquet"],
            r"mixes sets of 1 and 2 shards \(testA-00000-of-00001.parquet, testA-00000-of-00002.parquet, ",
        ),
        (["testA-00000-of-00001.parquet", "testA-0-of-1.parquet"], r"has shard 0 twice \(testA-0-of-1.parquet, "),
        (["testA-00000-of-00001-aa.parquet", "testA-00000-of-00001-bb.parquet"], "has shard 0 twice"),
        (["testA-00000-of-00001.parquet", "testA-00001-of-00001.parquet"], "shards beyond its 1"),
        (["testA.parquet", "testA.jsonl"], r"more than one form \(.*testA.jsonl, .*testA.parquet\)"),
        (["testA.json", "testA.jsonl"], "more than one form"),
        (["testA.parquet", "testA-00000-of-00001.parquet"], "more than one form"),
        (["testA.parquet", "data/testA-00000-of-00001.parquet"], "more than one form"),
        (["testA-0.parquet", "testA.parquet"], "more than one form"),
        (["testA.parquet", "testA/0.parquet"], r"more than one form \(.*testA, .*testA.parquet\)"),
        (["testA-00000-of-00001.parquet", "data/testA/x.jsonl"], "more than one form"),
    ],
)
def test_what_is_not_all_there_or_there_twice_is_refused(tmp_path: Path, names: list[str], expected: str) -> None:
    make(tmp_path, [*names, "val.parquet"])
    with pytest.raises(RerouteError, match=expected) as caught:
        split_files(tmp_path, "testA")
    assert str(tmp_path) in str(caught.value)
    assert split_files(tmp_path, "val") == [tmp_path / "val.parquet"]
