"""Peers of the norm functions: PyTorch eager and compiled, Liger, quack, flash-attn's Triton layer norm."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.bench.peers import Inapplicable, Peer
from nybble.bench.timing import Call
from nybble.ops.case import Case
from nybble.ops.norm.cases import EPS


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def layernorm_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return layernorm(x, weight, bias, eps) + residual


def add_layernorm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return layernorm(h, weight, bias, eps), h


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rmsnorm(h, weight, eps), h


def add_dual_layernorm(
    hidden: Tensor,
    attn: Tensor,
    mlp: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    h = hidden + attn + mlp
    return layernorm(h, w1, b1, eps), layernorm(h, w2, b2, eps), h


EAGER = {
    function.__name__: function
    for function in (layernorm, rmsnorm, layernorm_residual, add_layernorm, add_rmsnorm, add_dual_layernorm)
}


def _named(inputs: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """The inputs by name (``None`` for one the case leaves out), then eps."""
    return (*(inputs.get(name) for name in names), EPS)


_ARGUMENTS = {
    "layernorm": ("x", "weight", "bias"),
    "rmsnorm": ("x", "weight"),
    "layernorm_residual": ("x", "residual", "weight", "bias"),
    "add_layernorm": ("x", "residual", "weight", "bias"),
    "add_rmsnorm": ("x", "residual", "weight"),
    "add_dual_layernorm": ("hidden", "attn", "mlp", "w1", "b1", "w2", "b2"),
}


def _eager(case: Case, inputs: dict[str, Any]) -> Call:
    return Call(EAGER[case.function], _named(inputs, *_ARGUMENTS[case.function]))


def _compiled(case: Case, inputs: dict[str, Any]) -> Call:
    call = _eager(case, inputs)
    if call.arguments[0].device.type != "cuda":
        raise Inapplicable("compared on CUDA only")
    # One code object serves every shape, and past a handful of recompilations PyTorch would quietly run it eagerly.
    torch._dynamo.reset()
    return Call(torch.compile(call.function, fullgraph=True, dynamic=False), call.arguments)


def _liger(case: Case, inputs: dict[str, Any]) -> Call:
    if case.function == "rmsnorm":
        from liger_kernel.ops.rms_norm import rms_norm_forward

        x, weight, eps = _named(inputs, "x", "weight")
        return Call(lambda x, w: rms_norm_forward(x, w, eps, 0.0, "llama", None)[0], (x, weight))
    if case.function == "add_rmsnorm":
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

        x, residual, weight, eps = _named(inputs, "x", "residual", "weight")
        return Call(lambda x, r, w: fused_add_rms_norm_forward(x, r, w, eps, 0.0, "llama")[:2], (x, residual, weight))
    if case.function == "layernorm":
        from liger_kernel.ops.layer_norm import layer_norm_forward

        x, weight, bias, eps = _named(inputs, "x", "weight", "bias")
        if bias is None:
            raise Inapplicable("layer norm needs a bias")
        return Call(lambda x, w, b: layer_norm_forward(x, w, b, eps)[0], (x, weight, bias))
    raise Inapplicable(f"no kernel for {case.function}")


def _quack(case: Case, inputs: dict[str, Any]) -> Call:
    quack_norm = importlib.import_module("quack.rmsnorm")  # the package's attribute of that name is a function
    if case.function == "rmsnorm":
        x, weight, eps = _named(inputs, "x", "weight")
        return Call(lambda x, w: quack_norm.rmsnorm_fwd(x, w, eps=eps)[0], (x, weight))
    if case.function == "add_rmsnorm":
        x, residual, weight, eps = _named(inputs, "x", "residual", "weight")
        return Call(
            lambda x, r, w: quack_norm.rmsnorm_fwd(x, w, residual=r, eps=eps)[:2],
            (x, residual, weight),
        )
    if case.function == "layernorm":
        x, weight, bias, eps = _named(inputs, "x", "weight", "bias")
        bias = None if bias is None else bias.float()
        return Call(lambda x, w, b: quack_norm.layernorm_fwd(x, w, b, eps=eps), (x, weight.float(), bias))
    raise Inapplicable(f"no kernel for {case.function}")


def _flash_attn(case: Case, inputs: dict[str, Any]) -> Call:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    if case.function in ("layernorm", "rmsnorm"):
        x, weight, bias, eps = _named(inputs, "x", "weight", "bias")
        rms = case.function == "rmsnorm"
        return Call(lambda x, w, b: layer_norm_fn(x, w, b, eps=eps, is_rms_norm=rms), (x, weight, bias))
    if case.function in ("add_layernorm", "add_rmsnorm"):
        x, residual, weight, bias, eps = _named(inputs, "x", "residual", "weight", "bias")
        rms = case.function == "add_rmsnorm"
        return Call(
            lambda x, r, w, b: layer_norm_fn(x, w, b, residual=r, eps=eps, prenorm=True, is_rms_norm=rms),
            (x, residual, weight, bias),
        )
    if case.function == "add_dual_layernorm":
        *tensors, eps = _named(inputs, *_ARGUMENTS["add_dual_layernorm"])
        return Call(
            lambda hidden, attn, mlp, w1, b1, w2, b2: layer_norm_fn(
                attn, w1, b1, residual=hidden, x1=mlp, weight1=w2, bias1=b2, eps=eps, prenorm=True
            ),
            tuple(tensors),
        )
    raise Inapplicable(f"no kernel for {case.function}")


PEERS = (
    Peer("torch", "eager", "torch", _eager),
    Peer("torch", "compile", "torch", _compiled),
    Peer("liger", "triton", "liger_kernel", _liger),
    Peer("quack", "cute", "quack", _quack),
    Peer("flash-attn", "triton", "flash_attn", _flash_attn),
)
