"""The maths of FlatQuant in PyTorch: the oracle of the kernel and what a CPU runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 2.0**-126
"""The smallest scale: the smallest normal float32."""


def transform(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left^T X right`` of every row of ``x`` as a matrix X ``[M, N]``: float32 ``[T, M * N]``."""
    m, n = left.shape[0], right.shape[0]
    t = x.float().reshape(-1, n) @ right.float()
    return (left.float().t() @ t.view(x.shape[0], m, n)).reshape(x.shape[0], m * n)


def quantize(y: Tensor, clip_ratio: float) -> tuple[Tensor, Tensor]:
    """int8 ``[T, F]`` in -8 .. 7 and float32 scales ``[T]`` of ``y``: see :func:`nybble.flatquant_dynamic_quantize`."""
    largest = y.abs().amax(-1) if y.shape[-1] else y.new_zeros(y.shape[0])
    scales = (clip_ratio * largest / 7.0).clamp(min=TINY)
    scales = torch.where(largest == 0, torch.ones_like(scales), scales)
    finite = largest.isfinite()
    q = (y * (1.0 / scales)[:, None]).round().clamp(-8, 7)
    q = torch.where(finite[:, None], q, torch.zeros_like(q))
    return q.to(torch.int8), torch.where(finite, scales, torch.full_like(scales, torch.nan))


def pack(q: Tensor, offset: bool = False) -> Tensor:
    """int32 ``[..., F / 8]`` of ``[..., F]``: element i in bits 4 (i % 8), two's complement or ``q + 8``."""
    nibbles = (q.to(torch.int64) + 8 if offset else q.to(torch.int64) & 15).unflatten(-1, (-1, 8))
    shifts = torch.arange(0, 32, 4, device=q.device)
    words = (nibbles << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: Tensor, offset: bool = False) -> Tensor:
    """The inverse of :func:`pack`: int8 ``[..., F]``."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    nibbles = (words[..., None] >> shifts & 15).flatten(-2)
    return (nibbles - 8 if offset else (nibbles ^ 8) - 8).to(torch.int8)


def flatquant(
    x: Tensor, left: Tensor, right: Tensor, clip_ratios: Sequence[float], packed: bool, offset: bool
) -> tuple[Tensor, Tensor]:
    """Values ``[clips, T, F]`` or ``[clips, T, F / 8]`` and scales ``[clips, T]``, all from one transform."""
    y = transform(x, left, right)
    values, scales = zip(*(quantize(y, clip) for clip in clip_ratios), strict=True)
    q = torch.stack(values)
    return pack(q, offset) if packed else q, torch.stack(scales)
