"""PyTorch beside the JAX code, on the same weights: transformers unrouted, and the eager reference routed."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from convert.crosscheck import reference as torch_reference
from convert.crosscheck.plain import image_features
from convert.families import abstract_params, table_of
from convert.table import match
from evals.speed.programs import Answer
from evals.speed.subjects import Sample, Subject
from reroute_jax.engine.batching import Question, lay_out, priors
from reroute_jax.errors import RerouteError
from reroute_jax.nn.params import named_parameters
from reroute_jax.routing.plan import Schedule


def check_device(device: str) -> None:
    """Raises RerouteError where PyTorch cannot run on `device`, the one that JAX runs on."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RerouteError(
            f"JAX runs on a GPU and PyTorch {torch.__version__} sees none, their times would not compare: install a "
            "PyTorch built for this GPU, or leave out --peer torch"
        )


def torch_model(subject: Subject, device: str, threads: int) -> PreTrainedModel:
    """transformers' model with the subject's weights, and `threads` threads for the CPU."""
    torch.set_num_threads(threads)
    config = AutoConfig.for_model(**subject.hf_config)
    kind = getattr(torch, subject.model.dtype)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=kind).eval()
    params, state = named_parameters(subject.model.module), model.state_dict()
    wanted = {path: value.shape for path, value in abstract_params(subject.model.config).items()}
    entries = [(key, "F32", tuple(value.shape)) for key, value in state.items()]
    for assignment in match(table_of(subject.model.config), entries, wanted, subject.name):
        values, target = np.array(params[assignment.path]), state[assignment.key]
        target.copy_(torch.from_numpy(values.view(np.uint8)).view(kind).reshape(target.shape))
    return model


def unrouted(subject: Subject, model: PreTrainedModel, batch: Sample, new_tokens: int) -> Callable[[], Answer]:
    """A call that returns (seconds of tower, prefill, decode; tokens `[B, new_tokens]`), greedy, with transformers'
    attention and cache as they come."""
    config, device = subject.model.config, model.device
    decoder, ids = model.model.language_model, torch.tensor(batch.ids, device=device)
    visual = ids == config.image_token
    images = {"pixel_values": torch.tensor(batch.pixels, device=device, dtype=model.dtype)}
    if batch.thw is not None:
        images["image_grid_thw"] = torch.tensor(batch.thw, device=device)
    found, next_position = subject.model.family.positions(batch.ids[0], [subject.grid], config)
    positions = torch.tensor(found, device=device).unsqueeze(-2).expand(*found.shape[:-1], *ids.shape)

    @torch.no_grad()
    def call() -> Answer:
        marks = [_now(device)]
        features = image_features(model, images)
        marks.append(_now(device))
        embeds = decoder.embed_tokens(ids)
        own, *levels = features.to(embeds.dtype).split(embeds.shape[-1], dim=1)
        embeds[visual] = own
        given = {"inputs_embeds": embeds, "position_ids": positions, "past_key_values": DynamicCache()}
        if levels:
            given |= {"visual_pos_masks": visual, "deepstack_visual_embeds": levels}
        out = decoder(**given, use_cache=True)
        logits = model.lm_head(out.last_hidden_state[:, -1])
        marks.append(_now(device))
        tokens = [logits.argmax(-1)]
        for step in range(new_tokens - 1):
            at = torch.full((*positions.shape[:-1], 1), next_position + step, device=device)
            x = decoder.embed_tokens(tokens[-1][:, None])
            out = decoder(inputs_embeds=x, position_ids=at, past_key_values=out.past_key_values, use_cache=True)
            tokens.append(model.lm_head(out.last_hidden_state[:, -1]).argmax(-1))
        marks.append(_now(device))
        return tuple(np.diff(marks).tolist()), torch.stack(tokens, dim=1).cpu().numpy()

    return call


def routed(
    subject: Subject, model: PreTrainedModel, one: Sample, schedule: Schedule, new_tokens: int
) -> Callable[[], Answer]:
    """The same of the eager reference, which runs one prompt at a time."""
    layout = lay_out(Question(one.ids[0], (subject.grid,)), subject.model.config, schedule)
    prior = priors(schedule, [layout], layout.shape.visual)[:, 0]
    ids: Tensor = torch.tensor(one.ids[0])

    @torch.no_grad()
    def call() -> Answer:
        marks = [time.perf_counter()]
        images = torch_reference.encode(model, one.pixels, one.thw, schedule)
        marks.append(time.perf_counter())
        walk, logits = torch_reference.prefill(model, ids, images, one.thw, schedule, prior)
        marks.append(time.perf_counter())
        tokens = torch_reference.decode(model, ids, logits, walk, new_tokens, (), 1.0)
        marks.append(time.perf_counter())
        return tuple(np.diff(marks).tolist()), np.array([tokens])

    return call


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
