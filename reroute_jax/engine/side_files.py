"""The files beside a checkpoint's weights: tokenizer, image processor, chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from reroute_jax.config import ModelConfig
from reroute_jax.engine.chat import ChatLayout, open_layout
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from reroute_jax.models.family import Family
from reroute_jax.types import Grid, Size


@dataclass(frozen=True)
class SideFiles:
    """Each is read where it is first asked for, and raises RerouteError there if it is absent or broken."""

    folder: Path
    config: ModelConfig

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.family]

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        def tried(folder: Path) -> Any:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer("")  # some damage shows only in use
            return tokenizer

        return _read(tried, self.folder)

    @cached_property
    def image_processor(self) -> Any:
        return _read(lambda folder: self.family.image_processor(folder, self.config), self.folder)

    @cached_property
    def chat_layout(self) -> ChatLayout:
        """How this checkpoint writes chats."""
        return open_layout(self.folder, self.tokenizer, self.config)

    @property
    def reference_grid(self) -> Grid:
        """Of the visual tokens that methods are planned for."""
        return self.family.typical_grid(self.config, lambda: self.image_processor)

    def visual_grid(self, image: Image.Image) -> Grid:
        """Of an image's visual tokens."""
        return self.family.visual_grid(image, self.config, self.image_processor)

    def model_size(self, image: Image.Image) -> Size:
        """Of the image that the model sees."""
        return self.family.model_size(image.size, self.image_processor)


def _read(read: Callable[[Path], Any], folder: Path) -> Any:
    try:
        return read(folder)
    except (RerouteError, ImportError, MemoryError):
        raise
    except Exception as problem:  # transformers and tokenizers raise anything on damaged files, and pointers of Git LFS
        reason = " ".join(str(problem).split())[:300]
        raise RerouteError(
            f"{folder} lacks tokenizer or image processor files, or has damaged ones ({reason}): copy them there from "
            "the original checkpoint"
        ) from problem
