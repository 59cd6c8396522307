"""A run that takes its time, so that it can be killed: `python -m tests.evals.slow_run FOLDER < config.pickle`. The
model's configuration is handed over because reading it imports PyTorch, half of what the process would cost."""

import pickle
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evals.harness.data import rec_source
from evals.harness.runner import Record, Run, Task, answer
from evals.refcoco import make_task
from reroute_jax.config import ModelConfig
from reroute_jax.engine.answers import Answer
from tests.evals.stub import StubModel

BATCH = 3
TOTAL = 43  # several windows, the last one with a short batch


class MixedModel(StubModel):
    """Sees images in four sizes. An answer depends on its whole batch. pause: seconds a batch."""

    def __init__(self, pause: float = 0.0, config: ModelConfig | None = None) -> None:
        super().__init__(config=config)
        self.pause = pause
        self.sizes: list[list[int]] = []

    def visual_grid(self, image) -> tuple[int, int]:
        return 1 + zlib.crc32(image.tobytes()) % 4, 8

    def answer(self, questions: Sequence[tuple], **how) -> list[Answer]:
        time.sleep(self.pause)
        self.sizes.append([self.visual_grid(image)[0] for image, _ in questions])
        mark = zlib.crc32("".join(prompt for _, prompt in questions).encode())
        return [replace(found, text=f"{found.text} {mark}") for found in super().answer(questions, **how)]


def mixed_task() -> Task:
    return make_task(rec_source("scenes", None), TOTAL, "full", "normalized", 2, 16)


def run(model: StubModel, folder: Path) -> list[Record]:
    return answer(model, mixed_task(), [(Run("full", model.plan("none")), folder)], BATCH)["full"]


if __name__ == "__main__":
    run(MixedModel(0.2, pickle.load(sys.stdin.buffer)), Path(sys.argv[1]))
