"""How each family's embedded models are trained: phases, questions, and what learns how fast."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import optax
from optax.contrib import MuonDimensionNumbers, muon

from evals.scenes.data import TRAINING_QUESTIONS

STEPS = {"llava": (1400, 3900), "qwen2_5_vl": (1000, 1400), "qwen3_vl": (400, 3000)}  # vision, and what ends in a model
# Learning rates after the vision phase, relative to the rest: LLaVA's tower, projector and dense heads; the mergers,
# and Qwen3-VL's tower.
STILL, MERGER_RATE = 0.08, 0.3
# Questions of each kind a scene is packed with. Boxes are learned first; yes/no and counting take longest.
YESNO_MIX = {"attribute": 2, "place": 2, "relation": 2, "yesno": 8, "colour": 1, "count": 1}
LAST_MIX = {"attribute": 3, "place": 2, "relation": 2, "yesno": 6, "colour": 2, "count": 1}
COUNT_MIX = {"attribute": 3, "place": 2, "relation": 2, "yesno": 5, "colour": 1, "count": 3}
# By family and phase: mix, share of the phase's schedule after which it changes, mix from there on.
MIXES = {
    ("llava", "joint"): (TRAINING_QUESTIONS, 0.45, YESNO_MIX),
    ("llava", "plain"): (TRAINING_QUESTIONS, 0.45, YESNO_MIX),
    ("llava", "bypass"): (TRAINING_QUESTIONS, 0.45, YESNO_MIX),
    ("qwen2_5_vl", "joint"): (TRAINING_QUESTIONS, 0.5, LAST_MIX),
    ("qwen3_vl", "joint"): (TRAINING_QUESTIONS, 0.4, COUNT_MIX),
}


@dataclass(frozen=True)
class Phase:
    """Steps [start, stop) on `rows` scenes each; starts from the end of phase `after`. `total`: steps of its learning
    rate schedule. branches: whether the optimiser goes on where `after` left it. checkpoint: what it ends in."""

    family: str
    name: str
    after: str | None
    start: int
    stop: int
    total: int
    rows: int
    branches: bool = False
    checkpoint: str | None = None

    @property
    def kind(self) -> tuple[str, str]:
        return self.family, "vision" if self.name == "vision" else "joint"

    def mix(self, step: int) -> dict[str, int]:
        """Questions of each kind for a scene of this step."""
        if self.name == "vision":
            return TRAINING_QUESTIONS
        first, share, later = MIXES[self.family, self.name]
        return first if step < share * self.total else later


# Scenes of a vision step and of a joint one, and the checkpoint that the Qwen families' two phases end in.
_TWO_PHASES = {"qwen2_5_vl": (16, 8, "scenes-qwen"), "qwen3_vl": (8, 4, "scenes-qwen3")}


def phases(family: str, vision_steps: int, joint_steps: int) -> tuple[Phase, ...]:
    if family in _TWO_PHASES:
        seen, asked, checkpoint = _TWO_PHASES[family]
        return (
            Phase(family, "vision", None, 0, vision_steps, vision_steps, seen),
            Phase(family, "joint", "vision", 0, joint_steps, joint_steps, asked, checkpoint=checkpoint),
        )
    branch, last = joint_steps * 2 // 3, {"total": joint_steps, "rows": 8, "branches": True}
    return (
        Phase(family, "vision", None, 0, vision_steps, vision_steps, 64),
        Phase(family, "joint", "vision", 0, branch, joint_steps, 8),
        Phase(family, "plain", "joint", branch, joint_steps, checkpoint="scenes-llava", **last),
        Phase(family, "bypass", "joint", branch, joint_steps, checkpoint="scenes-llava-bypass", **last),
    )


_LAYERS, _MERGER, _DEEPSTACK = "model.vision.layers.", "model.vision.merger.", "model.vision.deepstack."
_DECODER = "model.decoder.layers."
# Parameters whose matrices Muon trains, by family and phase; Adam trains the others, and all where none is named.
MUON = {
    ("llava", "vision"): (),
    ("llava", "joint"): (_DECODER,),
    ("qwen2_5_vl", "vision"): (_LAYERS, _MERGER),
    ("qwen2_5_vl", "joint"): (_DECODER, _MERGER),
    ("qwen3_vl", "vision"): (_LAYERS, _MERGER, _DEEPSTACK),
    ("qwen3_vl", "joint"): (_DECODER, _LAYERS),
}
# Learning rates relative to the rest. The words (and Qwen3-VL's layers, which are not fresh) wait for the tower, whose
# blocks then stand still, or in Qwen3-VL, where they have seen fewer scenes, nearly so.
RATES = {
    ("llava", "vision"): {},
    ("llava", "joint"): dict.fromkeys(
        ("model.vision.", "model.projector.", "heads.object", "heads.corners", "heads.presence"), STILL
    ),
    ("qwen2_5_vl", "vision"): {"model.decoder.": 0.0},
    ("qwen2_5_vl", "joint"): {
        **dict.fromkeys((_LAYERS, "model.vision.patch_embed."), 0.0),
        **dict.fromkeys((_MERGER, "heads.object", "heads.reach"), MERGER_RATE),
    },
    ("qwen3_vl", "vision"): {"model.decoder.": 0.0},
    ("qwen3_vl", "joint"): {
        **dict.fromkeys(("model.vision.", "heads.object", "heads.corners"), MERGER_RATE),
    },
}


def rate_of(name: str, rates: dict[str, float]) -> float:
    """Of a parameter, relative to the rest."""
    return next((rate for prefix, rate in rates.items() if name.startswith(prefix)), 1.0)


def _muon_axes(params: dict, prefixes: tuple[str, ...]) -> dict:
    """Which dimensions Muon takes as rows and columns; None: Adam."""

    def axes(name: str) -> MuonDimensionNumbers | None:
        if not name.startswith(prefixes) or not name.endswith(".kernel"):
            return None
        match name.split(".")[-2]:
            case "q" | "k" | "v":
                return MuonDimensionNumbers(2, (0, 1))
            case "qkv":
                return MuonDimensionNumbers(3, (0, 1, 2))
            case "o":
                return MuonDimensionNumbers((1, 2), 0)
        return MuonDimensionNumbers(1, 0)

    return {name: axes(name) for name in params}


def optimiser(phase: Phase) -> optax.GradientTransformation:
    if not MUON[phase.kind]:
        rate = optax.warmup_cosine_decay_schedule(0.0, 1.5e-3, 100, phase.total, 1e-4)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, min(150, phase.total // 6), phase.total, 0.02)
    learn = muon(
        lambda step: 0.014 * shape(step),
        adam_learning_rate=lambda step: 1.2e-3 * shape(step),
        weight_decay=0.01,
        muon_weight_dimension_numbers=partial(_muon_axes, prefixes=MUON[phase.kind]),
    )
    rates = RATES[phase.kind]
    scale = optax.stateless(
        lambda updates, _: {name: update * rate_of(name, rates) for name, update in updates.items()}
    )
    return optax.chain(optax.clip_by_global_norm(1.0), learn, scale)
