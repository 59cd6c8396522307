"""One of several processes that take their time over a run: `python -m tests.evals.slow_together --out FOLDER ...`."""

import sys

from evals.harness.parts import answer_together
from evals.harness.processes import joined
from evals.harness.runner import Run
from evals.refcoco import parser
from reroute_jax.commandline.parsing import exit_code
from tests.evals.slow_run import BATCH, MixedModel, mixed_task

PAUSE = 0.5


def main(argv: list[str]) -> None:
    args, model = parser().parse_args(["--distributed", *argv]), MixedModel(PAUSE)
    with joined(args) as processes:
        runs = [Run("full", model.plan("none"))]
        answer_together(model, mixed_task(), runs, {"of": "the test"}, BATCH, processes)
    print(f"answered {sum(model.batches)}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
