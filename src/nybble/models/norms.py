"""Norm modules that run Nybble's kernels. An instance becomes one by a change of its class, and changes back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from nybble.ops.norm.op import layernorm, rmsnorm

COUNTER = "_nybble_calls"
"""The attribute of a patched module that holds its model's :class:`collections.Counter` of kernel calls."""


def count(module: nn.Module, function: str) -> None:
    """One more call of ``function``. Not under ``torch.compile``: a number that changes would recompile every call."""
    if not torch.compiler.is_compiling():
        module.__dict__[COUNTER][function] += 1


def attach(module: nn.Module, counter: Counter[str]) -> None:
    """Let ``module`` count into ``counter``."""
    module.__dict__[COUNTER] = counter


def inference_only(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels may take this call: no gradient is wanted, no autocast, one dtype."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)


class FusedLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over one dimension through :func:`nybble.layernorm`."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not inference_only(x, self.weight):
            return super().forward(x)
        count(self, "layernorm")
        return layernorm(x, self.weight, self.bias, self.eps)


class _FusedRMSNorm:
    """Before a Hugging Face RMSNorm among the bases: its ``forward`` through :func:`nybble.rmsnorm`."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not inference_only(hidden_states, self.weight):
            return super().forward(hidden_states)  # type: ignore[misc]
        count(self, "rmsnorm")
        return rmsnorm(hidden_states, self.weight, self.variance_epsilon)


# Named classes rather than made ones, so that a patched model pickles.
class FusedLlamaRMSNorm(_FusedRMSNorm, LlamaRMSNorm): ...


class FusedQwen2RMSNorm(_FusedRMSNorm, Qwen2RMSNorm): ...


class FusedQwen3RMSNorm(_FusedRMSNorm, Qwen3RMSNorm): ...


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: FusedLayerNorm,
    LlamaRMSNorm: FusedLlamaRMSNorm,
    Qwen2RMSNorm: FusedQwen2RMSNorm,
    Qwen3RMSNorm: FusedQwen3RMSNorm,
}
"""Class of a norm module -> the class that replaces it."""

ORIGINAL = {fused: original for original, fused in FUSED.items()}


def refusal(module: nn.Module) -> str | None:
    """Why this norm module stays as it is, or ``None`` when it can be replaced."""
    if "forward" in module.__dict__:
        return "its forward was replaced by someone else"
    if type(module) is nn.LayerNorm:
        if len(module.normalized_shape) != 1:
            return f"it normalises {len(module.normalized_shape)} dimensions, the kernel one"
        if module.weight is None:
            return "it has no weight"
    return None


def swap(module: nn.Module, counter: Counter[str]) -> str:
    """Replace a norm that has no :func:`refusal`; returns the name of the function that it calls from now on."""
    attach(module, counter)
    module.__class__ = FUSED[type(module)]
    return "layernorm" if isinstance(module, nn.LayerNorm) else "rmsnorm"
