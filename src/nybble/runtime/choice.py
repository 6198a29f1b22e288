"""How a variant is chosen: candidates, each predicted or refused with its reason, and the pick.

A pure function of the request and the hardware, so a choice is tested and printed on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nybble.runtime.errors import UnsupportedError, wrong_value


@dataclass(frozen=True)
class Candidate:
    """One way to run an operation.

    Attributes:
        variant: its name, as ``variant=`` of the public function takes it.
        config: the compile-time constants beyond the request's own (tile sizes, threads); empty for the reference.
        us: predicted device time in microseconds; ``None`` when refused, or when nothing is measured to predict from:
            such a variant runs where it is asked for by name.
        reason: why it is as fast as predicted, or why it is refused.
        refused: it can't run this request here.
    """

    variant: str
    config: tuple[tuple[str, Any], ...] = ()
    us: float | None = None
    reason: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Choice:
    """The pick among ``candidates`` (refused ones included)."""

    pick: Candidate
    candidates: tuple[Candidate, ...]


def choose(operation: str, candidates: Sequence[Candidate], variant: str = "auto") -> Choice:
    """The fastest candidate that is not refused, or the one named.

    Raises:
        ValueError: ``variant`` is neither ``"auto"`` nor a candidate's name.
        UnsupportedError: the named variant, or every one, is refused; the text gives the reasons.
    """
    names = list(dict.fromkeys(c.variant for c in candidates))
    if variant != "auto" and variant not in names:
        raise wrong_value(operation, "variant", f"'auto' or one of {names}", repr(variant))
    wanted = [c for c in candidates if variant in ("auto", c.variant)]
    able = [c for c in wanted if not c.refused]
    if not able:
        reasons = "; ".join(f"{c.variant}: {c.reason}" for c in wanted)
        raise UnsupportedError(f"{operation}: no variant can run this here ({reasons})")
    pick = min(able, key=lambda c: c.us if c.us is not None else float("inf"))
    return Choice(pick, tuple(candidates))
