"""RefCOCO-style grounding: the box of the object an expression refers to. `python -m evals.refcoco --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evals import prompts
from evals.boxes import COORD_FORMAT_OF_FAMILY, COORD_FORMATS, REC_METRICS, normalise_box, parse_box, rec_metrics
from evals.cli import benchmark_parser, exit_code, load_model, run_benchmark
from evals.data import PARITY_JPEG_ROUNDTRIPS, SCENES, Doc, Source, rec_docs, rec_source
from evals.routes import check_routes
from evals.runner import Record, Task, fingerprint

NAME = "refcoco"
# The task sets no length, so the reference's model classes do; the embedded models say a box in four tokens.
MAX_NEW_TOKENS = {"llava": 1024}
SCENES_MAX_NEW_TOKENS = 16
SCENES_LIMIT = 200  # both runs of the first command in under 3 minutes on 2 CPU cores


def make_task(source: Source, limit: int | None, style: str, coord_format: str, roundtrips: int, max_new: int) -> Task:
    """The first `limit` questions of a source as a task."""
    total = min(count for count in (source.count, limit) if count is not None)

    def score(text: str, doc: Doc) -> Record:
        parsed = parse_box(text)
        box = normalise_box(parsed, coord_format, doc.size)
        return {"parsed": parsed, "box": box, "truth": doc.truth, "metrics": rec_metrics(box, doc.truth)}

    return Task(
        name=NAME,
        docs=lambda start: rec_docs(source, start, total, roundtrips),
        total=total,
        prompt=lambda doc: prompts.rec(doc.text, style),
        score=score,
        max_new_tokens=max_new,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(NAME, "Grounding accuracy with all visual tokens and with routed ones.")
    parser.add_argument(
        "--data",
        default=SCENES,
        help="'scenes', a hub id such as lmms-lab/RefCOCO, or a local parquet file or folder (default: %(default)s)",
    )
    parser.add_argument("--split", help="default: test of the scenes, val of other data")
    parser.add_argument(
        "--prompt-style", choices=prompts.REC_STYLES, help="default: what the reference uses for the model family"
    )
    parser.add_argument(
        "--coord-format", choices=COORD_FORMATS, help="of the model's boxes (default: as its family's reference)"
    )
    parser.add_argument(
        "--jpeg-roundtrips",
        type=int,
        choices=(PARITY_JPEG_ROUNDTRIPS, 0),
        default=PARITY_JPEG_ROUNDTRIPS,
        help="re-saves of JPEG images, 2 as the reference makes (default: %(default)s)",
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    check_routes(args)
    source = rec_source(args.data, args.split)
    model = load_model(args.model, args.dtype)
    family, scenes = model.config.family, args.data == SCENES
    style = args.prompt_style or prompts.REC_STYLE_OF_FAMILY[family]
    coord_format = args.coord_format or COORD_FORMAT_OF_FAMILY[family]
    max_new = args.max_new_tokens or (SCENES_MAX_NEW_TOKENS if scenes else MAX_NEW_TOKENS[family])
    limit = args.limit or (SCENES_LIMIT if scenes else None)
    data = Path(args.data).expanduser()
    settings = {
        "data": source.name,
        "data_files": fingerprint(data) if not scenes and data.exists() else None,
        "prompt_style": style,
        "coord_format": coord_format,
        "jpeg_roundtrips": args.jpeg_roundtrips,
    }
    task = make_task(source, limit, style, coord_format, args.jpeg_roundtrips, max_new)
    run_benchmark(args, model, task, REC_METRICS, settings)


if __name__ == "__main__":
    sys.exit(main())
