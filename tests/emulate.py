"""CUDA kernels on a CPU, unmodified: for the tests of what a kernel computes, where there is no GPU.

A kernel file is C++ once CUDA's own words are given a meaning (``tests/emulated/cuda.h``) and the headers that hold PTX
have a counterpart in plain C++ beside it. It is compiled by g++ with the same constants as by NVRTC and called through
ctypes. Barriers, shuffles, tensor-core fragments, clusters and shared memory are as on a GPU; races and speed are not.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import torch

from nybble.runtime.source import DEVICE, Source

HERE = Path(__file__).resolve().parent / "emulated"
COMPILER = shutil.which("g++")
_BUILT = Path(tempfile.gettempdir()) / f"nybble-emulated-{os.getuid()}"  # libraries are loaded from it: of one user


def text(source: Source, parameters: str) -> str:
    """The kernel's own text between the emulator's, its shared arrays taken from the block."""
    kernel = re.sub(
        r"extern __shared__ __align__\(\d+\) unsigned char (\w+)\[\];",
        r"unsigned char* const \1 = self->block->dynamic();",
        source.path.read_text(encoding="utf-8"),
    )
    kernel = re.sub(
        r"__shared__ (?:__align__\(16\) )?([\w ]+?) (\w+)((?:\[[^\]]+\])+);",
        r"auto& \2 = *reinterpret_cast<\1(*)\3>(static_shared(__LINE__, sizeof(\1\3)));",
        kernel,
    )
    read = {"q": "Argument{argument[%d]}", "t": "*static_cast<TensorMap*>(argument[%d])"}
    read |= {kind: f"*static_cast<{number}*>(argument[%d])" for kind, number in (("n", "long long"), ("d", "double"))}
    arguments = ", ".join(read[kind] % i for i, kind in enumerate(parameters))
    return f'{source.prelude()}{kernel}\n#define CALL {source.entry}({arguments})\n#include "launch.h"\n'


def build(source: Source, parameters: str) -> ctypes.CDLL:
    """Compile, or find what was compiled from the same text."""
    whole = text(source, parameters)
    digest = hashlib.sha256(whole.encode())
    for header in (*sorted(HERE.iterdir()), *sorted(DEVICE.iterdir())):
        digest.update(header.read_bytes())
    _BUILT.mkdir(mode=0o700, exist_ok=True)
    assert _BUILT.stat().st_uid == os.getuid(), f"{_BUILT} belongs to somebody else"
    library = _BUILT / f"{digest.hexdigest()[:24]}.so"
    if not library.exists():
        assert COMPILER is not None, "g++ is needed; skip the test without it"
        with tempfile.TemporaryDirectory(dir=_BUILT) as folder:
            # One folder of headers, the emulator's over Nybble's own: an include is first looked for beside its file.
            for header in (*DEVICE.iterdir(), *HERE.iterdir()):
                shutil.copy(header, folder)
            file, made = Path(folder) / "kernel.cc", Path(folder) / "kernel.so"
            file.write_text(whole, encoding="utf-8")
            command = [COMPILER, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", file, "-o", made]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[:4000]
            made.replace(library)
    return ctypes.CDLL(str(library))


def launch(
    source: Source,
    parameters: str,
    grid: tuple[int, int, int],
    threads: int,
    *arguments: torch.Tensor | tuple[torch.Tensor, int] | int | float | None,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> None:
    """Run a kernel over a grid of blocks.

    Args:
        source: the specialisation.
        parameters: a letter an argument: ``q`` a pointer, ``n`` a 64-bit integer, ``d`` a double, ``t`` a tensor map.
        grid: blocks in x (a multiple of ``cluster``), y, z.
        threads: threads a block.
        arguments: CPU tensors, ``None`` for a null pointer, numbers; results are written into the tensors. For a map
            its matrix of 16-bit values and the rows of a tile.
        shared_bytes: dynamic shared memory a block. cluster: blocks of one cluster.
    """
    held: list[object] = []
    addresses = (ctypes.c_void_p * len(arguments))()
    for i, (kind, value) in enumerate(zip(parameters, arguments, strict=True)):
        if kind == "q":
            addresses[i] = value.data_ptr() if isinstance(value, torch.Tensor) else None
            continue
        if isinstance(value, tuple):
            matrix, tile_rows = value
            room = ctypes.create_string_buffer(128 + 64)
            addresses[i] = -(-ctypes.addressof(room) // 64) * 64
            fields = struct.pack("qqqq", matrix.data_ptr(), matrix.shape[1], matrix.shape[0], tile_rows)
            ctypes.memmove(addresses[i], fields, len(fields))
            held.append(room)
            continue
        number = ctypes.c_double(value) if kind == "d" else ctypes.c_longlong(value)  # type: ignore[arg-type]
        held.append(number)
        addresses[i] = ctypes.addressof(number)
    build(source, parameters).launch((ctypes.c_int * 3)(*grid), threads, shared_bytes, cluster, addresses)
