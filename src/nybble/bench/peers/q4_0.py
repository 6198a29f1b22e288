"""Peers of the Q4_0 products: the weight in 16 bits, through cuBLAS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.bench.peers import Inapplicable, Peer
from nybble.bench.timing import Call
from nybble.ops.case import Case


def _dense(case: Case, inputs: Any) -> Call:
    if case.function != "q4_0_linear":
        raise Inapplicable("x is not quantised; see q4_0_linear")
    x, out = inputs.x, case.result_dtypes(1)[0]

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight).to(out)

    return Call(run, (x, inputs.quantized.dequantize(x.dtype).t().contiguous()))


PEERS = (Peer("torch", "dequantised linear", "torch", _dense),)
