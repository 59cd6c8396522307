"""What an answer costs at different limits on its length. `python -m benchmarks.limits --help`.

The same questions are answered with the same few tokens under each limit. Time and memory follow the answers, not the
limits: the cache has room for one segment, and grows where an answer does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from convert.embedded import EMBEDDED
from evals.harness.cli import load_model
from evals.harness.prompts import rec
from evals.scenes.data import refcoco_rows
from reroute_jax.commandline.loading import add_bits_arguments, add_mesh_argument, load_options
from reroute_jax.commandline.parsing import DATA, RUN, Parser, exit_code, positive
from reroute_jax.engine.compilation import compilations
from reroute_jax.models import FAMILIES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: print(json.dumps(measure(args), indent=2)), debug=args.debug)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a batch at each limit, taking turns, after a round that is not counted."""
    model = load_model(args.model, None, **load_options(args))
    style = FAMILIES[model.config.family].evaluation.rec_style
    rows = refcoco_rows("test", args.batch_size, family=model.config.family)
    questions = [model.question((row["image"], rec(row["answer"][0], style))) for row in rows]
    seconds: dict[int, list[float]] = {limit: [] for limit in args.limits}
    with compilations() as first:
        answers = {
            limit: model.generate(questions, max_new_tokens=limit, batch_size=args.batch_size) for limit in args.limits
        }
    with compilations() as later:
        for _ in range(args.repetitions):
            for limit in args.limits:
                start = time.perf_counter()
                model.generate(questions, max_new_tokens=limit, batch_size=args.batch_size)
                seconds[limit].append(time.perf_counter() - start)
    return {
        "model": args.model,
        "batch_size": args.batch_size,
        "answers_equal": len({tuple(found) for found in answers.values()}) == 1,
        "programs": len(first),
        "programs_compiled_later": len(later),
        "median_ms": {str(limit): 1e3 * float(np.median(found)) for limit, found in seconds.items()},
    }


def _parser() -> argparse.ArgumentParser:
    examples = ("--limits 16 128 1024", "--batch-size 1 --repetitions 40", "--model scenes-qwen --limits 32 512")
    parser = Parser("benchmarks.limits", __doc__, examples)
    run = parser.group(RUN)
    run.add_argument(
        "--limits", type=positive, nargs="+", default=[16, 128, 1024], help="new tokens (default: %(default)s)"
    )
    run.add_argument("--batch-size", type=positive, default=8, help="questions (default: %(default)s)")
    run.add_argument("--repetitions", type=positive, default=20, help="counted rounds (default: %(default)s)")
    parser.group(DATA).add_argument("--model", default=EMBEDDED[0], help="(default: %(default)s)")
    add_mesh_argument(parser)
    add_bits_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
