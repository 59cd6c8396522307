"""What a schedule costs in theory: multiply-accumulates of prefill and key-value memory (section 8). Host code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reroute_jax.config import DecoderConfig
from reroute_jax.nn.cache import token_bytes
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.repair import REPAIRS
from reroute_jax.routing.scores import SCORES, Score
from reroute_jax.routing.tower import TowerSizes
from reroute_jax.types import Grid

FORMS = ("fastv", "swiglu", "gqa")


@dataclass(frozen=True)
class Compute:
    """Multiply-accumulates of one row's prefill through the decoder layers, the papers' "FLOPs" (8.1).

    fastv: two-matrix MLP; swiglu: three; gqa: three, and keys and values at their own width. scoring: of the decisions,
    each by its score's own formula and its repair's (8.2, 20); in none of the three.
    """

    fastv: int
    swiglu: int
    gqa: int
    scoring: int

    def total(self, form: str = "swiglu") -> int:
        """One of the three forms with the scoring pass."""
        return getattr(self, form) + self.scoring


@dataclass(frozen=True)
class Account:
    """Cost of one row with one image.

    visual: image tokens before any merge. average: visual tokens per decoder layer as they really run, of a count that
    each image decides the limit (14.3); nominal: before
    keep counts are cut to whole numbers. visual_only, prompt: compute of the visual tokens alone, and with the text.
    merging: multiply-accumulates of the reduction before the decoder, beside the tower and in none of the forms (20);
    None where the tower's sizes were not given.
    kv_visual, kv_tokens: cached tokens after prefill summed over the layers, visual and all; kv_bytes: of keys and
    values of all.
    """

    label: str
    visual: int
    average: float
    nominal: float
    visual_only: Compute
    prompt: Compute
    kv_visual: int
    kv_tokens: int
    kv_bytes: int
    merging: int | None = None

    def __str__(self) -> str:
        tera = {form: getattr(self.prompt, form) / 1e12 for form in ("swiglu", "fastv", "scoring")}
        merging = f", merging before the decoder {self.merging / 1e12:.3g}" if self.merging else ""
        return (
            f"{self.label}: {self.average:.2f} of {self.visual} visual tokens per layer (nominal {self.nominal:.2f}), "
            f"prompt {tera['swiglu']:.4g} TFLOPs SwiGLU form, {tera['fastv']:.4g} FastV form, scoring adds "
            f"{tera['scoring']:.3g}{merging}, KV {self.kv_bytes / 1e6:.4g} MB"
        )


def visual_per_layer(schedule: Schedule, visual: int) -> list[int]:
    """Visual tokens that each decoder layer runs, and caches, of a row with `visual` at the decoder input (8.3), with
    the proxies among them (15.2)."""
    plan = schedule.resolve(visual)
    return [visual if s.cap is None else s.cap + s.proxies for s in plan.stages for _ in range(s.lo, s.hi)]


def account(
    schedule: Schedule,
    config: DecoderConfig,
    *,
    visual: int,
    text: int,
    grid: tuple[int, int],
    dtype: str = "bfloat16",
    tower: TowerSizes | None = None,
) -> Account:
    """Cost of a row with `text` text tokens and one image of `visual` tokens on a (rows, cols) grid.

    dtype: the model's. tower: for the cost of a merge. Raises RerouteError if the schedule is for another depth.
    """
    schedule.check_depth(config.num_layers)
    entering = schedule.merged_count(visual, grid)
    per_layer = visual_per_layer(schedule, entering)
    scored, repairs = scored_rows(schedule, entering), repair_macs(schedule, config, entering)
    cached = cached_per_layer(schedule, per_layer)
    kv_tokens = sum(cached) + config.num_layers * text
    return Account(
        label=schedule.label,
        visual=visual,
        average=sum(per_layer) / config.num_layers,
        nominal=_nominal(schedule, entering),
        visual_only=compute(config, per_layer, [*repairs, *(score.macs(config, rows, 0) for rows, score in scored)]),
        prompt=compute(
            config,
            [v + text for v in per_layer],
            [*repairs, *(score.macs(config, rows, text) for rows, score in scored)],
        ),
        kv_visual=sum(cached),
        kv_tokens=kv_tokens,
        kv_bytes=kv_tokens * token_bytes(config, dtype),
        merging=None if tower is None else merge_macs(schedule, tower, grid),
    )


def merge_macs(schedule: Schedule, tower: TowerSizes, grid: Grid) -> int:
    """Multiply-accumulates of the reduction before the decoder, of one image (20)."""
    return 0 if schedule.merge is None else schedule.merge.macs(tower, grid)


def _nominal(schedule: Schedule, visual: int) -> float:
    """Visual tokens per layer, before counts are cut to whole numbers."""
    total, kept = 0.0, visual
    for stage in schedule.stages:
        if stage.ratio is not None:
            kept = float((kept if stage.of_kept else visual) * stage.ratio)
        elif stage.count is not None:
            kept = min(stage.count, visual)
        total += (stage.hi - stage.lo) * kept
    return total / schedule.num_layers


def scored_rows(schedule: Schedule, visual: int) -> list[tuple[int, Score]]:
    """(visual rows, score) of each decision: all of a reroute's layout, a deletion's survivors (8.2)."""
    rows, present = [], visual
    for stage in schedule.resolve(visual).stages:
        if stage.cap is not None:
            rows.append((present, SCORES[stage.score]))
        if stage.action == "delete":
            present = stage.cap
    return rows


def repair_macs(schedule: Schedule, config: DecoderConfig, visual: int) -> list[int]:
    """Multiply-accumulates of each decision's repair, of a row with `visual` tokens at the decoder input (20)."""
    found, present = [], visual
    for stage in schedule.resolve(visual).stages:
        if stage.cap is not None:
            found.append(REPAIRS[stage.repair].macs(config, visual, present - stage.cap))
        if stage.action == "delete":
            present = stage.cap
    return found


def cached_per_layer(schedule: Schedule, per_layer: Sequence[int]) -> list[int]:
    """Visual tokens that each layer caches for decoding: what it ran, or less where caches are cut (15.1). Of a reroute
    the most: how many tokens of two selections are the same depends on the image."""
    if schedule.cut_caches == "no":
        return list(per_layer)
    spared = int(schedule.cut_caches == "all_but_first")
    return [ran if layer < spared else min(ran, per_layer[-1]) for layer, ran in enumerate(per_layer)]


def kv_width(config: DecoderConfig) -> int:
    return config.num_kv_heads * config.head_dim


def compute(config: DecoderConfig, layers: Sequence[int], scoring: Sequence[int]) -> Compute:
    """Of layers with so many tokens, and decisions with so many multiply-accumulates. The papers' heads are as wide
    together as the model (8.1); where they are not, as in Qwen3-VL, their own width counts."""
    d, m, kv = config.hidden_size, config.mlp_dim, kv_width(config)
    heads = config.num_heads * config.head_dim
    attention = sum(2 * t * t * heads for t in layers)
    tokens = sum(layers)
    return Compute(
        fastv=attention + tokens * (4 * d * heads + 2 * d * m),
        swiglu=attention + tokens * (4 * d * heads + 3 * d * m),
        gqa=attention + tokens * (2 * d * heads + 2 * d * kv + 3 * d * m),
        scoring=sum(scoring),
    )
