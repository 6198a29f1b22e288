"""A plan: one compiled kernel, loaded on one device, ready to launch with nothing left to look up.

A warm launch reads no environment, renders no source and asks the driver nothing but the launch itself. Plans hold no
workspace, so two streams can share one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from nybble.runtime.build import Binary

_MAX_KEPT = 1024
"""Grids and streams a plan remembers before it starts anew, so that odd uses can't grow it without end."""


class Plan:
    """A kernel on a device.

    Args:
        binary: the compiled kernel.
        device: index of the CUDA device its tensors live on.
        threads: threads a block.
        shared_bytes: dynamic shared memory a block, allowed once here.
    """

    __slots__ = ("_configs", "_kernel", "_launch", "_streams", "device", "shared_bytes", "threads")

    def __init__(self, binary: Binary, *, device: int, threads: int, shared_bytes: int = 0) -> None:
        self.device, self.threads, self.shared_bytes = device, threads, shared_bytes
        self._configs: dict[tuple[int, int, int], Any] = {}
        self._streams: dict[int, Any] = {}
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the primary context exists and is current
            core = import_module("cuda.core")
            self._launch = core.launch
            self._kernel = core.ObjectCode.from_cubin(binary.cubin).get_kernel(binary.entry)
            if shared_bytes > 48 << 10:
                self._allow_shared(shared_bytes)

    def _allow_shared(self, shared_bytes: int) -> None:
        driver = import_module("cuda.bindings.driver")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle = driver.CUkernel(int(self._kernel.handle))
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, handle, driver.CUdevice(self.device))
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver refused {shared_bytes} bytes of shared memory a block: {status.name}")

    def launch(self, grid: tuple[int, int, int], *arguments: int | float) -> None:
        """Launch on the current stream of the plan's device.

        Args:
            grid: blocks in x, y, z.
            arguments: pointers and 64-bit integers as ``int``, doubles as ``float``, as the kernel declares them.
        """
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.launch(grid, *arguments)
        raw = torch._C._cuda_getCurrentRawStream(self.device)
        stream = self._streams.get(raw) or self._stream(raw)
        config = self._configs.get(grid) or self._config(grid)
        return self._launch(stream, config, self._kernel, *arguments)

    def _config(self, grid: tuple[int, int, int]) -> Any:
        if len(self._configs) >= _MAX_KEPT:
            self._configs.clear()
        config = import_module("cuda.core").LaunchConfig(grid=grid, block=self.threads, shmem_size=self.shared_bytes)
        self._configs[grid] = config
        return config

    def _stream(self, raw: int) -> Any:
        """The cuda.core stream for a raw handle, kept: building one on every launch adds microseconds."""
        if len(self._streams) >= _MAX_KEPT:
            self._streams.clear()
        stream = self._streams[raw] = import_module("cuda.core").Stream.from_handle(raw)
        return stream
