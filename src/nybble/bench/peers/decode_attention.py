"""Peers of attention of one new token: PyTorch's, alone and with what a model does around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nybble.bench.peers import Inapplicable, Peer
from nybble.bench.timing import Call
from nybble.ops.case import Case
from nybble.ops.decode_attention.reference import prepare, quarter


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``[B, Hq, D]`` of rotated queries, of a cache that has the new token already."""
    grouped = q.shape[1] != keys.shape[1]
    return functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=grouped)[:, :, 0]


def step(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot: Tensor, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """As a model's step has it: rotation, append, attention."""
    if cos is not None and sin is not None:
        cos, sin, rotary = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]
        q, k = (_turn(x, cos, sin, rotary) for x in (q, k))
    keys.index_copy_(2, slot, k.unsqueeze(2))
    values.index_copy_(2, slot, v.unsqueeze(2))
    return attend(q, keys, values)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:
    part = x[..., :rotary]
    turned = part * cos + quarter(part) * sin
    return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), -1)


def _alone(case: Case, inputs: Any) -> Call:
    given: Any = case
    if given.sinks:
        raise Inapplicable("keys that stay as they are")
    norms = inputs.norms or (None, None)
    q, k = (prepare(x, w, 1e-6, inputs.angles) for x, w in zip((inputs.q, inputs.k), norms, strict=True))
    keys, values = inputs.keys[:, :, : given.used].clone(), inputs.values[:, :, : given.used].clone()
    keys[:, :, given.slot], values[:, :, given.slot] = k, inputs.v
    return Call(attend, (q, keys, values))


def _step(case: Case, inputs: Any) -> Call:
    given: Any = case
    if given.sinks or given.norm or given.used < given.slots:
        raise Inapplicable("a cache that is full, without norms and sinks")
    angles = inputs.angles or (None, None)
    keys, values = inputs.keys.clone(), inputs.values.clone()
    return Call(step, (inputs.q, inputs.k, inputs.v, keys, values, inputs.slot, *angles))


PEERS = (Peer("torch", "sdpa", "torch", _alone), Peer("torch", "eager", "torch", _step))
