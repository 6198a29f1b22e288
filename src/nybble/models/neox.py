"""GPT-NeoX with its residual additions fused into the LayerNorms.

A layer of the original computes ``h = mlp + attn + h`` and the next one reads ``h`` twice, for two LayerNorms. Here the
three tensors travel on unsummed, and one ``add_dual_layernorm`` at the top of the next layer adds and normalises:

======================  ==============================  ==================================================
where                   use_parallel_residual           sequential residual
======================  ==============================  ==================================================
first layer             ``layernorm`` twice             ``layernorm``, then ``add_layernorm(attn, h)``
every later layer       ``add_dual_layernorm``          ``add_layernorm(mlp, h)``, ``add_layernorm(attn, h)``
final norm              ``add_layernorm(attn + mlp, h)``  ``add_layernorm(mlp, h)``
======================  ==============================  ==================================================

Everything else (masks, rotary embedding, cache, attention) is transformers' own code, called as its forward calls it.
"""

from __future__ import annotations

from collections import Counter
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXModel
from transformers.utils.generic import merge_with_config_defaults

from nybble.models.norms import attach, count
from nybble.ops.norm.op import add_dual_layernorm, add_layernorm, layernorm

# What the fused forward does not call as a module, so that whatever hangs on it would be lost.
_BYPASSED = ("input_layernorm", "post_attention_layernorm", "post_attention_dropout", "post_mlp_dropout")
_CAPTURE = "transformers.utils.output_capturing"


def refusal(model: GPTNeoXModel) -> str | None:
    """Why this model can't be fused, or ``None`` when it can."""
    if "forward" in model.__dict__:
        return "the model's forward was replaced by someone else"
    if not len(model.layers):
        return "the model has no layers"
    for index, layer in enumerate(model.layers):
        if type(layer) is not GPTNeoXLayer:
            return f"layer {index} is a {type(layer).__name__}, not a GPTNeoXLayer"
        if layer.use_parallel_residual != model.layers[0].use_parallel_residual:
            return f"layer {index} differs from layer 0 in use_parallel_residual"
        if "forward" in layer.__dict__:
            return f"the forward of layer {index} was replaced by someone else"
    for name, module in model.named_modules():
        if name.endswith("norm") and (type(module) is not nn.LayerNorm or module.weight is None):
            return f"{name} is a {type(module).__name__}, not an nn.LayerNorm with a weight"
    return None


def patch(model: GPTNeoXModel, counter: Counter[str]) -> list[tuple[str, str]]:
    """Replace the forward of this instance; returns (module, what it became). Needs ``refusal(model) is None``."""
    attach(model, counter)
    model.__dict__["forward"] = MethodType(fused_forward, model)
    last = len(model.layers)
    if model.layers[0].use_parallel_residual:
        first = "layernorm of the embedding, twice"
        later = "add_dual_layernorm: both residual additions and both LayerNorms"
        final = "add_layernorm: the last residual addition and the final norm"
    else:
        first = "layernorm of the embedding, then add_layernorm"
        later = "add_layernorm, twice: each residual addition with the LayerNorm after it"
        final = "add_layernorm: the last residual addition and the final norm"
    return [
        ("layers.0", first),
        *((f"layers.{i}", later) for i in range(1, last)),
        ("final_layer_norm", final),
    ]


def is_patched(model: nn.Module) -> bool:
    """Whether :func:`patch` replaced the forward of this instance."""
    return getattr(model.__dict__.get("forward"), "__func__", None) is fused_forward


# The name stays "forward": a bound method pickles by its name, and an unpickled model then finds the original.
@wraps(GPTNeoXModel.forward)
def fused_forward(self: GPTNeoXModel, *args: Any, **kwargs: Any) -> Any:
    """The original forward where the fused one can't stand in for it, else the fused one."""
    if _needs_original(self, args, kwargs):
        return GPTNeoXModel.forward(self, *args, **kwargs)
    kwargs.pop("return_dict", None)
    return _forward(self, *args, **kwargs)


@merge_with_config_defaults
def _forward(
    self: GPTNeoXModel,
    input_ids: torch.LongTensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    if (input_ids is None) ^ (inputs_embeds is not None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if inputs_embeds is None:
        inputs_embeds = self.embed_in(input_ids)
    assert inputs_embeds is not None
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=self.config)
    if position_ids is None:
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen  # type: ignore[assignment]
        position_ids = position_ids.unsqueeze(0)  # type: ignore[union-attr]
    mask = create_causal_mask(
        config=self.config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )
    hidden = self.emb_dropout(inputs_embeds)
    attention_arguments = {
        "attention_mask": mask,
        "position_ids": position_ids,
        "layer_past": past_key_values,
        "use_cache": use_cache,
        "position_embeddings": self.rotary_emb(hidden, position_ids=position_ids),
        **kwargs,
    }
    run = _parallel if self.layers[0].use_parallel_residual else _sequential
    return BaseModelOutputWithPast(
        last_hidden_state=run(self, hidden, attention_arguments),
        past_key_values=past_key_values,
    )


def _parallel(self: Any, hidden: Tensor, attention_arguments: dict[str, Any]) -> Tensor:
    attn = mlp = None  # of the layer before, not yet added to hidden
    for layer in self.layers:
        norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
        if attn is None or mlp is None:
            count(self, "layernorm")
            for_attn = layernorm(hidden, norm1.weight, norm1.bias, norm1.eps)
            count(self, "layernorm")
            for_mlp = layernorm(hidden, norm2.weight, norm2.bias, norm2.eps)
        else:
            count(self, "add_dual_layernorm")
            for_attn, for_mlp, hidden = add_dual_layernorm(
                hidden, attn, mlp, norm1.weight, norm1.bias, norm2.weight, norm2.bias, norm1.eps
            )
        attn = layer.attention(for_attn, **attention_arguments)[0]
        mlp = layer.mlp(for_mlp)
    final = self.final_layer_norm
    assert attn is not None and mlp is not None
    count(self, "add_layernorm")
    return add_layernorm(mlp + attn, hidden, final.weight, final.bias, final.eps)[0]


def _sequential(self: Any, hidden: Tensor, attention_arguments: dict[str, Any]) -> Tensor:
    mlp = None  # of the layer before, not yet added to hidden
    for layer in self.layers:
        norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
        if mlp is None:
            count(self, "layernorm")
            for_attn = layernorm(hidden, norm1.weight, norm1.bias, norm1.eps)
        else:
            count(self, "add_layernorm")
            for_attn, hidden = add_layernorm(mlp, hidden, norm1.weight, norm1.bias, norm1.eps)
        attn = layer.attention(for_attn, **attention_arguments)[0]
        count(self, "add_layernorm")
        for_mlp, hidden = add_layernorm(attn, hidden, norm2.weight, norm2.bias, norm2.eps)
        mlp = layer.mlp(for_mlp)
    final = self.final_layer_norm
    assert mlp is not None
    count(self, "add_layernorm")
    return add_layernorm(mlp, hidden, final.weight, final.bias, final.eps)[0]


def _needs_original(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call wants something that only the original forward gives."""
    config, final = self.config, self.final_layer_norm
    if kwargs.get("return_dict", getattr(config, "return_dict", True)) is False:
        return True
    for key in ("output_hidden_states", "output_attentions"):
        asked = kwargs.get(key, getattr(config, key, False))
        if asked is not None and asked is not False:  # a list of layers counts, an empty one included
            return True
    if torch.is_grad_enabled():
        tensors = (*args, *kwargs.values(), *self.parameters())
        if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            return True
    embeds = kwargs.get("inputs_embeds", args[3] if len(args) > 3 else None)
    source = self.embed_in.weight if embeds is None else embeds
    if torch.is_autocast_enabled(source.device.type) or torch.nn.modules.module._has_any_global_hook():
        return True
    if not _bypassable(final) or final.weight.dtype != source.dtype:
        return True
    return not all(_layer_is_plain(layer, source.dtype) for layer in self.layers)


def _layer_is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    # Through _modules and __dict__: nn.Module's attribute access costs three times as much, and this runs every token.
    children = layer.__dict__["_modules"]
    if not _bypassable(layer):
        return False
    for name in _BYPASSED:
        if not _bypassable(children[name]):
            return False
    first, second = children["input_layernorm"], children["post_attention_layernorm"]
    if type(first) is not nn.LayerNorm or type(second) is not nn.LayerNorm or first.eps != second.eps:
        return False
    one, two = first.__dict__["_parameters"], second.__dict__["_parameters"]
    return one["weight"].dtype is dtype and (one["bias"] is None) is (two["bias"] is None)


def _bypassable(module: nn.Module) -> bool:
    """No dropout at work, no replaced forward, no hooks but those that transformers installs once and leaves asleep."""
    state = module.__dict__
    if state["training"] or state["_forward_pre_hooks"] or "forward" in state:
        return False
    hooks = state["_forward_hooks"]
    return not hooks or all(getattr(hook, "__module__", "") == _CAPTURE for hook in hooks.values())
