"""How long single calls take: each timed alone, warm, with the host's share in it, as whoever waits for one sees it.

The tables of ``nybble bench run`` answer how fast a kernel is among others; this answers whether a deadline holds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from nybble.bench.run import as_tuple, label
from nybble.bench.timing import no_collection
from nybble.ops.case import Case, relative_error

RUNS = 1000
QUICK_RUNS = 100
"""On a CPU, for a first look."""
WARM_UP = 20
PERCENTILES = (50, 90, 95, 99)


class Latency(NamedTuple):
    """Milliseconds of a call over many runs, and whether its result is right.

    Attributes:
        case: the case in one line.
        runs: calls timed.
        how: ``"events"``, CUDA events around each eager call, or ``"wall"`` on a CPU.
        mean, min, max, std, p50, p90, p95, p99: in milliseconds; a percentile is one of the samples.
        target_ms: what P99 is held against, ``None`` for nothing. holds: whether it is at most that.
        shapes: of the outputs. finite: no NaN or Inf in them. rel_err: against the float64 truth, in the 2-norm.
    """

    case: str
    runs: int
    how: str
    mean: float
    min: float
    max: float
    std: float
    p50: float
    p90: float
    p95: float
    p99: float
    target_ms: float | None
    holds: bool | None
    shapes: list[list[int]]
    finite: bool
    rel_err: float


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest sample that at least ``percent`` of all do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def measure(case: Case, *, device: torch.device, runs: int = RUNS, target_ms: float | None = None) -> Latency:
    """Run a case's public function ``runs`` times with the variant that it picks itself.

    Args:
        case: the request; its inputs are made here, and stay in the caches.
        device: where to run it.
        runs: calls to time, after a few that are not.
        target_ms: what the 99th percentile should not exceed.
    """
    with torch.inference_mode():
        inputs = case.make(device, seed=0)
        got, truth = as_tuple(case.run(inputs)), case.truth(inputs)
        right = bool(all(t.isfinite().all() for t in got)), relative_error(got, truth)
        shapes = [list(t.shape) for t in got]
        del got, truth
        call = case.bind(inputs)
        timed = _events if device.type == "cuda" else _wall
        with no_collection():
            for _ in range(WARM_UP):
                call()
            samples = sorted(timed(call, runs, device))
    p50, p90, p95, p99 = (percentile(samples, p) for p in PERCENTILES)
    return Latency(
        label(case),
        runs,
        "events" if device.type == "cuda" else "wall",
        statistics.fmean(samples),
        samples[0],
        samples[-1],
        statistics.pstdev(samples),
        p50,
        p90,
        p95,
        p99,
        target_ms,
        None if target_ms is None else p99 <= target_ms,
        shapes,
        *right,
    )


def _events(call: Callable[[], Any], runs: int, device: torch.device) -> list[float]:
    samples = []
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(runs):
            torch.cuda.synchronize(device)
            start.record()
            call()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end))
    return samples


def _wall(call: Callable[[], Any], runs: int, device: torch.device) -> list[float]:
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def lines(latency: Latency) -> list[str]:
    """The report of one case, as a person reads it."""
    t = latency
    shapes = ", ".join(str(shape) for shape in t.shapes)
    said = [
        f"latency of {t.case}: {t.runs} calls one by one ({t.how}), ms",
        f"  mean {t.mean:.4f}  min {t.min:.4f}  max {t.max:.4f}  std {t.std:.4f}",
        f"  P50 {t.p50:.4f}  P90 {t.p90:.4f}  P95 {t.p95:.4f}  P99 {t.p99:.4f}",
        f"  output {shapes}, {'all finite' if t.finite else 'NOT all finite'}, relative error {t.rel_err:.2e}",
    ]
    if t.target_ms is not None:
        said.append(f"  target {t.target_ms:g} ms {'holds' if t.holds else 'MISSED'}: P99 is {t.p99:.4f} ms")
    return said
