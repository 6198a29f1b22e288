"""The kernels' layout of an int4 weight with one scale an output channel, for the integer tensor cores.

A chunk is 64 output by 64 input features, 2 KB, and chunks follow each other along K, which is padded to a multiple of
128. A strip of a chunk, 16 output features, is four words for each of a warp's 32 lanes. With ``g = lane // 4`` and
``t = lane % 4``, byte ``b`` of word ``2 s + h`` holds two values of input feature ``32 s + 16 h + 4 t + b``: that of
output feature ``g`` in its high half, that of ``g + 8`` in its low half, two's complement. So ``word & 0xf0f0f0f0`` and
``(word << 4) & 0xf0f0f0f0`` are registers of an int8 fragment, 16 times the value each::

    qweight[N/64][2 * ceil(K/128)][strip of 16 outputs: 4][lane: 32][word: 4]   int32
    scales [N padded to 64]                                                     float32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.runtime.errors import wrong_type, wrong_value

UNIT = 128
"""Input features that a kernel takes at a time."""


def chunks(in_features: int) -> int:
    """Chunks of 64 input features, K padded to whole units."""
    return 2 * -(-in_features // UNIT)


@dataclass(frozen=True, eq=False)
class ChannelWeight:
    """An int4 weight ``[K, N]`` in the kernels' layout (the module's diagram): ``W[k, n] = q[k, n] * scales[n]``.

    Attributes:
        qweight: int32 ``[ceil(N/64), chunks(K), 512]``.
        scales: float32 ``[ceil(N/64) * 64]``, zero past N.
        in_features: K, a multiple of 8. out_features: N, a multiple of 8.

    Raises:
        TypeError: a dtype is not the one above.
        ValueError: a shape, a stride or the device of a tensor is not; the message names it.
    """

    qweight: Tensor
    scales: Tensor
    in_features: int
    out_features: int

    _settled: ClassVar[int | None] = None
    """On an instance, as :class:`nybble.PackedWeight` has it."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_settled"}

    def __post_init__(self) -> None:
        for name, features in (("in_features", self.in_features), ("out_features", self.out_features)):
            if features < 8 or features % 8:
                raise wrong_value("ChannelWeight", name, "a positive multiple of 8", features)
        wide = -(-self.out_features // 64)
        for name, tensor, dtype, shape in (
            ("qweight", self.qweight, torch.int32, (wide, chunks(self.in_features), 512)),
            ("scales", self.scales, torch.float32, (wide * 64,)),
        ):
            if tensor.dtype != dtype:
                raise wrong_type("ChannelWeight", name, dtype, tensor.dtype)
            if tensor.shape != shape or not tensor.is_contiguous():
                remedy = "Pack with ChannelWeight.from_values."
                raise wrong_value("ChannelWeight", name, f"contiguous {list(shape)}", list(tensor.shape), remedy)
            if tensor.device != self.qweight.device:
                expected = f"device {self.qweight.device}, that of qweight"
                raise wrong_value("ChannelWeight", name, expected, tensor.device)

    @classmethod
    def from_values(cls, q: Tensor, scales: Tensor) -> ChannelWeight:
        """Pack int8 ``[K, N]`` in -8 .. 7 and scales ``[N]``; on their own device.

        Raises:
            TypeError: a dtype. ValueError: a shape, a device or a value.
        """
        if q.dtype != torch.int8:
            raise wrong_type("ChannelWeight", "q", torch.int8, q.dtype)
        if q.dim() != 2 or q.shape[0] % 8 or q.shape[1] % 8 or not q.numel():
            raise wrong_value("ChannelWeight", "q", "shape [K, N], multiples of 8", list(q.shape))
        k, n = q.shape
        if scales.shape != (n,):
            raise wrong_value("ChannelWeight", "scales", f"shape [N] = [{n}]", list(scales.shape))
        if not scales.dtype.is_floating_point:
            raise wrong_type("ChannelWeight", "scales", "a floating-point dtype", scales.dtype)
        if scales.device != q.device:
            raise wrong_value("ChannelWeight", "scales", f"device {q.device}, that of q", scales.device)
        if bool(((q < -8) | (q > 7)).any()):
            raise wrong_value("ChannelWeight", "q", "values -8 .. 7", int(q.abs().max()))
        wide, deep = -(-n // 64), chunks(k)
        padded = q.new_zeros(deep * 64, wide * 64)
        padded[:k, :n] = q
        nibbles = padded.view(torch.uint8).bitwise_and_(15).t().reshape(wide, 4, 2, 8, deep, 2, 2, 4, 4)
        #                                                             N/64 strip half g  chunk s h t b
        ordered = nibbles.permute(0, 4, 1, 3, 7, 5, 6, 8, 2)
        qweight = (ordered[..., 0] << 4 | ordered[..., 1]).contiguous().view(torch.int32).reshape(wide, deep, 512)
        all_scales = torch.zeros(wide * 64, dtype=torch.float32, device=q.device)
        all_scales[:n] = scales
        return cls(qweight, all_scales, k, n)

    @classmethod
    def from_float(cls, weight: Tensor) -> ChannelWeight:
        """Round ``[N, K]`` (as ``nn.Linear`` has it) to the nearest; a channel's scale is its largest magnitude / 7."""
        largest = weight.float().abs().amax(1)
        scales = torch.where(largest == 0, torch.ones_like(largest), largest / 7.0)
        q = (weight.float() / scales[:, None]).round().clamp(-8, 7).to(torch.int8)
        return cls.from_values(q.t().contiguous(), scales)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """int8 ``[K, N]`` and float32 scales ``[N]``: the exact inverse of :meth:`from_values`."""
        wide, deep, _ = self.qweight.shape
        packed = self.qweight.contiguous().view(torch.uint8).reshape(wide, deep, 4, 8, 4, 2, 2, 4)
        nibbles = torch.stack((packed >> 4, packed & 15), -1)
        #                      N/64 chunk strip g t s h b half -> chunk s h t b, N/64 strip half g
        q = nibbles.permute(1, 5, 6, 4, 7, 0, 2, 8, 3).reshape(deep * 64, wide * 64)
        q = ((q ^ 8).to(torch.int8) - 8)[: self.in_features, : self.out_features]
        return q.contiguous(), self.scales[: self.out_features]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """``(qweight, scales)``, as the operator takes them."""
        return self.qweight, self.scales

    def settle(self) -> bool:
        """Whether a launch must wait for the whole of the kernel before it, which may be what wrote the weight.

        True for the first launch and after a change in place; a kernel otherwise reads it before it waits.
        """
        if self._settled == -1:
            return False
        if self.qweight.is_inference():
            object.__setattr__(self, "_settled", -1)
            return True
        version = self.qweight._version
        if self._settled == version:
            return False
        object.__setattr__(self, "_settled", version)
        return True

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight occupies."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    def to(self, device: torch.device | str) -> ChannelWeight:
        """The same weight on another device."""
        return ChannelWeight(self.qweight.to(device), self.scales.to(device), self.in_features, self.out_features)
