"""A model of this project as a chat model of lmms-eval, which alone imports this module."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from convert.embedded import EMBEDDED
from evals.harness.cli import load_model
from evals.harness.routes import check_routes, plan_routes
from evals.harness.runner import sized_batches
from reroute_jax.commandline.parsing import budget
from reroute_jax.commandline.routes import SWITCH_ARGUMENTS
from reroute_jax.errors import RerouteError, one_of
from reroute_jax.models import FAMILIES
from reroute_jax.routing.found import FOUND
from reroute_jax.routing.methods import METHODS

ROUTE_OPTIONS = ("method", "action", "budget", "preset", "schedule", *SWITCH_ARGUMENTS)


@dataclass(frozen=True)
class PluginRequest:
    """One request. place: among those of its call."""

    place: int
    images: list[Image.Image]
    text: str


class RerouteJax(lmms):
    """Greedy answers, as the reference's own classes for these families decode, under one schedule.

    pretrained, dtype, mrope_compat, quantise, kv_cache: as --model, --dtype, --mrope-compat, --quantise and --kv-cache
    of this project's commands. batch_size: questions at a time. device, max_batch_size: lmms-eval passes them to every
    model; they have no meaning here. options: the commands' arguments for routing, with underscores: method, action,
    budget, preset, schedule, seed and the switches of methods. Without any all tokens run. Raises RerouteError for
    options that are unknown or do not fit.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = EMBEDDED[0],
        dtype: str | None = None,
        mrope_compat: str | None = None,
        quantise: str | None = None,
        kv_cache: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise RerouteError(f"batch_size is {batch_size!r}, expected a whole number from 1 on")
        routing = _route_arguments(options)
        self.batch_size = int(batch_size)
        self.model = load_model(pretrained, dtype, mrope_compat, quantise=quantise, kv_cache=kv_cache)
        self.schedule = plan_routes(routing, self.model).runs[-1].schedule

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in the order of the requests. Batches are those of this project's runner on the same task."""
        answers: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), desc=self.schedule.label, unit="question", disable=self.rank != 0) as bar:
            for (_, _, limit), places in groupby(range(len(requests)), lambda place: self._kind(requests[place])):
                questions = (self._question(requests[place], place) for place in places)
                for batch in sized_batches(questions, self.batch_size, self._visual_tokens):
                    pairs = [(one.images, one.text) for one in batch]
                    how = {"schedule": self.schedule, "max_new_tokens": limit, "batch_size": self.batch_size}
                    for one, text in zip(batch, self.model.generate(pairs, **how), strict=True):
                        answers[one.place] = text
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        raise NotImplementedError("reroute_jax generates answers and has no likelihoods: choose a generate_until task")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        raise NotImplementedError("reroute_jax answers one question at a time: choose a generate_until task")

    def _kind(self, request: Instance) -> tuple[str, str, int]:
        """Task, split, and length of the answer: the task's, or what the reference's class for the family takes.

        `until` is ignored, as there. Raises RerouteError for a task that is not decoded greedily.
        """
        _, _, asked, _, task, split = request.args
        if asked.get("do_sample") or asked.get("temperature") or (asked.get("num_beams") or 1) != 1:
            raise RerouteError(f"{task} asks for sampling or beams ({dict(asked)}): only greedy decoding is supported")
        return task, split, asked.get("max_new_tokens") or FAMILIES[self.model.config.family].evaluation.max_new_tokens

    def _question(self, request: Instance, place: int) -> PluginRequest:
        """Raises RerouteError for what is not one user turn of decoded images and then one text."""
        _, messages_of, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=messages_of(self.task_dict[task][split][doc_id])).messages
        parts = [part for message in messages for part in message.content]
        kinds, roles = [part.type for part in parts], [message.role for message in messages]
        images = [part.url for part in parts if part.type == "image"]
        decoded = all(isinstance(image, Image.Image) for image in images)
        if roles != ["user"] or kinds != ["image"] * len(images) + ["text"] or not decoded:
            raise RerouteError(
                f"{task}, document {doc_id} has {', '.join(kinds)} in turns of {', '.join(roles)}: expected one user "
                "turn of decoded images and then one text"
            )
        return PluginRequest(place, images, parts[-1].text)

    def _visual_tokens(self, question: PluginRequest) -> int:
        return sum(math.prod(self.model.visual_grid(image)) for image in question.images)


def _route_arguments(options: Mapping[str, Any]) -> argparse.Namespace:
    """What the commands' parser would make of the options."""
    unknown = [name for name in options if name not in (*ROUTE_OPTIONS, "seed")]
    if unknown:
        raise RerouteError(f"unknown options {', '.join(unknown)}, expected some of {', '.join(ROUTE_OPTIONS)}, seed")
    given = {**dict.fromkeys(ROUTE_OPTIONS), "seed": 0, "compare": False, "controls": False, **options}
    if given["preset"] is None and given["schedule"] is None and given["method"] in (None, "none"):
        without = [name for name in options if name not in ("method", "seed")]
        if without:
            raise RerouteError(f"all tokens run without a method, which has no use for {', '.join(without)}: name one")
        given["method"] = "none"
    if given["method"] is not None:
        one_of("method", given["method"], (*METHODS, FOUND))
    if given["budget"] is not None:
        try:
            given["budget"] = budget(str(given["budget"]))
        except argparse.ArgumentTypeError as error:
            raise RerouteError(f"budget {error}") from error
    args = argparse.Namespace(**given)
    check_routes(args)
    return args
