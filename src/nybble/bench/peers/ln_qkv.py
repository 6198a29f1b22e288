"""Peers of the norm with queries, keys and values behind it: the same as two kernels.

Their results are views of one product, as unfused models have them: splitting costs them nothing here.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nybble.bench.peers import Peer
from nybble.bench.timing import Call
from nybble.ops.case import Case
from nybble.ops.norm.op import layernorm, rmsnorm
from nybble.ops.w4a16.op import w4a16_linear


def _planes(y: Tensor, hidden: int) -> Tensor | tuple[Tensor, ...]:
    n = y.shape[-1]
    if n == 3 * hidden:
        return y.unflatten(-1, (3, hidden)).movedim(-2, 0)
    width = (n - hidden) // 2
    return y.split((hidden, width, width), -1)


def _dense(case: Case, inputs: Any) -> Call:
    rms, eps, hidden = inputs.norm.kind == "rmsnorm", inputs.norm.eps, inputs.x.shape[-1]

    def run(x: Tensor, gain: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor | None) -> Any:
        h = F.rms_norm(x, (hidden,), gain, eps) if rms else F.layer_norm(x, (hidden,), gain, shift, eps)
        return _planes(F.linear(h, weight, bias), hidden)

    weight = inputs.quantized.dequantize(inputs.x.dtype).t().contiguous()
    return Call(run, (inputs.x, inputs.norm.weight, inputs.norm.bias, weight, inputs.bias))


def _pair(case: Case, inputs: Any) -> Call:
    rms, eps, hidden = inputs.norm.kind == "rmsnorm", inputs.norm.eps, inputs.x.shape[-1]

    def run(x: Tensor, gain: Tensor, shift: Tensor | None, weight: Any, bias: Tensor | None) -> Any:
        h = rmsnorm(x, gain, eps) if rms else layernorm(x, gain, shift, eps)
        return _planes(w4a16_linear(h, weight, bias=bias), hidden)

    return Call(run, (inputs.x, inputs.norm.weight, inputs.norm.bias, inputs.weight, inputs.bias))


PEERS = (
    Peer("torch", "norm+linear", "torch", _dense),
    Peer("nybble-pair", "norm+w4a16", "nybble", _pair),
)
