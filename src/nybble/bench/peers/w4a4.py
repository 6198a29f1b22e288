"""Peers of the W4A4 linear: the weight in 16 bits (cuBLAS), PyTorch's int8 product with the scales after it, and
Nybble's own linear of 4-bit weights and 16-bit activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.bench.peers import Inapplicable, Peer
from nybble.bench.timing import Call
from nybble.formats.grouped import QuantizedWeight
from nybble.formats.tiles import PackedWeight
from nybble.ops.case import Case
from nybble.ops.w4a16.op import w4a16_linear


def _activations(case: Any, inputs: Any) -> Tensor:
    """The quantised ones, in the dtype of the result."""
    if case.dtype not in (torch.float16, torch.bfloat16):
        raise Inapplicable("16-bit results only")
    q_x, scale_x = (inputs.q_x, inputs.scale_x) if inputs.raw is None else case.quantiser.truth(inputs.raw)
    return (q_x.float() * scale_x.float()[:, None]).to(case.dtype)


def _dense(case: Case, inputs: Any) -> Call:
    """What the layer would cost without quantisation: the same values in 16 bits."""
    x = _activations(case, inputs)
    weight = (inputs.q.float() * inputs.scales).t().contiguous().to(case.dtype)
    return Call(F.linear, (x, weight, inputs.bias))


def _weight_only(case: Case, inputs: Any) -> Call:
    """The same weight in groups of 128, whose scales are all its channel's."""
    x, k = _activations(case, inputs), inputs.q.shape[0]
    scales = inputs.scales.to(case.dtype).expand(-(-k // 128), -1).contiguous()
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8, device=scales.device)
    weight = PackedWeight.from_quantized(QuantizedWeight((inputs.q + 8).to(torch.uint8), zeros, scales, 128))
    return Call(lambda x, weight, bias: w4a16_linear(x, weight, bias=bias), (x, weight, inputs.bias))


def int8(q_x: Tensor, scale_x: Tensor, q: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch.ops.aten._int_mm(q_x, q) * scale_x[:, None] * scales
    return (y if bias is None else y + bias).to(dtype)


def _int8(case: Case, inputs: Any) -> Call:
    if inputs.raw is not None:
        raise Inapplicable("activations that are int8 already")
    if inputs.q_x.device.type != "cuda" or inputs.q_x.shape[0] <= 16:
        raise Inapplicable("CUDA, more than 16 rows")
    q = inputs.q.t().contiguous().t()  # column-major, as cuBLAS wants it
    return Call(int8, (inputs.q_x, inputs.scale_x, q, inputs.scales, inputs.bias, case.dtype))


PEERS = (
    Peer("torch", "fp16", "torch", _dense),
    Peer("torch", "int8", "torch", _int8),
    Peer("nybble-w4a16", "w4a16", "nybble", _weight_only),
)
