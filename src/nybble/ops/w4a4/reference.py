"""The maths of the W4A4 linear in PyTorch: the oracle of the kernel and what a CPU runs."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.formats.channels import ChannelWeight

EXACT = 1 << 24
"""Integers up to which float32 has them all."""


def linear(q_x: Tensor, scale_x: Tensor, weight: ChannelWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(q_x @ q) * scale_x * scale_w (+ bias)``: an exact sum of integers, then float32, rounded once to ``dtype``."""
    q, scales = weight.unpack()
    exact = torch.float32 if weight.in_features * 128 * 8 <= EXACT else torch.float64
    total = (q_x.to(exact) @ q.to(exact)).float()
    y = total * scale_x.float()[..., None] * scales
    return (y if bias is None else y + bias.float()).to(dtype)
