"""Attention of one new token in PyTorch: the oracle of the kernel, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def quarter(x: Tensor) -> Tensor:
    """``(-second half, first half)``: rotated by a quarter turn."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def prepare(x: Tensor, weight: Tensor | None, eps: float, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys, normed and rotated in fp32, rounded once.

    Args:
        x: ``[B, heads, D]``.
        weight: of the RMSNorm over D, or ``None``.
        angles: cosines and sines ``[B or 1, rotary]``, or ``None``.
    """
    y = x.float()
    if weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    if angles is not None:
        cos, sin = (angle.float().unsqueeze(1) for angle in angles)
        rotary = cos.shape[-1]
        y = torch.cat((y[..., :rotary] * cos + quarter(y[..., :rotary]) * sin, y[..., rotary:]), -1)
    return y.to(x.dtype)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    seen: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None,
    sinks: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    scale: float,
    eps: float,
) -> Tensor:
    """As :func:`nybble.decode_attention`; the host is asked for nothing. Scores, their softmax and sums in fp32."""
    q_weight, k_weight = (None, None) if norms is None else norms
    q, k = prepare(q, q_weight, eps, angles), prepare(k, k_weight, eps, angles)
    keys.index_copy_(2, slot, k.unsqueeze(2))
    values.index_copy_(2, slot, v.unsqueeze(2))
    batch, heads, slots, d = keys.shape
    held = keys.float()
    if sinks is not None:
        still, turned, cos, sin = sinks
        count, rotary = still.shape[2:]
        held[:, :, :count, :rotary] = (still * cos + turned * sin).to(keys.dtype).float()
    used = torch.arange(slots, device=keys.device) <= seen
    scores = (q.float().reshape(batch, heads, q.shape[1] // heads, d) @ held.transpose(2, 3)) * scale
    weights = scores.masked_fill(~used, float("-inf")).softmax(-1)
    # whatever lies in a slot that is not in use must not come through its weight of 0
    taken = values.float().masked_fill(~used.view(-1, 1), 0.0)
    return (weights @ taken).view(q.shape).to(q.dtype)
