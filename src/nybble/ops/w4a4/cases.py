"""Inputs of the W4A4 linear for tests, benches and the compile gate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from nybble.formats.channels import ChannelWeight
from nybble.ops.case import ROUNDING, Case, Tensors, take
from nybble.ops.flatquant import cases as flat
from nybble.ops.norm.cases import TINY
from nybble.ops.w4a4 import cost, op
from nybble.runtime.choice import Choice
from nybble.runtime.hardware import H200, Hardware
from nybble.runtime.source import Source


@dataclass(frozen=True)
class Inputs:
    """Of one call; ``q`` int8 ``[K, N]`` and ``scales`` ``[N]`` are the meaning of ``weight``, which no call reads.

    ``raw``: activations that are quantised first; then ``q_x`` and ``scale_x`` are empty.
    """

    q_x: Tensor
    scale_x: Tensor
    weight: ChannelWeight
    bias: Tensor | None
    q: Tensor
    scales: Tensor
    raw: flat.Inputs | None = None
    never_read: ClassVar[tuple[str, ...]] = ("q", "scales")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self.never_read}
        return replace(self, **copy.deepcopy(own, memo))


@dataclass(frozen=True)
class W4A4Case(Case):
    """One request: rows, features, the dtype of the result.

    ``left``: activations come in ``dtype`` and FlatQuant, whose left transform is so large, comes first; 0: as int8.
    """

    m: int = 1
    n: int = 4096
    k: int = 4096
    dtype: torch.dtype = torch.float16
    bias: bool = False
    left: int = 0
    op: ClassVar[str] = "w4a4"
    function: str = field(default="w4a4_linear", init=False)

    def shape(self) -> dict[str, int]:
        return {"m": self.m, "n": self.n, "k": self.k}

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        draw = torch.Generator(device).manual_seed(seed)

        def values(*shape: int) -> Tensor:
            return torch.randint(-8, 8, shape, generator=draw, device=device, dtype=torch.int8)

        def between(low: float, high: float, size: int) -> Tensor:
            return low + (high - low) * torch.rand(size, generator=draw, device=device)

        rows = 0 if self.left else self.m
        q_x, q = values(rows, self.k), values(self.k, self.n)
        scale_x, scales = between(0.1, 0.5, rows), between(0.5, 1.5, self.n) * (0.2 / self.k**0.5)
        bias = between(-1.0, 1.0, self.n).to(self.dtype) if self.bias else None
        raw = self.quantiser.make(device, seed) if self.left else None
        return Inputs(q_x, scale_x, ChannelWeight.from_values(q, scales), bias, q, scales, raw)

    @property
    def quantiser(self) -> flat.FlatQuantCase:
        """What comes first where activations are not int8."""
        return flat.FlatQuantCase(self.m, self.left, self.k // self.left, self.dtype, packed=False)

    def bind(self, inputs: Inputs, variant: str = "auto") -> Callable[[], Any]:
        weight, bias, raw = inputs.weight, inputs.bias, inputs.raw
        multiply = partial(op.w4a4_linear, bias=bias, dtype=self.dtype, variant=variant)
        if raw is None:
            return partial(multiply, inputs.q_x, inputs.scale_x, weight)
        quantise = self.quantiser.bind(raw)

        def both() -> Tensor:
            q_x, scale_x = quantise()
            return multiply(q_x, scale_x, weight)

        return both

    def run(self, inputs: Inputs, variant: str = "auto") -> Tensors:
        return (self.bind(inputs, variant)(),)

    def truth(self, inputs: Inputs) -> Tensors:
        q_x, scale_x = (inputs.q_x, inputs.scale_x) if inputs.raw is None else self.quantiser.truth(inputs.raw)
        y = (q_x.double() @ inputs.q.double()) * scale_x.double()[:, None] * inputs.scales.double()
        return (y if inputs.bias is None else y + inputs.bias.double(),)

    def tolerance(self, inputs: Inputs, truth: Tensors) -> Tensors:
        """One rounding of the result, and those of two products and a sum in fp32; and how far the quantiser is off."""
        product = truth[0] if inputs.bias is None else (truth[0] - inputs.bias.double())
        error = ROUNDING[self.dtype] * truth[0].abs() + 2.0**-22 * (product.abs() + truth[0].abs()) + TINY[self.dtype]
        if inputs.raw is not None:
            right = self.quantiser.truth(inputs.raw)
            of_q, of_scale = self.quantiser.tolerance(inputs.raw, right)
            scales = inputs.scales.double()
            error = error + (of_q @ inputs.q.double().abs()) * (right[1] + of_scale)[:, None] * scales
            error = error + product.abs() * (of_scale / right[1])[:, None]
        return (error,)

    def spec(self, variant: str = "auto") -> cost.Spec:
        m = 1 << max(0, self.m - 1).bit_length()
        return cost.Spec(m, self.n, self.k, self.dtype, self.bias, variant)

    def choice(self, hardware: Hardware | None, variant: str = "auto") -> Choice:
        return cost.choose(self.spec(variant), hardware)

    def sources(self, hardware: Hardware) -> list[Source]:
        spec = self.spec()
        return [op.source(spec, c) for c in cost.candidates(spec, hardware) if c.variant == "gemm" and not c.refused][
            :2
        ]

    @property
    def bytes(self) -> int:
        result = (self.m + self.bias) * self.n * self.dtype.itemsize
        if self.left:  # what is between the two kernels need not cross
            transforms = self.left**2 + (self.k // self.left) ** 2
            result += (self.m * self.k + transforms) * self.dtype.itemsize - self.m * (self.k + 4)
        return self.m * (self.k + 4) + self.n * (self.k // 2 + 4) + result

    @property
    def flops(self) -> int:
        """Half of the integer operations, which run at twice the rate of fp16."""
        return self.m * self.n * self.k


ROWS = (1, 16, 64, 128, 512, 1024, 2048, 4096)
PRODUCTS: tuple[W4A4Case, ...] = (
    *(W4A4Case(m, 12288, 4096) for m in ROWS),
    *(W4A4Case(m, 28672, 8192) for m in (1, 16, 1024, 4096)),
    *(W4A4Case(m, 4096, 4096) for m in (1, 16, 1024, 4096)),
    W4A4Case(1024, 12288, 4096, torch.bfloat16, bias=True),
)
"""What a GPU is measured on: the product alone."""

LAYERS: tuple[W4A4Case, ...] = (
    *(W4A4Case(m, n, 4096, left=64) for n in (4096, 12288) for m in (1, 16, 1024, 4096)),
    *(W4A4Case(m, 28672, 8192, left=64) for m in (1, 1024, 4096)),
)
"""And with FlatQuant before it, as a linear layer has it."""
BENCH = PRODUCTS + LAYERS

SMALL: tuple[W4A4Case, ...] = (
    W4A4Case(4, 128, 256),
    W4A4Case(33, 72, 144, torch.bfloat16, bias=True),
    W4A4Case(5, 72, 128, left=8),
)
"""What a CPU can run in a moment."""

GATE: tuple[W4A4Case, ...] = (
    *(W4A4Case(m, 12288, 4096) for m in (1, 8, 16, 32, 64, 128, 256, 1024)),
    *(W4A4Case(m, 28672, 8192, torch.bfloat16, bias=True) for m in (1, 64, 4096)),
    *(W4A4Case(m, 72, 144) for m in (1, 64, 1024)),
)
"""What the compile gate builds, the two best tiles of each."""


def parse(shape: dict[str, int], dtype: torch.dtype, **options: Any) -> W4A4Case:
    """The case for a shape such as ``{"m": 8, "n": 4096, "k": 4096}``; options are those of :class:`W4A4Case`.

    Raises:
        ValueError: a dimension is missing or unknown.
    """
    m, n, k = take("w4a4", shape, {"m": 1, "n": 4096, "k": 4096})
    return W4A4Case(m, n, k, dtype, **options)


def gate(hardware: Hardware = H200) -> list[Source]:
    """Every specialisation the compile gate builds for a GPU, without repeats."""
    return list(dict.fromkeys(source for case in GATE for source in case.sources(hardware)))
