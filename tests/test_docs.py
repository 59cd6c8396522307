"""The pages hold together: commands parse, links and quoted section numbers lead somewhere, README stays short."""

from __future__ import annotations

import argparse
import ast
import io
import re
import runpy
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from reroute_jax.routing.switches import SWITCHES

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PACKAGES = ("reroute_jax", "convert", "evals", "benchmarks", "tests")

_BASH = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# "section 8.3", "sections 4.3 and 5.3", "(4.6)", "(4.1 to 4.3, 4.7, 5.3)", "(8.2; ...)" and "(..., 5.4)".
_NUMBER = r"(?:1\d|2[0-2]|[1-9])(?:\.\d{1,2})?"
_NUMBERS = rf"{_NUMBER}(?:(?:, | and | to ){_NUMBER})*"
_QUOTED = re.compile(
    rf"\b[Ss]ections? ({_NUMBERS})|\(({_NUMBERS})(?=[);]|, [a-z])|[, ]((?:1\d|2[0-2]|[1-9])\.\d{{1,2}})(?=\))",
    re.DOTALL,
)


class Parsed(Exception):
    """A command's arguments were understood; nothing ran."""


def commands() -> Iterator[pytest.ParameterSet]:
    for page in PAGES:
        for block in _BASH.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("python -m ") and not line.startswith("python -m pytest"):
                    yield pytest.param(line, id=f"{page.name}: {line[10:60]}")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("line", commands())
def test_a_command_is_understood_by_its_own_parser(line, monkeypatch):
    understood = argparse.ArgumentParser.parse_args

    def parse_only(parser, args=None, namespace=None):
        understood(parser, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    name, *arguments = shlex.split(line, comments=True)[2:]
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(Parsed):
        runpy.run_module(name, run_name="__main__")


def test_the_pages_hold_commands():
    assert len(list(commands())) > 20


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [number for number, line in enumerate(lines, 1) if len(line) > 140] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    targets = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in targets if not _exists(page, *link.partition("#")[::2])] == []


def _exists(page: Path, path: str, anchor: str) -> bool:
    target = page.parent / path if path else page
    if not target.exists():
        return False
    return not anchor or anchor in {_anchor(title) for title in _HEADING.findall(target.read_text(encoding="utf-8"))}


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def test_every_section_that_the_code_quotes_is_there():
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    there = {found[0] for title in _HEADING.findall(methods) if (found := re.match(r"\d+(?:\.\d+)?(?=[. ])", title))}
    quoted = {
        (number, f"{path.relative_to(ROOT)}:{line}")
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, text in _prose(path)
        for number in _sections(text)
    }
    quoted |= {(number, name) for name, switch in SWITCHES.items() for number in _sections(switch.about)}
    assert len({number for number, _ in quoted}) > 20
    assert sorted((number, where) for number, where in quoted if number not in there) == []


def _sections(text: str) -> Iterator[str]:
    # A section of a paper is quoted as "arXiv 2409.12191, section 2.1".
    for groups in _QUOTED.findall(re.sub(r"arXiv [\d.]+,\s+section [\d.]+", "", " ".join(text.split()))):
        yield from re.findall(_NUMBER, " ".join(groups))


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings, and comments with numbers, with the lines they stand on."""
    source = path.read_text(encoding="utf-8")
    if re.search(r"#.*\d", source):  # reading tokens takes long
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        yield from ((t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)) is not None:
            yield getattr(node, "lineno", 1), text


def test_the_table_of_switches_is_that_of_their_declarations():
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in SWITCHES if _switch_row(name) not in methods] == []


def _switch_row(name: str) -> str:
    switch = SWITCHES[name]
    values = ", ".join(f"`{choice}`" for choice in switch.choices) or {bool: "yes, no"}.get(switch.kind, "")
    users = ", ".join(switch.methods)
    only = "".join(f"; {what} only" for what in (switch.action, switch.family) if what)
    return f"| `{name}` | {switch.default} | {values} | {users}{only} | {switch.about} |"
