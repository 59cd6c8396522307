"""`python -m convert SRC OUT`: a Hugging Face checkpoint to a converted folder."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from convert.checkpoint import plan
from convert.conversion import check_free, save_converted, stored_params
from convert.families import table_of
from convert.opening import open_checkpoint
from convert.pieces import PARTS
from reroute_jax.commandline.parsing import OUTPUT, RUN, Parser, exit_code
from reroute_jax.errors import RerouteError
from reroute_jax.nn.quantised import TILES
from reroute_jax.types import FLOATS


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(argv)
    # Nothing is computed here, and a GPU's memory may be another program's.
    jax.config.update("jax_platforms", "cpu")
    with suppress(RuntimeError):  # a process that used its devices already keeps them, and stores fewer parts
        jax.config.update("jax_num_cpu_devices", PARTS)
    interrupted = f"error: interrupted, {args.out} was not written: the same command goes on where it was"
    return exit_code(lambda: _convert(args.src, args.out, args.dtype, args.quantise), args.debug, interrupted)


def _convert(src: str, out: Path, dtype: str | None, quantise: str | None) -> None:
    start = time.monotonic()
    check_free(out)
    source, config = open_checkpoint(src)
    if source.manifest is not None:
        raise RerouteError(f"{src} is converted already: expected a Hugging Face checkpoint")
    target = stored_params(config, quantise)
    planned = plan(source, target, table_of(config))
    total = sum(tensor.nbytes for _, tensor in planned)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as bar:
        manifest = save_converted(source, out, planned, target, dtype, bar.update)
    kinds = ", ".join(filter(None, (quantise, dtype or "stored dtypes")))
    print(
        f"{out}: {manifest.tensors} tensors, {manifest.parameters:,} parameters, {manifest.nbytes / 1e9:.2f} GB "
        f"({kinds}), {time.monotonic() - start:.0f} s, peak memory {_peak_bytes() / 1e9:.2f} GB"
    )


def _peak_bytes() -> int:
    """Largest resident size of this process so far. Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _parser() -> Parser:
    examples = (
        "llava-hf/llava-1.5-7b-hf llava-7b",
        "Qwen/Qwen2.5-VL-7B-Instruct qwen-7b --dtype bfloat16",
        "checkpoints/mine converted/mine",
    )
    parser = Parser("convert", __doc__, examples)
    run, output = parser.group(RUN), parser.group(OUTPUT)
    run.add_argument("src", metavar="SRC", help="hub id (owner/model) or checkpoint folder with safetensors")
    output.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    output.add_argument("--dtype", choices=list(FLOATS), help="dtype to store (default: as in SRC)")
    output.add_argument("--quantise", choices=list(TILES), help="of the decoder's weights; needs qwix (default: none)")
    return parser


def _without_late_writes(problem: Any) -> None:
    """An unraisable hook. Where a write fails, Orbax (0.12.8, November 2026) closes its event loop while others still
    run in tensorstore, each of which complains of the loop when it ends; the error itself is raised and told."""
    if not (isinstance(problem.exc_value, RuntimeError) and str(problem.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(problem)


if __name__ == "__main__":
    sys.unraisablehook = _without_late_writes  # of this process, to its end: nobody knows when the last one comes
    sys.exit(main())
