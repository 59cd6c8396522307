"""What the packages import when they are imported stands in pyproject.toml: `pip install` brings it."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.imports import import_statements

ROOT = Path(__file__).parents[1]
PACKAGES = ("reroute_jax", "convert", "evals")
# Only these need what an extra brings.
EXTRAS = {"reroute_jax/serving": "serve", "convert/crosscheck": "torch", "evals/speed/bench_torch.py": "torch"}
# lmms-eval itself imports it.
PLUGIN = "evals/lmms_plugin"


def at_import(text: str) -> Iterator[str]:
    """Top-level packages that are imported with the module, and not by a function of it or for types."""
    for node in import_statements(ast.parse(text), inside_functions=False):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        yield from (name.split(".")[0] for name in names)


def named(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def undeclared(files: dict[str, str], project: dict) -> set[tuple[str, str]]:
    """Pairs of a file and a package. files: their texts, by their path from the root."""
    brought = packages_distributions()
    found = set()
    for file, text in files.items():
        extras = [extra for place, extra in EXTRAS.items() if file.startswith(place)]
        declared = named(project["dependencies"]).union(*(named(project["optional-dependencies"][e]) for e in extras))
        for package in at_import(text):
            if package in sys.stdlib_module_names or package in PACKAGES:
                continue
            if not declared & {normal(name) for name in brought.get(package, [package])}:
                found.add((file, package))
    return found


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_is_imported_is_declared() -> None:
    files = {
        name: file.read_text()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if not (name := file.relative_to(ROOT).as_posix()).startswith(PLUGIN)
    }
    assert undeclared(files, project()) == set()


def test_what_is_not_is_found() -> None:
    files = {
        "evals/a.py": "import jax, torch\n",
        "convert/crosscheck/b.py": "import torch\nfrom starlette import requests\n",
        "reroute_jax/c.py": "def late():\n    import torch\n",
    }
    assert undeclared(files, project()) == {("evals/a.py", "torch"), ("convert/crosscheck/b.py", "starlette")}
