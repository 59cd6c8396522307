"""What the benchmark commands share: arguments, one-line errors, exit codes, and the way from runs to a report."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import reroute_jax
from evals.harness.columns import OWN_HUB, Hub
from evals.harness.data import IMAGE_BACKEND, SCENES
from evals.harness.padding import IMAGE_MODES, Colour, mean_colour
from evals.harness.report import heading, render, summarise
from evals.harness.routes import add_route_arguments, plan_routes
from evals.harness.runner import SUMMARY_FILE, Answerer, Task, answer, fingerprint, open_folder, write_json
from reroute_jax.engine.compilation import keep_programs
from reroute_jax.errors import RerouteError
from reroute_jax.nn.mrope import COMPATS
from reroute_jax.types import FLOATS

CHECKPOINTS = Path(__file__).parents[1] / "scenes" / "checkpoints"
EMBEDDED = ("scenes-llava", "scenes-llava-bypass", "scenes-qwen")
CAVEATS = {
    "scenes-llava-bypass": "the last third of this checkpoint's training bypassed random visual tokens, which is close "
    "to rerouting: its numbers are no evidence for a training-free claim",
}
PACKAGES = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy", "pillow")

# Of an answer where the task sets none: what the reference's model classes take.
MAX_NEW_TOKENS = {"llava": 1024, "qwen2_5_vl": 128}

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """argparse with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message} ({self.prog} --help)\n")


def exit_code(command: Callable[[], None]) -> int:
    """Run `command`: 0, or 2 after one line on bad input, or 130 after one line on Ctrl-C."""
    try:
        command()
    except (RerouteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on after the last whole batch", file=sys.stderr)
        return INTERRUPTED
    return 0


def benchmark_parser(name: str, description: str) -> Parser:
    """Parser with the arguments that every benchmark has."""
    parser = Parser(prog=f"python -m evals.{name}", description=description)
    add_route_arguments(parser)
    parser.add_argument(
        "--model",
        default=EMBEDDED[0],
        help=f"hub id, folder in HF format, converted folder, or one of {', '.join(EMBEDDED)} (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(FLOATS),
        help="default: float32 for the embedded models, the checkpoint's own otherwise",
    )
    parser.add_argument(
        "--mrope-compat", choices=COMPATS, help="rotary positions as transformers of this version gave Qwen's images"
    )
    parser.add_argument(
        "--vicuna-system",
        action="store_true",
        help="open LLaVA's prompts with the system sentence of its own evaluation",
    )
    parser.add_argument(
        "--llava-image-mode",
        choices=IMAGE_MODES,
        default=IMAGE_MODES[0],
        help="crop as the reference, or pad to a square as LLaVA's own evaluation (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: %(default)s)")
    parser.add_argument("--limit", type=positive, help="only the first so many questions")
    parser.add_argument("--max-new-tokens", type=positive, help="length of an answer (default: the task's)")
    parser.add_argument(
        "--seed", type=whole, default=0, help="of the method `random` and of the intervals (default: 0)"
    )
    parser.add_argument(
        "--compilation-cache", type=Path, metavar="DIR", help="keep compiled programs there for the next run"
    )
    parser.add_argument("--out", type=Path, help="run folder (default: runs/ and a name made from the settings)")
    return parser


def add_data_arguments(parser: argparse.ArgumentParser, hub: Hub) -> None:
    """--data, --split and --skip-bad, for a benchmark that has real data."""
    config = f" ({hub.config})" if hub.config else ""
    parser.add_argument(
        "--data",
        default=SCENES,
        help=f"'{SCENES}': a rendered stand-in; '{OWN_HUB}': {hub.name}{config}; another hub id; or a local folder, "
        "parquet file or JSON lines with the same columns (default: %(default)s)",
    )
    parser.add_argument("--split", help=f"default: test of the scenes, {hub.split} of other data")
    parser.add_argument(
        "--skip-bad", action="store_true", help="count and report images that cannot be decoded instead of stopping"
    )


def positive(text: str) -> int:
    """argparse type: a whole number from 1 on."""
    return whole(text, 1)


def whole(text: str, least: int = 0) -> int:
    """argparse type: a whole number from `least` on."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)


def positive_number(text: str) -> float:
    """argparse type: a finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def load_model(name: str, dtype: str | None, mrope_compat: str | None = None, vicuna_system: bool = False) -> Answerer:
    """The model of the arguments --model, --dtype, --mrope-compat and --vicuna-system."""
    if name not in EMBEDDED:
        return reroute_jax.load(name, dtype=dtype, mrope_compat=mrope_compat, vicuna_system=vicuna_system)
    path = CHECKPOINTS / name
    if not (path / "config.json").is_file():
        raise RerouteError(f"the embedded model {name} is not at {path}: make it with `python -m evals.scenes.train`")
    return reroute_jax.load(path, dtype or "float32", mrope_compat, vicuna_system)


def run_benchmark(
    args: argparse.Namespace, model: Answerer, task: Task, metrics: Sequence[str], settings: Mapping[str, Any]
) -> None:
    """Make or go on with the runs that `args` ask for, write their files, and print the report.

    settings: what else the answers depend on. Raises RerouteError for a folder made with other settings.
    """
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    routes = plan_routes(args, model)
    everything = {**run_settings(args, model, task, settings), "runs": routes.settings}
    folder = args.out or _default_folder(everything)
    open_folder(folder, everything)
    records = {run.name: answer(model, task, run, folder, args.batch_size) for run in routes.runs}
    summary = summarise(records, routes, metrics, model, args.seed, task)
    write_summary(folder, summary, everything)
    print(f"{heading(summary, everything, _versions())}\n\n{render(summary, task.difference_scale)}\n")
    if args.model in CAVEATS:
        print(f"Note: {CAVEATS[args.model]}.\n")
    print(f"Answers and {SUMMARY_FILE}: {folder}")


def run_settings(args: argparse.Namespace, model: Answerer, task: Task, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that the answers depend on, the schedule aside. settings: those of the task alone."""
    return {
        "task": task.name,
        "questions": task.total,
        **settings,
        **_model_settings(args.model, model),
        "max_new_tokens": task.max_new_tokens,
        "batch_size": args.batch_size,
        "seed": args.seed,
        **_protocol(model, args.llava_image_mode),
    }


def write_summary(folder: Path, summary: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """SUMMARY_FILE: the summary with what it was made from and what has to be known of it."""
    model = settings["model"]
    caveat = {"caveat": CAVEATS[model]} if model in CAVEATS else {}
    write_json(folder / SUMMARY_FILE, {**summary, **caveat, "settings": settings, "versions": _versions()})


def _model_settings(name: str, model: Answerer) -> dict[str, Any]:
    """What identifies the model: a local folder counts with its content, not by its name alone."""
    path = CHECKPOINTS / name if name in EMBEDDED else Path(name).expanduser()
    return {"model": name, "model_files": fingerprint(path) if path.exists() else None, "dtype": str(model.dtype)}


def pad_colour(args: argparse.Namespace, model: Answerer) -> Colour | None:
    """What --llava-image-mode pad fills squares with; None where images are not padded.

    Raises RerouteError for another family than LLaVA.
    """
    if args.llava_image_mode == "crop":
        return None
    if model.config.family != "llava":
        raise RerouteError(f"--llava-image-mode pad is for LLaVA, {args.model} is {model.config.family}: leave it out")
    return mean_colour(model.image_processor.image_mean)


def _protocol(model: Answerer, llava_image_mode: str) -> dict[str, Any]:
    """Choices of the reference's protocol that are built in, or made by the model."""
    shared = {
        "image_backend": IMAGE_BACKEND,
        "float32_truth": True,
        "coord_frame": "original",
        "repetition_penalty": model.config.repetition_penalty,
    }
    if model.config.family == "llava":
        return shared | {"llava_image_mode": llava_image_mode, "vicuna_system": model.config.vicuna_system}
    limits = [model.image_processor.size[edge] for edge in ("shortest_edge", "longest_edge")]
    return shared | {"image_resizes": 2, "pixel_limits": limits, "mrope_compat": model.config.mrope_compat}


def _default_folder(settings: Mapping[str, Any]) -> Path:
    """runs/TASK/ and the model, the last run and a hash of all settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    model = re.sub(r"[^\w.-]+", "-", Path(settings["model"]).name)
    return Path("runs") / settings["task"] / f"{model}_{settings['questions']}_{list(settings['runs'])[-1]}_{digest}"


def _versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in PACKAGES}
