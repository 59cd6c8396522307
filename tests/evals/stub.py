"""A model that answers at once: same question and schedule, same answer."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

from evals.scenes.spec import model_config
from reroute_jax.routing import methods
from reroute_jax.routing.plan import Schedule


class StubModel:
    """Boxes drawn from a hash of image, prompt and schedule. interrupt_after: calls of generate until Ctrl-C."""

    dtype = "float32"

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.config = model_config()
        self.batches: list[int] = []
        self.max_new_tokens: set[int] = set()
        self.prompts: list[str] = []
        self._left = interrupt_after

    def plan(self, method: str, **arguments) -> Schedule:
        rows, cols = self.config.vision.grid
        return methods.plan(
            method, num_layers=self.config.num_layers, visual=rows * cols, grid=(rows, cols), **arguments
        )

    def prompt_ids(self, text: str, images: int) -> list[int]:
        rows, cols = self.config.vision.grid
        return [0] * (rows * cols * images + 4 + len(text.split()))

    def generate(
        self, pairs: Sequence[tuple], *, schedule: Schedule, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        if self._left is not None:
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
        assert 1 <= len(pairs) <= batch_size
        self.batches.append(len(pairs))
        self.max_new_tokens.add(max_new_tokens)
        self.prompts += [prompt for _, prompt in pairs]
        return [self._answer(image, prompt, schedule.label) for image, prompt in pairs]

    def _answer(self, image, prompt: str, label: str) -> str:
        rng = random.Random(zlib.crc32(image.tobytes() + prompt.encode() + label.encode()))
        if rng.random() < 0.1:
            return "I see no such thing."
        x, y = rng.uniform(0, 0.5), rng.uniform(0, 0.5)
        return f" [{x:.2f}, {y:.2f}, {x + rng.uniform(0.1, 0.5):.2f}, {y + rng.uniform(0.1, 0.5):.2f}] "
