"""What the evaluation commands share: one-line errors, exit codes, the model argument."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from evals.runner import fingerprint
from reroute_jax.errors import RerouteError

CHECKPOINTS = Path(__file__).parent / "scenes" / "checkpoints"
EMBEDDED = ("scenes-llava", "scenes-llava-bypass")
DTYPES = ("float32", "bfloat16", "float16")
PACKAGES = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy", "pillow")
CAVEATS = {
    "scenes-llava-bypass": "the last third of this checkpoint's training bypassed random visual tokens, which resembles "
    "rerouting: its numbers are no evidence for a training-free claim",
}

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """argparse with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message} ({self.prog} --help)\n")


def exit_code(command: Callable[[], None]) -> int:
    """Run `command`: 0, or 2 after one line on bad input, or 130 after one line on Ctrl-C."""
    try:
        command()
    except (RerouteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the last whole batch", file=sys.stderr)
        return INTERRUPTED
    return 0


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=EMBEDDED[0],
        help=f"hub id, folder in HF format, converted folder, or one of {', '.join(EMBEDDED)} (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: float32 for the embedded models, the checkpoint's own otherwise"
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--seed", type=int, default=0, help="of the method `random` and of the intervals (default: 0)")
    parser.add_argument("--out", type=Path, help="run folder (default: one below runs/ named after the settings)")


def positive(text: str) -> int:
    """argparse type: a whole number from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def load_model(name: str, dtype: str | None) -> Any:
    """reroute_jax.load for a --model argument."""
    import reroute_jax

    path = _embedded(name)
    return reroute_jax.load(name, dtype=dtype) if path is None else reroute_jax.load(path, dtype=dtype or "float32")


def model_settings(name: str, dtype: str | None) -> Mapping[str, Any]:
    """What identifies the model in a run's settings. A local folder counts with its content, not its name alone."""
    path = _embedded(name) or Path(name).expanduser()
    dtype = dtype or ("float32" if name in EMBEDDED else "checkpoint")
    return {"model": name, "model_files": fingerprint(path) if path.exists() else None, "dtype": dtype}


def versions() -> dict[str, str]:
    """Versions of the packages that can change an answer."""
    return {package: metadata.version(package) for package in PACKAGES}


def _embedded(name: str) -> Path | None:
    if name not in EMBEDDED:
        return None
    path = CHECKPOINTS / name
    if not (path / "config.json").is_file():
        raise RerouteError(f"the embedded model {name} is not at {path}: make it with `python -m evals.scenes.train`")
    return path
