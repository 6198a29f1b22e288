"""Measuring which kernel is the fastest for a request on this GPU, so that the choice need not be predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from nybble.bench.run import as_tuple, fault
from nybble.bench.timing import Call, Timing, one_line, time_calls
from nybble.ops.case import Tensors
from nybble.ops.w4a16 import cost, op
from nybble.ops.w4a16.cases import W4A16Case
from nybble.runtime import tuned
from nybble.runtime.choice import Candidate
from nybble.runtime.hardware import Hardware

ROWS = tuple(1 << i for i in range(13))
"""1 to 4096: choices are kept by powers of two."""


class Tried(NamedTuple):
    """One candidate of one request: us is ``None`` where it was wrong or could not run, for ``why``."""

    candidate: Candidate
    us: float | None
    why: str


class Result(NamedTuple):
    """What a request's measurement found.

    Attributes:
        case: the request.
        picked: the fastest; ``None`` where none ran right.
        predicted: what would have run untuned.
        tried: every candidate; empty where the choice was in the file already.
    """

    case: W4A16Case
    picked: Candidate | None
    predicted: Candidate
    tried: list[Tried]


def tune(
    cases: Iterable[W4A16Case], *, device: torch.device, hardware: Hardware, rounds: int = 15, again: bool = False
) -> Iterator[Result]:
    """Measure each request and keep its choice, request by request: what was interrupted goes on where it was.

    Args:
        cases: the requests.
        device: a CUDA device. hardware: that device.
        rounds: samples a candidate; the median counts.
        again: measure what is in the file already, too.

    Raises:
        OSError: the file can't be written.
    """
    for case in cases:
        spec = case.spec()
        predicted = cost.choose(spec, hardware).pick
        known = tuned.lookup(hardware, cost.key(spec))
        if known is not None and not again:
            yield Result(case, known, predicted, [])
            continue
        tried = measure(case, device=device, hardware=hardware, rounds=rounds)
        right = [(one.us, one.candidate) for one in tried if one.us is not None]
        if not right:
            yield Result(case, None, predicted, tried)
            continue
        us, best = min(right, key=lambda pair: pair[0])
        picked = Candidate(best.variant, best.config, us, "measured here by `nybble tune`")
        tuned.write(hardware, {cost.key(spec): picked})
        yield Result(case, picked, predicted, tried)


def measure(case: W4A16Case, *, device: torch.device, hardware: Hardware, rounds: int) -> list[Tried]:
    """Check every candidate of a request against float64 and time those that are right, interleaved."""
    spec = case.spec()
    with torch.inference_mode():
        inputs = case.make(device, seed=0)
        truth = case.truth(inputs)
        checked: list[tuple[Candidate, Call | None, str]] = []
        for candidate in cost.contenders(spec, hardware):
            call = Call(partial(_run, case, spec, candidate, {}), (inputs,))
            try:
                wrong = fault(case, inputs, as_tuple(call.function(inputs)), truth, own=True)
            except Exception as error:  # a kernel that can't run here is no reason to stop
                wrong = one_line(error)
            checked.append((candidate, None if wrong else call, wrong))
        del truth
        timings = iter(
            time_calls(
                [call for _, call, _ in checked if call is not None],
                device=device,
                bytes_per_call=case.bytes,
                floor_us=case.floor_us(hardware),
                l2_bytes=hardware.l2_bytes,
                rounds=rounds,
            )
        )
    tried = []
    for candidate, call, wrong in checked:
        timing = next(timings) if call is not None else wrong
        tried.append(Tried(candidate, timing.us, "") if isinstance(timing, Timing) else Tried(candidate, None, timing))
    return tried


def _run(case: W4A16Case, spec: cost.Spec, candidate: Candidate, plans: dict[Any, Any], inputs: Any) -> Tensors:
    with op.forced(spec, candidate, plans):
        return case.run(inputs)


def crossovers(results: Iterable[Result]) -> list[tuple[int, str]]:
    """From how many rows on which kernel is the fastest: ``[(1, "stream"), (2, "wgmma"), (32, "gemm")]``."""
    said: list[tuple[int, str]] = []
    for result in sorted(results, key=lambda one: one.case.m):
        if result.picked is not None and (not said or said[-1][1] != result.picked.variant):
            said.append((result.case.m, result.picked.variant))
    return said
