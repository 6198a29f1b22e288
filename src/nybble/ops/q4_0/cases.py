"""Inputs of the Q4_0 products for tests, benches and the compile gate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from nybble.formats.gguf_q4_0 import BLOCK, Q8_1, Q8_1_BYTES, quantize_q8_1
from nybble.formats.grouped import QuantizedWeight
from nybble.formats.tiles import PackedWeight
from nybble.ops.case import ROUNDING, Case, Tensors, take
from nybble.ops.norm.cases import TINY
from nybble.ops.q4_0 import cost, op, reference
from nybble.ops.w4a16 import cost as linear_cost
from nybble.ops.w4a16 import op as linear
from nybble.runtime.choice import Choice
from nybble.runtime.errors import wrong_value
from nybble.runtime.hardware import H200, Hardware
from nybble.runtime.source import Source

FUNCTIONS = ("q4_0_linear", "gemm_q4_0_fp16", "gemm_q4_0_q8_1")
KINDS = ("normal", "uniform", "outliers", "zeros")


def activations(kind: str, m: int, k: int, dtype: torch.dtype, device: torch.device | str, seed: int) -> Tensor:
    """``[m, k]`` of a kind, the same for a seed and a kind of device.

    ``normal``: deviation 1. ``uniform``: in [-1, 1]. ``outliers``: normal, one value in 256 times 50.
    ``zeros``: normal, every third block of 32 all zero.
    """
    draw = torch.Generator(device).manual_seed(seed)
    if kind == "uniform":
        return (2 * torch.rand(m, k, generator=draw, device=device) - 1).to(dtype)
    x = torch.randn(m, k, generator=draw, device=device)
    if kind == "outliers":
        x = torch.where(torch.rand(m, k, generator=draw, device=device) < 1 / 256, 50 * x, x)
    elif kind == "zeros":
        x = x * (torch.arange(k, device=device) // BLOCK % 3 != 1)
    elif kind != "normal":
        raise wrong_value("q4_0", "kind", f"one of {list(KINDS)}", repr(kind))
    return x.to(dtype)


@dataclass(frozen=True)
class Inputs:
    """What one request is made of: ``quantized`` is the meaning of ``weight``, ``held`` what of x is multiplied."""

    x: Tensor
    weight: PackedWeight
    quantized: QuantizedWeight
    held: Q8_1
    never_read: ClassVar[tuple[str, ...]] = ("quantized", "held")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self.never_read}
        return replace(self, **copy.deepcopy(own, memo))


@dataclass(frozen=True)
class Q4Case(Case):
    """One request: rows, features, the dtypes of x and of the result, and what kind of activations."""

    m: int = 1
    n: int = 4096
    k: int = 4096
    dtype: torch.dtype = torch.float16
    out_dtype: torch.dtype = torch.float32
    kind: str = "normal"
    function: str = "q4_0_linear"
    op: ClassVar[str] = "q4_0"

    def shape(self) -> dict[str, int]:
        return {"m": self.m, "n": self.n, "k": self.k}

    def result_dtypes(self, count: int) -> tuple[torch.dtype, ...]:
        return (self.out_dtype,) * count

    def quantized(self, device: torch.device | str = "cpu", seed: int = 0) -> QuantizedWeight:
        """A random weight with the deviation of a trained one, about ``1 / sqrt(K)``."""
        draw = torch.Generator(device).manual_seed(seed)
        groups = self.k // BLOCK
        q = torch.randint(0, 16, (self.k, self.n), generator=draw, device=device, dtype=torch.uint8)
        scales = (0.5 + torch.rand(groups, self.n, generator=draw, device=device)) * (0.2 / self.k**0.5)
        # Of either sign, as Q4_0 has them.
        signs = torch.where(
            torch.rand(groups, self.n, generator=draw, device=device) < 0.5, -1.0, 1.0
        )  # as Q4_0 has them
        zeros = torch.full((groups, self.n), 8, dtype=torch.uint8, device=device)
        return QuantizedWeight(q, zeros, (scales * signs).half(), BLOCK)

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        quantized = self.quantized(device, seed)
        x = activations(self.kind, self.m, self.k, self.dtype, device, seed + 1)
        return self.inputs(x, quantized)

    def inputs(self, x: Tensor, quantized: QuantizedWeight) -> Inputs:
        """For a float x of one's own. It is quantised on the CPU: on CUDA PyTorch multiplies by 1 / 127 instead."""
        parts = quantize_q8_1(x.cpu())
        held = Q8_1(*(part.to(x.device) for part in parts))
        if self.function == "gemm_q4_0_q8_1":
            x = reference.quantize(x.cpu()).to(x.device)
        return Inputs(x, PackedWeight.from_quantized(quantized), quantized, held)

    def bind(self, inputs: Inputs, variant: str = "auto") -> Callable[[], Any]:
        if self.function == "q4_0_linear":
            return partial(op.q4_0_linear, inputs.x, inputs.weight, out_dtype=self.out_dtype, variant=variant)
        return partial(getattr(op, self.function), inputs.x, inputs.weight, out_dtype=self.out_dtype)

    def run(self, inputs: Inputs, variant: str = "auto") -> Tensors:
        return (self.bind(inputs, variant)(),)

    def _values(self, inputs: Inputs) -> Tensor:
        """float64 ``[M, K]``: x, or what is left of it after quantising where only that is multiplied."""
        if self.function == "q4_0_linear":
            return inputs.x.double()
        return (inputs.held.d.double().unsqueeze(-1) * inputs.held.q.double()).flatten(1)

    def truth(self, inputs: Inputs) -> Tensors:
        """Of the quantised weight's own meaning, which knows nothing of tiles; of x itself, or for the functions that
        only multiply, of x as quantised."""
        return (self._values(inputs) @ inputs.quantized.dequantize(torch.float64),)

    def tolerance(self, inputs: Inputs, truth: Tensors) -> Tensors:
        """The absolute error each element may have.

        A block's integer is exact; ``d8`` times it and its addition are rounded, each within 2^-24 of what is added up;
        partial sums meet at the end. ``q4_0_linear`` may also quantise x: each value then is off by half of ``d``, and
        by 127 times what rounding ``d`` to float16 takes (2^-11 of it, or 2^-25 where it is subnormal); or round the
        result to the dtype of x.
        """
        magnitude = inputs.quantized.dequantize(torch.float64).abs()
        unit = ROUNDING[self.out_dtype]
        depth = self.k / BLOCK + 16
        x = self._values(inputs).abs()
        error = depth * 2.0**-24 * (x @ magnitude)
        if self.function == "q4_0_linear":
            d = inputs.held.d.double().repeat_interleave(BLOCK, -1)
            off = (0.5 * (1 + 2.0**-10) + 127 * 2.0**-11) * d + 127 * 2.0**-25
            error = error * (1 + 2.0**-6) + off @ magnitude + ROUNDING[self.dtype] * truth[0].abs() + TINY[self.dtype]
        return (error * (1 + unit) + unit * truth[0].abs() + TINY[self.out_dtype],)

    def spec(self, variant: str = "auto") -> cost.Spec:
        if self.function != "q4_0_linear":
            variant = {"gemm_q4_0_fp16": "fused", "gemm_q4_0_q8_1": "separate"}[self.function]
        m = 1 << max(0, self.m - 1).bit_length()
        dtype = torch.uint8 if self.function == "gemm_q4_0_q8_1" else self.dtype
        return cost.Spec(m, self.n, self.k, dtype, self.out_dtype, variant)

    def choice(self, hardware: Hardware | None, variant: str = "auto") -> Choice:
        spec = self.spec(variant)
        found = op.choose(spec if hardware is not None else spec._replace(variant="auto"), hardware)
        if self.function == "q4_0_linear":
            return found
        # A function that is one way has no others to time.
        kept = tuple(c for c in found.candidates if c.variant in (spec.variant, found.pick.variant))
        return Choice(found.pick, kept)

    def sources(self, hardware: Hardware) -> list[Source]:
        """Of every kernel that can run it; of the 4-bit linear's those that write fp32: its own cases have none."""
        able = [c for c in cost.candidates(self.spec(), hardware) if not c.refused]
        found = [op.source(self.spec(), c) for c in able if c.variant in ("fused", "separate")]
        if any(c.variant == "separate" for c in able) and self.function == "q4_0_linear":
            found.append(op.quantize_source(self.dtype))
        inner = cost.linear_spec(self.spec())
        if any(c.variant == "w4a16" for c in able) and inner.out_dtype is not None:
            found += [
                linear.source(inner, c)
                for c in linear_cost.candidates(inner, hardware)
                if not c.refused and c.variant in ("wgmma", "gemm")
            ]
        return found

    @property
    def bytes(self) -> int:
        weights = self.n * self.k // 2 + self.n * self.k // BLOCK * 2
        if self.function == "gemm_q4_0_q8_1":
            activation_bytes = self.m * self.k // BLOCK * Q8_1_BYTES
        else:
            activation_bytes = self.m * self.k * self.dtype.itemsize
        return weights + activation_bytes + self.m * self.n * self.out_dtype.itemsize

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


ROWS = (1, 4, 8, 16, 32, 64, 128, 512, 2048)
BENCH: tuple[Q4Case, ...] = (
    *(Q4Case(m, n, k) for n, k in ((4096, 4096), (12288, 4096), (14336, 4096)) for m in ROWS),
    *(Q4Case(m, 4096, 14336) for m in (1, 16, 64)),
    *(Q4Case(m, 12288, 4096, torch.float32) for m in (1, 16, 64, 512)),
    *(Q4Case(m, 12288, 4096, function=f) for f in FUNCTIONS[1:] for m in (1, 16, 512)),
)
"""What a GPU is measured on."""

SMALL: tuple[Q4Case, ...] = (
    Q4Case(1, 256, 256, torch.float32),
    Q4Case(16, 256, 256, torch.float32, kind="outliers"),
    Q4Case(16, 256, 256, torch.float32, function="gemm_q4_0_q8_1"),
)
"""What a CPU can run in a moment."""

GATE: tuple[Q4Case, ...] = (
    *(Q4Case(m, n, k, d) for m in (1, 16, 32, 64) for n, k in ((4096, 4096), (12288, 4096)) for d in cost.FLOATS),
    *(Q4Case(512, n, k) for n, k in ((4096, 4096), (12288, 4096), (4096, 14336))),
    *(Q4Case(m, 4096, 14336) for m in (1, 16, 32)),
    *(Q4Case(m, 8192, 28672, torch.bfloat16, torch.bfloat16) for m in (1, 16, 64)),
    *(Q4Case(m, 72, 224, torch.bfloat16, out) for m in (1, 16, 64) for out in (torch.float16, torch.bfloat16)),
)
"""What the compile gate builds: every tile and dtype, and shapes off the tile."""


def parse(shape: dict[str, int], dtype: torch.dtype, **options: Any) -> Q4Case:
    """The case for a shape such as ``{"m": 8, "n": 12288, "k": 4096}``; options are the fields of :class:`Q4Case`.

    Raises:
        ValueError: a dimension is missing or unknown.
    """
    m, n, k = take("q4_0", shape, {"m": 1, "n": 4096, "k": 4096})
    for name, features, unit in (("n", n, 8), ("k", k, BLOCK)):
        if features < unit or features % unit:
            raise wrong_value("q4_0", name, f"a positive multiple of {unit}", features)
    return Q4Case(m, n, k, dtype, **options)


def every_form(hardware: Hardware = H200) -> list[Source]:
    """``q4_0.cu`` in every form that the cost model compares, at the widest K of three that fits."""
    found = []
    for form in (*cost.ONCE, *cost.FORMS):
        k = next((k for k in (28672, 14336, 4096) if not cost.refused(form, k, hardware)), 0)
        for variant in ("fused", "separate"):
            spec = cost.Spec(form.tile_m, 12288, k, torch.float16, torch.float32)
            candidate = op.Candidate(variant, tuple(cost.constants(form, k).items()))
            found.append(op.source(spec, candidate))
    return found if hardware.capability == (9, 0) else []


def gate(hardware: Hardware = H200) -> list[Source]:
    """Every specialisation the compile gate builds for a GPU, without repeats."""
    quantizing = [op.quantize_source(dtype, exact) for dtype in cost.FLOATS for exact in (False, True)]
    cases = [source for case in GATE for source in case.sources(hardware)]
    return list(dict.fromkeys((*quantizing, *cases, *every_form(hardware))))
