"""Linear layers as the fused forward calls them: several that read the same input as one product, packed ones with what
goes around the product inside it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from nybble.formats.channels import ChannelWeight
from nybble.formats.tiles import TILE, PackedWeight
from nybble.models.flatquant import FlatQuantLinear
from nybble.models.layers import W4A16Linear
from nybble.models.ranks import Ranks, RowParallel
from nybble.ops.w4a4.op import w4a4_linear
from nybble.ops.w4a16.op import WORDS, Norm, run

KINDS = (nn.Linear, Conv1D, W4A16Linear, FlatQuantLinear)
"""The linear layers that are understood; a subclass may compute something else."""

FIELDS = ("qweight", "scales", "qzeros")
"""Tensors of a packed weight whose first dimension counts blocks of output features."""

SYMMETRIC = {4: 0x88, 8: 0x80}
"""Bits of a weight -> a byte of ``qzeros`` that says what leaving them out says: two points of 8, or one of 128."""

Weight = Tensor | PackedWeight | ChannelWeight


def join_refusal(modules: tuple[Any, ...]) -> str | None:
    """Why linear layers can't be computed as one, or ``None`` when they can."""
    first = modules[0]
    if type(first) not in (nn.Linear, W4A16Linear, FlatQuantLinear) or any(type(m) is not type(first) for m in modules):
        return f"they are {', '.join(dict.fromkeys(type(m).__name__ for m in modules))}"
    if any(m.in_features != first.in_features for m in modules):
        return "they differ in their input features"
    if any((m.bias is None) is not (first.bias is None) for m in modules):
        return "some have a bias and some have none"
    if any("forward" in m.__dict__ for m in modules):
        return "the forward of one was replaced by someone else"
    own: list[dict[str, Tensor | None]] = [m.__dict__["_parameters"] for m in modules]
    for name in own[0]:
        kinds = {(t.dtype, t.device) for p in own if (t := p[name]) is not None}
        if len(kinds) > 1:
            return f"they differ in the dtype or device of {name}"
    if isinstance(first, nn.Linear):
        return None
    if any(m.out_features % TILE for m in modules[:-1]):
        return f"the packed layout joins multiples of {TILE} output features"
    if isinstance(first, FlatQuantLinear):
        if any(m.transform is not first.transform for m in modules):
            return "they do not share a transform"
        return None if all(m.clip_ratio == first.clip_ratio for m in modules) else "they differ in their clip ratio"
    if any(m.group_size != first.group_size for m in modules):
        return "they differ in their group size"
    if any(m.bits != first.bits for m in modules):
        return "they differ in their bits"
    orders = [p["perm"] for p in own]
    if any((o is None) is not (orders[0] is None) for o in orders):
        return "only some are in act-order"
    if orders[0] is not None and not all(torch.equal(orders[0], o) for o in orders[1:] if o is not None):
        return "they are in different act-orders"
    return None


class Joined:
    """Linear layers with one input as one weight. Their own parameters become views of it, so nothing is held twice.

    A copy of a model, or one moved to another device, has parameters of its own again: they are joined anew at the
    next eager call, and until then (as while being compiled) the layers are computed one by one.

    Attributes:
        modules: the layers, in the order of their output features.
        widths: the output features of each.
    """

    def __init__(self, modules: tuple[Any, ...]) -> None:
        self.modules = modules
        self.widths = [m.out_features for m in modules]
        self._weight: Weight | None = None
        self._bias: Tensor | None = None
        self._places: list[tuple[Tensor, int]] = []
        self._join()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_weight": None, "_bias": None, "_places": []}

    def whole(self) -> tuple[Weight, Tensor | None] | None:
        """The weight and bias of all, or ``None`` where only the layers one by one will do."""
        if torch.compiler.is_compiling():
            return None if self._weight is None else (self._weight, self._bias)
        for parameter, address in self._places:
            if parameter.data_ptr() != address:
                self._weight = None
        if self._weight is None:
            if join_refusal(self.modules) is not None:
                return None
            self._join()
        assert self._weight is not None
        return self._weight, self._bias

    def split(self) -> None:
        """Give every layer tensors of its own again."""
        for module in self.modules:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()
            if isinstance(module, FlatQuantLinear):
                module._scales = module._scales.clone()
            _forget(module)
        self._weight, self._bias, self._places = None, None, []

    def _join(self) -> None:
        self._places = []
        first = self.modules[0]
        self._bias = self._one("bias")
        if isinstance(first, nn.Linear):
            self._weight = self._one("weight")
        elif isinstance(first, FlatQuantLinear):
            qweight, scales, begin = self._one("qweight"), torch.cat([m._scales for m in self.modules]), 0
            assert qweight is not None
            for module in self.modules:
                module._scales = scales[begin : begin + module._scales.numel()]
                begin += module._scales.numel()
            self._weight = ChannelWeight(qweight, scales, first.in_features, sum(self.widths))
        else:
            qweight, scales, qzeros = (self._one(name) for name in FIELDS)
            assert qweight is not None and scales is not None
            perm = None if first.perm is None else first.perm.data
            self._weight = PackedWeight(
                qweight, scales, qzeros, perm, first.in_features, sum(self.widths), first.group_size, first.bits
            )
            for module in self.modules[1:]:
                if perm is not None:
                    module.perm.data = perm
        for module in self.modules:
            _forget(module)

    def _one(self, name: str) -> Tensor | None:
        """The tensors of this name, one after the other; the parameters become views of it."""
        own = [m.__dict__["_parameters"][name] for m in self.modules]
        given = next((p for p in own if p is not None), None)
        if given is None:
            return None
        parts = [p.data if p is not None else self._symmetric(m) for m, p in zip(self.modules, own, strict=True)]
        one, begin = torch.cat(parts), 0
        for parameter, part in zip(own, parts, strict=True):
            if parameter is not None:
                parameter.data = one[begin : begin + part.shape[0]]
                self._places.append((parameter, parameter.data_ptr()))
            begin += part.shape[0]
        return one

    @staticmethod
    def _symmetric(module: Any) -> Tensor:
        """Zero points in the middle, for a layer that leaves them out where another has them."""
        blocks, groups, _ = module.scales.shape
        shape, value = (blocks, groups, TILE * module.bits // 8), SYMMETRIC[module.bits]
        return torch.full(shape, value, dtype=torch.uint8, device=module.scales.device)


def _forget(module: nn.Module) -> None:
    """The weight that a packed layer holds remembers when it was last written; this memory is new."""
    if isinstance(module, (W4A16Linear, FlatQuantLinear)):
        module._held = None


class Projection:
    """One product: of a linear layer, or of several joined ones.

    Attributes:
        modules: the layers.
        joined: as one, ``None`` for a single layer and where they can't be.
        packed: whether a norm before it and an epilogue after it can be part of its launch.
        activation: what follows it, as ``w4a16_linear`` names it; ``""`` for nothing. Only where ``packed``.
        planes: whether the parts of the result, one a layer, should be contiguous tensors.
        ranks: where the result is that of several processes, those: it is added up.
    """

    def __init__(self, *modules: Any, join: bool = False, activation: str = "", planes: tuple[int, ...] = ()) -> None:
        self.ranks: Ranks | None = None
        if isinstance(modules[0], RowParallel) and isinstance(modules[0].linear, W4A16Linear):
            self.ranks, modules = modules[0].ranks, (modules[0].linear,)
        self.modules = modules
        self.joined = Joined(modules) if join else None
        self.packed = isinstance(modules[0], W4A16Linear) and (len(modules) == 1 or join)
        self.activation = activation
        self.planes: tuple[int, ...] = planes

    def split(self) -> None:
        """Undo the joining."""
        if self.joined is not None:
            self.joined.split()

    @property
    def leads(self) -> bool:
        """Whether this is the process that adds what is to be added once."""
        return self.ranks is None or self.ranks.rank == 0

    def whole(self, part: Tensor) -> Tensor:
        """The results of all processes, added up in place."""
        return part if self.ranks is None else self.ranks.sum(part)

    def __call__(
        self, x: Tensor, calls: Counter[str] | None, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Any:
        """The product of ``x``: one tensor, or a tuple where several layers are computed one by one and where the
        parts of a 4-bit product are planes, one behind the other.

        Args:
            x: ``[..., K]``.
            calls: counts kernel calls, ``None`` for no counting.
            norm, residual: inside the launch; only where ``packed``.
        """
        if self.ranks is None:
            return self.part(x, calls, norm, residual)
        return self.whole(self.part(x, calls, norm, residual if self.leads else None))

    def part(
        self, x: Tensor, calls: Counter[str] | None, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Any:
        """What this process has of the result, by itself and with the residual that it is given."""
        if not self.packed:
            return self._plain(x, calls)
        if self.joined is None:
            weight, bias = self.modules[0].packed(), self.modules[0].bias
        else:
            whole = self.joined.whole()
            if whole is None:
                return self._one_by_one(x, norm)
            weight, bias = whole
        if calls is not None:
            calls["ln_qkv" if norm is not None and self.planes else "w4a16_linear"] += 1
        if not self.planes:
            return run(x, weight, bias, "auto", residual, norm, self.activation, 0, 0, WORDS)  # type: ignore[arg-type]
        q, k, v = self.planes
        y = run(x, weight, bias, "auto", residual, norm, "", q, q + k, WORDS)  # type: ignore[arg-type]
        if x.numel() == x.shape[-1]:  # of one row the planes are that row
            return y.view(*x.shape[:-1], q + k + v)
        if y.dim() > 1:  # three of one width come as [3, ..., width]
            return tuple(y.unbind(0))
        lead, rows = x.shape[:-1], x.numel() // x.shape[-1]
        parts = y.split((rows * q, rows * k, rows * v))
        return tuple(part.view(*lead, width) for part, width in zip(parts, self.planes, strict=True))

    def _plain(self, x: Tensor, calls: Counter[str] | None) -> Any:
        whole, first = None if self.joined is None else self.joined.whole(), self.modules[0]
        if calls is not None and isinstance(first, FlatQuantLinear):
            calls["w4a4_linear"] += len(self.modules) if whole is None else 1
        if whole is not None:
            weight, bias = whole
            if isinstance(weight, ChannelWeight):
                q, scales = first.transform.quantize_once(x, first.clip_ratio)
                return w4a4_linear(q, scales, weight, bias=bias, dtype=x.dtype)
            return functional.linear(x, weight, bias)  # type: ignore[arg-type]
        if len(self.modules) == 1:
            return first(x)
        return tuple(module(x) for module in self.modules)

    def _one_by_one(self, x: Tensor, norm: Norm | None) -> Any:
        parts = tuple(run(x, m.packed(), m.bias, "auto", None, norm, "", 0, 0, WORDS) for m in self.modules)
        if self.activation == "silu_mul":
            return functional.silu(parts[0]) * parts[1]
        return parts
