"""The one meaning of a grouped 4-bit or 8-bit weight, to which every format unpacks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nybble.formats.parts import Cut, cut
from nybble.runtime.errors import wrong_type, wrong_value

GROUP_SIZES = (16, 32, 64, 128, 256)
"""Group sizes along K that are supported, besides one group for the whole of K."""

BITS = (4, 8)
"""Bits of a value that are supported."""


def sorted_features(g_idx: torch.Tensor, group_size: int) -> torch.Tensor:
    """int64 ``[K]``: the input features in the order of their groups.

    Raises:
        ValueError: a group has not ``group_size`` features, the last perhaps fewer.
    """
    k = g_idx.shape[0]
    counts = torch.bincount(g_idx.long(), minlength=-(-k // group_size)).tolist()
    for group, count in enumerate(counts):
        expected = min(group_size, k - group * group_size)
        if count != expected:
            raise wrong_value(
                "PackedWeight",
                "g_idx",
                f"{expected} features in group {group} (group_size {group_size})",
                count,
                "Quantise again with whole groups, or without act-order.",
            )
    return torch.argsort(g_idx, stable=True)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight ``W[k, n] = scales[g, n] * (q[k, n] - zeros[g, n])`` with ``g = g_idx[k]``, or ``k // group_size``.

    Attributes:
        q: uint8 ``[K, N]``, values 0..15, or 0..255 with 8 bits.
        zeros: uint8 ``[G, N]``, in the same range (8 or 128 everywhere when symmetric), the true zero points of every
            format.
        scales: ``[G, N]`` float16, bfloat16 or float32.
        group_size: features of K that share a scale; K itself for one group per output channel.
        g_idx: int32 ``[K]``, the group of each input feature (act-order), or ``None`` for ``k // group_size``.
        bits: 4 or 8.

    ``K`` is in_features, ``N`` out_features, ``G = ceil(K / group_size)``; the last group may be short.

    Raises:
        TypeError: a dtype is not the one above.
        ValueError: a shape, device or value is not; the message names it.
    """

    q: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    group_size: int
    g_idx: torch.Tensor | None = None
    bits: int = 4

    def __post_init__(self) -> None:
        op = "QuantizedWeight"
        if self.bits not in BITS:
            raise wrong_value(op, "bits", f"one of {BITS}", self.bits)
        for name, dtypes in (
            ("q", (torch.uint8,)),
            ("zeros", (torch.uint8,)),
            ("scales", (torch.float16, torch.bfloat16, torch.float32)),
        ):
            tensor = getattr(self, name)
            if not isinstance(tensor, torch.Tensor):
                raise wrong_type(op, name, "a torch.Tensor", type(tensor).__name__)
            if tensor.dtype not in dtypes:
                raise wrong_type(op, name, " or ".join(map(str, dtypes)), tensor.dtype)
            if tensor.dim() != 2:
                raise wrong_value(op, name, "2 dimensions", list(tensor.shape))
            if tensor.device != self.q.device:
                raise wrong_value(op, name, f"device {self.q.device}, that of q", tensor.device)
        k, n = self.q.shape
        if k == 0 or n == 0:
            raise wrong_value(op, "q", "K > 0 and N > 0", [k, n])
        if self.group_size not in GROUP_SIZES and self.group_size != k:
            raise wrong_value(op, "group_size", f"one of {GROUP_SIZES} or K = {k}", self.group_size)
        groups = -(-k // self.group_size)
        for name in ("zeros", "scales"):
            if tuple(getattr(self, name).shape) != (groups, n):
                raise wrong_value(op, name, f"shape [G, N] = [{groups}, {n}]", list(getattr(self, name).shape))
        if self.g_idx is not None:
            if self.g_idx.dtype != torch.int32:
                raise wrong_type(op, "g_idx", torch.int32, self.g_idx.dtype)
            if tuple(self.g_idx.shape) != (k,):
                raise wrong_value(op, "g_idx", f"shape [K] = [{k}]", list(self.g_idx.shape))
            if self.g_idx.device != self.q.device:
                raise wrong_value(op, "g_idx", f"device {self.q.device}, that of q", self.g_idx.device)
            low, high = int(self.g_idx.min()), int(self.g_idx.max())
            if low < 0 or high >= groups:
                raise wrong_value(op, "g_idx", f"groups 0..{groups - 1}", f"{low}..{high}")
        for name in ("q", "zeros"):
            if self.bits < 8 and int(getattr(self, name).max()) > 15:
                raise wrong_value(op, name, "values 0..15", int(getattr(self, name).max()))

    @property
    def in_features(self) -> int:
        return self.q.shape[0]

    @property
    def out_features(self) -> int:
        return self.q.shape[1]

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 8, or 128 with 8 bits, so that the kernels need not read them."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    def group_of(self) -> torch.Tensor:
        """int64 ``[K]``: the group of each input feature."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.in_features, device=self.q.device) // self.group_size

    def outputs(self, what: Cut) -> QuantizedWeight:
        """Some of the output features."""
        if what is None:
            return self
        q, zeros, scales = (cut(tensor, 1, what) for tensor in (self.q, self.zeros, self.scales))
        return QuantizedWeight(q, zeros, scales, self.group_size, self.g_idx, self.bits)

    def in_order(self) -> QuantizedWeight:
        """The input features sorted by group, those of a group as they are, so that there is no act-order any more.

        Raises:
            ValueError: a group has not ``group_size`` features.
        """
        if self.g_idx is None:
            return self
        order = sorted_features(self.g_idx, self.group_size)
        return QuantizedWeight(self.q[order], self.zeros, self.scales, self.group_size, None, self.bits)

    def inputs(self, begin: int, end: int) -> QuantizedWeight:
        """The input features from ``begin`` to before ``end`` of a weight without act-order.

        Where they begin or end inside of a group, all groups are cut into smaller ones of the same scale and zero
        point, which says the same.

        Raises:
            ValueError: no supported size of groups divides them so.
        """
        assert self.g_idx is None, "features in order"
        k, size = self.in_features, self.group_size
        if (begin, end) == (0, k):
            return self
        left = end - begin
        # a short last group ends with the features
        size = left if size >= k else math.gcd(size, begin, 0 if end == k else end)
        if size < left and size not in GROUP_SIZES:
            expected = f"bounds at multiples of {min(GROUP_SIZES)} within groups of {self.group_size}"
            raise wrong_value("QuantizedWeight", "inputs", expected, (begin, end))
        of = torch.arange(begin, end, min(size, left), device=self.q.device) // self.group_size
        return QuantizedWeight(
            self.q[begin:end].contiguous(), self.zeros[of], self.scales[of], min(size, left), None, self.bits
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as ``[K, N]``. In float32 it is exact: an fp16 or bf16 scale times an integer of 5 or 9 bits."""
        group = self.group_of()
        steps = self.q.to(torch.float32) - self.zeros.to(torch.float32)[group]
        return (self.scales.to(torch.float32)[group] * steps).to(dtype)
