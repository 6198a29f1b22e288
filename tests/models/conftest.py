"""Tiny models with random weights everywhere: a norm of ones or a bias of zeros would hide a mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

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

    def make(kind: str, **changes: Any) -> PreTrainedModel:
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

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """int64 ``[2, 11]`` token ids."""
    return torch.randint(1, 96, (2, 11), generator=torch.Generator().manual_seed(3))
