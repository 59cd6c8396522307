"""Train the embedded models from scratch: `python -m evals.scenes.train --out runs/scenes`.

Four phases, each resumable, each ending in a saved state:

    vision   tower, projector and word embeddings on dense targets
    joint    everything, first two thirds of the question-answering steps; from 45% on with more yes/no questions
    plain    the last third -> checkpoint scenes-llava
    bypass   the last third again, in which random visual tokens skip random layers -> scenes-llava-bypass

Which scenes a step sees depends on its number alone, so an interrupted run ends where an undisturbed one does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon
from tqdm import tqdm

from evals.scenes.data import TRAINING_QUESTIONS
from evals.scenes.export import export
from evals.scenes.losses import AuxiliaryHeads, Targets, answer_loss, dense_loss, vision_states
from evals.scenes.packing import Packed, coordinate_starts, pack, soft_labels
from evals.scenes.spec import GRID, model_config
from evals.scenes.tokenizer import vocabulary
from evals.scenes.world import COLOURS, SHAPES, SIZES
from reroute_jax.models.llava import Llava
from reroute_jax.params import named_parameters, with_parameters

SEED = 0
SAVE_EVERY = 250
VALIDATION_SCENES = 64
STILL = 0.08  # learning rate of tower, projector and dense heads after the vision phase, relative to the rest
EARLY_MIX = TRAINING_QUESTIONS
LATE_MIX = {"attribute": 2, "place": 2, "relation": 2, "yesno": 8, "colour": 1, "count": 1}
DENSE_SHARE, POINTER_SHARE = 0.4, 0.25
BYPASS_SHARE = 0.65  # of the rows of a bypass step; segments of 1 to 3 layers keep 15 to 90% of the visual tokens


@dataclass(frozen=True)
class Phase:
    """Steps [start, stop) on `rows` scenes each; starts from the end of phase `after`."""

    name: str
    after: str | None
    start: int
    stop: int
    rows: int


def phases(vision_steps: int, joint_steps: int) -> tuple[Phase, ...]:
    branch = joint_steps * 2 // 3
    return (
        Phase("vision", None, 0, vision_steps, 64),
        Phase("joint", "vision", 0, branch, 8),
        Phase("plain", "joint", branch, joint_steps, 8),
        Phase("bypass", "joint", branch, joint_steps, 8),
    )


class Trainee(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        config = model_config()
        self.model = Llava(config, rngs=rngs, dtype=jnp.float32)
        kinds = len(SHAPES) + len(COLOURS) + len(SIZES)
        self.heads = AuxiliaryHeads(config.vision.hidden_size, config.decoder.hidden_size, kinds, rngs=rngs)


def targets() -> Targets:
    vocab = vocabulary()
    words = tuple(tuple(vocab[word] for word in group) for group in (SHAPES, COLOURS, SIZES))
    return Targets(words, tuple(coordinate_starts()))


def vision_loss(params: dict, batch: Packed, trainee: Trainee, soft):
    trainee = with_parameters(trainee, params)
    states = vision_states(trainee.model.vision, batch.images)
    features = trainee.model.projector(states[trainee.model.config.feature_layer][:, 1:])
    loss, accuracy = dense_loss(trainee.model, trainee.heads, states, features, batch, targets(), soft)
    return loss, {"dense": loss, "shape": accuracy[0], "colour": accuracy[1], "size": accuracy[2]}


def joint_loss(params: dict, batch: Packed, bypass, trainee: Trainee, soft):
    trainee = with_parameters(trainee, params)
    model, heads = trainee.model, trainee.heads
    states = vision_states(model.vision, batch.images)
    features = model.projector(states[model.config.feature_layer][:, 1:])
    dense, _ = dense_loss(model, heads, states, features, batch, targets(), soft)
    answer, pointer, predicted = answer_loss(model, heads, features, batch, bypass, soft)
    total = answer + DENSE_SHARE * dense + POINTER_SHARE * pointer
    return total, {"answer": answer, "dense": dense, "pointer": pointer, "predicted": predicted}


def _muon_axes(params: dict) -> dict:
    """Muon for the decoder's matrices, Adam (None) for everything else."""

    def axes(name: str) -> MuonDimensionNumbers | None:
        if not name.startswith("model.decoder.layers.") or not name.endswith(".kernel"):
            return None
        if name.split(".")[-2] in "qkv":
            return MuonDimensionNumbers(0, (1, 2))
        return MuonDimensionNumbers((0, 1), 2) if name.split(".")[-2] == "o" else MuonDimensionNumbers(0, 1)

    return {name: axes(name) for name in params}


def _is_vision(name: str) -> bool:
    return name.startswith(("model.vision.", "model.projector.", "heads.object", "heads.corners", "heads.presence"))


def optimiser(phase: Phase, total: int) -> optax.GradientTransformation:
    if phase.name == "vision":
        rate = optax.warmup_cosine_decay_schedule(0.0, 1.5e-3, 100, total, 1e-4)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, 150, total, 0.02)
    learn = muon(
        lambda step: 0.014 * shape(step),
        adam_learning_rate=lambda step: 1.2e-3 * shape(step),
        weight_decay=0.01,
        muon_weight_dimension_numbers=_muon_axes,
    )
    slow = optax.stateless(
        lambda updates, _: {name: update * (STILL if _is_vision(name) else 1.0) for name, update in updates.items()}
    )
    return optax.chain(optax.clip_by_global_norm(1.0), learn, slow)


def random_bypass(step: int, layers: int, rows: int) -> np.ndarray:
    """`[layers, rows, patches]`: True where a visual token skips a layer."""
    rng = np.random.default_rng((SEED, step))
    bypass = np.zeros((layers, rows, GRID * GRID), bool)
    for row in np.flatnonzero(rng.random(rows) < BYPASS_SHARE):
        layer = 1
        while layer < layers:
            length = int(rng.integers(1, 4))
            bypass[layer : layer + length, row] = rng.random(GRID * GRID) > rng.uniform(0.15, 0.9)
            layer += length
    return bypass


def mix(phase: Phase, step: int, total: int) -> dict[str, int]:
    """Questions of each kind a scene is packed with. Boxes are learned first; yes/no takes longest."""
    return EARLY_MIX if phase.name == "vision" or step < 0.45 * total else LATE_MIX


def batches(phase: Phase, first: int, total: int) -> Iterator[tuple[int, Packed]]:
    """Numbered batches from step `first` on, packed ahead of time in another process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead = {}
        for step in range(first, phase.stop):
            for future in range(step, min(step + 12, phase.stop)):
                if future not in ahead:
                    asked = mix(phase, future, total)
                    ahead[future] = pool.submit(pack, "train", future * phase.rows, phase.rows, asked)
            yield step, ahead.pop(step).result()


def answer_scores(predicted: np.ndarray, batch: Packed) -> dict[str, float]:
    """Teacher-forced: ACC@0.5 of the boxes read off slot by slot, and accuracy of VQA answers by kind."""
    vocab, starts = vocabulary(), coordinate_starts()
    kinds = {"yesno": ("yes", "no"), "colour": COLOURS, "count": tuple("012345")}
    hits: dict[str, list[float]] = {"ACC@0.5": [], **{kind: [] for kind in kinds}}
    for row, number in np.argwhere(batch.target >= 0):
        corners = slice(batch.ask[row, number], batch.ask[row, number] + 4)
        true, found = batch.label[row, number, corners], predicted[row, number, corners]
        hits["ACC@0.5"].append(_iou(true - np.array(starts), found - np.array(starts)) >= 0.5)
    for kind, answers in kinds.items():
        where = np.isin(batch.label, [vocab[answer] for answer in answers])
        hits[kind].extend((predicted == batch.label)[where])
    return {name: float(np.mean(values)) for name, values in hits.items()}


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    inside = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    union = (a[2:] - a[:2]).prod() + np.clip(b[2:] - b[:2], 0, None).prod() - inside
    return float(inside / max(union, 1))


def run_phase(phase: Phase, total: int, out: Path) -> dict:
    """Train one phase, resuming from its last saved step; returns the final parameters."""
    trainee = Trainee(rngs=nnx.Rngs(SEED))
    soft, config = jnp.asarray(soft_labels()), model_config()
    solver = optimiser(phase, total)
    params = named_parameters(trainee)
    if phase.after is not None:
        params = restore(out / phase.after, params)
    continues = phase.name in ("plain", "bypass")
    state = {"params": params, "solver": solver.init(params)}
    manager = ocp.CheckpointManager(out / phase.name, options=ocp.CheckpointManagerOptions(max_to_keep=1))
    if manager.latest_step() is not None:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
    elif continues:
        with ocp.CheckpointManager(out / phase.after) as before:
            state = before.restore(before.latest_step(), args=ocp.args.StandardRestore(state))
    first = manager.latest_step() or phase.start
    loss = partial(vision_loss, trainee=trainee, soft=soft)
    if phase.name != "vision":
        loss = partial(joint_loss, trainee=trainee, soft=soft)

    @partial(jax.jit, donate_argnums=0)
    def update(state: dict, *inputs):
        (_, logs), gradients = jax.value_and_grad(loss, has_aux=True)(state["params"], *inputs)
        updates, solved = solver.update(gradients, state["solver"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "solver": solved}, logs

    evaluate = jax.jit(loss)
    validation = pack("val", 0, VALIDATION_SCENES, EARLY_MIX)
    nothing = np.zeros((config.num_layers, phase.rows, GRID * GRID), bool)
    none_validation = np.zeros((config.num_layers, VALIDATION_SCENES, GRID * GRID), bool)
    curve = (out / "curve.jsonl").open("a")
    bar = tqdm(total=phase.stop, initial=first, desc=phase.name, unit="step", mininterval=5)
    begun = time.monotonic()
    for step, batch in batches(phase, first, total):
        bypass = random_bypass(step, config.num_layers, phase.rows) if phase.name == "bypass" else nothing
        state, _ = update(state, batch, *(() if phase.name == "vision" else (bypass,)))
        bar.update()
        done = step + 1
        if done % SAVE_EVERY == 0 or done == phase.stop:
            extra = () if phase.name == "vision" else (none_validation,)
            _, checked = evaluate(state["params"], validation, *extra)
            predicted = checked.pop("predicted", None)
            line = {name: round(float(value), 4) for name, value in checked.items()}
            if predicted is not None:
                line |= answer_scores(np.asarray(predicted), validation)
            line = {"phase": phase.name, "step": done, "seconds": round(time.monotonic() - begun), **line}
            curve.write(json.dumps(line) + "\n")
            curve.flush()
            bar.write(json.dumps(line))
            manager.save(done, args=ocp.args.StandardSave(state))
    bar.close()
    manager.close()
    return state["params"]


def restore(folder: Path, params: dict) -> dict:
    """The parameters at the end of a finished phase."""
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
        whole = manager.restore(step, args=ocp.args.StandardRestore())
    return {name: jnp.asarray(whole["params"][name]) for name in params}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.scenes.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"), help="states, curve and checkpoints")
    parser.add_argument("--vision-steps", type=int, default=1400)
    parser.add_argument("--joint-steps", type=int, default=3900)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for phase in phases(arguments.vision_steps, arguments.joint_steps):
        total = arguments.vision_steps if phase.name == "vision" else arguments.joint_steps
        params = run_phase(phase, total, out)
        if phase.name in ("plain", "bypass"):
            model = {name.removeprefix("model."): value for name, value in params.items() if name.startswith("model.")}
            export(model, out / {"plain": "scenes-llava", "bypass": "scenes-llava-bypass"}[phase.name])


if __name__ == "__main__":
    main()
