"""Q4_0 times Q8_1 in PyTorch: the oracle of the kernels, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.formats.gguf_q4_0 import BLOCK, ZERO_POINT, pack_q8_1, unpack_q8_1
from nybble.formats.gguf_q4_0 import quantize_q8_1 as parts
from nybble.formats.tiles import unpack_scales, unpack_values


def quantize(x: Tensor, exact_sum: bool = False) -> Tensor:
    """``[..., K]`` to blocks of Q8_1, uint8 ``[..., K / 32, 36]``."""
    if not x.numel():
        return torch.empty((*x.shape[:-1], x.shape[-1] // BLOCK, 36), dtype=torch.uint8, device=x.device)
    return pack_q8_1(parts(x, exact_sum=exact_sum))


def product(q8_1: Tensor, qweight: Tensor, scales: Tensor, k: int, n: int) -> Tensor:
    """float32 ``[..., N]`` of blocks ``[..., K / 32, 36]`` and a packed weight.

    ``sum over blocks of d4 * (d8 * dot(q4 - 8, q8))``: the dot is an exact integer, the rest is float32.
    """
    lead = q8_1.shape[:-2]
    held = unpack_q8_1(q8_1.reshape(-1, k // BLOCK, 36))
    q4 = unpack_values(qweight)[:k, :n].float() - ZERO_POINT
    d4 = unpack_scales(scales)[: k // BLOCK, :n].float()
    q8, d8 = held.q.float(), held.d.float()
    y = torch.zeros(q8.shape[0], n, device=q8_1.device)
    for block in range(k // BLOCK):
        dot = q8[:, block] @ q4[block * BLOCK : (block + 1) * BLOCK]  # up to 2^19: exact in float32
        y += d4[block] * (d8[:, block, None] * dot)
    return y.reshape(*lead, n)
