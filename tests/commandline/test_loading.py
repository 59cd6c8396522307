"""--quantise and --kv-cache: every command that answers hands them to `load`, and tells them in what it makes."""

import importlib
import json

import pytest

import reroute_jax
from evals import refcoco, search, show, table
from reroute_jax.errors import RerouteError
from tests.evals.stub import StubModel

BITS = {"quantise": "int8", "kv_cache": "int8"}
GIVEN = ["--quantise", "int8", "--kv-cache", "int8"]
# What each needs to come as far as its model.
COMMANDS = {
    "evals.refcoco": [],
    "evals.vqav2": [],
    "evals.show": [],
    "evals.table": ["--methods", "pdrop"],
    "evals.levers": [],
    "evals.bench": [],
    "benchmarks.arrivals": [],
    "benchmarks.limits": [],
    "reroute_jax.serve": ["--port", "0"],
}


class Loading(Exception):
    """The model would be loaded now."""


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def told(monkeypatch):
    """What `load` is told beyond the model and its dtype."""
    options = {}

    def load(*arguments, **given):
        options.update(given)
        raise Loading

    monkeypatch.setattr(reroute_jax, "load", load)
    return options


@pytest.mark.parametrize("command", COMMANDS)
def test_they_reach_load(command, told):
    with pytest.raises(Loading):
        importlib.import_module(command).main([*COMMANDS[command], *GIVEN])
    assert {name: told.get(name) for name in BITS} == BITS


def test_a_search_takes_weights_alone(told, capsys):
    needed = ["--budget", "1/3", "--out", "found.json"]
    assert search.main([*needed, *GIVEN]) == 2
    assert "reads no KV cache: leave out --kv-cache" in capsys.readouterr().err
    with pytest.raises(Loading):
        search.main([*needed, *GIVEN[:2]])
    assert told["quantise"] == "int8"


def test_what_load_refuses_is_one_line(monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise RerouteError("x holds int8 weights, not int4: leave it out, or convert again")

    monkeypatch.setattr(reroute_jax, "load", refuse)
    assert refcoco.main(["--quantise", "int4"]) == 2
    assert capsys.readouterr().err == "error: x holds int8 weights, not int4: leave it out, or convert again\n"


@pytest.mark.parametrize(
    ("module", "given", "settings"),
    [
        (refcoco, ["--method", "none"], "settings.json"),
        (table, ["--methods", "uniform", "--budgets", "64"], "scenes-llava/refcoco/full/settings.json"),
    ],
    ids=["refcoco", "table"],
)
def test_a_run_is_told_by_them(module, given, settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(module, "load_model", lambda *arguments, **options: StubModel())
    command = [*given, "--limit", "4", "--out", str(tmp_path / "out")]
    assert module.main(command) == 0
    for name, bits in zip(BITS, (GIVEN[:2], GIVEN[2:]), strict=True):
        capsys.readouterr()
        assert module.main([*command, *bits]) == 2
        assert f"{name}: None there, 'int8' now" in capsys.readouterr().err
    assert module.main([*command, *GIVEN, "--fresh"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} int8" in printed for name in BITS)
    found = json.loads((tmp_path / "out" / settings).read_text())
    assert {name: found[name] for name in BITS} == BITS
    if module is refcoco:
        own = show._own_arguments("refcoco", found)
        assert (own.quantise, own.kv_cache) == ("int8", "int8")
