"""The 4-bit linear in PyTorch: the oracle of the kernels, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.formats.tiles import unpack_scales, unpack_values, unpack_zeros


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``[K, N]`` of a packed weight, its rows in packed (sorted) order; exact in float32.

    Args:
        qweight, scales, qzeros: as :class:`nybble.PackedWeight` holds them.
        in_features, out_features, group_size: K, N and the group.
        dtype: of the result; the arithmetic is float32.
    """
    groups = -(-in_features // group_size)
    q = unpack_values(qweight)[: groups * group_size, :out_features]
    scale = unpack_scales(scales)[:groups, None, :out_features].float()
    zero: Tensor | float = 8.0 if qzeros is None else unpack_zeros(qzeros)[:groups, None, :out_features].float()
    # The last group may be short: pad its rows to a whole group, which the caller never sees.
    missing = groups * group_size - q.shape[0]
    if missing:
        q = torch.nn.functional.pad(q, (0, 0, 0, missing))
    steps = q.reshape(groups, group_size, out_features).to(torch.float32).sub_(zero)
    return steps.mul_(scale).reshape(-1, out_features)[:in_features].to(dtype)


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
) -> Tensor:
    """``x @ W (+ bias)`` in float32, rounded once to the dtype of ``x``.

    Args:
        x: ``[..., K]``. The rest as :class:`nybble.PackedWeight` holds them; bias ``[N]`` or ``None``.

    Returns:
        ``[..., N]``.
    """
    weight = dequantize(qweight, scales, qzeros, in_features, out_features, group_size)
    if perm is not None:
        x = x.index_select(-1, perm)
    y = x.float() @ weight
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
