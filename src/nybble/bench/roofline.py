"""The two ceilings of a device, measured: how fast it reads memory, and how fast it multiplies fp16 matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from nybble.bench.timing import spread
from nybble.runtime.hardware import Hardware


class Ceilings(NamedTuple):
    """What this device did today.

    Attributes:
        read_tbps: a sum over far more memory than the cache holds, TB/s.
        half_tflops: a square fp16 product of random matrices through cuBLAS, TFLOP/s.
    """

    read_tbps: float
    half_tflops: float


class Peaks(NamedTuple):
    """What a device can't exceed, from its clocks; 0 where the driver does not say.

    Attributes:
        read_tbps: memory clock times bus width, TB/s.
        half_tflops: dense fp16 on all tensor cores at the highest clock, TFLOP/s.
    """

    read_tbps: float
    half_tflops: float


TENSOR_FLOPS = {(8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096}
"""Dense fp16 operations with fp32 sums that an SM does in a cycle, by compute capability."""


def peaks(index: int) -> Peaks:
    """Of CUDA device ``index``."""
    card = torch.cuda.get_device_properties(index)
    memory = 2e3 * getattr(card, "memory_clock_rate", 0) * getattr(card, "memory_bus_width", 0) / 8
    a_cycle = TENSOR_FLOPS.get((card.major, card.minor), 0) * card.multi_processor_count
    return Peaks(memory / 1e12, a_cycle * 1e3 * getattr(card, "clock_rate", 0) / 1e12)


def measure(device: torch.device, *, side: int = 8192, repeats: int = 20) -> Ceilings:
    """Measure both on a CUDA device. Takes about a second."""
    with torch.cuda.device(device), torch.inference_mode():
        ceilings = Ceilings(_read_tbps(device, repeats), _half_tflops(device, side, repeats))
        torch.cuda.empty_cache()
    return ceilings


def _read_tbps(device: torch.device, repeats: int) -> float:
    count = min(4 << 30, torch.cuda.mem_get_info()[0] // 4) // 4
    data = torch.randn(count, dtype=torch.float32, device=device)
    return 4 * count / _median_us(data.sum, repeats) / 1e6


def _half_tflops(device: torch.device, side: int, repeats: int) -> float:
    left, right = (torch.randn(side, side, dtype=torch.float16, device=device) for _ in range(2))
    return 2 * side**3 / _median_us(lambda: left @ right, repeats) / 1e6


def _median_us(work: Callable[[], object], repeats: int) -> float:
    marks = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return spread([start.elapsed_time(end) * 1e3 for start, end in marks[3:]])[0]


def with_ceilings(hardware: Hardware, measured: Ceilings) -> Hardware:
    """``hardware`` with the measured numbers where none are known.

    A known card keeps its own, so that rows of different days share one floor.
    """
    return hardware._replace(
        read_tbps=hardware.read_tbps if hardware.half_tflops else measured.read_tbps,
        half_tflops=hardware.half_tflops or measured.half_tflops,
    )
