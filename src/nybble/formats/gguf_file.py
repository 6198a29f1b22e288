"""A GGUF file: what is in it and whether it is whole. Read by the gguf library, its tensors only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nybble.runtime.errors import CheckpointError

MAGIC = b"GGUF"

PLAIN = ("F32", "F16", "BF16", "Q8_0", "Q6_K")
"""Types besides Q4_0 whose tensors are read: as floats, each with the values that llama.cpp gives them. llama.cpp's own
Q4_0 files keep the head in Q6_K."""


def is_gguf(path: str | Path) -> bool:
    """Whether a path is meant as a GGUF file: its name says so, or its first bytes do."""
    file = Path(path).expanduser()
    if file.is_dir():
        return False
    if file.suffix.lower() == ".gguf":
        return True
    try:
        with file.open("rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


EVERY = slice(None)


class GGUFFile:
    """The tensors and fields of a file.

    Args:
        file: path of the file.

    Raises:
        CheckpointError: it is missing, truncated or no GGUF file.
    """

    def __init__(self, file: str | Path) -> None:
        from gguf import GGUFReader

        self.file = Path(file).expanduser()
        if not self.file.is_file():
            raise CheckpointError(self.file, "", "not a file" if self.file.exists() else "no such file")
        size = self.file.stat().st_size
        with self.file.open("rb") as stream:
            start = stream.read(40)
        if start[:4] != MAGIC:
            pointer = start.startswith(b"version https://git-lfs")
            why = "a Git LFS pointer, not the file itself" if pointer else "not a GGUF file"
            raise CheckpointError(self.file, "", f"{why} ({size} bytes)")
        try:
            reader: Any = GGUFReader(str(self.file))
        except Exception as error:  # the library finds damage by whatever NumPy or an enumeration raises
            reason = f"truncated, damaged or of a type unknown to the gguf library ({size} bytes: {error})"
            raise CheckpointError(self.file, "", f"{reason}. Download it again") from error
        if reader.byte_order != "I":
            raise CheckpointError(self.file, "", "written for a machine of the other byte order")
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        for name, tensor in self._tensors.items():
            end = tensor.data_offset + tensor.n_bytes
            if end > size or tensor.data.nbytes != tensor.n_bytes:
                raise CheckpointError(self.file, name, f"truncated: ends at byte {end} of a file of {size}")

    def field(self, key: str) -> Any:
        """The value of a metadata field, ``None`` where it is not there."""
        found = self._fields.get(key)
        return None if found is None else found.contents()

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """As PyTorch has it: ``[out_features, in_features]`` of a linear layer."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def type(self, name: str) -> str:
        """Such as ``"Q4_0"``."""
        return str(self._tensors[name].tensor_type.name)

    def check_type(self, name: str) -> str:
        """The type of a tensor; CheckpointError where it is none that is read."""
        kind = self.type(name)
        if kind not in (*PLAIN, "Q4_0"):
            known = ", ".join(("Q4_0", *PLAIN))
            raise CheckpointError(self.file, name, f"is of type {kind}; supported are {known}")
        return kind

    def bytes(self, name: str, rows: slice = EVERY, columns: slice = EVERY) -> Tensor:
        """Rows of a quantised tensor as they lie in the file: uint8 ``[rows, bytes]``, a copy. Others are not read."""
        return torch.from_numpy(np.array(self._tensors[name].data[rows, columns], dtype=np.uint8, copy=True))

    def tensor(self, name: str) -> Tensor:
        """The values: float16 where the file has it, else float32."""
        from gguf import dequantize

        found = self._tensors[name]
        if self.check_type(name) == "F16":
            return torch.from_numpy(np.array(found.data, copy=True))
        values = dequantize(found.data, found.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=True)).reshape(self.shape(name))
