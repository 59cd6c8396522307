"""Schedules back from the JSON that a run folder keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import NuwaMerge, PoolMerge, Schedule, Stage

MERGES = {merge.__name__: merge for merge in (NuwaMerge, PoolMerge)}


def read_schedule(record: Mapping[str, Any]) -> Schedule:
    """The schedule that `Routes.settings` wrote. Raises RerouteError for anything else."""
    try:
        fields = dict(record)
        fields["stages"] = tuple(Stage(**_exact(stage, "ratio")) for stage in fields["stages"])
        if fields["merge"] is not None:
            merge = _exact(fields["merge"], "share", "quantile")
            fields["merge"] = MERGES[merge.pop("kind")](**merge)
        return Schedule(**fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RerouteError(f"a schedule cannot be read ({error}): repeat the run that wrote it") from error


def _exact(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Fractions stand as text."""
    return {key: Fraction(value) if key in names and isinstance(value, str) else value for key, value in record.items()}
