"""`--help` of every command: its groups, its defaults, and examples that its own parser takes."""

import argparse
import importlib
import shlex

import pytest

from reroute_jax.commandline.parsing import DATA, DEFECT, OUTPUT, ROUTE, RUN, SERVE, SWITCH, Parser
from reroute_jax.commandline.routes import flag
from reroute_jax.routing.switches import SWITCHES

ROUTED = (RUN, DATA, ROUTE, SWITCH, DEFECT)
GROUNDING = ("refcoco", "refcocoplus", "refcocog")
ANSWERING = ("pope", "gqa", "mme", "mmbench", "textvqa", "scienceqa", "vqav2", "scenes_vqa")
GROUPS = {
    **{f"evals.{task}": (*ROUTED, OUTPUT) for task in (*GROUNDING, *ANSWERING)},
    "evals.show": (*ROUTED, OUTPUT),
    "evals.table": (RUN, DATA, ROUTE, DEFECT, OUTPUT),
    "evals.levers": (RUN, DATA, ROUTE, DEFECT, OUTPUT),
    "evals.search": (RUN, DATA, ROUTE, DEFECT, OUTPUT),
    "evals.bench": (RUN, DATA, ROUTE, OUTPUT),
    "evals.profile": (*ROUTED, OUTPUT),
    "reroute_jax.serve": (RUN, ROUTE, SWITCH, DEFECT, SERVE),
    "evals.scenes.train": (RUN, OUTPUT),
    "convert": (RUN, OUTPUT),
    "convert.crosscheck": ROUTED,
    "benchmarks.aot": (RUN, DATA, ROUTE, OUTPUT),
    "benchmarks.arrivals": (RUN, DATA, ROUTE),
    "benchmarks.attention": (RUN, DATA, OUTPUT),
    "benchmarks.beyond": (RUN, DATA, ROUTE, OUTPUT),
    "benchmarks.coverage_profile": (RUN, DATA, ROUTE, OUTPUT),
    "benchmarks.found_schedules": (RUN, DATA, ROUTE, OUTPUT),
    "benchmarks.gpu": (RUN, OUTPUT),
    "benchmarks.fewer_bits": (RUN, DATA, ROUTE, OUTPUT),
    "benchmarks.head_selection": (RUN, DATA, ROUTE, OUTPUT),
    "benchmarks.load": (RUN, DATA, ROUTE, OUTPUT),
    "benchmarks.mesh": (RUN, ROUTE, OUTPUT),
    "benchmarks.quantised": (RUN, DATA, ROUTE),
    "benchmarks.random_checkpoint": (RUN, OUTPUT),
    "benchmarks.server_memory": (RUN, DATA, ROUTE, OUTPUT),
    "benchmarks.vision_windows": (RUN, DATA),
}
PACKAGES = {"convert": "convert.__main__", "convert.crosscheck": "convert.crosscheck.command"}


class ArgumentsRead(Exception):
    """Parsing went well, and the command is not to run."""


def main_of(command):
    return importlib.import_module(PACKAGES.get(command, command)).main


def help_of(command, capsys):
    with pytest.raises(SystemExit) as left:
        main_of(command)(["--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def parse_only(monkeypatch):
    """Every command stops behind its parser, which is kept."""
    parsers = []

    def parse(self, argv=None):
        parsers.append(self)
        super(Parser, self).parse_args(argv)
        raise ArgumentsRead

    monkeypatch.setattr(Parser, "parse_args", parse)
    return parsers


@pytest.mark.parametrize("command", GROUPS)
def test_help_has_its_groups(command, capsys):
    lines = help_of(command, capsys).splitlines()
    titles = [line[:-1] for line in lines if line and line[0] != " " and line.endswith(":")]
    assert titles == ["options", *GROUPS[command], "examples"]


@pytest.mark.parametrize("command", GROUPS)
def test_its_three_examples_parse(command, capsys, parse_only, monkeypatch):
    with monkeypatch.context() as unpatched:
        unpatched.setattr(Parser, "parse_args", argparse.ArgumentParser.parse_args)
        text = help_of(command, capsys)
    examples = [line.strip() for line in text.partition("\nexamples:\n")[2].splitlines()]
    assert len(set(examples)) == 3
    for example in examples:
        python, flag, module, *arguments = shlex.split(example)
        assert (python, flag, module) == ("python", "-m", command)
        with pytest.raises(ArgumentsRead):
            main_of(command)(arguments)


@pytest.mark.parametrize("command", GROUPS)
def test_every_default_is_shown(command, parse_only):
    needed = {"convert": ["a", "b"], "convert.crosscheck": ["a"], "benchmarks.random_checkpoint": ["llava-tiny", "b"]}
    needed["benchmarks.gpu"] = ["--peak-tflops", "1", "--out", "a"]
    needed |= {"evals.search": ["--budget", "64", "--out", "a"], "benchmarks.found_schedules": ["--found", "a"]}
    with pytest.raises(ArgumentsRead):
        main_of(command)(needed.get(command, []))
    for action in parse_only[0]._actions:
        silent = action.default in (None, False, argparse.SUPPRESS)
        assert action.help and (silent or "(default: " in action.help), action.option_strings


def test_a_switch_is_an_argument_with_its_declaration(capsys):
    text = " ".join(help_of("evals.refcoco", capsys).split())
    defects = text.partition(DEFECT + ":")[2].partition("output:")[0]
    for name, switch in SWITCHES.items():
        assert flag(name) in text
        assert (flag(name) in defects) == switch.defect, name
        if name != "seed":  # the commands' own, which draws more than one method's scores
            assert switch.about in text, name
