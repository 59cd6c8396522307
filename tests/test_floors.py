"""The four floors: imports run downward only, modules do not import each other in a circle, and a class's name is its
own."""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.imports import import_statements

ROOT = Path(__file__).parents[1]
FLOORS = ("reroute_jax", "convert", "evals", "benchmarks")
# The facade: `reroute_jax.load` imports `convert` when it is called.
UPWARD = {("reroute_jax", "convert.loading")}

# Each family's tower has these, as in transformers, and the PyTorch reading of a repair is called as what it reads.
SHARED = {"PatchEmbed", "VisionAttention", "VisionLayer", "Merger", "MeanBypass", "ProxyBypass"}


def modules() -> dict[str, Path]:
    files = (file for floor in FLOORS for file in sorted((ROOT / floor).rglob("*.py")))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(tree: ast.AST, known: set[str], inside_functions: bool) -> Iterator[str]:
    """Modules of the project that a file imports; `from package import module` names the module."""
    for node in import_statements(tree, inside_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
            continue
        assert node.level == 0, "relative imports are not read here"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            if inner in known or node.module in known:
                yield inner if inner in known else node.module


def upward(files: dict[str, Path]) -> list[tuple[str, str]]:
    """Pairs of a module and one of a higher floor that it imports, inside functions and for types too."""
    found = []
    for name, file in files.items():
        floor = FLOORS.index(name.split(".")[0])
        for other in imported(parsed(file), set(files), inside_functions=True):
            if FLOORS.index(other.split(".")[0]) > floor:
                found.append((name, other))
    return found


def circle(files: dict[str, Path]) -> list[str]:
    """Modules that import each other at import time, the first again at the end; empty where none do."""
    arrows = {name: list(imported(parsed(file), set(files), False)) for name, file in files.items()}
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in arrows[name]:
                if found := walk(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in files if (found := walk(name, []))), [])


def test_imports_run_downward() -> None:
    # The facade names the model's class for types, and `convert.loading` inside `load`.
    assert set(upward(modules())) <= UPWARD


def test_no_modules_import_each_other() -> None:
    assert circle(modules()) == []


def shared_names(files: dict[str, Path]) -> set[str]:
    """Of classes that stand in more than one module."""
    counts = Counter(
        node.name for file in files.values() for node in parsed(file).body if isinstance(node, ast.ClassDef)
    )
    return {name for name, count in counts.items() if count > 1}


def test_a_name_is_one_class() -> None:
    assert {name for name in shared_names(modules()) if not name.startswith("_")} == SHARED


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, Path]:
    texts = {
        "reroute_jax.a": "def late():\n    from evals import b\n",
        "convert.c": "from convert import d\n\n\nclass Same:\n    pass\n",
        "convert.d": "import convert.c\n",
        "evals.b": "from reroute_jax import a\n\n\nclass Same:\n    pass\n",
    }
    files = {name: tmp_path / f"{name}.py" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text)
    return files


def test_what_is_wrong_is_found(broken: dict[str, Path]) -> None:
    assert upward(broken) == [("reroute_jax.a", "evals.b")]
    assert circle(broken) == ["convert.c", "convert.d", "convert.c"]
    assert shared_names(broken) == {"Same"}
