"""One evaluation by several processes: they meet through `jax.distributed`, and each holds a lock while it works.

JAX's runtime tells every process its number and how many there are, from flags or from the cluster's environment, and
lets none go on before all are there. Then they part: each computes on its own devices alone. Whether another still
works is told by its lock in the shared run folder, which the operating system releases however it ends; JAX's own
heartbeat would abort the process with a stack trace instead of a line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from reroute_jax.commandline.parsing import RUN, Parser, positive, whole
from reroute_jax.errors import RerouteError

_START_SECONDS = 300  # until all processes must be there


@dataclass(frozen=True)
class Processes:
    """index: of this one, from 0. count: of all. folder: that they share."""

    index: int
    count: int
    folder: Path

    def others(self) -> list[int]:
        return [number for number in range(self.count) if number != self.index]

    def works(self, number: int) -> bool:
        """Whether another process still holds its lock."""
        try:
            with _lock(self.folder, number).acquire(timeout=0):
                return False
        except Timeout:
            return True


def add_process_arguments(parser: Parser) -> None:
    """--distributed, --coordinator, --processes and --process."""
    run = parser.group(RUN)
    run.add_argument(
        "--distributed",
        action="store_true",
        help="share the questions with the other processes that run this command; needs an --out that all of them see",
    )
    run.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (default: the cluster's environment)")
    run.add_argument("--processes", type=positive, metavar="N", help="(default: the cluster's environment)")
    run.add_argument("--process", type=whole, metavar="I", help="of this one (default: the cluster's environment)")


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[Processes | None]:
    """This command's place among the processes while it works; None without --distributed.

    Raises RerouteError for arguments that do not fit each other, and where the others cannot be met.
    """
    told = (args.coordinator, args.processes, args.process)
    if not args.distributed:
        if any(one is not None for one in told):
            raise RerouteError(
                "--coordinator, --processes and --process belong to --distributed: give it, or leave them out"
            )
        yield None
        return
    if args.out is None or args.fresh:
        raise RerouteError("--distributed needs an --out of its own, which all processes see, and no --fresh")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        jax.distributed.initialize(*told, initialization_timeout=_START_SECONDS)
    except (ValueError, RuntimeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise RerouteError(
            f"the processes of --distributed cannot meet ({reason}): give --coordinator, --processes and --process, or "
            "start them by a cluster that JAX knows"
        ) from problem
    processes = Processes(jax.process_index(), jax.process_count(), args.out)
    try:
        held = _lock(processes.folder, processes.index).acquire(timeout=0)
    except Timeout as error:
        raise RerouteError(f"another process {processes.index} works on {args.out}: wait for it") from error
    with held:
        jax.distributed.shutdown()  # which waits for all: each now holds its lock
        yield processes


def _lock(folder: Path, number: int) -> FileLock:
    return FileLock(folder / f".process-{number}.lock")
