"""Tiny models with random weights everywhere: a norm of ones or a bias of zeros would hide a mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SIZES: dict[str, dict[str, Any]] = {
    "gpt_neox": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "rotary_pct": 0.25,
    },
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}
SIZES["qwen2"] = SIZES["llama"]
SIZES["qwen3"] = {**SIZES["llama"], "head_dim": 16}

CLASSES = {
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small run slower on two threads than on one, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def make_model() -> MakeModel:
    """``make_model(kind, **changes to the configuration)``: a model in eval mode that wants no gradients."""
    return made


def made(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(7)
    config_name, class_name = CLASSES[kind]
    positions = {"n_positions": 64} if kind == "gpt2" else {"max_position_embeddings": 64}
    settings = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **positions}
    config = getattr(transformers, config_name)(**{**settings, **SIZES[kind], **changes})
    model = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * spread + (parameter.ndim == 1) * 0.5)
    return model.eval().requires_grad_(False)


WIDE: dict[str, dict[str, Any]] = {
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
    "llama": {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 128},
}
"""Widths that the packed layout joins: multiples of 64."""
WIDE["qwen2"] = WIDE["llama"]
WIDE["qwen3"] = {**WIDE["llama"], "head_dim": 32}


def quantise(
    model: PreTrainedModel,
    *,
    zeros: bool | str = False,
    act_order: bool = False,
    group_size: int = 32,
    bits: int = 4,
) -> None:
    """Replace every linear layer but the head by a packed one with random values, at the scale of its weights.

    ``zeros``: points that are not in the middle; a string, but in layers whose name ends so."""
    from nybble.formats.grouped import QuantizedWeight
    from nybble.formats.tiles import PackedWeight
    from nybble.models.layers import W4A16Linear

    generator = torch.Generator().manual_seed(11)
    orders: dict[int, torch.Tensor] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, Conv1D)) or name.endswith("lm_head"):
            continue
        k, n = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        groups = k // group_size
        levels = 1 << bits
        q = torch.randint(levels, (k, n), generator=generator, dtype=torch.uint8)
        points = torch.full((groups, n), levels // 2, dtype=torch.uint8)
        if zeros and not (isinstance(zeros, str) and name.endswith(zeros)):
            low, high = levels * 5 // 16, levels * 11 // 16
            points = torch.randint(low, high, (groups, n), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(groups, n, generator=generator) + 0.5) * 3.2 / levels * k**-0.5
        g_idx = None
        if act_order:
            if k not in orders:
                orders[k] = torch.randperm(k, generator=generator, dtype=torch.int64).to(torch.int32) // group_size
            g_idx = orders[k]
        weight = PackedWeight.from_quantized(QuantizedWeight(q, points, scales, group_size, g_idx, bits))
        model.set_submodule(name, W4A16Linear(weight, module.bias).eval())


@pytest.fixture
def make_packed(make_model: MakeModel) -> MakeModel:
    """As ``make_model``, the linear layers in 4 bits: ``make_packed(kind, {"zeros": True}, **changes)``."""

    def make(kind: str, how: dict[str, Any] | None = None, **changes: Any) -> PreTrainedModel:
        model = make_model(kind, **{**WIDE[kind], **changes})
        quantise(model, **(how or {}))
        return model

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """int64 ``[2, 11]`` token ids."""
    return torch.randint(1, 96, (2, 11), generator=torch.Generator().manual_seed(3))
