"""RefCOCO grounding: the box of the object an expression refers to. `python -m evals.refcoco --help`.

Splits val, test, testA, testB; the val of the hub's set holds more objects than the usual one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from evals.harness import prompts
from evals.harness.boxes import (
    COORD_FORMATS,
    NULL_BOX,
    REC_METRICS,
    RESIZED,
    beyond_image,
    find_box,
    normalise_box,
    rec_metrics,
    shrunk,
)
from evals.harness.cli import (
    add_data_arguments,
    benchmark_parser,
    exit_code_together,
    load_model,
    pad_colour,
    run_benchmark,
)
from evals.harness.columns import Hub
from evals.harness.data import PARITY_JPEG_ROUNDTRIPS, REFCOCO, SCENES, Doc, DocSource, rec_docs, rec_source
from evals.harness.padding import Colour, from_square, padded
from evals.harness.processes import Processes
from evals.harness.routes import check_routes
from evals.harness.runner import Answerer, Record, Task
from reroute_jax.commandline.loading import load_options
from reroute_jax.commandline.parsing import DATA, RUN, Parser
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES

NAME = "refcoco"
SCENES_MAX_NEW_TOKENS = 64  # the embedded models need four tokens for a coordinate
SCENES_LIMIT = 200  # both runs of the first command in under 3 minutes on 2 CPU cores
BEYOND = "true box reaches out of the image"
EMPTY = "expression is empty"
METRICS = (*REC_METRICS, *(name + RESIZED for name in REC_METRICS))


def make_task(
    source: DocSource,
    limit: int | None,
    style: str,
    coord_format: str,
    roundtrips: int,
    max_new: int,
    model_size: Callable[[Image.Image], tuple[int, int]] | None = None,
    name: str = NAME,
    skip_bad: bool = False,
    pad: Colour | None = None,
) -> Task:
    """The first `limit` questions of a source as a task.

    model_size: (width, height) in pixels that the model sees of an image. With it, metrics named RESIZED stand beside
    those of the reference, which divides by the stored image's size although the model answers in its own pixels.
    pad: colour of the squares that images are shown in, whose fractions the boxes then are.
    """
    total = min(count for count in (source.count, limit) if count is not None)

    def score(text: str, doc: Doc) -> Record:
        found = find_box(text)
        parsed = found or NULL_BOX
        box = normalise_box(parsed, coord_format, shrunk(doc.size, doc.shrinking))
        if pad is not None:
            box = from_square(box, doc.size)
        record = {"parsed": parsed, "unparsed": found is None, "box": box, "truth": doc.truth}
        record |= {"metrics": rec_metrics(box, doc.truth)}
        noted = EMPTY if not doc.text.strip() else BEYOND if beyond_image(doc.truth) else None
        record |= {} if noted is None else {"noted": noted}
        if model_size is None:
            return record
        resized = normalise_box(parsed, coord_format, shrunk(model_size(doc.image), doc.shrinking))
        extra = {name + RESIZED: value for name, value in rec_metrics(resized, doc.truth).items()}
        return record | {"box" + RESIZED: resized, "metrics": record["metrics"] | extra}

    def docs(start: int) -> Iterator[Doc]:
        found = rec_docs(source, start, total, roundtrips, skip_bad)
        return found if pad is None else padded(found, pad)

    return Task(
        name=name,
        docs=docs,
        total=total,
        prompt=lambda doc: prompts.rec(doc.text, style),
        score=score,
        max_new_tokens=max_new,
        skip_bad=skip_bad,
    )


def main(argv: Sequence[str] | None = None, name: str = NAME, hub: Hub = REFCOCO) -> int:
    """Command line of the set called `name`; returns the exit code."""
    args = parser(name, hub).parse_args(argv)
    return exit_code_together(lambda processes: _run(args, name, hub, processes), args)


def parser(name: str = NAME, hub: Hub = REFCOCO) -> Parser:
    """Of the command of the set called `name`."""
    parser = benchmark_parser(name, "Grounding accuracy with all visual tokens and with routed ones.")
    add_data_arguments(parser, hub)
    run = parser.group(RUN)
    run.add_argument(
        "--prompt-style", choices=prompts.REC_STYLES, help="(default: what the reference uses for the model family)"
    )
    run.add_argument(
        "--coord-format", choices=COORD_FORMATS, help="of the model's boxes (default: as its family's reference)"
    )
    parser.group(DATA).add_argument(
        "--jpeg-roundtrips",
        type=int,
        choices=(PARITY_JPEG_ROUNDTRIPS, 0),
        default=PARITY_JPEG_ROUNDTRIPS,
        help="re-saves of JPEG images, 2 as the reference makes (default: %(default)s)",
    )
    return parser


def _run(args: argparse.Namespace, name: str, hub: Hub, processes: Processes | None) -> None:
    check_routes(args)
    source = rec_source(args.data, args.split, hub=hub)  # bad data is refused before a model is loaded
    model = load_model(args.model, args.dtype, args.mrope_compat, args.vicuna_system, **load_options(args))
    run_benchmark(args, model, source, *questions(args, source, model, name), processes)


def questions(
    args: argparse.Namespace, source: DocSource, model: Answerer, name: str = NAME
) -> tuple[Task, tuple[str, ...], dict[str, Any]]:
    """What `args` ask a model about a source that was opened: the task, its metrics, and its settings."""
    family, scenes = FAMILIES[model.config.family], args.data == SCENES
    if scenes:
        source = rec_source(args.data, args.split, family.name)
    style = args.prompt_style or family.evaluation.rec_style
    coord_format = args.coord_format or family.evaluation.coord_format
    max_new = args.max_new_tokens or (SCENES_MAX_NEW_TOKENS if scenes else family.evaluation.max_new_tokens)
    limit = args.limit or (SCENES_LIMIT if scenes else None)
    settings = {
        "data": source.name,
        "prompt_style": style,
        "coord_format": coord_format,
        "jpeg_roundtrips": args.jpeg_roundtrips,
    }
    # A family that answers in pixels means those of the whole image after its resize. LLaVA sees a crop.
    model_size = model.model_size if coord_format == family.evaluation.coord_format == "pixel" else None
    pad = pad_colour(args, model)
    if pad is not None and coord_format != "normalized":
        raise RerouteError(
            f"--llava-image-mode pad needs boxes in fractions, not {coord_format}: leave --coord-format out"
        )
    how = style, coord_format, args.jpeg_roundtrips, max_new, model_size, name, args.skip_bad, pad
    return make_task(source, limit, *how), METRICS, settings


if __name__ == "__main__":
    sys.exit(main())
