"""`python -m reroute_jax.serve --model scenes-llava --method pdrop --budget 128`

An OpenAI-style endpoint that routes. Requests are answered side by side on a fixed number of slots; a request may name
one of the plans that the server was started with. All programs are compiled before the first one.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import reroute_jax
from reroute_jax.buckets import TEXT_BUCKETS, bucket
from reroute_jax.commandline.loading import add_bits_arguments, load_options
from reroute_jax.commandline.parsing import RUN, SERVE, Parser, argument_of, exit_code, new_tokens, positive, whole
from reroute_jax.commandline.routes import (
    add_route_arguments,
    check_fixed,
    fixed_schedule,
    given_route,
    given_switches,
)
from reroute_jax.errors import RerouteError
from reroute_jax.serving.plans import Plan, plan_words, planned
from reroute_jax.types import FLOATS

if TYPE_CHECKING:
    from reroute_jax.engine.model import Model

DEFAULT_METHOD = "pdrop"
KEY_VARIABLE = "REROUTE_API_KEY"
MOST_PORTS = 65_535


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _serve(args), args.debug)


def _serve(args: argparse.Namespace) -> None:
    # The web stack is an extra: a machine without it is told before anything is loaded.
    from reroute_jax.engine.compilation import keep_programs
    from reroute_jax.serving.buckets import Limits
    from reroute_jax.serving.server import Options, open_socket, serve

    _log_warnings()
    check_fixed(args, given_route(args))
    key = args.api_key or _key(os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE)
    listener = open_socket(args.host, args.port)
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    model = reroute_jax.load(args.model, args.dtype, **load_options(args))
    limits = Limits(
        slots=args.max_batch,
        token_budget=args.token_budget,
        text=args.max_text,
        images=args.max_images,
        image_sizes=args.image_sizes,
        new_tokens=args.max_tokens,
        image_cache=args.image_cache * 2**20,
    )
    options = Options(Path(args.model).name, limits, args.queue, args.max_body * 2**20, args.allow_fetch, key)
    serve(model, plans_of(args, model), options, listener)


def plans_of(args: argparse.Namespace, model: Model) -> list[Plan]:
    """That of the routing arguments first. Raises RerouteError for one that is not for this model."""
    fixed, switches = fixed_schedule(args, model.config.num_layers), given_switches(args)
    if fixed is not None:
        first = Plan(fixed.label, None, None, fixed)
    else:
        first = planned(model, args.method or DEFAULT_METHOD, args.budget, args.action, switches)
    return [first, *(planned(model, method, budget, action, {}) for method, budget, action in args.also or ())]


def _key(text: str, where: str) -> str | None:
    """None for no text. Raises RerouteError for what no header can bear."""
    if text and not re.fullmatch(r"[!-~]+", text):
        raise RerouteError(f"{where} is no key, expected ASCII characters without spaces")
    return text or None


@argument_of
def _api_key(text: str) -> str:
    """argparse type."""
    if not text:
        raise RerouteError("an empty key would let everybody in: leave --api-key out for that")
    return _key(text, "this")


def _log_warnings() -> None:
    errors = logging.StreamHandler()
    errors.setLevel(logging.WARNING)
    logging.getLogger().addHandler(errors)


@argument_of
def _buckets(text: str) -> tuple[int, ...]:
    """argparse type: numbers of text tokens, each as the bucket that holds it."""
    return tuple(
        sorted({bucket(positive(part), TEXT_BUCKETS, "a prompt, in text tokens,") for part in text.split(",")})
    )


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    """argparse type: WIDTHxHEIGHT, several with commas between them."""
    found = [re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", part) for part in text.split(",")]
    if None in found:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes, expected such as 448x448,640x480")
    return tuple((int(size[1]), int(size[2])) for size in found)


def _port(text: str) -> int:
    number = whole(text)
    if number > MOST_PORTS:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, expected 0 to {MOST_PORTS}")
    return number


@argument_of
def _host(text: str) -> str:
    """argparse type: what a socket can be bound to."""
    try:
        text.encode("idna")
    except UnicodeError:
        raise RerouteError(f"{text[:40]!r} is no host") from None
    if not text:
        raise RerouteError("an empty host would be all addresses: give 0.0.0.0 for that")
    return text


@argument_of
def _hosts(text: str) -> frozenset[str]:
    """argparse type: names of hosts, as they stand in URLs, with commas between them."""
    hosts = frozenset(host.strip().lower() for host in text.split(",") if host.strip())
    for host in hosts:
        if "/" in host or host.count(":") == 1:
            raise RerouteError(f"{host[:40]!r} is no host, expected such as example.org, without scheme, port and path")
    return hosts


def _parser() -> Parser:
    examples = (
        "--model scenes-llava --method pdrop --budget 128",
        "--model scenes-llava --also none --also pdrop:2/9:delete --max-text 64,256 --max-batch 4",
        "--model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --host 0.0.0.0 --api-key secret --allow-fetch example.org",
    )
    parser = Parser("reroute_jax.serve", __doc__, examples)
    add_route_arguments(parser, DEFAULT_METHOD)
    run, served = parser.group(RUN), parser.group(SERVE)
    run.add_argument(
        "--model",
        default="scenes-llava",
        help="hub id, folder in HF format, converted folder, or an embedded model (default: %(default)s)",
    )
    run.add_argument(
        "--dtype",
        choices=tuple(FLOATS),
        help="(default: float32 for the embedded models, the checkpoint's own otherwise)",
    )
    add_bits_arguments(parser)
    run.add_argument(
        "--also",
        type=argument_of(plan_words),
        action="append",
        metavar="PLAN",
        help="METHOD, METHOD:BUDGET or METHOD:BUDGET:ACTION, another plan that requests may ask for; may be repeated",
    )
    run.add_argument(
        "--max-batch",
        type=positive,
        default=8,
        help="answers side by side, of each plan and bucket (default: %(default)s)",
    )
    run.add_argument(
        "--token-budget",
        type=positive,
        default=2048,
        help="slots at the decoder's input, text and images, that are prefilled at a time (default: %(default)s)",
    )
    run.add_argument(
        "--max-text",
        type=_buckets,
        default="128",
        metavar="TOKENS",
        help="of a prompt; several, such as 64,256, are a bucket each, and a prompt takes the smallest that holds it "
        "(default: %(default)s)",
    )
    run.add_argument("--max-images", type=whole, default=1, help="of a prompt (default: %(default)s)")
    run.add_argument(
        "--image-sizes",
        type=_sizes,
        default="448x448",
        metavar="SIZES",
        help="in pixels, such as 448x448,640x480, for Qwen, which sees each image in its own size: one size "
        "for all that have about as many visual tokens (default: %(default)s)",
    )
    run.add_argument("--max-tokens", type=new_tokens, default=256, help="of an answer (default: %(default)s)")
    run.add_argument(
        "--image-cache",
        type=whole,
        default=0,
        metavar="MB",
        help="MiB of device memory, and as much of the host's, for images that are asked about again: what runs before "
        "the first decision is kept, and later questions begin behind it (default: %(default)s, none)",
    )
    run.add_argument("--compilation-cache", type=Path, metavar="DIR", help="keep compiled programs there")
    served.add_argument(
        "--host", type=_host, default="127.0.0.1", help="to listen on, 0.0.0.0 for all (default: %(default)s)"
    )
    served.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)")
    served.add_argument(
        "--queue",
        type=positive,
        default=64,
        help="requests that may wait for a slot, others get 429 (default: %(default)s)",
    )
    served.add_argument("--max-body", type=positive, default=20, help="of a request, in MiB (default: %(default)s)")
    served.add_argument(
        "--allow-fetch",
        type=_hosts,
        default=frozenset(),
        metavar="HOSTS",
        help="hosts, with commas between them, that images are fetched from (default: none, images come as data URLs)",
    )
    served.add_argument(
        "--api-key",
        type=_api_key,
        help=f"that requests must bear as a token (default: {KEY_VARIABLE} of the environment, if any)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
