"""Train the embedded models: `python -m evals.scenes.train --family llava --out runs/scenes`.

Phases, each resumable, each ending in a saved state. LLaVA, from scratch:

    vision   tower, projector and word embeddings on dense targets
    joint    everything, first two thirds of the question-answering steps; from 45% on with more yes/no questions
    plain    the last third -> checkpoint scenes-llava
    bypass   the last third again, in which random visual tokens skip random layers -> scenes-llava-bypass

Qwen2.5-VL, from scratch but for the words, whose embeddings and output rows are those of the shipped scenes-llava:

    vision   tower on dense targets
    joint    all but the tower's blocks; from half of the steps on with more yes/no questions -> checkpoint scenes-qwen

Qwen3-VL, whose words and decoder begin as those of the shipped scenes-llava, four layers of which are there twice:

    vision   tower, mergers and learned positions on dense targets
    joint    everything, the tower more slowly; later with more yes/no and counting -> checkpoint scenes-qwen3

Which scenes a step sees depends on its number alone, so an interrupted run ends where an undisturbed one does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

from convert.loading import load
from evals.harness.cli import add_fresh_argument
from evals.harness.identity import fingerprint, software
from evals.harness.run_folder import RUN_FILES, run_folder
from evals.scenes.data import TRAINING_QUESTIONS
from evals.scenes.spec import IMAGE_SLOTS, model_config
from evals.scenes.tokenizer import vocabulary
from evals.scenes.training.export import export
from evals.scenes.training.losses import AuxiliaryHeads, answer_loss, dense_loss, targets
from evals.scenes.training.packing import Packed, coordinate_starts, pack, soft_labels
from evals.scenes.training.recipes import RATES, STEPS, Phase, optimiser, phases, rate_of
from evals.scenes.training.towers import look
from evals.scenes.training.warm import with_layers, with_local_attention, with_words
from evals.scenes.world import COLOURS
from reroute_jax.commandline.parsing import OUTPUT, RUN, Parser, exit_code, positive
from reroute_jax.models.llava import Llava
from reroute_jax.models.qwen2_5_vl import QwenVL
from reroute_jax.models.qwen3_vl import Qwen3VL
from reroute_jax.nn.params import named_parameters, with_parameters

SEED = 0
WARM_START = Path(__file__).parent / "checkpoints" / "scenes-llava"
SAVE_EVERY = 100
VALIDATION_SCENES = 32
DENSE_SHARE, POINTER_SHARE, PLACE_SHARE = 0.4, 0.25, 0.4
BYPASS_SHARE = 0.65  # of the rows of a bypass step; segments of 1 to 3 layers keep 15 to 90% of the visual tokens


class Trainee(nnx.Module):
    def __init__(self, family: str, *, rngs: nnx.Rngs):
        config = model_config(family)
        model = {"llava": Llava, "qwen2_5_vl": QwenVL, "qwen3_vl": Qwen3VL}[family]
        self.model = model(config, rngs=rngs, dtype=jnp.float32)
        self.heads = AuxiliaryHeads(family, config.vision.hidden_size, config.decoder.hidden_size, rngs=rngs)


def vision_loss(params: dict, batch: Packed, trainee: Trainee, soft):
    trainee = with_parameters(trainee, params)
    model, asked = trainee.model, targets(trainee.model.config.family)
    loss, accuracy = dense_loss(model, trainee.heads, look(model, batch.images), batch, asked, soft)
    return loss, {"dense": loss, "shape": accuracy[0], "colour": accuracy[1], "size": accuracy[2]}


def joint_loss(params: dict, batch: Packed, bypass, trainee: Trainee, soft):
    trainee = with_parameters(trainee, params)
    model, heads, asked = trainee.model, trainee.heads, targets(trainee.model.config.family)
    seen = look(model, batch.images)
    dense, _ = dense_loss(model, heads, seen, batch, asked, soft)
    answer, pointer, place, predicted = answer_loss(model, heads, seen, batch, bypass, asked, soft)
    total = answer + DENSE_SHARE * dense + POINTER_SHARE * pointer + PLACE_SHARE * place
    return total, {"answer": answer, "dense": dense, "pointer": pointer, "place": place, "predicted": predicted}


def random_bypass(step: int, layers: int, rows: int, patches: int) -> np.ndarray:
    """`[layers, rows, patches]`: True where a visual token skips a layer."""
    rng = np.random.default_rng((SEED, step))
    bypass = np.zeros((layers, rows, patches), bool)
    for row in np.flatnonzero(rng.random(rows) < BYPASS_SHARE):
        layer = 1
        while layer < layers:
            length = int(rng.integers(1, 4))
            bypass[layer : layer + length, row] = rng.random(patches) > rng.uniform(0.15, 0.9)
            layer += length
    return bypass


def batches(phase: Phase, first: int) -> Iterator[tuple[int, Packed]]:
    """Numbered batches from step `first` on, packed ahead of time in another process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead = {}
        for step in range(first, phase.stop):
            for future in range(step, min(step + 12, phase.stop)):
                if future not in ahead:
                    asked, start = phase.mix(future), future * phase.rows
                    ahead[future] = pool.submit(pack, "train", start, phase.rows, asked, phase.family)
            yield step, ahead.pop(step).result()


def answer_scores(predicted: np.ndarray, batch: Packed, family: str) -> dict[str, float]:
    """Teacher-forced: ACC@0.5 of the boxes read off slot by slot, and accuracy of VQA answers by kind."""
    vocab, starts = vocabulary(family), coordinate_starts(family)
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


def run_phase(phase: Phase, out: Path) -> dict:
    """Train one phase, resuming from its last saved step; returns the final parameters."""
    trainee = Trainee(phase.family, rngs=nnx.Rngs(SEED))
    config, patches = model_config(phase.family), IMAGE_SLOTS[phase.family]
    soft = jnp.asarray(soft_labels(phase.family))
    solver = optimiser(phase)
    params = named_parameters(trainee)
    if phase.after is not None:
        params = restore(out / phase.after, params)
    elif phase.family != "llava":
        params = warm_start(phase.family, params)
    # Committed to its device, as what `update` makes of restored parameters is: step two would compile it again.
    state = jax.device_put({"params": params, "solver": solver.init(params)}, jax.devices()[0])
    manager = ocp.CheckpointManager(out / phase.name, options=ocp.CheckpointManagerOptions(max_to_keep=1))
    if manager.latest_step() is not None:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
    elif phase.branches:
        with ocp.CheckpointManager(out / phase.after) as before:
            state = before.restore(before.latest_step(), args=ocp.args.StandardRestore(state))
    first = manager.latest_step() or phase.start
    loss = partial(vision_loss if phase.name == "vision" else joint_loss, trainee=trainee, soft=soft)

    def learning(params: dict, *inputs):
        """The loss without gradients for what does not learn: they would take a fifth of a step."""
        rates = RATES[phase.kind]
        held = {name: jax.lax.stop_gradient(value) for name, value in params.items() if rate_of(name, rates) == 0}
        return loss({**params, **held}, *inputs)

    @partial(jax.jit, donate_argnums=0)
    def update(state: dict, *inputs):
        (_, logs), gradients = jax.value_and_grad(learning, has_aux=True)(state["params"], *inputs)
        updates, solved = solver.update(gradients, state["solver"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "solver": solved}, logs

    evaluate = jax.jit(loss)
    validation = pack("val", 0, VALIDATION_SCENES, TRAINING_QUESTIONS, phase.family)
    nothing, none_validation = (
        np.zeros((config.num_layers, rows, patches), bool) for rows in (phase.rows, VALIDATION_SCENES)
    )
    curve = (out / "curve.jsonl").open("a")
    bar = tqdm(total=phase.stop, initial=first, desc=phase.name, unit="step", mininterval=5)
    begun = time.monotonic()
    for step, batch in batches(phase, first):
        bypass = nothing
        if phase.name == "bypass":
            bypass = random_bypass(step, config.num_layers, phase.rows, patches)
        state, _ = update(state, batch, *(() if phase.name == "vision" else (bypass,)))
        bar.update()
        done = step + 1
        if done % SAVE_EVERY == 0 or done == phase.stop:
            extra = () if phase.name == "vision" else (none_validation,)
            _, checked = evaluate(state["params"], validation, *extra)
            predicted = checked.pop("predicted", None)
            line = {name: round(float(value), 4) for name, value in checked.items()}
            if predicted is not None:
                line |= answer_scores(np.asarray(predicted), validation, phase.family)
            line = {"phase": phase.name, "step": done, "seconds": round(time.monotonic() - begun), **line}
            curve.write(json.dumps(line) + "\n")
            curve.flush()
            bar.write(json.dumps(line))
            manager.save(done, args=ocp.args.StandardSave(state))
    bar.close()
    manager.close()
    return state["params"]


def warm_start(family: str, params: dict) -> dict:
    """A Qwen family's fresh parameters with what they begin with of the shipped LLaVA."""
    llava = named_parameters(load(WARM_START, "float32").module)
    params = with_words(llava, params, family)
    return with_local_attention(with_layers(llava, params)) if family == "qwen3_vl" else params


def restore(folder: Path, params: dict) -> dict:
    """The parameters at the end of a finished phase."""
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
        whole = manager.restore(step, args=ocp.args.StandardRestore())
    return {name: jnp.asarray(whole["params"][name]) for name in params}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(
        "evals.scenes.train",
        __doc__.splitlines()[0],
        ("--family llava", "--family qwen3_vl --out runs/qwen3", "--vision-steps 20 --joint-steps 30 --fresh"),
    )
    run = parser.group(RUN)
    run.add_argument("--family", choices=tuple(STEPS), default="llava", help="(default: %(default)s)")
    run.add_argument("--vision-steps", type=positive, help="(default: those of the shipped checkpoints)")
    run.add_argument("--joint-steps", type=positive, help="likewise")
    parser.group(OUTPUT).add_argument(
        "--out", type=Path, help="states, curve and checkpoints (default: runs/scenes/FAMILY)"
    )
    add_fresh_argument(parser)
    args = parser.parse_args(argv)
    stopped = "stopped: the same command goes on from the last saved state"
    return exit_code(lambda: train(args), args.debug, stopped)


def train(args: argparse.Namespace) -> None:
    """All phases of a family. Raises RerouteError for a folder whose states were made otherwise, or are being made."""
    family = args.family
    out = (args.out or Path("runs/scenes") / family).resolve()
    vision, joint = STEPS[family]
    planned = phases(family, args.vision_steps or vision, args.joint_steps or joint)
    settings = {
        "seed": SEED,
        "phases": [asdict(phase) for phase in planned],
        "identity": {"warm_start": None if family == "llava" else fingerprint(WARM_START), **software()},
    }
    made = [name for phase in planned for name in (phase.name, phase.checkpoint) if name is not None]
    with run_folder(out, settings, args.fresh, owned=(*RUN_FILES, *made)):
        for phase in planned:
            params = run_phase(phase, out)
            if phase.checkpoint is not None:
                model = {
                    name.removeprefix("model."): value for name, value in params.items() if name.startswith("model.")
                }
                export(model, out / phase.checkpoint, family)


if __name__ == "__main__":
    sys.exit(main())
