"""How much a method may keep: the share of an image's visual tokens, averaged over all decoder layers."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from numbers import Rational, Real
from typing import Any

from reroute_jax.errors import RerouteError

# The tiers of the papers, named by their tokens of LLaVA-1.5's 576, as shares of an image's own visual tokens.
TIERS = {192: Fraction(1, 3), 128: Fraction(2, 9), 64: Fraction(1, 9)}

# What a `Fraction` is made of at once: 1e-999999999 would take all memory.
_SHORT = re.compile(r"\s*[+-]?[0-9./]{1,40}(e[+-]?[0-9]{1,3})?\s*", re.IGNORECASE)


def parsed_budget(text: str) -> int | Fraction:
    """ "192", "128", "64" or a share such as "0.15" or "2/9". Raises RerouteError for anything else."""
    try:
        return exact_number(text)
    except ValueError:
        known = ", ".join(map(str, TIERS))
        raise RerouteError(f"{text[:40]!r} is neither {known} nor a share such as 0.15 or 1/9") from None


def exact_number(text: str) -> int | Fraction:
    """ "12", "0.15", "1e-3" or "2/9", whose value nothing rounds. Raises ValueError for anything else, and for more
    than 40 digits or an exponent of more than 3."""
    if not _SHORT.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is no number such as 12, 0.15 or 1/9")
    try:
        number = Fraction(text)
    except ZeroDivisionError as error:
        raise ValueError(f"{text[:40]!r} divides by 0") from error
    return int(number) if text.strip().isdigit() else number


def share_of(budget: Any, visual: int) -> Fraction:
    """The share that a budget names. Raises RerouteError where it is none, or leaves less than one token."""
    is_number = isinstance(budget, Real | Decimal) and not isinstance(budget, bool)
    if is_number and budget in TIERS:
        share = TIERS[budget]
    elif not is_number or not 0 < budget < 1:
        raise RerouteError(f"budget is {budget}, expected one of {', '.join(map(str, TIERS))} or a share in (0, 1)")
    else:
        # 0.15 means 15/100 and not its binary neighbour; likewise 1 / 3.
        share = Fraction(budget if isinstance(budget, Rational) else float(budget)).limit_denominator(10**6)
    if share * visual < 1:
        raise RerouteError(f"a budget of {float(share):.4g} leaves fewer than one of {visual} visual tokens, raise it")
    return share
