"""Memory in which the blocks of a kernel leave sums for each other, one for each stream.

It begins with flags, which are zero before and after every kernel that uses them. Kernels of a stream follow each
other, so they share one. A graph that is being captured gets one of its own, zeroed by a node of the graph itself: a
replay runs beside whatever the streams do meanwhile.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

FLAG_BYTES = 16384
"""As in ``gemm.cu``: of a flag of four bytes for each of 16 warps of 256 blocks."""

_HELD: dict[tuple[int, int, int], Tensor] = {}
"""By device, stream, and the capture under way, 0 where there is none."""


def address(device: int, size: int) -> int:
    """Where the workspace of the current stream of a device is; it has at least ``size`` bytes.

    It grows when asked for more, and is kept. What a finished capture used is given back to its graph's pool, which the
    graph keeps alive.
    """
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return address(device, size)
    stream, capture = torch._C._cuda_getCurrentRawStream(device), 0
    if torch._C._cuda_isCurrentStreamCapturing():
        capture = _capture(stream)
    held = _HELD.get((device, stream, capture))
    if held is None or held.numel() < size:
        for key in [key for key in _HELD if key[2] not in (0, capture)]:
            del _HELD[key]
        held = torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))
        held[:FLAG_BYTES].zero_()
        _HELD[device, stream, capture] = held
    return held.data_ptr()


def _capture(stream: int) -> int:
    driver: Any = import_module("cuda.bindings.driver")
    answer = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    if answer[0] is not driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver does not say what is being captured: {answer[0].name}")
    return int(answer[2])
