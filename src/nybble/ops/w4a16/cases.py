"""Inputs of the 4-bit or 8-bit linear for tests, benches and the compile gate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.formats.grouped import BITS, GROUP_SIZES, QuantizedWeight
from nybble.formats.tiles import PackedWeight
from nybble.ops.case import ROUNDING, Case, Tensors, take
from nybble.ops.norm.cases import TINY
from nybble.ops.w4a16 import cost, op
from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.errors import wrong_value
from nybble.runtime.hardware import H200, Hardware
from nybble.runtime.source import Source

EPS = 1e-5
LIPSCHITZ = 1.13
"""No activation grows faster: the steepest point of gelu, 1.129; silu's is 1.100."""


@dataclass(frozen=True)
class Inputs:
    """What one request is made of: ``quantized`` is the meaning of ``weight``.

    A copy has its own of everything that a call reads, and shares the rest: copies that are timed in turn lie in memory
    as the layers of a model do, not with twice their size of other things between them.
    """

    x: Tensor
    weight: PackedWeight
    bias: Tensor | None
    quantized: QuantizedWeight
    norm: op.Norm | None = None
    activation: str = ""
    residual: Tensor | None = None
    never_read: ClassVar[tuple[str, ...]] = ("quantized",)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self.never_read}
        return replace(self, **copy.deepcopy(own, memo))


@dataclass(frozen=True)
class W4A16Case(Case):
    """One request: rows, features, group, dtype, and which of the format's options the weight uses."""

    m: int = 1
    n: int = 4096
    k: int = 4096
    group_size: int = 128
    dtype: torch.dtype = torch.float16
    symmetric: bool = True
    act_order: bool = False
    bias: bool = False
    scale_dtype: torch.dtype | None = None
    norm: str = ""
    activation: str = ""
    residual: bool = False
    bits: int = 4
    op: ClassVar[str] = "w4a16"
    function: str = field(default="w4a16_linear", init=False)

    def shape(self) -> dict[str, int]:
        return {"m": self.m, "n": self.n, "k": self.k, "group_size": self.group_size}

    def quantized(self, device: torch.device | str = "cpu", seed: int = 0) -> QuantizedWeight:
        """A random weight with the deviation of a trained one, about ``1 / sqrt(K)``."""
        draw = torch.Generator(device).manual_seed(seed)
        size = self.k if self.group_size == -1 else self.group_size
        groups = -(-self.k // size)
        q = torch.randint(0, 1 << self.bits, (self.k, self.n), generator=draw, device=device, dtype=torch.uint8)
        if self.symmetric:
            zeros = torch.full((groups, self.n), 1 << (self.bits - 1), device=device, dtype=torch.uint8)
        else:
            zeros = torch.randint(0, 1 << self.bits, (groups, self.n), generator=draw, device=device, dtype=torch.uint8)
        scales = 0.5 + torch.rand(groups, self.n, generator=draw, device=device)
        scales = (scales * (3.2 / 2**self.bits / self.k**0.5)).to(self.scale_dtype or self.dtype)
        g_idx = None
        if self.act_order:
            order = torch.randperm(self.k, generator=draw, device=device)
            g_idx = torch.empty(self.k, device=device, dtype=torch.int32)
            g_idx[order] = torch.arange(self.k, device=device, dtype=torch.int32) // size
        return QuantizedWeight(q, zeros, scales, size, g_idx, self.bits)

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        quantized = self.quantized(device, seed)
        draw = torch.Generator(device).manual_seed(seed + 1)
        x = torch.randn(self.m, self.k, generator=draw, device=device).to(self.dtype)

        def vector(length: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
            return (mean + deviation * torch.randn(length, generator=draw, device=device)).to(self.dtype)

        bias = vector(self.n) if self.bias else None
        norm = None
        if self.norm:
            shift = vector(self.k, deviation=0.1) if self.norm == "layernorm" else None
            norm = op.Norm(vector(self.k, 1.0, 0.1), shift, EPS, self.norm)
        residual = vector(self.m * self.n_out).view(self.m, self.n_out) if self.residual else None
        weight = PackedWeight.from_quantized(quantized)
        return Inputs(x, weight, bias, quantized, norm, self.activation, residual)

    @property
    def n_out(self) -> int:
        """Features of the result."""
        return self.n // 2 if self.activation == "silu_mul" else self.n

    def bind(self, inputs: Inputs, variant: str = "auto") -> Callable[[], Any]:
        return partial(
            op.w4a16_linear,
            inputs.x,
            inputs.weight,
            bias=inputs.bias,
            norm=inputs.norm,
            activation=inputs.activation or None,
            residual=inputs.residual,
            variant=variant,
        )

    def run(self, inputs: Inputs, variant: str = "auto") -> Tensors:
        return (self.bind(inputs, variant)(),)

    def truth(self, inputs: Inputs) -> Tensors:
        """From the quantised weight's own meaning, which knows nothing of tiles."""
        y = _activate(_product(inputs, _normed(inputs)), self.activation)
        return (y if inputs.residual is None else y + inputs.residual.double(),)

    def tolerance(self, inputs: Inputs, truth: Tensors) -> Tensors:
        """That of the composition, which rounds after every kernel: the one in which every variant must stay."""
        return (self.bound(inputs, truth[0], composed=True),)

    def bound(self, inputs: Inputs, truth: Tensor, *, composed: bool) -> Tensor:
        """The absolute error each element may have, followed through the steps.

        The norm: one rounding of what the product reads, and fp32's part, 1e-6 of the row's largest value, both times
        the weight's magnitudes. The product: the worst case of fp32 sums, a chain of K / 64 chunks, and within a chunk
        the tensor core's, each step within 2^-23 of the sum of magnitudes. The activation: the product's error times
        :data:`LIPSCHITZ`, and 2^-21 of its argument for fp32's exp, erf and tanh. At the end one rounding.
        ``composed`` adds a rounding of the product and one of the activation.
        """
        unit, tiny = ROUNDING[self.dtype], TINY[self.dtype]
        magnitude = inputs.quantized.dequantize(torch.float64).abs()
        x = _normed(inputs).abs()
        error = 0.0
        if inputs.norm is not None:
            off = unit * x + 1e-6 * x.amax(-1, keepdim=True) + tiny if x.numel() else x
            error, x = off @ magnitude, x + off
        if self.m == 1:  # an integer of 30 bits below the largest of its neighbours (digits.cu)
            error = error + 2.0**-30 * x.amax() * magnitude.sum(0)
        roundings = (self.m > 128) * (1 + (self.scale_dtype not in (None, self.dtype)))  # and of the scale
        error = error + ((self.k / 64 + 16) * 2.0**-24 + roundings * unit) * (x @ magnitude)
        if not self.activation and inputs.residual is None:
            return unit * truth.abs() + error + 2.0**-25
        rounded = unit if composed else 0.0
        product = _product(inputs, _normed(inputs))
        error = error + rounded * product.abs() + composed * tiny
        value = product
        if self.activation:
            value = _activate(product, self.activation)
            steep = LIPSCHITZ * error + 2.0**-21 * product.abs()
            if self.activation == "silu_mul":
                gate, up = product.chunk(2, -1)
                of_gate, of_up = steep[..., : self.n_out], error[..., self.n_out :]
                of_gate = of_gate + rounded * F.silu(gate).abs() + composed * tiny
                steep = of_gate * (up.abs() + of_up) + F.silu(gate).abs() * of_up
            error = steep
        if inputs.residual is not None:
            error = error + rounded * value.abs() + composed * tiny
        return unit * truth.abs() + error * (1 + unit) + 2.0**-25

    def spec(self, variant: str = "auto") -> cost.Spec:
        m = 1 << max(0, self.m - 1).bit_length()
        size = self.k if self.group_size == -1 else self.group_size
        scale_dtype = self.scale_dtype or self.dtype
        return cost.Spec(
            m, self.n, self.k, size, self.dtype, scale_dtype, not self.symmetric, self.act_order, self.bias, variant,
            self.norm, self.activation, self.residual, self.norm == "layernorm", (), self.bits,
        )  # fmt: skip

    def choice(self, hardware: Hardware | None, variant: str = "auto") -> Choice:
        return op.choose(self.spec(variant), hardware)

    def sources(self, hardware: Hardware) -> list[Source]:
        """Of every variant that can run it; a composition's are those of what it asks for."""

        def of(spec: cost.Spec) -> list[Source]:
            able = [c for c in cost.candidates(spec, hardware) if not c.refused]
            found = [op.source(spec, c) for c in able if c.variant in op.KERNELS]
            if any(dict(c.config).get("GATHERED") for c in able):
                found.append(op.gather_source(spec))
            return found + (of(spec.inner) if any(c.variant == "composed" for c in able) else [])

        return of(self.spec())

    @property
    def bytes(self) -> int:
        groups = 1 if self.group_size == -1 else -(-self.k // self.group_size)
        scales = groups * self.n * (self.scale_dtype or self.dtype).itemsize
        zeros = 0 if self.symmetric else groups * self.n * self.bits // 8
        vectors = self.n * self.bias + self.k * {"": 0, "layernorm": 2, "rmsnorm": 1}[self.norm]
        activations = (self.m * (self.k + self.n_out * (1 + self.residual)) + vectors) * self.dtype.itemsize
        return self.n * self.k * self.bits // 8 + scales + zeros + activations + 4 * self.k * self.act_order

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def _normed(inputs: Inputs) -> Tensor:
    """float64 ``[..., K]``: what the product multiplies, unrounded."""
    x, norm = inputs.x.double(), inputs.norm
    if norm is None:
        return x
    if norm.kind == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], norm.weight.double(), norm.eps)
    bias = None if norm.bias is None else norm.bias.double()
    return F.layer_norm(x, x.shape[-1:], norm.weight.double(), bias, norm.eps)


def _product(inputs: Inputs, x: Tensor) -> Tensor:
    y = x @ inputs.quantized.dequantize(torch.float64)
    return y if inputs.bias is None else y + inputs.bias.double()


def _activate(y: Tensor, activation: str) -> Tensor:
    """From the functions' definitions, in float64."""
    if activation == "gelu":
        return 0.5 * y * (1 + torch.erf(y / 2**0.5))
    if activation == "gelu_tanh":
        return 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    if activation == "silu_mul":
        gate, up = y.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up
    return y


_POINTS: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (4096, 4096, (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)),
    (12288, 4096, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)),
    (11008, 4096, (1, 16)),
    (28672, 8192, (1, 4, 16, 32, 64, 128, 512, 4096)),
    (8192, 28672, (1, 16, 128, 4096)),
)

_OPTIONS: tuple[dict[str, Any], ...] = (
    {"act_order": True},
    {"n": 4096, "act_order": True},
    {"symmetric": False},
    {"group_size": 32},
    {"group_size": 64},
    {"group_size": -1},
    {"n": 12296},
    {"k": 4104},
    {"dtype": torch.bfloat16},
    {"norm": "layernorm"},
    {"n": 28672, "activation": "silu_mul"},
    {"n": 28672, "norm": "rmsnorm", "activation": "silu_mul"},
    {"n": 4096, "k": 14336, "residual": True},
)

_OPTIONS_OF_BYTES: tuple[dict[str, Any], ...] = (
    {"symmetric": False},
    {"group_size": -1},
    {"act_order": True},
    {"dtype": torch.bfloat16},
)

BENCH: tuple[W4A16Case, ...] = (
    *(W4A16Case(m, n, k) for n, k, rows in _POINTS for m in rows),
    *(replace(W4A16Case(m, 12288, 4096), **options) for options in _OPTIONS for m in (1, 16)),
    *(W4A16Case(m, n, 4096, bits=8) for n in (12288, 4096) for m in (1, 16, 128, 1024)),
    *(W4A16Case(1, 12288, 4096, bits=8, **options) for options in _OPTIONS_OF_BYTES),
)
"""What a GPU is measured on."""

SMALL: tuple[W4A16Case, ...] = (
    W4A16Case(1, 256, 256, 128, torch.float32),
    W4A16Case(16, 256, 256, 32, torch.float32, symmetric=False, act_order=True, bias=True),
    W4A16Case(16, 256, 256, 128, torch.float32, symmetric=False, bits=8),
)
"""What a CPU can run in a moment."""

_PLAIN = W4A16Case(1, 4096, 4096)
_BYTES = replace(_PLAIN, bits=8)
GATE: tuple[W4A16Case, ...] = (
    *(W4A16Case(m, 4096, 4096, g, d) for m in (1, 16, 32, 64) for g in (32, 128) for d in cost.HALF),
    *(
        replace(_PLAIN, m=m, group_size=g, symmetric=False, act_order=True, bias=True)
        for m in (1, 16, 64)
        for g in (16, 64, 256, -1)
    ),
    *(W4A16Case(m, n, k) for m in (1, 64, 256) for n, k in ((12288, 4096), (28672, 8192), (256, 1024), (72, 200))),
    W4A16Case(256, 6144, 4096),
    *(
        W4A16Case(256, 12288, 4096, g, torch.bfloat16, symmetric=False, act_order=True, bias=True, residual=True)
        for g in (16, 64)
    ),
    W4A16Case(512, 28672, 8192, bits=8),
    W4A16Case(1, 4096, 4096, 128, torch.bfloat16, scale_dtype=torch.float16),
    W4A16Case(16, 8200, 8256, 64, torch.bfloat16, symmetric=False),
    *(replace(_PLAIN, m=m, norm=norm, activation=a) for m in (1, 16) for norm in op.NORMS for a in ("", "silu_mul")),
    *(replace(_PLAIN, m=m, activation=a, residual=True) for m in (1, 16) for a in ("", "gelu", "gelu_tanh")),
    replace(
        _PLAIN,
        m=16,
        group_size=32,
        dtype=torch.bfloat16,
        symmetric=False,
        act_order=True,
        bias=True,
        norm="layernorm",
        activation="silu_mul",
        residual=True,
    ),
    *(replace(_BYTES, m=m, dtype=d) for m in (1, 16, 64, 256) for d in cost.HALF),
    *(replace(_BYTES, m=m, n=12288) for m in (1, 64, 1024)),
    *(
        replace(_BYTES, m=m, group_size=g, dtype=torch.bfloat16, symmetric=False, act_order=True, bias=True)
        for m in (1, 16, 64, 256)
        for g in (16, 64, -1)
    ),
    *(replace(_BYTES, m=m, n=12288, norm="layernorm", activation="silu_mul") for m in (1, 16)),
)
"""What the compile gate builds: every tile, dtype and option, and shapes off the tile."""

ONE_ROW: tuple[W4A16Case, ...] = (
    *(W4A16Case(1, n, k, g) for n, k in ((4096, 14336), (28672, 8192), (11008, 4096)) for g in (32, 64, 128)),
    *(W4A16Case(1, n, 2560, bias=True, norm="layernorm", activation=a) for n, a in ((7680, ""), (10240, "gelu"))),
    *(W4A16Case(1, n, 4096, g, norm="rmsnorm", activation="silu_mul") for n in (28672, 22016) for g in (32, 64, 128)),
    W4A16Case(1, 12288, 4096, act_order=True, norm="layernorm"),
)
"""The forms of ``digits.cu``, by the length of the row, by groups and by what is around: the gate builds that alone."""


def parse(shape: dict[str, int], dtype: torch.dtype, **options: Any) -> W4A16Case:
    """The case for a shape such as ``{"m": 8, "n": 12288, "k": 4096}``; options are the fields of :class:`W4A16Case`.

    Raises:
        ValueError: a dimension is missing or unknown, or a number is not one that there is.
    """
    m, n, k, group_size = take("w4a16", shape, {"m": 1, "n": 4096, "k": 4096, "group_size": 128})
    for name, features in (("n", n), ("k", k)):
        if features < 8 or features % 8:
            raise wrong_value("w4a16", name, "a positive multiple of 8", features)
    if group_size != -1 and group_size not in GROUP_SIZES:
        raise wrong_value("w4a16", "group_size", f"-1 or one of {GROUP_SIZES}", group_size)
    if options.get("bits", 4) not in BITS:
        raise wrong_value("w4a16", "bits", f"one of {BITS}", options["bits"])
    return W4A16Case(m, n, k, group_size, dtype, **options)


def gate(hardware: Hardware = H200) -> list[Source]:
    """Every specialisation the compile gate builds for a GPU, without repeats."""
    sources = [source for case in GATE for source in case.sources(hardware)]
    for spec in (case.spec() for case in ONE_ROW):
        config = cost.digits_shape(spec, hardware)
        if isinstance(config, dict):
            sources.append(op.source(spec, Candidate("digits", tuple(config.items()), None)))
    return list(dict.fromkeys(sources))
