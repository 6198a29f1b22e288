"""llama.cpp's blocks of 32 along K: Q4_0 for weights, Q8_1 for quantised activations.

::

    Q4_0, 18 bytes   d  float16 | qs 16 bytes: element j in the low nibble of qs[j], element j + 16 in the high one
                     value = d * (nibble - 8)
    Q8_1, 36 bytes   d  float16 | s float16 | qs 32 int8
                     value = d * q; s is the sum of the block's values, which nothing here depends on

A tensor of Q4_0 is uint8 ``[N, K / 32 * 18]``, as a GGUF file has it; Q8_1 is uint8 ``[..., K / 32, 36]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nybble.formats.grouped import QuantizedWeight
from nybble.formats.words import Origin
from nybble.runtime.errors import wrong_type, wrong_value

BLOCK = 32
"""Elements of one block."""
Q4_0_BYTES, Q8_1_BYTES = 18, 36
ZERO_POINT = 8
TINIEST = 2.0**-120
"""A block whose largest magnitude is below this is quantised to zeros: its Q8_1 ``d`` is zero in float16 anyway, and
``1 / d`` would be infinite in float32."""


def quantize_q4_0(weight: Tensor) -> Tensor:
    """Quantise as llama.cpp's reference does, bit for bit.

    ``d = max / -8`` with the block's value of largest magnitude (the first, with its sign), and
    ``q = min(15, trunc(x / d + 8.5))``, in float32.

    Args:
        weight: ``[N, K]``, a floating-point dtype; K a multiple of 32.

    Returns:
        uint8 ``[N, K / 32 * 18]``.

    Raises:
        TypeError: a dtype. ValueError: a shape.
    """
    if not weight.is_floating_point():
        raise wrong_type("quantize_q4_0", "weight", "a floating-point dtype", weight.dtype)
    if weight.dim() != 2 or weight.shape[1] % BLOCK or not weight.shape[1]:
        raise wrong_value("quantize_q4_0", "weight", "shape [N, K] with K a multiple of 32", list(weight.shape))
    n, k = weight.shape
    x = weight.float().reshape(n, k // BLOCK, BLOCK)
    d = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -8
    inverse = torch.where(d == 0, torch.zeros_like(d), 1 / d)
    q = torch.trunc(x * inverse + 8.5).clamp(0, 15).to(torch.uint8)
    return _join(d.squeeze(-1).half(), q)


def unpack_q4_0(data: Tensor, *, file: str = "", name: str = "") -> QuantizedWeight:
    """Q4_0 as the one meaning of a 4-bit weight: group size 32, zero point 8, float16 scales. Exact.

    Args:
        data: uint8 ``[N, K / 32 * 18]``.
        file, name: file and tensor, for messages.

    Raises:
        CheckpointError: the dtype or the shape is wrong, and ``file`` or ``name`` is given.
        TypeError, ValueError: the same without them.
    """
    origin = Origin("unpack_q4_0", file, name)
    if data.dtype != torch.uint8:
        raise origin.refuse("data", "torch.uint8", data.dtype, dtype=True)
    if data.dim() != 2 or not data.shape[1] or data.shape[1] % Q4_0_BYTES:
        raise origin.refuse("data", "shape [N, K / 32 * 18]", list(data.shape))
    n, blocks = data.shape[0], data.shape[1] // Q4_0_BYTES
    split = data.reshape(n, blocks, Q4_0_BYTES)
    scales = split[..., :2].contiguous().view(torch.float16).reshape(n, blocks)
    nibbles = split[..., 2:]
    q = torch.cat((nibbles & 15, nibbles >> 4), -1).reshape(n, blocks * BLOCK)
    zeros = torch.full((blocks, n), ZERO_POINT, dtype=torch.uint8, device=data.device)
    return QuantizedWeight(q.t().contiguous(), zeros, scales.t().contiguous(), BLOCK)


def pack_q4_0(weight: QuantizedWeight) -> Tensor:
    """The blocks of a weight: the inverse of :func:`unpack_q4_0`, bit for bit.

    Returns:
        uint8 ``[N, K / 32 * 18]``.

    Raises:
        ValueError: its groups are not of 32 features, K is no multiple of 32, a zero point is not 8, it has
            act-order, or its scales are not float16.
    """
    k, n = weight.in_features, weight.out_features
    for argument, good, expected, got in (
        ("weight.group_size", weight.group_size == BLOCK, "32", weight.group_size),
        ("weight.in_features", k % BLOCK == 0, "a multiple of 32", k),
        ("weight.zeros", weight.symmetric, "8 everywhere", "other zero points"),
        ("weight.g_idx", weight.g_idx is None, "None", "act-order"),
        ("weight.scales", weight.scales.dtype == torch.float16, "torch.float16", weight.scales.dtype),
    ):
        if not good:
            raise wrong_value("pack_q4_0", argument, expected, got, "Q4_0 has no place for it.")
    q = weight.q.t().reshape(n, k // BLOCK, BLOCK)
    return _join(weight.scales.t().contiguous(), q)


def _join(d: Tensor, q: Tensor) -> Tensor:
    """float16 ``[N, blocks]`` and uint8 ``[N, blocks, 32]`` -> uint8 ``[N, blocks * 18]``."""
    low, high = q[..., : BLOCK // 2], q[..., BLOCK // 2 :]
    scale = d.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.cat((scale, low | (high << 4)), -1).flatten(1)


class Q8_1(NamedTuple):
    """What blocks of Q8_1 hold.

    Attributes:
        q: int8 ``[..., K / 32, 32]``.
        d: float16 ``[..., K / 32]``, what a q is worth.
        s: float16 ``[..., K / 32]``, the sum of the block's values.
    """

    q: Tensor
    d: Tensor
    s: Tensor


def pack_q8_1(parts: Q8_1) -> Tensor:
    """The blocks, uint8 ``[..., K / 32, 36]``."""
    d, s = (half.contiguous().unsqueeze(-1).view(torch.uint8) for half in (parts.d, parts.s))
    return torch.cat((d, s, parts.q.contiguous().view(torch.uint8)), -1)


def unpack_q8_1(blocks: Tensor) -> Q8_1:
    """The parts of uint8 ``[..., K / 32, 36]``: the inverse of :func:`pack_q8_1`.

    Raises:
        TypeError: the dtype. ValueError: the shape.
    """
    if blocks.dtype != torch.uint8:
        raise wrong_type("unpack_q8_1", "blocks", "torch.uint8", blocks.dtype)
    if blocks.dim() < 1 or blocks.shape[-1] != Q8_1_BYTES:
        raise wrong_value("unpack_q8_1", "blocks", "shape [..., K / 32, 36]", list(blocks.shape))
    halves = blocks[..., :4].contiguous().view(torch.float16)
    return Q8_1(blocks[..., 4:].contiguous().view(torch.int8), halves[..., 0], halves[..., 1])


def quantize_q8_1(x: Tensor, *, exact_sum: bool = False) -> Q8_1:
    """Quantise as llama.cpp's reference does, in float32.

    ``d = amax / 127`` over a block, ``q = round(x * (1 / d))`` with halves away from zero, zeros where ``amax`` is
    below :data:`TINIEST`. A NaN or an infinity makes ``d`` NaN or infinite, and the block's q zeros.

    Args:
        x: ``[..., K]``, a floating-point dtype; K a multiple of 32.
        exact_sum: ``s`` is the sum of x (llama.cpp's CUDA code) instead of ``d * sum(q)`` (its CPU code).
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    d = blocks.abs().amax(-1) / 127.0
    finite = (d >= TINIEST / 127.0) & d.isfinite()
    inverse = torch.where(finite, 1.0 / d, torch.zeros_like(d)).unsqueeze(-1)
    # Halves away from zero: what is added is the largest float below one half, so that 0.49999997 stays 0.
    scaled = torch.where(finite.unsqueeze(-1), blocks * inverse, torch.zeros_like(blocks))
    q = torch.trunc(scaled + torch.copysign(torch.full_like(scaled, 0.49999997), scaled))
    total = blocks.sum(-1) if exact_sum else d * q.sum(-1)
    d = torch.where(finite | ~d.isfinite(), d, torch.zeros_like(d))
    return Q8_1(q.to(torch.int8), d.half(), total.half())
