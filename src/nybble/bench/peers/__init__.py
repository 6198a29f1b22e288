"""The libraries Nybble is measured beside, one module an operation.

A peer is used through its public interface, and only where it is installed. Each is a small adapter from a case's
inputs to a :class:`~nybble.bench.timing.Call`; its result is checked like Nybble's own before it is timed, so an
interface that has changed shows as one line of the report and never as a wrong number.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from nybble.bench.timing import Call, one_line
from nybble.ops.case import Case


class Inapplicable(Exception):
    """The peer has nothing for this request; the text says what it lacks."""


class Peer(NamedTuple):
    """One other way to compute an operation.

    Attributes:
        name: the provider, as results name it: ``"torch"``, ``"liger"``.
        variant: which of its functions: ``"compile"``, ``"marlin"``.
        package: what must be importable.
        build: from the case and its inputs, the call; every tensor it reads is in its arguments.
    """

    name: str
    variant: str
    package: str
    build: Callable[[Case, Any], Call]


def peers_of(op: str) -> tuple[Peer, ...]:
    """The peers of an operation; none where nobody has written an adapter."""
    if importlib.util.find_spec(f"{__name__}.{op}") is None:
        return ()
    return importlib.import_module(f"{__name__}.{op}").PEERS


def build_calls(case: Case, inputs: Any, note: Callable[[str], None]) -> Iterator[tuple[Peer, Call]]:
    """Every peer that can run this case; ``note`` gets one line for each that can't, with the reason."""
    for peer in peers_of(case.op):
        if importlib.util.find_spec(peer.package) is None:
            note(f"{peer.name}: not installed")
            continue
        try:
            yield peer, peer.build(case, inputs)
        except Inapplicable as reason:
            note(f"{peer.name}/{peer.variant}: {reason}")
        except Exception as error:  # whatever an installed library raises is its own line in the report
            note(f"{peer.name}/{peer.variant}: {one_line(error)}")
