"""What the benchmark commands share: arguments, and the way from runs to a report."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import reroute_jax
from convert.embedded import CAVEATS, EMBEDDED, locate
from evals.harness.columns import OWN_HUB, Hub
from evals.harness.data import IMAGE_BACKEND, SCENES, DocSource
from evals.harness.identity import checkpoint_identity, files_digest, images_digest, software, versions
from evals.harness.padding import IMAGE_MODES, Colour, mean_colour
from evals.harness.parts import answer_together
from evals.harness.pixels import with_harness_pixels
from evals.harness.processes import Processes, add_process_arguments, joined
from evals.harness.report import IDENTITY, heading, render, summarise
from evals.harness.routes import DEFAULT_METHOD, add_comparison_arguments, beside_found, plan_routes
from evals.harness.run_folder import SUMMARY_FILE, run_folder, write_json
from evals.harness.runner import Answerer, Task, answer
from reroute_jax.commandline.loading import add_bits_arguments, add_mesh_argument, load_options
from reroute_jax.commandline.parsing import DATA, DEFECT, OUTPUT, RUN, Parser, exit_code, new_tokens, positive, whole
from reroute_jax.commandline.routes import add_route_arguments
from reroute_jax.engine.compilation import keep_programs
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.nn.mrope import COMPATS
from reroute_jax.types import FLOATS


def exit_code_together(benchmark: Callable[[Processes | None], None], args: argparse.Namespace) -> int:
    """`exit_code_of` a benchmark that is told its place among the processes of --distributed."""

    def run() -> None:
        with joined(args) as processes:
            benchmark(processes)

    return exit_code_of(run, args)


def exit_code_of(benchmark: Callable[[], None], args: argparse.Namespace) -> int:
    """`exit_code` of a benchmark, whose finished batches Ctrl-C leaves in its folder."""
    same = "the same command without --fresh" if args.fresh else "the same command"
    return exit_code(benchmark, args.debug, f"stopped: {same} goes on after the last whole batch")


def benchmark_parser(name: str, description: str) -> Parser:
    """Parser with the arguments that every benchmark has."""
    examples = ("--method nuwa", "--compare --budget 64 --limit 100", "--method pdrop --action delete --out runs/pdrop")
    parser = Parser(f"evals.{name}", description, examples)
    add_route_arguments(parser, DEFAULT_METHOD)
    add_comparison_arguments(parser)
    run = parser.group(RUN)
    run.add_argument(
        "--model",
        default=EMBEDDED[0],
        help=f"hub id, folder in HF format, converted folder, or one of {', '.join(EMBEDDED)} (default: %(default)s)",
    )
    run.add_argument(
        "--dtype",
        choices=tuple(FLOATS),
        help="(default: float32 for the embedded models, the checkpoint's own otherwise)",
    )
    run.add_argument(
        "--vicuna-system",
        action="store_true",
        help="open LLaVA's prompts with the system sentence of its own evaluation",
    )
    add_mesh_argument(parser)
    add_bits_arguments(parser)
    add_process_arguments(parser)
    run.add_argument("--max-new-tokens", type=new_tokens, help="length of an answer (default: the task's)")
    run.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: %(default)s)")
    run.add_argument(
        "--seed", type=whole, default=0, help="of the method `random` and of the intervals (default: %(default)s)"
    )
    run.add_argument(
        "--compilation-cache", type=Path, metavar="DIR", help="keep compiled programs there for the next run"
    )
    data = parser.group(DATA)
    data.add_argument("--limit", type=positive, help="only the first so many questions")
    data.add_argument(
        "--llava-image-mode",
        choices=IMAGE_MODES,
        default=IMAGE_MODES[0],
        help="crop as the reference, or pad to a square as LLaVA's own evaluation (default: %(default)s)",
    )
    add_compat_argument(parser)
    parser.group(OUTPUT).add_argument(
        "--out", type=Path, help="run folder (default: runs/ and a name made from the settings)"
    )
    add_fresh_argument(parser)
    return parser


def add_fresh_argument(parser: Parser) -> None:
    parser.group(OUTPUT).add_argument(
        "--fresh", action="store_true", help="start anew where --out holds answers; they are moved aside within it"
    )


def add_compat_argument(parser: Parser) -> None:
    """--mrope-compat."""
    parser.group(DEFECT).add_argument(
        "--mrope-compat", choices=COMPATS, help="rotary positions as transformers of this version gave Qwen's images"
    )


def add_data_arguments(parser: Parser, hub: Hub) -> None:
    """--data, --split and --skip-bad, for a benchmark that has real data."""
    config, group = f" ({hub.config})" if hub.config else "", parser.group(DATA)
    group.add_argument(
        "--data",
        default=SCENES,
        help=f"'{SCENES}': a rendered stand-in; '{OWN_HUB}': {hub.name}{config}; another hub id; or a local folder, "
        "parquet file or JSON lines with the same columns (default: %(default)s)",
    )
    group.add_argument("--split", help=f"(default: test of the scenes, {hub.split} of other data)")
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="count and report questions that cannot be asked, for their image or their text, instead of stopping",
    )


def load_model(
    name: str,
    dtype: str | None,
    mrope_compat: str | None = None,
    vicuna_system: bool = False,
    **options: Any,
) -> Answerer:
    """The model of --model, --dtype, --mrope-compat and --vicuna-system, within the harness's pixel limits. options: as
    of `load`."""
    model = reroute_jax.load(name, dtype, mrope_compat, vicuna_system, **options)
    if name in EMBEDDED:
        return model
    return replace(model, config=with_harness_pixels(model.config, lambda: model.image_processor))


def run_benchmark(
    args: argparse.Namespace,
    model: Answerer,
    source: DocSource,
    task: Task,
    metrics: Sequence[str],
    settings: Mapping[str, Any],
    processes: Processes | None = None,
) -> None:
    """Make or go on with the runs that `args` ask for, write their files, and print the report.

    source: of the task's questions. settings: what else the answers depend on. processes: that share the questions;
    the first of them writes and prints. Raises RerouteError for a folder made with other settings, data, model or
    software, for one that another process works on, and where one of `processes` ended too early.
    """
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    routes = beside_found(plan_routes(args, model), args, model)
    everything = {**run_settings(args, model, source, task, settings), "runs": routes.settings}
    folder = args.out or _default_folder(everything)
    first = processes is None or processes.index == 0
    with run_folder(folder, everything, args.fresh) if first else nullcontext():
        if processes is not None:
            answer_together(model, task, routes.runs, everything, args.batch_size, processes)
        if not first:
            print(f"process {processes.index} of {processes.count}: its questions are answered, process 0 reports")
            return
        records = answer(model, task, [(run, folder) for run in routes.runs], args.batch_size)
        summary = summarise(records, routes, metrics, model, args.seed, task)
        write_summary(folder, summary, everything)
    print(f"{heading(summary, everything, versions())}\n\n{render(summary, task.difference_scale)}\n")
    if args.model in CAVEATS:
        print(f"Note: {CAVEATS[args.model]}.\n")
    print(f"Answers and {SUMMARY_FILE}: {folder}")


def run_settings(
    args: argparse.Namespace, model: Answerer, source: DocSource, task: Task, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the answers depend on, the schedule aside. settings: those of the task alone."""
    path = Path(locate(args.model)).expanduser()
    return {
        "task": task.name,
        "questions": task.total,
        **settings,
        "model": args.model,
        "dtype": str(model.dtype),
        "max_new_tokens": task.max_new_tokens,
        "batch_size": args.batch_size,
        **load_options(args),
        "seed": args.seed,
        **_protocol(model, args.llava_image_mode),
        IDENTITY: {
            "data_files": files_digest({str(file): file for file in source.files}) if source.files else None,
            "data_images": images_digest(source.images(task.total)),
            "data_revision": source.revision,
            **checkpoint_identity(path, model.folder),
            **software(),
        },
    }


def write_summary(folder: Path, summary: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """SUMMARY_FILE: the summary with what it was made from and what has to be known of it."""
    model = settings["model"]
    caveat = {"caveat": CAVEATS[model]} if model in CAVEATS else {}
    write_json(folder / SUMMARY_FILE, {**summary, **caveat, "settings": settings, "versions": versions()})


def pad_colour(args: argparse.Namespace, model: Answerer) -> Colour | None:
    """What --llava-image-mode pad fills squares with; None where images are not padded.

    Raises RerouteError for another family than LLaVA.
    """
    if args.llava_image_mode == "crop":
        return None
    if "llava_image_mode" not in FAMILIES[model.config.family].options:
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
    family = FAMILIES[model.config.family]
    mode = {"llava_image_mode": llava_image_mode} if "llava_image_mode" in family.options else {}
    return shared | mode | family.settings(model.config, lambda: model.image_processor)


def _default_folder(settings: Mapping[str, Any]) -> Path:
    """runs/TASK/ and the model, the last run and a hash of the command alone, so that it finds its own answers."""
    said = {name: value for name, value in settings.items() if name != IDENTITY}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
    model = re.sub(r"[^\w.-]+", "-", Path(settings["model"]).name)
    return Path("runs") / settings["task"] / f"{model}_{settings['questions']}_{list(settings['runs'])[-1]}_{digest}"
