"""Peers of the W4A4 linear: the weight in 16 bits (cuBLAS), and PyTorch's int8 product with the scales after it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.bench.peers import Inapplicable, Peer
from nybble.bench.timing import Call
from nybble.ops.case import Case


def _dense(case: Case, inputs: Any) -> Call:
    """What the layer would cost without quantisation: the same values in 16 bits."""
    if case.dtype not in (torch.float16, torch.bfloat16):
        raise Inapplicable("16-bit results only")
    x = (inputs.q_x.float() * inputs.scale_x[:, None]).to(case.dtype)
    weight = (inputs.q.float() * inputs.scales).t().contiguous().to(case.dtype)
    return Call(F.linear, (x, weight, inputs.bias))


def int8(q_x: Tensor, scale_x: Tensor, q: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch.ops.aten._int_mm(q_x, q) * scale_x[:, None] * scales
    return (y if bias is None else y + bias).to(dtype)


def _int8(case: Case, inputs: Any) -> Call:
    if inputs.q_x.device.type != "cuda" or inputs.q_x.shape[0] <= 16:
        raise Inapplicable("CUDA, more than 16 rows")
    q = inputs.q.t().contiguous().t()  # column-major, as cuBLAS wants it
    return Call(int8, (inputs.q_x, inputs.scale_x, q, inputs.scales, inputs.bias, case.dtype))


PEERS = (Peer("torch", "fp16", "torch", _dense), Peer("torch", "int8", "torch", _int8))
