"""Which part of which layer a process has (tensor parallelism), and the model made of such parts.

Heads are divided, and the features between the two products of an MLP: products before them by output features, which
needs no word from another process; products behind them by input features, whose results are added up, so twice a
layer (once where attention and MLP are parallel). Embedding and norms are everybody's; of the head each has some
tokens.

**Act-order.** Sorted by group, the input features of an MLP's second product are consecutive groups, and the features
of the first products are put into that order: nothing is left to permute, and a part begins with a group. The same
can't be done with the product behind attention, since features belong to heads: its inputs are put together, and its
output features are divided.

**Groups.** A part may begin inside of a group; then all groups of that layer are cut into smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.pytorch_utils import Conv1D

from nybble.formats.grouped import sorted_features
from nybble.formats.parts import Cut, Ranges, length, shares
from nybble.models.architectures import HEAD
from nybble.models.decoder import FAMILIES, Family
from nybble.models.ranks import Gathered, Ranks, RowParallel, Share, Shared, Vocabulary, set_ranks
from nybble.runtime.errors import UnsupportedError, wrong_value

STYLES: dict[str, type[Shared] | None] = {
    "column": None,
    "row": RowParallel,
    "gathered": Gathered,
    "vocabulary": Vocabulary,
}
"""What a layer becomes: one with fewer output features is itself."""

Order = Callable[[str], "tuple[Tensor, int] | None"]
"""Name of a layer -> ``g_idx`` and the group size, where it is in act-order."""


def no_order(_: str) -> None:
    """No layer is in act-order."""


def divide(
    model: PreTrainedModel, ranks: Ranks, order_of: Order = no_order, whole_rows: Container[str] = ()
) -> dict[str, Share]:
    """Name of a linear layer -> this process's part of it; others are everybody's.

    Args:
        model: whole, on any device (the meta device too).
        ranks: the processes.
        order_of: which layers are in act-order.
        whole_rows: names of layers whose inputs must be whole: their activations are transformed or scaled by row.

    Raises:
        ValueError: heads or widths that the processes can't divide. UnsupportedError: a family that is not known.
    """
    base: Any = model.base_model
    family = FAMILIES.get(type(base))
    if family is None:
        raise UnsupportedError(f"load: mesh: {type(base).__name__} can't be divided among processes.")
    _check(model, family, ranks.size)
    prefix, size, rank = f"{model.base_model_prefix}.{family.layers}", ranks.size, ranks.rank
    found: dict[str, Share] = {}
    for index, layer in enumerate(getattr(base, family.layers)):
        attention, mlp = f"{prefix}.{index}.{family.attention}", f"{prefix}.{index}.mlp"
        attn = layer.get_submodule(family.attention)
        planes = 3 if family.module is gpt2 else 1
        for name in family.split:
            found[f"{attention}.{name}"] = Share("column", _pieces(_out(attn.get_submodule(name)), planes, size, rank))
        name = f"{attention}.{family.output}"
        width, out = _features(attn.get_submodule(family.output))
        if name in whole_rows or order_of(name) is not None:
            found[name] = _gathered(name, out, size, rank)
        else:
            found[name] = Share("row", None, shares(width, size)[rank], rank == 0)
        name = f"{mlp}.{family.down}"
        width, out = _features(layer.mlp.get_submodule(family.down))
        part, order = shares(width, size)[rank], order_of(name)
        between: Cut = (part,)
        if name in whole_rows:
            found[name] = _gathered(name, out, size, rank)
        else:
            found[name] = Share("row", None, part, rank == 0)
            if order is not None:
                between = sorted_features(*order)[part[0] : part[1]]
        for up in family.up:
            found[f"{mlp}.{up}"] = Share("column", between)
    head: Any = model.get_output_embeddings()
    if head is not None and _out(head) % (8 * size) == 0:
        found[HEAD] = Share("vocabulary", (shares(_out(head), size)[rank],))
    return found


def _pieces(out: int, planes: int, size: int, rank: int) -> Ranges:
    """The output features of some heads; of GPT-2 in each of the planes of queries, keys and values."""
    plane = out // planes
    begin, end = shares(plane, size)[rank]
    return tuple((i * plane + begin, i * plane + end) for i in range(planes))


def _gathered(name: str, out: int, size: int, rank: int) -> Share:
    if out % (8 * size):
        expected = f"a number of processes that divides the {out} output features of {name} into multiples of 8"
        raise wrong_value("load", "mesh", expected, size)
    return Share("gathered", (shares(out, size)[rank],))


def _check(model: PreTrainedModel, family: Family, size: int) -> None:
    config: Any = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layer: Any = getattr(model.base_model, family.layers)[0]
    width, _ = _features(layer.mlp.get_submodule(family.down))
    attended, _ = _features(layer.get_submodule(family.attention).get_submodule(family.output))
    for what, number in (("heads", heads), ("heads of keys and values", kv_heads)):
        if number % size:
            raise wrong_value("load", "mesh", f"a number of processes that divides the {number} {what}", size)
    for what, number in (("MLP", width), ("attention", attended), ("keys", attended // heads * kv_heads)):
        if number % (8 * size):
            expected = f"a number of processes that divides the {number} features of {what} into multiples of 8"
            raise wrong_value("load", "mesh", expected, size)


def _features(module: nn.Module) -> tuple[int, int]:
    """(in, out)."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features  # type: ignore[return-value]


def _out(module: nn.Module) -> int:
    return _features(module)[1]


def shrink(model: PreTrainedModel, found: Mapping[str, Share]) -> None:
    """Give the plain linear layers the sizes of their parts; on a model whose parameters have no values yet."""
    for name, share in found.items():
        module: Any = model.get_submodule(name)
        sizes = share.sizes(*_features(module))
        if isinstance(module, Conv1D):
            module.nx, module.nf = sizes
        else:
            module.in_features, module.out_features = sizes
        for short, cuts in (("weight", share.of_weight(module)), ("bias", (share.outputs,))):
            whole = module._parameters[short]
            if whole is not None:
                shape = [length(what, size) for what, size in zip(cuts, whole.shape, strict=True)]
                module._parameters[short] = nn.Parameter(whole.new_empty(shape), requires_grad=False)
        if not share.bias and not isinstance(module, Conv1D):  # which can't do without: its bias is zero
            module._parameters["bias"] = None


def connect(model: PreTrainedModel, found: Mapping[str, Share], ranks: Ranks) -> None:
    """Put layers into place whose parts are put together, and tell attention how many heads there are here."""
    for name, share in found.items():
        kind = STYLES[share.style]
        if kind is not None:
            model.set_submodule(name, kind(model.get_submodule(name), ranks))
    base: Any = model.base_model
    family = FAMILIES[type(base)]
    if family.module is gpt2:
        for layer in base.h:
            layer.attn.split_size //= ranks.size
            layer.attn.num_heads //= ranks.size
    set_ranks(model, ranks)
