"""int32 words of eight nibbles or four bytes, and what a packed tensor must look like before it is read as such.

A check here runs alike on a file's header and on a tensor in hand, so that a refusal reads the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nybble.formats.grouped import GROUP_SIZES
from nybble.runtime.errors import CheckpointError, wrong_type, wrong_value

NIBBLES = 8
"""Values of 4 bits in one int32 word; nibble ``i`` is bits ``4*i .. 4*i+3``."""

IN_ORDER = tuple(range(NIBBLES))
WORD = (torch.int32,)
SCALE = (torch.float16, torch.bfloat16, torch.float32)


def unpack_rows(words: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """The values of each word, one below the other.

    Args:
        words: int32 ``[R, N]``.
        bits: of a value, 4 or 8; a word holds ``P = 32 / bits`` of them, the lowest first.

    Returns:
        uint8 ``[P*R, N]``: row ``P*r + i`` is value ``i`` of row ``r``.
    """
    each, mask = 32 // bits, (1 << bits) - 1
    values = torch.empty((each * words.shape[0], words.shape[1]), dtype=torch.uint8, device=words.device)
    for i in range(each):
        # the sign bits that >> drags in are masked away: no wider type is needed
        values[i::each] = (words >> bits * i).bitwise_and_(mask)
    return values


def pack_rows(values: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """The inverse of :func:`unpack_rows`: uint8 ``[P*R, N]`` to int32 ``[R, N]``."""
    each = 32 // bits
    words = values[0::each].to(torch.int32)
    for i in range(1, each):
        words |= values[i::each].to(torch.int32) << bits * i
    return words


def unpack_columns(words: torch.Tensor, order: Sequence[int] = IN_ORDER, bits: int = 4) -> torch.Tensor:
    """The values of each word, side by side.

    Args:
        words: int32 ``[R, C]``.
        order: value ``i`` of word ``c`` is column ``P*c + order[i]``; of its entries the first ``P = 32 / bits`` count.
        bits: of a value, 4 or 8.

    Returns:
        uint8 ``[R, P*C]``.
    """
    each, mask = 32 // bits, (1 << bits) - 1
    values = torch.empty((words.shape[0], each * words.shape[1]), dtype=torch.uint8, device=words.device)
    for i, column in enumerate(order[:each]):
        values[:, column::each] = (words >> bits * i).bitwise_and_(mask)
    return values


def pack_columns(values: torch.Tensor, order: Sequence[int] = IN_ORDER, bits: int = 4) -> torch.Tensor:
    """The inverse of :func:`unpack_columns`: uint8 ``[R, P*C]`` to int32 ``[R, C]``."""
    each = 32 // bits
    words = values[:, order[0] :: each].to(torch.int32)
    for i, column in enumerate(order[1:each], start=1):
        words |= values[:, column::each].to(torch.int32) << bits * i
    return words


class Origin(NamedTuple):
    """Whose tensors are checked: a refusal names the file and module where there are any, else the function."""

    operation: str
    file: str = ""
    module: str = ""

    def refuse(self, tensor: str, expected: str, got: object, *, why: str = "", dtype: bool = False) -> Exception:
        """``CheckpointError`` for a tensor of a file, else ``TypeError`` (``dtype``) or ``ValueError``."""
        if self.file or self.module:
            reason = f"expected {expected}, got {got}" + (f". {why}" if why else "")
            return CheckpointError(self.file or "checkpoint", self.name(tensor), reason)
        return (wrong_type if dtype else wrong_value)(self.operation, tensor, expected, got, why)

    def name(self, tensor: str) -> str:
        return f"{self.module}.{tensor}" if self.module else tensor


class Form(NamedTuple):
    """The shape and dtype that one tensor of a packed layer must have.

    Attributes:
        axes: the shape in letters, such as ``"[K/8, N]"``.
        shape: the same in numbers.
        dtypes: any of these.
    """

    axes: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def check(self, tensor: str, shape: Sequence[int], dtype: torch.dtype, origin: Origin) -> None:
        """Raises as ``origin.refuse`` says unless ``shape`` and ``dtype`` are these."""
        if dtype not in self.dtypes:
            raise origin.refuse(tensor, " or ".join(map(str, self.dtypes)), dtype, dtype=True)
        if tuple(shape) != self.shape:
            raise origin.refuse(tensor, f"shape {self.axes} = {list(self.shape)}", list(shape))


def check_tensor(tensor: str, value: torch.Tensor, form: Form, origin: Origin) -> None:
    """``form.check`` of a tensor in hand."""
    if not isinstance(value, torch.Tensor):
        raise wrong_type(origin.operation, tensor, "a torch.Tensor", type(value).__name__)
    form.check(tensor, value.shape, value.dtype, origin)


def check_words(tensor: str, value: torch.Tensor, origin: Origin) -> None:
    """Refuses what is no 2-dimensional, non-empty int32 tensor: the sizes of a layer are taken from it."""
    if not isinstance(value, torch.Tensor):
        raise wrong_type(origin.operation, tensor, "a torch.Tensor", type(value).__name__)
    if value.dtype not in WORD:
        raise origin.refuse(tensor, str(WORD[0]), value.dtype, dtype=True)
    if value.dim() != 2 or 0 in value.shape:
        raise origin.refuse(tensor, "2 dimensions, none of them 0", list(value.shape))


def features_per_group(group_size: int, k: int, origin: Origin) -> int:
    """``group_size`` with -1 (and nothing else) meaning the whole of K; refuses sizes that are not supported."""
    if group_size == -1:
        return k
    if group_size not in GROUP_SIZES and group_size != k:
        raise origin.refuse("group_size", f"-1, one of {GROUP_SIZES}, or K = {k}", group_size)
    return group_size


def check_packable(k: int, n: int, origin: Origin) -> None:
    """Refuses a weight whose sides are no multiples of 8: the formats pack eight nibbles a word, along K or along N,
    and the kernels move eight features at a time, bytes too."""
    for axis, size in (("K (in_features)", k), ("N (out_features)", n)):
        if size % NIBBLES:
            raise origin.refuse("qweight", f"{axis} to be a multiple of {NIBBLES}", size)
