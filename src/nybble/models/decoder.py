"""The fused forward of a decoder: norms, residual additions, projections and activations in as few kernels as they go.

A layer of any family here is two branches, attention and MLP, each of them a norm, a product, something in between, and
a product whose result is added to the hidden states. Where the two products are 4-bit, a branch is::

    q, k, v = ln_qkv(h, Wqkv, norm)                       norm and three projections, one launch
    h = w4a16_linear(attention(q, k, v), Wo, residual=h)  projection and residual addition, one launch
    f = w4a16_linear(h, Wup, norm, activation)            norm, projection (gate and up as one), activation, one launch
    h = w4a16_linear(f, Wdown, residual=h)

In a decode step from a cache of static shapes ``attention`` is one launch too: ``decode_attention`` norms and rotates
queries and keys, appends to the cache and attends.

Where they are not, the products are PyTorch's or those of int4 activations, and the residual addition goes with the
norm that follows it, in this layer or the next: ``normed, h = add_rmsnorm(branch, h)``, or ``add_layernorm``; GPT-NeoX
with its parallel residual has ``add_dual_layernorm(h, attn, mlp)``. Outside of such a step masks, cache and attention
are transformers' own functions, called as its forward calls them; queries and keys are rotated together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.utils.generic import merge_with_config_defaults

from nybble.models.cache import RingCache
from nybble.models.layers import W4A16Linear
from nybble.models.projection import KINDS, Projection, join_refusal
from nybble.models.ranks import bare
from nybble.ops.decode_attention.op import Sinks, can_run, decode_attention
from nybble.ops.norm.op import add_dual_layernorm, add_layernorm, add_rmsnorm, layernorm, rmsnorm
from nybble.ops.w4a16.op import Norm

FUSIONS = ("carry", "qkv", "gate_up", "prologue", "epilogue", "attention")
"""What :func:`nybble.fuse` can leave out: the residual addition with the norm after it, the query, key and value
projections as one, gate and up as one, the norm inside a 4-bit product, activation and residual inside it, and the
attention of a decode step in one kernel."""

COUNTER, PLAN = "_nybble_calls", "_nybble_plan"
"""The attributes that a patched base model has besides its forward."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu_mul",
    "swish": "silu_mul",
}
"""``hidden_act`` -> the activation inside the 4-bit product."""

_CAPTURE = "transformers.utils.output_capturing"

Entries = list[tuple[str, str]]
Branch = Callable[..., Any]


@dataclass(frozen=True)
class Family:
    """Where the parts of a family's base model are, and the code of its attention.

    Attributes:
        module: transformers' module of the family. layer, norm: its classes.
        layers, embedding, final: names in the base model. norms, attention: names in a layer.
        dropouts: modules of a layer that do nothing in eval mode.
        split: projections of queries, keys and values, one name for a joint one. output: of attention.
        up, down: of the MLP. act: the name of its activation in the configuration.
        gated: whether ``up`` is a gate and what it multiplies.
    """

    module: Any
    layer: type[nn.Module]
    norm: type[nn.Module]
    layers: str
    embedding: str
    final: str
    norms: tuple[str, str]
    attention: str
    split: tuple[str, ...]
    output: str
    up: tuple[str, ...]
    down: str
    act: str
    dropouts: tuple[str, ...] = ()

    @property
    def gated(self) -> bool:
        return len(self.up) == 2


def _llama(module: Any, prefix: str) -> Family:
    return Family(
        module, getattr(module, f"{prefix}DecoderLayer"), getattr(module, f"{prefix}RMSNorm"),
        "layers", "embed_tokens", "norm", ("input_layernorm", "post_attention_layernorm"),
        "self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj", ("gate_proj", "up_proj"), "down_proj", "hidden_act",
    )  # fmt: skip


FAMILIES: dict[type[nn.Module], Family] = {
    gpt_neox.GPTNeoXModel: Family(
        gpt_neox, gpt_neox.GPTNeoXLayer, nn.LayerNorm,
        "layers", "embed_in", "final_layer_norm", ("input_layernorm", "post_attention_layernorm"),
        "attention", ("query_key_value",), "dense", ("dense_h_to_4h",), "dense_4h_to_h", "hidden_act",
        ("post_attention_dropout", "post_mlp_dropout"),
    ),
    llama.LlamaModel: _llama(llama, "Llama"),
    qwen2.Qwen2Model: _llama(qwen2, "Qwen2"),
    qwen3.Qwen3Model: _llama(qwen3, "Qwen3"),
    gpt2.GPT2Model: Family(
        gpt2, gpt2.GPT2Block, nn.LayerNorm,
        "h", "wte", "ln_f", ("ln_1", "ln_2"),
        "attn", ("c_attn",), "c_proj", ("c_fc",), "c_proj", "activation_function",
    ),
}  # fmt: skip
"""Class of a base model -> how it is fused."""


class Watched(NamedTuple):
    """A module that the fused forward does not call, so that whatever hangs on it would be lost.

    Attributes:
        siblings: the modules of its parent. name: its name there. module: what was there when the model was fused.
    """

    siblings: dict[str, nn.Module | None]
    name: str
    module: nn.Module


class Pass(NamedTuple):
    """What every layer of one forward is given.

    Attributes:
        masks: kind of layer -> the mask. kinds: of each layer, ``None`` where there is one kind.
        arguments: as transformers' attention takes them.
        turns: cosines and sines of the positions, ``[..., 1, rotary]``, the sines' first half negated; ``None``
            without rotary embedding.
        step: the cache, where the attention of this step is one kernel; then ``turns`` are the cosines and sines
            ``[texts, rotary]`` themselves.
    """

    masks: dict[str, Any]
    kinds: list[str] | None
    arguments: dict[str, Any]
    turns: tuple[Tensor, Tensor] | None
    step: RingCache | None = None

    def mask(self, index: int) -> Any:
        return self.masks["full_attention"] if self.kinds is None else self.masks[self.kinds[index]]


@dataclass
class Layer:
    """How one layer is computed.

    Attributes:
        norm1, norm2: its norms.
        attn, mlp: the modules.
        qkv, output: the projections around attention, or ``None`` where ``attn`` is called as it is.
        up, down: of the MLP, or ``None`` where ``mlp`` is called as it is.
    """

    norm1: Any
    norm2: Any
    attn: Any
    mlp: Any
    qkv: Projection | None
    output: Projection | None
    up: Projection | None
    down: Projection | None

    def projections(self) -> list[Projection]:
        return [p for p in (self.qkv, self.output, self.up, self.down) if p is not None]


@dataclass
class Plan:
    """How a base model is computed.

    Attributes:
        kind: the class of the base model.
        without: fusions that are left out.
        rms: whether its norms are RMSNorms.
        parallel: both branches of a layer read the same hidden states (GPT-NeoX). shared: several processes have parts.
        layers: one each. watched: what must be as it was for this plan to hold. norms: the parameters of each norm.
        paused: whether every call takes the original forward.
    """

    kind: type[nn.Module]
    without: frozenset[str]
    rms: bool
    parallel: bool
    shared: bool = False
    layers: list[Layer] = field(default_factory=list)
    watched: list[Watched] = field(default_factory=list)
    norms: list[dict[str, Any]] = field(default_factory=list)
    paused: bool = False

    @property
    def family(self) -> Family:
        """Not held: it has modules of Python in it, which can't be copied."""
        return FAMILIES[self.kind]


def refusal(model: Any) -> str | None:
    """Why this base model can't be fused, or ``None`` when it can."""
    family = FAMILIES.get(type(model))
    if family is None:
        return f"{type(model).__name__} is a subclass of a known model; its forward may differ"
    if "forward" in model.__dict__:
        return "the model's forward was replaced by someone else"
    layers = getattr(model, family.layers)
    if not len(layers):
        return "the model has no layers"
    if getattr(model.config, "add_cross_attention", False):
        return "it has cross-attention"
    if getattr(model.config, "reorder_and_upcast_attn", False):
        return "its attention is reordered and upcast"
    for index, layer in enumerate(layers):
        if type(layer) is not family.layer:
            return f"layer {index} is a {type(layer).__name__}, not a {family.layer.__name__}"
        if getattr(layer, "use_parallel_residual", None) != getattr(layers[0], "use_parallel_residual", None):
            return f"layer {index} differs from layer 0 in use_parallel_residual"
        if "forward" in layer.__dict__:
            return f"the forward of layer {index} was replaced by someone else"
        for name in family.norms:
            reason = _norm_refusal(layer.get_submodule(name), family)
            if reason is not None:
                return f"{family.layers}.{index}.{name} {reason}"
        if isinstance(layer.get_submodule(family.norms[0]), nn.LayerNorm):
            first, second = (layer.get_submodule(name) for name in family.norms)
            if first.eps != second.eps or (first.bias is None) is not (second.bias is None):
                return f"the norms of layer {index} differ in eps or in having a bias"
    reason = _norm_refusal(model.get_submodule(family.final), family)
    return None if reason is None else f"{family.final} {reason}"


def _norm_refusal(norm: nn.Module, family: Family) -> str | None:
    if type(norm) is not family.norm:
        return f"is a {type(norm).__name__}, not a {family.norm.__name__}"
    if norm.weight is None:
        return "has no weight"
    if "forward" in norm.__dict__:
        return "has a forward that was replaced by someone else"
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) != 1:
        return f"normalises {len(norm.normalized_shape)} dimensions, the kernel one"
    return None


def patch(model: Any, counter: Counter[str], without: Collection[str]) -> tuple[Entries, Entries]:
    """Replace the forward of this instance. Needs ``refusal(model) is None``.

    Returns:
        What became of which module, and what stays as it was and why.
    """
    family = FAMILIES[type(model)]
    layers = getattr(model, family.layers)
    plan = Plan(
        type(model),
        frozenset(without),
        family.norm is not nn.LayerNorm,
        bool(getattr(layers[0], "use_parallel_residual", False)),
    )
    replaced: Entries = []
    refused: Entries = []
    for index, layer in enumerate(layers):
        made, notes = _plan_layer(layer, model.config, plan)
        plan.layers.append(made)
        plan.shared |= made.output is not None and made.output.ranks is not None
        refused += [(f"{family.layers}.{index}.{name}", why) for name, why in notes]
        replaced.append((f"{family.layers}.{index}", _describe(made, plan, first=index == 0)))
        plan.watched.append(Watched(layers._modules, str(index), layer))
    final = model.get_submodule(family.final)
    plan.watched.append(Watched(model._modules, family.final, final))
    plan.norms = [norm._parameters for layer in plan.layers for norm in (layer.norm1, layer.norm2)]
    plan.norms.append(final._parameters)
    alone, added = _NAMES[plan.rms]
    whole = _adds_itself(plan.layers[-1], plan) or "carry" in plan.without
    replaced.append((family.final, alone if whole else f"{added}: the last residual addition and the final norm"))
    model.__dict__[COUNTER] = counter
    model.__dict__[PLAN] = plan
    model.__dict__["forward"] = MethodType(_FORWARDS[type(model)], model)
    return replaced, refused


def unpatch(model: nn.Module) -> None:
    """Take :func:`patch` back, if this module is patched."""
    if is_patched(model):
        for layer in model.__dict__[PLAN].layers:
            for projection in layer.projections():
                projection.split()
        for name in ("forward", PLAN):
            del model.__dict__[name]
    model.__dict__.pop(COUNTER, None)
    model.__dict__.pop(PLAN, None)


def is_patched(model: nn.Module) -> bool:
    """Whether :func:`patch` replaced the forward of this instance."""
    return getattr(model.__dict__.get("forward"), "__func__", None) in _FORWARDS.values()


_NAMES = {True: ("rmsnorm", "add_rmsnorm"), False: ("layernorm", "add_layernorm")}


def _plan_layer(layer: Any, config: Any, plan: Plan) -> tuple[Layer, Entries]:
    """One layer's plan; it joins what is joined, and notes what can't be."""
    family, notes = plan.family, list[tuple[str, str]]()
    norm1, norm2 = (layer.get_submodule(name) for name in family.norms)
    attn, mlp = layer.get_submodule(family.attention), layer.mlp
    bypassed = [*family.norms, *family.dropouts]
    qkv = output = up = down = None

    heads = [attn.get_submodule(name) for name in family.split]
    out = attn.get_submodule(family.output)
    plain = all(type(bare(m)) in KINDS for m in (*heads, out)) and (family.gated or isinstance(heads[0], W4A16Linear))
    if family.module is qwen3:
        plain = plain and type(attn.q_norm) is family.norm and type(attn.k_norm) is family.norm
    if plain:
        join = len(heads) > 1 and "qkv" not in plan.without
        reason = join_refusal(tuple(heads)) if join else None
        if reason is not None:
            notes.append((f"{family.attention}.{{{','.join(family.split)}}}", f"not one product: {reason}"))
        planes: tuple[int, ...] = ()
        if join and reason is None:
            planes = tuple(m.out_features for m in heads)
        elif family.module is gpt2:
            planes = (attn.split_size,) * 3
        qkv = Projection(*heads, join=join and reason is None, planes=planes)
        output = Projection(out)
        bypassed.append(family.attention)

    ups, low = [mlp.get_submodule(name) for name in family.up], mlp.get_submodule(family.down)
    name = getattr(config, family.act)
    activation = ACTIVATIONS.get(name, "")
    if (activation == "silu_mul") is not family.gated:
        activation = ""
    if all(type(bare(m)) in KINDS for m in (*ups, low)) and (family.gated or isinstance(ups[0], W4A16Linear)):
        join = family.gated and "gate_up" not in plan.without
        reason = join_refusal(tuple(ups)) if join else None
        if reason is not None:
            notes.append((f"mlp.{{{','.join(family.up)}}}", f"not one product: {reason}"))
        join = join and reason is None
        inside = isinstance(ups[0], W4A16Linear) and "epilogue" not in plan.without and (join or not family.gated)
        if inside and not activation:
            notes.append(("mlp", f"the activation {name} stays outside of the product"))
        up = Projection(*ups, join=join, activation=activation if inside else "")
        down = Projection(low)
        bypassed.append("mlp")

    made = Layer(norm1, norm2, attn, mlp, qkv, output, up, down)
    for name in bypassed:
        module = layer.get_submodule(name)
        plan.watched.append(Watched(layer._modules, name, module))
        for inner in module.modules():
            plan.watched += [Watched(inner._modules, n, m) for n, m in inner.named_children()]
    return made, notes


def _adds_itself(layer: Layer, plan: Plan) -> bool:
    """Whether the MLP of this layer leaves hidden states to which its result is added already."""
    if plan.parallel and not (_inside(layer.qkv, plan) and _inside(layer.up, plan) and _packed(layer.output)):
        return False
    return _packed(layer.down) and "epilogue" not in plan.without


def _packed(projection: Projection | None) -> bool:
    return projection is not None and projection.packed


def _inside(projection: Projection | None, plan: Plan) -> bool:
    """Whether a norm goes inside this product.

    Not where both branches read the same states: one kernel then adds both results of the layer before and has both
    norms, 1.10 ms a token of Pythia-2.8B beside 1.15. Among processes what is added inside is added up once instead.
    """
    return _packed(projection) and "prologue" not in plan.without and (plan.shared or not plan.parallel)


def _describe(layer: Layer, plan: Plan, *, first: bool) -> str:
    """What runs in a layer, for the report."""
    said = []
    alone, added = _NAMES[plan.rms]
    carried = "carry" not in plan.without
    if plan.parallel:
        if not (_inside(layer.qkv, plan) and _inside(layer.up, plan)):
            if not carried:
                said.append("layernorm, twice")
            elif first:
                said.append("layernorm of the embedding, twice")
            else:
                said.append("add_dual_layernorm: both residual additions and both LayerNorms")
    else:
        outside = [not _inside(layer.qkv, plan), not _inside(layer.up, plan)]
        inside = "epilogue" not in plan.without
        adds = [carried and not (_packed(p) and inside) for p in (layer.down, layer.output)]
        if all(outside) and all(adds):
            one = f"{alone} of the embedding, then {added}"
            said.append(one if first else f"{added}, twice: each residual addition with the norm after it")
        elif any(outside):
            names = [added if add else alone for out, add in zip(outside, adds, strict=True) if out]
            said.append(", ".join(names))
    pieces = []
    for what, projection in (("q, k, v", layer.qkv), ("output", layer.output), ("up", layer.up), ("down", layer.down)):
        if projection is None:
            continue
        before, last = what in ("q, k, v", "up"), what in ("output", "down")
        parts = [("gate and up" if what == "up" and plan.family.gated else what)]
        parts += ["as one"] if projection.joined is not None else []
        parts += ["with its norm"] if before and _inside(projection, plan) else []
        parts += [f"with {projection.activation}"] if projection.activation else []
        added_inside = last and projection.packed and "epilogue" not in plan.without
        parts += ["with the residual"] if added_inside and (not plan.parallel or _adds_itself(layer, plan)) else []
        if len(parts) > 1:
            pieces.append(" ".join(parts))
        if what == "q, k, v" and "attention" not in plan.without:
            pieces.append("attention of a step as one")
    return "; ".join([*said, *([", ".join(pieces)] if pieces else [])]) or "its products one by one"


def _forward_of(original: Any) -> Any:
    """A forward for an instance: the original one where the fused one can't stand in for it, else the fused one."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 or _needs_original(self, args, kwargs):
            return original(self, *args, **kwargs)
        kwargs.pop("return_dict", None)
        return _forward(self, *args, **kwargs)

    # A bound method pickles by its name, and an unpickled model then finds the original.
    forward.__doc__ = original.__doc__
    forward.__wrapped__ = original  # type: ignore[attr-defined]
    return forward


_FORWARDS = {cls: _forward_of(cls.forward) for cls in FAMILIES}


@merge_with_config_defaults
def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    plan: Plan = self.__dict__[PLAN]
    family, config = plan.family, self.config
    if (input_ids is None) ^ (inputs_embeds is not None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if inputs_embeds is None:
        inputs_embeds = getattr(self, family.embedding)(input_ids)
    assert inputs_embeds is not None
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=config)
    if position_ids is None:
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
    assert position_ids is not None
    hidden = inputs_embeds
    arguments, turns = kwargs, None
    step = _step_of(plan, config, past_key_values, inputs_embeds)
    if family.module is gpt2:
        hidden = self.drop(hidden + self.wpe(position_ids))
        if isinstance(attention_mask, Tensor) and attention_mask.ndim < 4:
            attention_mask = attention_mask.view(hidden.shape[0], -1)
    else:
        if family.module is gpt_neox:
            hidden = self.emb_dropout(hidden)
        cos, sin = arguments["position_embeddings"] = self.rotary_emb(hidden, position_ids=position_ids)
        if step is not None:
            turns = cos[:, 0], sin[:, 0]
        else:
            first, second = sin.chunk(2, -1)
            turns = cos.unsqueeze(-2), torch.cat((-first, second), -1).unsqueeze(-2)
    masks = attention_mask
    if not isinstance(masks, dict):
        makers: dict[str, Any] = {"full_attention": create_causal_mask}
        if getattr(self, "has_sliding_layers", False):
            makers["sliding_attention"] = create_sliding_window_causal_mask
        masks = {
            kind: make(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for kind, make in makers.items()
        }
    arguments |= {
        "layer_past" if family.module is gpt_neox else "past_key_values": past_key_values,
        "use_cache": use_cache,
        "position_ids": position_ids,
    }
    kinds = getattr(config, "layer_types", None) if len(masks) > 1 else None
    given = Pass(masks, kinds, arguments, turns, step)
    hidden = (_parallel if plan.parallel else _sequential)(self, plan, hidden, given)
    kept = past_key_values if use_cache or family.module in (llama, gpt_neox) else None
    made = BaseModelOutputWithPastAndCrossAttentions if family.module is gpt2 else BaseModelOutputWithPast
    return made(last_hidden_state=hidden, past_key_values=kept)  # type: ignore[return-value, arg-type]


def _step_of(plan: Plan, config: Any, cache: Any, x: Tensor) -> RingCache | None:
    """The cache, where this is a step that attends in one kernel: one token a text, and what is asked of the cache is
    in tensors. There every layer is initialised, and no mask says more than the count of tokens does."""
    if "attention" in plan.without or not isinstance(cache, RingCache) or not cache.ring.stepping:
        return None
    if config._attn_implementation not in ("sdpa", "eager") or torch.compiler.is_compiling() or x.shape[1] != 1:
        return None
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return None
    keys = cache.rings[0].keys
    if keys is None or any(not layer.is_initialized for layer in cache.rings) or keys.dtype != x.dtype:
        return None
    if any(layer.qkv is None for layer in plan.layers):
        return None
    sinks = 0 if cache.ring.sink_angles is None else cache.ring.sinks
    group = config.num_attention_heads // keys.shape[1]
    return cache if can_run(keys.dtype, keys.shape[3], group, sinks, keys.device) else None


def _sequential(self: Any, plan: Plan, hidden: Tensor, given: Pass) -> Tensor:
    calls = None if torch.compiler.is_compiling() else self.__dict__[COUNTER]
    residual_inside = "epilogue" not in plan.without
    pending: Tensor | None = None  # the result of the branch before, not yet added to hidden
    for index, layer in enumerate(plan.layers):
        mask = given.mask(index)
        if layer.qkv is None or layer.output is None:
            normed, hidden = _normed(plan, layer.norm1, hidden, pending, calls)
            pending = layer.attn(hidden_states=normed, attention_mask=mask, **given.arguments)[0]
        else:
            projected, hidden = _enter(plan, layer.qkv, layer.norm1, hidden, pending, calls)
            attended = _attend(plan, layer.attn, projected, mask, given, calls)
            hidden, pending = _leave(layer.output, attended, hidden, calls, inside=residual_inside)
        if layer.up is None or layer.down is None:
            normed, hidden = _normed(plan, layer.norm2, hidden, pending, calls)
            pending = layer.mlp(normed)
        else:
            projected, hidden = _enter(plan, layer.up, layer.norm2, hidden, pending, calls)
            activated = _activate(layer, projected)
            hidden, pending = _leave(layer.down, activated, hidden, calls, inside=residual_inside)
    final = getattr(self, plan.family.final)
    return _normed(plan, final, hidden, pending, calls)[0]


def _parallel(self: Any, plan: Plan, hidden: Tensor, given: Pass) -> Tensor:
    calls = None if torch.compiler.is_compiling() else self.__dict__[COUNTER]
    attn = mlp = None  # of the layer before, not yet added to hidden
    for layer in plan.layers:
        mask = given.mask(0)
        if _inside(layer.qkv, plan) and _inside(layer.up, plan):
            if attn is not None and mlp is not None:
                hidden, attn, mlp = hidden + (mlp + attn), None, None
            assert layer.qkv is not None and layer.up is not None and layer.output is not None
            assert layer.down is not None
            projected = layer.qkv(hidden, calls, norm=_as_norm(layer.norm1))
            activated = _activate(layer, layer.up(hidden, calls, norm=_as_norm(layer.norm2)))
            attended = _attend(plan, layer.attn, projected, mask, given, calls)
            if layer.output.packed and layer.down.packed and "epilogue" not in plan.without:
                # Of several processes both are added up at once.
                part = layer.output.part(attended, calls, residual=hidden if layer.output.leads else None)
                hidden = layer.down.whole(layer.down.part(activated, calls, residual=part))
            else:
                attn, mlp = layer.output(attended, calls), layer.down(activated, calls)
            continue
        norm1, norm2 = layer.norm1, layer.norm2
        if attn is not None and mlp is not None and "carry" in plan.without:
            hidden, attn, mlp = hidden + (mlp + attn), None, None
        if attn is None or mlp is None:
            _count(calls, "layernorm")
            for_attn = layernorm(hidden, norm1.weight, norm1.bias, norm1.eps)
            _count(calls, "layernorm")
            for_mlp = layernorm(hidden, norm2.weight, norm2.bias, norm2.eps)
        else:
            _count(calls, "add_dual_layernorm")
            for_attn, for_mlp, hidden = add_dual_layernorm(
                hidden, attn, mlp, norm1.weight, norm1.bias, norm2.weight, norm2.bias, norm1.eps
            )
        if layer.qkv is None or layer.output is None:
            attn = layer.attn(hidden_states=for_attn, attention_mask=mask, **given.arguments)[0]
        else:
            attn = layer.output(_attend(plan, layer.attn, layer.qkv(for_attn, calls), mask, given, calls), calls)
        if layer.up is None or layer.down is None:
            mlp = layer.mlp(for_mlp)
        else:
            mlp = layer.down(_activate(layer, layer.up(for_mlp, calls)), calls)
    pending = None if attn is None or mlp is None else mlp + attn
    return _normed(plan, getattr(self, plan.family.final), hidden, pending, calls)[0]


def _count(calls: Counter[str] | None, function: str) -> None:
    """One more call. Not under ``torch.compile``: a number that changes would recompile every call."""
    if calls is not None:
        calls[function] += 1


def _as_norm(norm: Any) -> Norm:
    if isinstance(norm, nn.LayerNorm):
        return Norm(norm.weight, norm.bias, norm.eps, "layernorm")
    return Norm(norm.weight, None, norm.variance_epsilon, "rmsnorm")


def _normed(
    plan: Plan, norm: Any, hidden: Tensor, pending: Tensor | None, calls: Counter[str] | None
) -> tuple[Tensor, Tensor]:
    """The norm of the hidden states and what is pending, and their sum."""
    if pending is not None and "carry" in plan.without:
        hidden, pending = hidden + pending, None
    _count(calls, _NAMES[plan.rms][pending is not None])
    if plan.rms:
        if pending is None:
            return rmsnorm(hidden, norm.weight, norm.variance_epsilon), hidden
        return add_rmsnorm(pending, hidden, norm.weight, norm.variance_epsilon)  # type: ignore[return-value]
    if pending is None:
        return layernorm(hidden, norm.weight, norm.bias, norm.eps), hidden
    return add_layernorm(pending, hidden, norm.weight, norm.bias, norm.eps)  # type: ignore[return-value]


def _enter(
    plan: Plan,
    projection: Projection,
    norm: Any,
    hidden: Tensor,
    pending: Tensor | None,
    calls: Counter[str] | None,
) -> tuple[Any, Tensor]:
    """A branch's first product, of the normed hidden states; and the hidden states."""
    if _inside(projection, plan):
        if pending is not None:
            hidden = hidden + pending
        return projection(hidden, calls, norm=_as_norm(norm)), hidden
    normed, hidden = _normed(plan, norm, hidden, pending, calls)
    return projection(normed, calls), hidden


def _leave(
    projection: Projection, x: Tensor, hidden: Tensor, calls: Counter[str] | None, *, inside: bool
) -> tuple[Tensor, Tensor | None]:
    """A branch's last product: added to the hidden states, or pending."""
    if inside and projection.packed:
        return projection(x, calls, residual=hidden), None
    return hidden, projection(x, calls)


def _activate(layer: Layer, projected: Any) -> Tensor:
    """What the MLP has between its products, unless it was inside the first."""
    up = layer.up
    assert up is not None
    if up.activation:
        return projected
    if len(up.modules) == 1:
        return layer.mlp.act(projected)
    gate, other = projected.chunk(2, -1) if isinstance(projected, Tensor) else projected
    return layer.mlp.act_fn(gate) * other


def _attend(plan: Plan, attn: Any, projected: Any, mask: Any, given: Pass, calls: Counter[str] | None) -> Tensor:
    """Attention between its projections, as the family's own forward computes it: ``[..., heads * head_dim]``."""
    if given.step is not None:
        return _attend_step(plan.family.module, attn, projected, given.step, given.turns, calls)
    module, rest = plan.family.module, dict(given.arguments)
    cache = rest.pop("layer_past" if module is gpt_neox else "past_key_values")
    rest.pop("position_embeddings", None)
    lead = (projected if isinstance(projected, Tensor) else projected[0]).shape[:-1]
    if module is gpt_neox:
        qkv = projected.view(*lead, -1, 3, attn.head_size)
        assert given.turns is not None
        cos, sin = given.turns
        turned = qkv[..., :2, : cos.shape[-1]]  # queries and keys at once, in place
        turned.copy_(_turn(turned, (cos.unsqueeze(-2), sin.unsqueeze(-2))))
        q, k, v = qkv.unbind(-2)
    else:
        q, k, v = _heads(module, attn, projected, lead, given.turns, calls)
    if module in (qwen2, qwen3):
        rest["sliding_window"] = attn.sliding_window
    return _weigh(module, attn, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), cache, mask, rest, lead)


def _attend_step(
    module: Any,
    attn: Any,
    projected: Any,
    cache: RingCache,
    angles: tuple[Tensor, Tensor] | None,
    calls: Counter[str] | None,
) -> Tensor:
    """The same for one token a text, in one kernel: ``[texts, 1, heads * head_dim]``."""
    ring, layer = cache.ring, cache.rings[attn.layer_idx]
    keys, values = layer.keys, layer.values
    assert keys is not None and values is not None
    texts, heads, _, width = keys.shape
    if module is gpt_neox:
        q, k, v = projected.view(texts, heads, 3, width).unbind(2)
    elif isinstance(projected, Tensor):
        every = projected.view(texts, -1, width)
        q, k, v = every.split((every.shape[1] - 2 * heads, heads, heads), 1)
    else:
        q, k, v = (part.view(texts, -1, width) for part in projected)
    norms = (attn.q_norm.weight, attn.k_norm.weight) if module is qwen3 else None
    sinks = None
    if ring.sink_angles is not None and layer.sunk is not None:
        (still, turned), (cos, sin) = layer.sunk, ring.sink_angles
        sinks = Sinks(still, turned, cos, sin)
    _count(calls, "decode_attention")
    # What the kernel before has written are q, k and v: the cache, its counts and the angles are older.
    out = decode_attention(
        q, k, v, keys, values, ring.slot, ring.seen, angles=angles, norms=norms, sinks=sinks, scale=attn.scaling,
        eps=attn.q_norm.variance_epsilon if module is qwen3 else 0.0, settled=True,
    )  # fmt: skip
    return out.view(texts, 1, -1)


def _heads(
    module: Any, attn: Any, projected: Any, lead: Any, turns: tuple[Tensor, Tensor] | None, calls: Counter[str] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[..., heads, head_dim]``, normed and rotated where the family does that."""
    shape = (*lead, -1, attn.head_dim)
    if isinstance(projected, Tensor):
        every = projected.view(shape)
        groups = 1 if module is gpt2 else attn.num_key_value_groups
        keys = every.shape[-2] // (groups + 2)
        if turns is not None and module is not qwen3:  # queries and keys lie side by side: one rotation
            v = every[..., -keys:, :]
            q, k = _turn(every[..., :-keys, :], turns).split((groups * keys, keys), -2)
            return q, k, v
        q, k, v = every.split((groups * keys, keys, keys), -2)
    else:
        q, k, v = (part.view(shape) for part in projected)
    if module is qwen3:
        _count(calls, "rmsnorm")
        q = rmsnorm(q, attn.q_norm.weight, attn.q_norm.variance_epsilon)
        _count(calls, "rmsnorm")
        k = rmsnorm(k, attn.k_norm.weight, attn.k_norm.variance_epsilon)
    return (q, k, v) if turns is None else (_turn(q, turns), _turn(k, turns), v)


def _turn(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of ``[..., heads, rotary]`` in three kernels; transformers' own takes five."""
    cos, sin = turns
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _weigh(
    module: Any, attn: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, mask: Any, rest: dict[str, Any], lead: Any
) -> Tensor:
    if cache is not None:
        k, v = cache.update(k, v, attn.layer_idx)
    name = attn.config._attn_implementation
    eager = module.eager_attention_forward
    attention = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    out = attention(attn, q, k, v, mask, dropout=0.0, scaling=attn.scaling, **rest)[0]
    return out.reshape(*lead, -1).contiguous()


def _needs_original(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call wants something that only the original forward gives."""
    plan: Plan = self.__dict__[PLAN]
    config = self.config
    if plan.paused:
        return True
    if kwargs.get("return_dict", getattr(config, "return_dict", True)) is False:
        return True
    for key in ("output_hidden_states", "output_attentions"):
        asked = kwargs.get(key, getattr(config, key, False))
        if asked is not None and asked is not False:  # a list of layers counts, an empty one included
            return True
    for key in ("token_type_ids", "encoder_hidden_states", "encoder_attention_mask"):
        if kwargs.get(key) is not None:
            return True
    if torch.is_grad_enabled():
        tensors = (*args, *kwargs.values(), *self.parameters())
        if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            return True
    embeds = kwargs.get("inputs_embeds")
    source = getattr(self, plan.family.embedding).weight if embeds is None else embeds
    if torch.is_autocast_enabled(source.device.type) or torch.nn.modules.module._has_any_global_hook():
        return True
    if any(norm["weight"].dtype != source.dtype for norm in plan.norms):
        return True
    # Through __dict__: nn.Module's attribute access costs three times as much, and this runs every token.
    for siblings, name, module in plan.watched:
        if siblings.get(name) is not module:
            return True
        state = module.__dict__
        if state["training"] or state["_forward_pre_hooks"] or "forward" in state:
            return True
        hooks = state["_forward_hooks"]
        # those that transformers installs once and leaves asleep do not count
        if hooks and not all(getattr(hook, "__module__", "") == _CAPTURE for hook in hooks.values()):
            return True
    return False


assert set(ACTIVATIONS) <= set(ACT2FN)
