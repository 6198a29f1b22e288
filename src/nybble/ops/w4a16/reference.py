"""The 4-bit or 8-bit linear in PyTorch: the oracle of the kernels, and what runs on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.formats.tiles import unpack_scales, unpack_values, unpack_zeros
from nybble.ops.norm.reference import norm


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
    bits: int = 4,
) -> Tensor:
    """``[K, N]`` of a packed weight, its rows in packed (sorted) order; exact in float32.

    Args:
        qweight, scales, qzeros: as :class:`nybble.PackedWeight` holds them.
        in_features, out_features, group_size: K, N and the group.
        dtype: of the result; the arithmetic is float32.
        bits: of a value, 4 or 8.
    """
    groups = -(-in_features // group_size)
    q = unpack_values(qweight, bits)[: groups * group_size, :out_features]
    scale = unpack_scales(scales)[:groups, None, :out_features].float()
    zero: Tensor | float = 2.0 ** (bits - 1)
    if qzeros is not None:
        zero = unpack_zeros(qzeros, bits)[:groups, None, :out_features].float()
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
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_kind: str = "",
    activation: str = "",
    *,
    bits: int = 4,
) -> Tensor:
    """``activation(norm(x) @ W + bias) + residual`` in float32, rounded once to the dtype of ``x``.

    The norm's result is rounded to the dtype of ``x`` before the product, as the tensor cores read it.

    Args:
        x: ``[..., K]``. The rest as :class:`nybble.PackedWeight` holds them; bias ``[N]`` or ``None``.
        residual: ``[..., N]`` (half of N with silu_mul) or ``None``.
        norm_weight, norm_bias, eps, norm_kind: of the norm; ``norm_kind`` is ``""`` for none.
        activation: ``""`` for none.
        bits: of a value of the weight, 4 or 8.

    Returns:
        ``[..., N]``, or half of N with silu_mul.
    """
    if norm_weight is not None:
        (x, _) = norm([x], [(norm_weight, norm_bias)], None, eps, rms=norm_kind == "rmsnorm")
    weight = dequantize(qweight, scales, qzeros, in_features, out_features, group_size, bits=bits)
    if perm is not None:
        x = x.index_select(-1, perm)
    y = x.float() @ weight
    if bias is not None:
        y = y + bias.float()
    return epilogue(y, activation, None if residual is None else residual.float()).to(x.dtype)


def epilogue(y: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """``activation(y) + residual`` in the dtype of ``y``, with PyTorch's functions."""
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif activation == "silu_mul":
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


def planes(y: Tensor, splits: tuple[int, int]) -> Tensor:
    """The columns of ``y [..., N]`` before, between and after ``splits``: contiguous, one behind the other, flat."""
    return torch.cat([part.reshape(-1) for part in y.tensor_split(splits, -1)])
