"""What a cost model needs to know of a GPU. Known cards can be named, so that a choice can be printed anywhere."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Hardware(NamedTuple):
    """One GPU, or one to reason about.

    Attributes:
        name: as the driver says it, such as ``"NVIDIA H200"``.
        slug: the folder of its results, such as ``"h200"``.
        capability: compute capability, ``(9, 0)`` for Hopper.
        sms: streaming multiprocessors.
        shared_bytes: shared memory one block may ask for.
        l2_bytes: L2 cache.
        read_tbps: bandwidth of a large read, TB/s (measured on cards named here, else from the driver's clocks).
        half_tflops: dense fp16 through cuBLAS on random data, TFLOP/s (measured on cards named here, else 0).
    """

    name: str
    slug: str
    capability: tuple[int, int]
    sms: int
    shared_bytes: int
    l2_bytes: int
    read_tbps: float
    half_tflops: float

    @property
    def arch(self) -> str:
        """The NVRTC target: ``sm_90a`` on Hopper, whose own instructions need the ``a``; ``sm_80`` and so on."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if (major, minor) >= (9, 0) else ''}"


H200 = Hardware("NVIDIA H200", "h200", (9, 0), 132, 232448, 60 << 20, 4.38, 745.0)
A100 = Hardware("NVIDIA A100-SXM4-80GB", "a100", (8, 0), 108, 166912, 40 << 20, 1.75, 270.0)
KNOWN = {card.slug: card for card in (H200, A100)}


def current(index: int | None = None) -> Hardware | None:
    """The CUDA device ``index`` (default: the current one), or ``None`` on a machine without one."""
    if not torch.cuda.is_available():
        return None
    return _of(torch.cuda.current_device() if index is None else index)


@cache
def _of(index: int) -> Hardware:
    properties = torch.cuda.get_device_properties(index)
    for card in KNOWN.values():
        if card.name == properties.name:
            return card
    slug = properties.name.lower().removeprefix("nvidia ").replace(" ", "-")
    clock_hz = 1e3 * getattr(properties, "memory_clock_rate", 0)
    bus_bytes = getattr(properties, "memory_bus_width", 0) / 8
    return Hardware(
        properties.name,
        slug,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.L2_cache_size,
        0.9 * 2 * clock_hz * bus_bytes / 1e12,
        0.0,
    )
