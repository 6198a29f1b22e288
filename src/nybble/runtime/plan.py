"""A plan: one compiled kernel, loaded on one device, ready to launch with nothing left to look up.

A warm launch reads no environment, renders no source and asks the driver nothing but the launch itself. Plans hold no
workspace, so two streams can share one.
"""

from __future__ import annotations

import ctypes
import struct
from importlib import import_module
from typing import Any, NamedTuple

import torch

from nybble.runtime.build import Binary

MAP = "128s"
"""A tensor map among a kernel's parameters."""
_MAX_KEPT = 1024
"""Grids and streams a plan remembers before it starts anew, so that odd uses can't grow it without end."""


class _Slot(NamedTuple):
    """Room for one launch's arguments, and the address of the list of their addresses that the driver reads."""

    values: ctypes.Array[ctypes.c_char]
    addresses: ctypes.Array[ctypes.c_void_p]
    at: int


class Plan:
    """A kernel on a device.

    Args:
        binary: the compiled kernel.
        parameters: what the kernel takes, as a ``struct`` format: ``q`` a pointer or 64-bit integer, ``d`` a double,
            ``128s`` before them a tensor map (:meth:`tensor_map`).
        device: index of the CUDA device its tensors live on.
        threads: threads a block.
        shared_bytes: dynamic shared memory a block, allowed once here.
        cluster: blocks of one cluster; a grid is a multiple of it in x.
        overlap: the kernel waits for the one before it on the stream by itself (``device/dependent.cuh``), so that it
            may be scheduled while that one still runs.
    """

    __slots__ = (
        "_configs", "_driver", "_function", "_kernel", "_launch", "_maps", "_ok", "_pack", "_slots", "_struct",
        "cluster", "device", "overlap", "shared_bytes", "threads",
    )  # fmt: skip

    def __init__(
        self,
        binary: Binary,
        parameters: str,
        *,
        device: int,
        threads: int,
        shared_bytes: int = 0,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        self.device, self.threads, self.shared_bytes = device, threads, shared_bytes
        self.cluster, self.overlap = cluster, overlap
        self._configs: dict[tuple[tuple[int, int, int], int, bool], Any] = {}
        self._struct = struct.Struct(f"={parameters}")
        self._maps = 1 if parameters.startswith(MAP) else 0
        self._pack, self._slots = self._struct.pack_into, []
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the primary context exists and is current
            core, self._driver = import_module("cuda.core"), import_module("cuda.bindings.driver")
            self._kernel = core.ObjectCode.from_cubin(binary.cubin).get_kernel(binary.entry)
            # cuda.core's own launch takes each argument apart again: 3.6 us with 13 of them, this 2.8 (H200, warm).
            self._launch, self._ok = self._driver.cuLaunchKernelEx, self._driver.CUresult.CUDA_SUCCESS
            kernel = self._driver.CUkernel(int(self._kernel.handle))
            self._function = self._done(self._driver.cuKernelGetFunction(kernel))
            if shared_bytes > 48 << 10:
                attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._done(
                    self._driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, self._driver.CUdevice(device))
                )

    def _done(self, answer: tuple[Any, ...]) -> Any:
        """What a driver call returned beside its status."""
        if answer[0] is not self._ok:
            raise RuntimeError(f"the CUDA driver refused a kernel: {answer[0].name}")
        return answer[1] if len(answer) > 1 else None

    def launch(self, grid: tuple[int, int, int], *arguments: int | float | bytes, alone: bool = False) -> None:
        """Launch on the current stream of the plan's device.

        Args:
            grid: blocks in x, y, z.
            arguments: as ``parameters`` has them.
            alone: do not overlap the kernel before, whatever the plan says: for a kernel that reads something before
                it waits, when that may just have been written.
        """
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.launch(grid, *arguments, alone=alone)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        config = self._configs.get((grid, stream, alone)) or self._config(grid, stream, alone)
        # A thread takes a slot for itself: the driver reads it with the interpreter's lock released.
        slot = self._slots.pop() if self._slots else self._slot()
        self._pack(slot.values, 0, *arguments)
        (status,) = self._launch(config, self._function, slot.at, 0)
        self._slots.append(slot)
        if status is not self._ok:
            raise RuntimeError(
                f"the CUDA driver refused a launch of {grid} blocks of {self.threads} threads: {status.name}"
            )
        return None

    def clusters_at_once(self) -> int:
        """Clusters of the kernel that run at a time: SMs are in groups, which a cluster never leaves."""
        with torch.cuda.device(self.device):
            if self.cluster == 1:
                count = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
                of_one = self._done(count(self._function, self.threads, self.shared_bytes))
                return int(of_one) * torch.cuda.get_device_properties(self.device).multi_processor_count
            config = self._config((self.cluster, 1, 1), 0, alone=True)
            return int(self._done(self._driver.cuOccupancyMaxActiveClusters(self._function, config)))

    def tensor_map(self, matrix: torch.Tensor, rows: int, tile_rows: int) -> bytes:
        """The driver's description of a 16-bit matrix for the copy engine, as a kernel takes it.

        Args:
            matrix: ``[..., columns]``, contiguous, 16-byte aligned, columns a multiple of 8.
            rows: of it. tile_rows: of a tile, which is 64 columns wide, swizzled over 128 bytes, zero past the end.
        """
        driver, columns = self._driver, matrix.shape[-1]
        kinds = driver.CUtensorMapDataType
        half = matrix.dtype is torch.float16
        made = self._done(
            driver.cuTensorMapEncodeTiled(
                kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                matrix.data_ptr(),
                [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
                [driver.cuuint64_t(columns * 2)],
                [driver.cuuint32_t(64), driver.cuuint32_t(tile_rows)],
                [driver.cuuint32_t(1), driver.cuuint32_t(1)],
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )
        return ctypes.string_at(int(made.getPtr()), 128)

    def _slot(self) -> _Slot:
        values = ctypes.create_string_buffer(self._struct.size)
        start, end = ctypes.addressof(values), ctypes.addressof(values) + self._struct.size
        places = [start] * self._maps + list(range(start + 128 * self._maps, end, 8))
        addresses = (ctypes.c_void_p * len(places))(*places)
        return _Slot(values, addresses, ctypes.addressof(addresses))

    def _config(self, grid: tuple[int, int, int], stream: int, alone: bool) -> Any:
        """The driver's launch description, kept: building one costs 12 us."""
        if len(self._configs) >= _MAX_KEPT:
            self._configs.clear()
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes, config.hStream = self.shared_bytes, driver.CUstream(stream)
        attributes = []
        if self.cluster > 1:
            across = driver.CUlaunchAttribute()
            across.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            across.value.clusterDim.x, across.value.clusterDim.y, across.value.clusterDim.z = self.cluster, 1, 1
            attributes.append(across)
        if self.overlap and not alone:
            early = driver.CUlaunchAttribute()
            early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            attributes.append(early)
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._configs[grid, stream, alone] = config
        return config
