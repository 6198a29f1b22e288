"""Choosing among candidates."""

from __future__ import annotations

import pytest

from nybble.runtime.choice import Candidate, choose
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import A100, H200

CANDIDATES = (
    Candidate("slow", (), 9.0),
    Candidate("fast", (("TILE", 8),), 2.0),
    Candidate("fast", (("TILE", 16),), 3.0),
    Candidate("fastest", (), None, "needs what is not here", refused=True),
)


def test_the_fastest_that_is_not_refused() -> None:
    chosen = choose("op", CANDIDATES)
    assert chosen.pick.config == (("TILE", 8),)
    assert chosen.candidates == CANDIDATES
    assert choose("op", CANDIDATES, "slow").pick.us == 9.0


def test_what_cannot_be_chosen_says_why() -> None:
    with pytest.raises(ValueError, match=r"variant: expected 'auto' or one of \['slow', 'fast', 'fastest'\], got 'x'"):
        choose("op", CANDIDATES, "x")
    with pytest.raises(UnsupportedError, match="fastest: needs what is not here"):
        choose("op", CANDIDATES, "fastest")
    with pytest.raises(UnsupportedError, match="op: no variant can run this here"):
        choose("op", CANDIDATES[3:])


def test_targets() -> None:
    assert (H200.arch, A100.arch) == ("sm_90a", "sm_80")
