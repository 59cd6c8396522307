"""The embedded models: small checkpoints that ship with the rendered scenes they were trained on, found by name.

They are data in a folder of `evals`, beside this package in a checkout and where it is installed; none of that
package's code is imported.
"""

from __future__ import annotations

from pathlib import Path

from reroute_jax.errors import RerouteError

CHECKPOINTS = Path(__file__).parents[1] / "evals" / "scenes" / "checkpoints"
EMBEDDED = ("scenes-llava", "scenes-llava-bypass", "scenes-qwen", "scenes-qwen3")
CAVEATS = {
    "scenes-llava-bypass": "the last third of this checkpoint's training bypassed random visual tokens, which is close "
    "to rerouting: its numbers are no evidence for a training-free claim",
}


def locate(model: str) -> str:
    """The folder of an embedded model; any other name, a hub id or a path, as it is.

    Raises RerouteError for an embedded model that is not where it should be.
    """
    if model not in EMBEDDED:
        return model
    path = CHECKPOINTS / model
    if not (path / "config.json").is_file():
        raise RerouteError(f"the embedded model {model} is not at {path}: make it with `python -m evals.scenes.train`")
    return str(path)
