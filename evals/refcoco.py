"""RefCOCO-style grounding: the box of the object an expression refers to. `python -m evals.refcoco --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from evals import prompts
from evals.boxes import (
    COORD_FORMAT_OF_FAMILY,
    COORD_FORMATS,
    REC_METRICS,
    RESIZED,
    normalise_box,
    parse_box,
    rec_metrics,
)
from evals.cli import benchmark_parser, exit_code, load_model, run_benchmark
from evals.data import PARITY_JPEG_ROUNDTRIPS, SCENES, Doc, Source, rec_docs, rec_source
from evals.routes import check_routes
from evals.runner import Record, Task, fingerprint

NAME = "refcoco"
# The task sets no length, so the reference's model classes do; the embedded models need four tokens of theirs.
MAX_NEW_TOKENS = {"llava": 1024, "qwen2_5_vl": 128}
SCENES_MAX_NEW_TOKENS = 64
SCENES_LIMIT = 200  # both runs of the first command in under 3 minutes on 2 CPU cores
METRICS = (*REC_METRICS, *(name + RESIZED for name in REC_METRICS))


def make_task(
    source: Source,
    limit: int | None,
    style: str,
    coord_format: str,
    roundtrips: int,
    max_new: int,
    model_size: Callable[[Image.Image], tuple[int, int]] | None = None,
) -> Task:
    """The first `limit` questions of a source as a task.

    model_size: (width, height) in pixels that the model sees of an image. With it, metrics named RESIZED stand beside
    those of the reference, which divides by the stored image's size although the model answers in its own pixels.
    """
    total = min(count for count in (source.count, limit) if count is not None)

    def score(text: str, doc: Doc) -> Record:
        parsed = parse_box(text)
        box = normalise_box(parsed, coord_format, doc.size)
        record = {"parsed": parsed, "box": box, "truth": doc.truth, "metrics": rec_metrics(box, doc.truth)}
        if model_size is None:
            return record
        resized = normalise_box(parsed, coord_format, model_size(doc.image))
        extra = {name + RESIZED: value for name, value in rec_metrics(resized, doc.truth).items()}
        return record | {"box" + RESIZED: resized, "metrics": record["metrics"] | extra}

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
    source = rec_source(args.data, args.split)  # bad data is refused before a model is loaded
    model = load_model(args.model, args.dtype, args.mrope_compat)
    family, scenes = model.config.family, args.data == SCENES
    if scenes:
        source = rec_source(args.data, args.split, family)
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
    # A family that answers in pixels means those of the whole image after its resize. LLaVA sees a crop.
    model_size = model.model_size if coord_format == COORD_FORMAT_OF_FAMILY[family] == "pixel" else None
    task = make_task(source, limit, style, coord_format, args.jpeg_roundtrips, max_new, model_size)
    run_benchmark(args, model, task, METRICS, settings)


if __name__ == "__main__":
    sys.exit(main())
