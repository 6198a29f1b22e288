"""Peers of FlatQuant's quantiser: the same in PyTorch, eager and compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.bench.peers import Inapplicable, Peer
from nybble.bench.timing import Call
from nybble.ops.case import Case
from nybble.ops.flatquant.cases import COMPARED


def quantize(x: Tensor, left: Tensor, right: Tensor, clip: float, packed: bool) -> tuple[Tensor, Tensor]:
    """As FlatQuant's own code has it: two products in the dtype of the activations, then the quantiser."""
    m, n = left.shape[0], right.shape[0]
    y = left.t() @ (x.view(-1, m, n) @ right)
    y = y.reshape(x.shape[0], m * n).float()
    scales = y.abs().amax(-1) * (clip / 7.0)
    q = (y / scales[:, None]).round().clamp(-8, 7).to(torch.int32)
    if not packed:
        return q.to(torch.int8), scales
    shifts = torch.arange(0, 32, 4, device=x.device, dtype=torch.int32)
    return ((q.unflatten(-1, (-1, 8)) & 15) << shifts).sum(-1, dtype=torch.int32), scales


def _eager(case: Case, inputs: Any) -> Call:
    given: Any = case
    if given.clips > 1:
        raise Inapplicable("one clip ratio")
    return Call(quantize, (inputs.x, inputs.left, inputs.right, given.clip, given.packed))


def _compiled(case: Case, inputs: Any) -> Call:
    call = _eager(case, inputs)
    if inputs.x.device.type != "cuda":
        raise Inapplicable("compared on CUDA only")
    if case not in COMPARED:
        raise Inapplicable("compiled for fewer cases, as it takes a minute for each")
    torch._dynamo.reset()  # one code object serves every shape
    return Call(torch.compile(call.function, fullgraph=True, dynamic=False), call.arguments)


PEERS = (Peer("torch", "eager", "torch", _eager), Peer("torch", "compile", "torch", _compiled))
