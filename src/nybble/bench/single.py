"""One product by itself, as a test program would run it: is it right, how fast is it, and the same for other rows.

``nybble bench run w4a16 M N K``. The tables beside the peers are :mod:`nybble.bench.run`'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from nybble.bench.roofline import Peaks
from nybble.bench.run import as_tuple, fault, label
from nybble.bench.timing import Call, Timing, time_calls
from nybble.ops.case import relative_error
from nybble.ops.w4a16.cases import W4A16Case
from nybble.runtime.hardware import Hardware

SWEEP = (1, 4, 16, 32, 64, 128, 256, 512)
"""Rows of the second table."""
SHOWN = 10
"""Values shown beside their truth."""
DEFAULTS = (32, 1024, 1024)
"""M, N, K where they are left out."""


class Point(NamedTuple):
    """One product's speed.

    Attributes:
        m: rows. kernel: the variant that ran. form: its tile, in words.
        us: device time, cold L2 (wall time on a CPU); ``None`` when it could not be timed, for ``why``.
        tflops: 2 M N K / us. gbps: the fewest bytes that must move / us.
        impossible: what the hardware can't do, so that the measurement must be wrong; ``""`` when all is well.
        why: the reason there is no time, or why it has the host's gaps in it; else ``""``.
    """

    m: int
    kernel: str
    form: str
    us: float | None
    tflops: float | None
    gbps: float | None
    impossible: str
    why: str


class Single(NamedTuple):
    """What the program prints.

    Attributes:
        case: the request in one line. m, n, k, group_size: of it.
        nonzero: the share of the result that is not 0. mean: of it. finite: no NaN or Inf.
        first: the first values of row 0, each with its float64 truth.
        rel_err: against the truth, in the 2-norm. wrong: why the result is wrong, or ``""``.
        point: its speed. sweep: that of other rows.
    """

    case: str
    m: int
    n: int
    k: int
    group_size: int
    nonzero: float
    mean: float
    finite: bool
    first: list[tuple[float, float]]
    rel_err: float
    wrong: str
    point: Point
    sweep: list[Point]


def measure(
    case: W4A16Case, *, device: torch.device, hardware: Hardware | None, peaks: Peaks | None, rounds: int = 30
) -> Single:
    """Check one product against float64, then time it and the rows of :data:`SWEEP`.

    Args:
        case: the product.
        device: where. hardware: that device, ``None`` for a CPU. peaks: what it can do at most, where that is known.
        rounds: samples a point; the median counts.
    """
    with torch.inference_mode():
        inputs = case.make(device, seed=0)
        got, truth = as_tuple(case.run(inputs)), case.truth(inputs)
        y, right = got[0], truth[0]
        head = slice(min(SHOWN, case.n))
        values = [(float(a), float(b)) for a, b in zip(y[:1].flatten()[head], right[:1].flatten()[head], strict=True)]
        count = max(1, y.numel())
        found = (
            float((y != 0).sum()) / count,
            float(y.double().sum()) / count,
            bool(y.isfinite().all()),
            values,
            relative_error(got, truth),
            fault(case, inputs, got, truth, own=True),
        )
    points = {m: time(replace(case, m=m), device, hardware, peaks, rounds) for m in dict.fromkeys((case.m, *SWEEP))}
    return Single(
        label(case), case.m, case.n, case.k, case.group_size, *found, points[case.m], [points[m] for m in SWEEP]
    )


def time(case: W4A16Case, device: torch.device, hardware: Hardware | None, peaks: Peaks | None, rounds: int) -> Point:
    """The speed of one product with the kernel that it picks itself."""
    pick = case.choice(hardware).pick
    with torch.inference_mode():
        inputs: Any = case.make(device, seed=0)
        (timing,) = time_calls(
            [Call(case.run, (inputs,))],
            device=device,
            bytes_per_call=case.bytes,
            floor_us=case.floor_us(hardware) if hardware is not None else 0.0,
            l2_bytes=hardware.l2_bytes if hardware is not None else 0,
            rounds=rounds,
        )
    if not isinstance(timing, Timing):
        return Point(case.m, pick.variant, pick.reason, None, None, None, "", timing)
    tflops, gbps = case.flops / timing.us / 1e6, case.bytes / timing.us / 1e3
    return Point(case.m, pick.variant, pick.reason, timing.us, tflops, gbps, beyond(tflops, gbps, peaks), timing.why)


def beyond(tflops: float, gbps: float, peaks: Peaks | None) -> str:
    """What of a measurement the hardware can't do, or ``""``."""
    said = []
    if peaks is not None and peaks.half_tflops and tflops > peaks.half_tflops:
        said.append(f"{tflops:.0f} TFLOP/s is more than this GPU's {peaks.half_tflops:.0f}")
    if peaks is not None and peaks.read_tbps and gbps > 1e3 * peaks.read_tbps:
        said.append(f"{gbps:.0f} GB/s is more than this GPU's {1e3 * peaks.read_tbps:.0f}")
    return f"{' and '.join(said)}: the measurement is wrong" if said else ""


def lines(single: Single, gpu: str, capability: str) -> list[str]:
    """The report, as a person reads it."""
    s, p = single, single.point
    said = [
        f"GPU {gpu}, compute capability {capability}" if capability else f"{gpu}: the reference",
        f"M {s.m}  N {s.n}  K {s.k}  group size {s.group_size}",
        f"kernel {p.kernel}: {p.form}",
        f"non-zero {100 * s.nonzero:.2f} %  mean {s.mean:.6g}  {'all finite' if s.finite else 'NOT all finite'}  "
        f"relative error {s.rel_err:.2e}",
        "first values, and their truth in float64",
        *(f"  y[0, {i}] = {got: .6f}  {true: .6f}" for i, (got, true) in enumerate(s.first)),
        _speed(p),
        "",
        f"{'M':>6}  {'kernel':<10} {'us':>10} {'TFLOP/s':>9} {'GB/s':>8}",
    ]
    for q in s.sweep:
        if q.us is None:
            said.append(f"{q.m:>6}  {q.kernel:<10} not timed: {q.why}")
        else:
            said.append(f"{q.m:>6}  {q.kernel:<10} {q.us:>10.2f} {q.tflops:>9.2f} {q.gbps:>8.1f}")
    return said


def _speed(point: Point) -> str:
    if point.us is None:
        return f"not timed: {point.why}"
    return f"time {point.us:.2f} us  {point.tflops:.2f} TFLOP/s  {point.gbps:.1f} GB/s"
