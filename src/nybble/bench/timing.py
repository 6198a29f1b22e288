"""How long a call takes: on the device (CUDA-graph replay, inputs cold) and on the host (warm eager calls).

A call is a function and its arguments. The arguments are copied, so that successive calls read different memory and
nothing is found in the L2 cache; one graph holds many calls, each on the next copy, and its replay time is divided
by their number. The graphs of all providers are replayed in turn within one round, so that a clock that drifts
drifts for all of them.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

WEIGHT_BYTES = 256 << 20
"""What the copies of one call's inputs hold together at least, where :data:`MAX_COPIES` allows."""
MAX_COPIES = 256
"""More nodes in a graph would not make its time per call surer."""
GRAPH_US = 400.0
"""About how long one graph should run: a start or an end that is 2 us off then costs half a percent."""
CPU_BATCH_US = 2000.0
HOST_BATCH = 32
"""Eager calls queued before the host waits: far fewer than the launches a stream can hold (1024)."""


class Call(NamedTuple):
    """``function(*arguments)``; the arguments hold every tensor the call reads, so that they can be copied.

    ``bind(*arguments)``, where given, returns the same call with nothing around it: host time is measured on that.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    bind: Callable[..., Callable[[], Any]] | None = None


class Rotation(NamedTuple):
    """How a call's inputs are kept cold.

    Attributes:
        copies: sets of inputs.
        calls: calls in one graph, a multiple of ``copies``.
        flush: the copies together are too small to push each other out of the cache, so it is emptied before a replay
            and every call of the graph has a copy of its own.
    """

    copies: int
    calls: int
    flush: bool


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median over rounds and its spread, and the host's share.

    Attributes:
        us, us_p10, us_p90: device time on CUDA, wall time on a CPU.
        host_us: wall time of a warm eager call that waits for nothing; ``None`` on a CPU, where ``us`` is that.
        how: ``"graph"``, ``"events"`` (eager calls between two events: the host's gaps are in it) or ``"wall"``.
        why: for ``"events"``, what kept the call from being captured.
    """

    us: float
    us_p10: float
    us_p90: float
    host_us: float | None
    how: str
    why: str = ""


def rotation(bytes_per_call: int, l2_bytes: int, floor_us: float) -> Rotation:
    """How many copies and calls one graph holds, from the bytes one call moves and its shortest possible time."""
    target = max(4 * l2_bytes, WEIGHT_BYTES)
    copies = max(2, min(MAX_COPIES, math.ceil(target / max(1, bytes_per_call))))
    if copies * bytes_per_call < target:
        return Rotation(copies, copies, True)
    wanted = min(MAX_COPIES, max(4, math.ceil(GRAPH_US / floor_us) if floor_us > 0 else MAX_COPIES))
    return Rotation(copies, copies * max(1, math.ceil(wanted / copies)), False)


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return statistics.median(samples), tenths[0], tenths[8]


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside: it would be timed."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def time_calls(
    calls: Sequence[Call],
    *,
    device: torch.device,
    bytes_per_call: int = 0,
    floor_us: float = 0.0,
    l2_bytes: int = 0,
    rounds: int = 30,
) -> list[Timing | str]:
    """Time all calls, interleaved.

    Args:
        calls: one a provider, each checked already.
        device: where their tensors are.
        bytes_per_call: the fewest bytes one of them moves; sets how many copies of its inputs are rotated.
        floor_us: the shortest possible time of one of them; sets the length of the graphs.
        l2_bytes: the device's L2 cache.
        rounds: samples a call.

    Returns:
        For each call its timing, or the reason why it could not be timed.
    """
    if device.type == "cuda":
        turns = rotation(bytes_per_call, l2_bytes, floor_us)
        return _time_cuda(calls, turns, device=device, l2_bytes=l2_bytes, rounds=rounds)
    return _time_cpu(calls, rounds=rounds)


def _time_cpu(calls: Sequence[Call], *, rounds: int) -> list[Timing | str]:
    def batch(call: Call, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call.function(*call.arguments)
        return (time.perf_counter() - start) * 1e6 / count

    with no_collection():
        counts = [max(1, math.ceil(CPU_BATCH_US / max(1e-3, min(batch(call, 1) for _ in range(3))))) for call in calls]
        samples: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for kept, call, count in zip(samples, calls, counts, strict=True):
                kept.append(batch(call, count))
    return [Timing(*spread(kept), None, "wall") for kept in samples]


class _Prepared:
    """A call with its copies, captured into a graph if that is possible."""

    def __init__(self, call: Call, turns: Rotation) -> None:
        self.call, self.rotation = call, turns
        self.copies = [copy.deepcopy(call.arguments) for _ in range(turns.copies)]
        self._warm_up()
        self.graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        self.why = ""
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self._queue()
        except Exception as error:  # a call that waits for the host: events around eager calls do for it
            self.graph, self.why = None, one_line(error)
            torch.cuda.synchronize()
            self._warm_up()
        self.samples: list[float] = []

    def _warm_up(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for arguments in self.copies:  # all: the first call with a weight may differ from the ones that follow
                self.call.function(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def _queue(self) -> None:
        function, copies = self.call.function, self.copies
        for index in range(self.rotation.calls):
            function(*copies[index % len(copies)])

    def replay(self) -> None:
        if self.graph is None:
            self._queue()
        else:
            self.graph.replay()

    def timing(self) -> Timing:
        how = "events" if self.graph is None else "graph"
        return Timing(*spread(self.samples), self._host_us(), how, self.why)

    def _host_us(self) -> float:
        bind = self.call.bind or partial(partial, self.call.function)
        bound = [bind(*arguments) for arguments in self.copies[:HOST_BATCH]]
        samples: list[float] = []
        began = time.perf_counter()
        while len(samples) < 5 or (len(samples) < 20 and time.perf_counter() - began < 0.5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for index in range(HOST_BATCH):
                bound[index % len(bound)]()
            samples.append((time.perf_counter() - start) * 1e6 / HOST_BATCH)
        torch.cuda.synchronize()
        return statistics.median(samples)


def _time_cuda(
    calls: Sequence[Call], turns: Rotation, *, device: torch.device, l2_bytes: int, rounds: int
) -> list[Timing | str]:
    with torch.cuda.device(device), torch.inference_mode(), no_collection():
        prepared: list[_Prepared | str] = []
        for call in calls:
            try:
                prepared.append(_Prepared(call, turns))
            except Exception as error:  # whatever a peer raises is its own line in the report
                prepared.append(one_line(error))
        ready = [p for p in prepared if isinstance(p, _Prepared)]
        # Emptying the cache by reading: after a write its lines would be dirty, and the timed call would wait for them.
        cold = torch.ones(max(4 * l2_bytes, WEIGHT_BYTES) // 4, dtype=torch.float32, device=device)
        for number in range(rounds + 2):
            first = number % len(ready) if ready else 0
            marks = []
            cold.sum()  # keeps the device busy while the host queues the round: no gap is timed
            for p in ready[first:] + ready[:first]:
                if turns.flush:
                    cold.sum()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                p.replay()
                end.record()
                marks.append((p, start, end))
            torch.cuda.synchronize()
            if number >= 2:  # the first two bring clocks and allocator to their steady state
                for p, start, end in marks:
                    p.samples.append(start.elapsed_time(end) * 1e3 / turns.calls)
        return [p if isinstance(p, str) else p.timing() for p in prepared]


def one_line(error: BaseException) -> str:
    """The error's type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
