"""The kernels' own layout of a 4-bit or 8-bit weight: every variant reads the same bytes, so a weight is stored once.

The weight is cut into tiles of 16 output by 16 input features, the A operand of one tensor-core step
(``mma.m16n8k16``, and a warp's quarter of ``wgmma.m64``), computing ``y^T = W^T x^T``. A tile is one 32-bit word for
each of a warp's 32 lanes. With ``g = lane // 4`` and ``t = lane % 4``, the word's nibbles are, lowest first::

    nibble            0        1        2        3        4        5        6        7
    output feature    g        g+8      g        g+8      g        g+8      g        g+8
    input feature     2t       2t       2t+8     2t+8     2t+1     2t+1     2t+9     2t+9

so that ``(word >> 4 i) & 0x000f000f`` is register ``i`` of the fragment. Four tiles along K make one 16-byte load a
lane, 512 bytes a warp; four warps cover 64 output features; and the 2 KB of 64 by 64 features follow each other along
K, so a block that owns 64 output features streams one contiguous range::

    qweight[N/64][K/64][strip of 16 outputs: 4][lane: 32][tile along K: 4]   int32
    scales [N/64][group][strip: 4][g: 8][half: 2]                            rows g and g + 8 are neighbours
    qzeros [N/64][group][strip: 4][g: 8]                                     uint8, row g in the low nibble, g + 8 high

With 8 bits a tile is two words a lane, and a 16-byte load holds two tiles along K, so that 64 by 64 features are 4 KB,
32 input features after the other 32::

    byte of 8          0        1        2        3        4        5        6        7
    output feature     g        g        g+8      g+8      g        g        g+8      g+8
    input feature      2t       2t+1     2t       2t+1     2t+8     2t+9     2t+8     2t+9

    qweight[N/64][K/64][half of 32 inputs: 2][strip of 16 outputs: 4][lane: 32][tile along K: 2][word: 2]   int32
    qzeros [N/64][group][strip: 4][g: 8][half: 2]                        uint8, rows g and g + 8 are neighbours

so that bytes ``2 i`` and ``2 i + 1`` are register ``i``.

Padding to whole tiles has weight zero. With act-order the input features are sorted by group (``perm``), so groups are
contiguous in the packed weight and the activations are gathered instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.formats.grouped import BITS, QuantizedWeight, sorted_features
from nybble.runtime.errors import wrong_type, wrong_value

TILE = 64
"""Features of K and of N in one contiguous block of the layout."""


def tiles(features: int) -> int:
    """Blocks of 64 that cover ``features``."""
    return -(-features // TILE)


def packed_groups(in_features: int, group_size: int) -> int:
    """Groups along the padded K: what the kernels index."""
    return 1 if group_size >= in_features else -(-tiles(in_features) * TILE // group_size)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A 4-bit or 8-bit weight in the kernels' layout (the module's diagram).

    Attributes:
        qweight: int32 ``[ceil(N/64), ceil(K/64), 512]``, or 1024 words with 8 bits.
        scales: ``[ceil(N/64), groups, 64]``, float16, bfloat16 or float32, as the checkpoint has them.
        qzeros: uint8 ``[ceil(N/64), groups, 32]``, or ``None`` when every zero point is 8; with 8 bits 64 bytes, or
            ``None`` when every zero point is 128.
        perm: int32 ``[K]``, packed position -> input feature, or ``None`` without act-order.
        in_features: K. out_features: N. group_size: features of K that share a scale (K for one group).
        bits: of a value, 4 or 8.

    Raises:
        TypeError: a dtype is not the one above.
        ValueError: a shape, a stride or the device of a tensor is not; the message names it.
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    perm: Tensor | None
    in_features: int
    out_features: int
    group_size: int
    bits: int = 4

    _settled: ClassVar[int | None] = None
    """On an instance: the versions of its tensors, added up, when a kernel last waited for whatever had written them
    (-1 where tensors have no versions). No field: it is of this object's tensors, and a copy's are new."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_settled"}

    def __post_init__(self) -> None:
        k, n, groups = self.in_features, self.out_features, packed_groups(self.in_features, self.group_size)
        if self.bits not in BITS:
            raise wrong_value("PackedWeight", "bits", f"one of {BITS}", self.bits)
        for name, features in (("in_features", k), ("out_features", n)):
            if features < 8 or features % 8:
                raise wrong_value("PackedWeight", name, "a positive multiple of 8", features)
        floats = (torch.float16, torch.bfloat16, torch.float32)
        for name, dtypes, shape in (
            ("qweight", (torch.int32,), (tiles(n), tiles(k), 128 * self.bits)),
            ("scales", floats, (tiles(n), groups, 64)),
            ("qzeros", (torch.uint8,), (tiles(n), groups, 8 * self.bits)),
            ("perm", (torch.int32,), (k,)),
        ):
            tensor: Tensor = getattr(self, name)
            if tensor is None and name in ("qzeros", "perm"):
                continue
            if tensor.dtype not in dtypes:
                raise wrong_type("PackedWeight", name, " or ".join(map(str, dtypes)), tensor.dtype)
            if tensor.shape != shape or not tensor.is_contiguous():
                remedy = "Pack with PackedWeight.from_quantized."
                raise wrong_value("PackedWeight", name, f"contiguous {list(shape)}", list(tensor.shape), remedy)
            if tensor.device != self.qweight.device:
                raise wrong_value("PackedWeight", name, f"device {self.qweight.device}, that of qweight", tensor.device)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight) -> PackedWeight:
        """Pack; on the weight's own device.

        Raises:
            ValueError: K or N is not a multiple of 8, or an act-order ``g_idx`` does not give every group its
                ``group_size`` features, so that sorting can't make the groups contiguous.
        """
        k, n = weight.in_features, weight.out_features
        for name, features in (("K (in_features)", k), ("N (out_features)", n)):
            if features % 8:
                raise wrong_value("PackedWeight", name, "a multiple of 8", features, "The kernels move 8 at a time.")
        q, perm = weight.q, None
        if weight.g_idx is not None:
            perm = _sort_groups(weight)
            if perm is not None:
                q = q[perm.long()]
        groups = packed_groups(k, weight.group_size)
        zeros = _pad(weight.zeros, groups, tiles(n) * TILE)
        scales = _pad(weight.scales, groups, tiles(n) * TILE)
        return cls(
            _pack_values(q, zeros, weight.group_size, weight.bits),
            _rows_to_tiles(scales),
            None if weight.symmetric else _pack_zeros(zeros, weight.bits),
            perm,
            k,
            n,
            weight.group_size,
            weight.bits,
        )

    def unpack(self) -> QuantizedWeight:
        """The exact inverse of :meth:`from_quantized`."""
        k, n = self.in_features, self.out_features
        groups = -(-k // self.group_size)
        q = unpack_values(self.qweight, self.bits)[:k, :n].contiguous()
        scales = _tiles_to_rows(self.scales)[:groups, :n].contiguous()
        if self.qzeros is None:
            zeros = torch.full((groups, n), 1 << (self.bits - 1), dtype=torch.uint8, device=q.device)
        else:
            zeros = unpack_zeros(self.qzeros, self.bits)[:groups, :n].contiguous()
        g_idx = None
        if self.perm is not None:
            order = self.perm.long()
            straight = torch.empty_like(q)
            straight[order] = q
            q = straight
            g_idx = torch.empty(k, dtype=torch.int32, device=q.device)
            g_idx[order] = torch.arange(k, dtype=torch.int32, device=q.device) // self.group_size
        return QuantizedWeight(q, zeros, scales, self.group_size, g_idx, self.bits)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``(qweight, scales, qzeros, perm)``, as the operator takes them."""
        return self.qweight, self.scales, self.qzeros, self.perm

    def settle(self) -> bool:
        """Whether a launch must wait for the whole of the kernel before it, which may be what wrote these tensors.

        True for the first launch and after a change in place; a kernel otherwise reads weights before it waits.
        """
        settled = self._settled
        if settled == -1:
            return False
        if settled is None and any(t is not None and t.is_inference() for t in self.tensors):
            object.__setattr__(self, "_settled", -1)
            return True
        version = self.qweight._version + self.scales._version
        if self.qzeros is not None:
            version += self.qzeros._version
        if settled == version:
            return False
        object.__setattr__(self, "_settled", version)
        return True

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight occupies."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        moved = [None if t is None else t.to(device) for t in self.tensors]
        return PackedWeight(*moved, self.in_features, self.out_features, self.group_size, self.bits)  # type: ignore[arg-type]


def _sort_groups(weight: QuantizedWeight) -> Tensor | None:
    """int32 ``[K]``: the features in order of their group; ``None`` when they already are."""
    assert weight.g_idx is not None
    perm = sorted_features(weight.g_idx, weight.group_size).to(torch.int32)
    ordered = torch.equal(perm, torch.arange(weight.in_features, dtype=torch.int32, device=perm.device))
    return None if ordered else perm


def _pad(rows: Tensor, height: int, width: int) -> Tensor:
    padded = rows.new_zeros(height, width)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    return padded


def _pack_values(q: Tensor, zeros: Tensor, group_size: int, bits: int) -> Tensor:
    k, n = q.shape
    height, width = tiles(k) * TILE, zeros.shape[1]
    padded = q
    if (height, width) != (k, n):
        # A padded value equals its zero point: its weight is 0 whatever the scale is.
        group = torch.arange(height, device=q.device) // group_size
        padded = zeros[group.clamp_(max=zeros.shape[0] - 1)]
        padded[:k, :n] = q
    if bits == 8:
        split = padded.t().reshape(width // 64, 4, 2, 8, height // 64, 2, 2, 2, 4, 2)
        #                          N/64  strip half g   K/64  k32 tile far t  odd
        ordered = split.permute(0, 4, 5, 1, 3, 8, 6, 7, 2, 9).reshape(width // 64, height // 64, 4096)
        return ordered.contiguous().view(torch.int32)
    split = padded.t().reshape(width // 64, 4, 2, 8, height // 64, 4, 2, 4, 2)
    #                          N/64  strip half g   K/64  tile  far t  odd
    nibbles = split.permute(0, 4, 1, 3, 7, 5, 8, 6, 2).reshape(width // 64, height // 64, 512, 8)
    return _join_nibbles(nibbles).view(torch.int32).reshape(width // 64, height // 64, 512)


def unpack_values(qweight: Tensor, bits: int = 4) -> Tensor:
    """uint8 ``[K padded, N padded]`` of a packed ``qweight``."""
    n_tiles, k_tiles, _ = qweight.shape
    packed = qweight.contiguous().view(torch.uint8)
    if bits == 8:
        split = packed.reshape(n_tiles, k_tiles, 2, 4, 8, 4, 2, 2, 2, 2)
        #                       N/64     K/64   k32 strip g t tile far half odd
        return split.permute(1, 2, 6, 7, 5, 9, 0, 3, 8, 4).reshape(k_tiles * 64, n_tiles * 64)
    nibbles = torch.stack((packed & 15, packed >> 4), -1)
    split = nibbles.reshape(n_tiles, k_tiles, 4, 8, 4, 4, 2, 2, 2)
    #                       N/64     K/64     strip g t tile odd far half
    return split.permute(1, 5, 7, 4, 6, 0, 2, 8, 3).reshape(k_tiles * 64, n_tiles * 64)


def _rows_to_tiles(rows: Tensor) -> Tensor:
    """``[groups, N]`` -> ``[N/64, groups, 64]`` with features g and g + 8 of a strip side by side."""
    groups, n = rows.shape
    return rows.reshape(groups, n // 64, 4, 2, 8).permute(1, 0, 2, 4, 3).reshape(n // 64, groups, 64).contiguous()


def _tiles_to_rows(packed: Tensor) -> Tensor:
    n_tiles, groups, _ = packed.shape
    return packed.reshape(n_tiles, groups, 4, 8, 2).permute(1, 0, 2, 4, 3).reshape(groups, n_tiles * 64)


def _pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    return _rows_to_tiles(zeros) if bits == 8 else _join_nibbles(_rows_to_tiles(zeros))


def unpack_zeros(qzeros: Tensor, bits: int = 4) -> Tensor:
    """uint8 ``[groups, N padded]`` of packed zero points."""
    if bits == 8:
        return _tiles_to_rows(qzeros)
    return _tiles_to_rows(torch.stack((qzeros & 15, qzeros >> 4), -1).flatten(-2))


def unpack_scales(scales: Tensor) -> Tensor:
    """``[groups, N padded]`` of packed scales."""
    return _tiles_to_rows(scales)


def _join_nibbles(nibbles: Tensor) -> Tensor:
    """uint8 ``[..., 2 n]`` -> uint8 ``[..., n]``, the first of two in the low half."""
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
