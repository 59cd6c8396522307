"""How many answers could not be read, how many were cut off, and a warning with an example where they are many.

Both look like wrong answers in a score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]

WARN_ABOVE = 0.2
EXAMPLE = 200  # characters of an answer that a warning shows


def unparsed(record: Record) -> bool:
    return record["unparsed"]


def cut_off(record: Record) -> bool:
    """The limit on new tokens ended it before the model did."""
    return record["finish"] == "length"


def shares(records: Sequence[Record]) -> dict[str, float | None]:
    """Of the answers, in [0, 1]. cut_off: None where the model did not say how they ended."""
    known = all(record["finish"] is not None for record in records)
    return {
        "unparsed": _share(unparsed, records),
        "cut_off": _share(cut_off, records) if known else None,
    }


def warnings(run: str, records: Sequence[Record]) -> list[str]:
    """One line for each share of the run that is above WARN_ABOVE, with the first such answer."""
    found = {
        "could not be read": (unparsed, "check the prompt and the format that the task expects"),
        "were cut off at the limit": (cut_off, "give a larger --max-new-tokens"),
    }
    return [
        f"{run}: {share:.0%} of the answers {what}, as that to question {example['question_id']}, "
        f"{_shown(example['text'])}: {advice}"
        for what, (applies, advice) in found.items()
        if (share := _share(applies, records)) > WARN_ABOVE
        for example in (next(record for record in records if applies(record)),)
    ]


def _share(applies: Callable[[Record], bool], records: Sequence[Record]) -> float:
    return sum(map(applies, records)) / len(records)


def _shown(text: str) -> str:
    return repr(text) if len(text) <= EXAMPLE else f"{text[:EXAMPLE]!r}..."
