"""A model that answers at once: same question and schedule, same answer."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from evals.harness.data import Doc
from evals.scenes.spec import model_config
from reroute_jax.config import ModelConfig
from reroute_jax.engine.answers import Answer
from reroute_jax.routing import methods
from reroute_jax.routing.plan import Schedule

NUWA_END = " in this image and output the bbox coordinates in JSON format."


class StubModel:
    """Boxes drawn from a hash of image, prompt and schedule. interrupt_after: batches until Ctrl-C. config: of the
    embedded LLaVA unless given."""

    dtype = "float32"
    folder = Path("stub")

    def __init__(self, interrupt_after: int | None = None, config: ModelConfig | None = None) -> None:
        self.config = config or model_config()
        self.batches: list[int] = []
        self.max_new_tokens: set[int] = set()
        self.prompts: list[str] = []
        self._left = interrupt_after

    def plan(self, method: str, **arguments) -> Schedule:
        rows, cols = self.config.vision.grid
        return methods.plan(
            method, num_layers=self.config.num_layers, visual=rows * cols, grid=(rows, cols), **arguments
        )

    def prompt_ids(self, text: str, grids: Sequence[tuple[int, int]]) -> list[int]:
        return [0] * (sum(rows * cols for rows, cols in grids) + 4 + len(text.split()))

    def visual_grid(self, image) -> tuple[int, int]:
        return self.config.vision.grid

    def model_size(self, image) -> tuple[int, int]:
        return self.config.vision.image_size, self.config.vision.image_size

    def generate(self, pairs: Sequence[tuple], **how) -> list[str]:
        return [found.text for found in self.answer(pairs, **how)]

    def question(self, item: tuple) -> tuple:
        return item

    def answer(
        self, questions: Sequence[tuple], *, schedule: Schedule, max_new_tokens: int, batch_size: int = 8
    ) -> list[Answer]:
        assert 1 <= len(questions) <= batch_size
        if self._left is not None:
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
        self.batches.append(len(questions))
        self.max_new_tokens.add(max_new_tokens)
        self.prompts += [prompt for _, prompt in questions]
        texts = [self._answer(image, prompt, schedule.label) for image, prompt in questions]
        return [Answer(text, finish_reason="stop") for text in texts]

    def _answer(self, image, prompt: str, label: str) -> str:
        rng = random.Random(zlib.crc32(image.tobytes() + prompt.encode() + label.encode()))
        if rng.random() < 0.1:
            return "I see no such thing."
        x, y = rng.uniform(0, 0.5), rng.uniform(0, 0.5)
        return f" [{x:.2f}, {y:.2f}, {x + rng.uniform(0.1, 0.5):.2f}, {y + rng.uniform(0.1, 0.5):.2f}] "


class QwenStub(StubModel):
    """Sees images of any size at twice their size, 14 stored pixels a visual token.

    It answers right, in pixels of the image it sees, where all tokens run, and finds nothing otherwise.
    """

    def __init__(self, docs: Sequence[Doc]) -> None:
        super().__init__()
        self.config = replace(model_config("qwen2_5_vl"), repetition_penalty=1.05)
        self.image_processor = SimpleNamespace(size={"shortest_edge": 9408, "longest_edge": 15680})
        self._truths = {(doc.image.tobytes(), doc.text): doc.truth for doc in docs}

    def plan(self, method: str, **arguments) -> Schedule:
        return methods.plan(
            method, num_layers=self.config.num_layers, visual=64, grid=(8, 8), family="qwen2_5_vl", **arguments
        )

    def visual_grid(self, image) -> tuple[int, int]:
        return image.height // 14, image.width // 14

    def model_size(self, image) -> tuple[int, int]:
        return 2 * image.width, 2 * image.height

    def _answer(self, image, prompt: str, label: str) -> str:
        if label != "none":
            return "Nothing."
        expression = prompt.removeprefix("Locate ").removesuffix(NUWA_END)
        width, height = self.model_size(image)
        x1, y1, x2, y2 = self._truths[image.tobytes(), expression]
        return f'[{{"bbox_2d":[{x1 * width:.1f}, {y1 * height:.1f}, {x2 * width:.1f}, {y2 * height:.1f}]}}]'
