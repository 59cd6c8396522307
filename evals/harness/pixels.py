"""The pixel limits that the reference harness gives Qwen2.5-VL's image processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convert.loading import with_pixel_limits
from reroute_jax.config import ModelConfig
from reroute_jax.models import FAMILIES

# Fewest and most pixels (lmms-eval's lower bound, and the upper one of its command line); those of the released
# checkpoints are 3136 and 12845056.
HARNESS_PIXELS = (200704, 451584)


def with_harness_pixels(config: ModelConfig, open_processor: Callable[[], Any]) -> ModelConfig:
    """`config` within the harness's limits, where its family has limits and the checkpoint's own are wider."""
    if "pixel_limits" not in FAMILIES[config.family].options:
        return config
    own = open_processor().size["longest_edge"]
    return config if own < HARNESS_PIXELS[1] else with_pixel_limits(config, HARNESS_PIXELS)
