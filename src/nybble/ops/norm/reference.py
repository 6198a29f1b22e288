"""The norm family in PyTorch: the oracle of the kernels, and what runs on a CPU.

Statistics in fp32 by the kernels' own method: deviations from a first mean, mended by the deviations' own mean, so a
row at mean 1e4 with deviation 1 keeps every digit that its inputs have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def standardize(h: Tensor, eps: float, rms: bool) -> Tensor:
    """``(h - mean) / sqrt(var + eps)`` over the last dimension, or ``h / sqrt(mean(h^2) + eps)``; ``h`` is fp32."""
    if rms:
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    deviation = h - h.mean(-1, keepdim=True)
    deviation = deviation - deviation.mean(-1, keepdim=True)
    return deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps)


def norm(
    addends: Sequence[Tensor],
    weights: Sequence[tuple[Tensor, Tensor | None]],
    after: Tensor | None,
    eps: float,
    *,
    rms: bool,
) -> tuple[Tensor, ...]:
    """Every function of the family: the outputs for each ``(weight, bias)``, then the sum in fp32 rounded once.

    Args:
        addends: one to three ``[..., hidden]`` tensors; summed in fp32 in this order.
        weights: one or two ``(weight [hidden], bias [hidden] or None)``.
        after: added to the normalised result, or ``None``.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm.

    Returns:
        ``(y for each weight, sum)``, all in the dtype of the addends.
    """
    dtype = addends[0].dtype
    h = addends[0].float()
    for addend in addends[1:]:
        h = h + addend.float()
    unit = standardize(h, eps, rms)
    results = []
    for weight, bias in weights:
        y = unit * weight.float()
        if bias is not None:
            y = y + bias.float()
        if after is not None:
            y = y + after.float()
        results.append(y.to(dtype))
    return (*results, h.to(dtype))
