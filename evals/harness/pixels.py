"""The pixel limits that the reference harness gives the image processor of Qwen2.5-VL, and ours for its successor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convert.loading import with_pixel_limits
from reroute_jax.config import ModelConfig
from reroute_jax.models import FAMILIES

# Fewest and most pixels (lmms-eval's lower bound, and the upper one of its command line); those of Qwen2.5-VL's
# released checkpoints are 3136 and 12845056.
HARNESS_PIXELS = (200704, 451584)
# Side of a visual token in pixels that the upper bound holds 576 of; with Qwen3-VL's larger ones as many stay.
_TOKEN = 28


def with_harness_pixels(config: ModelConfig, open_processor: Callable[[], Any]) -> ModelConfig:
    """`config` within the harness's limits, where its family has limits and the checkpoint's own are wider."""
    if "pixel_limits" not in FAMILIES[config.family].options:
        return config
    own, token = open_processor().size["longest_edge"], config.vision.patch_size * config.vision.merge
    fewest, most = HARNESS_PIXELS
    most = max(most, most // _TOKEN**2 * token**2)
    return config if own < most else with_pixel_limits(config, (fewest, most))
