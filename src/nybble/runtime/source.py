"""A kernel specialisation: a ``.cu`` file and the constants it is compiled with, as one text for NVRTC.

The file itself is never edited: a prelude of ``constexpr`` constants and type names goes before it, and a ``#line``
directive makes the compiler's messages name the real file and line.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGE = Path(__file__).resolve().parent.parent
DEVICE = PACKAGE / "device"

Constant = bool | int | float | torch.dtype
C_TYPES = {torch.float32: "float", torch.float16: "half_t", torch.bfloat16: "bf16_t", torch.int8: "signed char"}
# The CUDA headers that device/*.cuh include, for the digest of a compiled kernel.
CUDA_HEADERS = ("cuda_fp16.h", "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp")


class Source(NamedTuple):
    """One specialisation of one kernel file.

    Attributes:
        path: the ``.cu`` file.
        constants: name -> value, in the order they are written; a ``torch.dtype`` becomes a type name.
    """

    path: Path
    constants: tuple[tuple[str, Constant], ...]

    @property
    def entry(self) -> str:
        """The ``extern "C"`` entry point: the file's stem with ``_kernel``."""
        return f"{self.path.stem}_kernel"

    @property
    def label(self) -> str:
        """One line that names this specialisation, the key of the register snapshot."""
        return f"{self.path.stem}({', '.join(f'{k}={_plain(v)}' for k, v in self.constants)})"

    def prelude(self) -> str:
        """The constants as C++, before the file's own text."""
        lines = ['#include "scalar.cuh"']
        for name, value in self.constants:
            if isinstance(value, torch.dtype):
                lines.append(f"using {name} = {C_TYPES[value]};")
            elif isinstance(value, bool):
                lines.append(f"constexpr bool {name} = {str(value).lower()};")
            elif isinstance(value, int):
                lines.append(f"constexpr int {name} = {value};")
            else:
                lines.append(f"constexpr float {name} = {value!r}f;")
        return "\n".join(lines) + "\n"

    def text(self) -> str:
        """What NVRTC compiles."""
        return f'{self.prelude()}#line 1 "{self.path}"\n{_read(self.path)}'


def _plain(value: Constant) -> str:
    return C_TYPES[value] if isinstance(value, torch.dtype) else str(value)


@cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def include_paths() -> tuple[str, ...]:
    """The folders of headers: Nybble's own, then CUDA's as cuda-pathfinder finds them (pip packages or a toolkit)."""
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found is None:
        raise FileNotFoundError(
            "the CUDA headers were not found: install the package nvidia-cuda-runtime (cuda-toolkit[cudart]) "
            "or a CUDA toolkit and set CUDA_HOME"
        )
    return (str(DEVICE), found)


@cache
def header_digest() -> bytes:
    """SHA-256 over every header a kernel can include, so that a changed header is never served a stale binary."""
    digest = hashlib.sha256()
    for path in sorted(DEVICE.glob("*.cuh")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for name in CUDA_HEADERS:
        path = Path(include_paths()[-1]) / name
        digest.update(name.encode() + b"\0" + (path.read_bytes() if path.exists() else b"") + b"\0")
    return digest.digest()
