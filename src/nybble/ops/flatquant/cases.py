"""Inputs of FlatQuant for tests, benches and the compile gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nybble.ops.case import ROUNDING, Case, Tensors, take
from nybble.ops.flatquant import cost, op
from nybble.ops.flatquant.reference import unpack
from nybble.runtime.choice import Choice
from nybble.runtime.hardware import H200, Hardware
from nybble.runtime.source import Source


class Inputs(NamedTuple):
    """Of one call."""

    x: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class FlatQuantCase(Case):
    """One request: tokens x (M N), and what becomes of it. ``deviation``: of x, but for a few larger features."""

    tokens: int = 1
    m: int = 64
    n: int = 64
    dtype: torch.dtype = torch.float16
    packed: bool = True
    clip: float = 1.0
    clips: int = 1
    deviation: float = 1.0
    function: str = "flatquant_dynamic_quantize"
    op: ClassVar[str] = "flatquant"
    peer_error: ClassVar[float | None] = 0.1
    """Of the values of a peer, which round the intermediate to 16 bits on their own account: ties fall elsewhere."""

    def shape(self) -> dict[str, int]:
        return {"tokens": self.tokens, "m": self.m, "n": self.n}

    @property
    def features(self) -> int:
        return self.m * self.n

    @property
    def clip_ratios(self) -> list[float]:
        return [self.clip * (1.0 - 0.125 * i) for i in range(self.clips)]

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        draw = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device)

        x = normal(self.tokens, self.features) * self.deviation
        x[:, :: max(1, self.features // 5)] *= 20.0  # outlier features, which the transforms spread
        left, right = (torch.linalg.qr(normal(size, size).cpu())[0].to(device) for size in (self.m, self.n))
        return Inputs(*(t.to(self.dtype).contiguous() for t in (x, left, right)))

    def bind(self, inputs: Inputs, variant: str = "auto") -> Callable[[], Any]:
        ratios = self.clip_ratios if self.clips > 1 else self.clip
        return partial(op.flatquant_dynamic_quantize, *inputs, ratios, self.packed, variant=variant)

    def run(self, inputs: Inputs, variant: str = "auto") -> Tensors:
        return self.bind(inputs, variant)()

    def readable(self, results: Tensors) -> Tensors:
        """Values one a byte, and scales."""
        q, scales = results
        return (unpack(q) if q.dtype == torch.int32 else q), scales

    def result_dtypes(self, count: int) -> tuple[torch.dtype, ...]:
        return torch.int8, torch.float32

    def _exact(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Y, the error it may have, and its scales by ratio, in float64."""
        x, left, right = (t.double() for t in inputs)
        rows = x.view(-1, self.m, self.n)
        t = rows @ right
        y = left.t() @ t
        wide = self.dtype == torch.float32
        # fp32 accumulators, a rounding for each of their additions; factors of tf32 pairs; T = x R as it is rounded.
        sums = 3 * 2.0**-22 if wide else 0.0
        of_t = (self.n * 2.0**-24 + sums) * (rows.abs() @ right.abs())
        if not wide:
            of_t = of_t + ROUNDING[self.dtype] * t.abs() + 2.0**-17 * t.abs().amax((1, 2), keepdim=True)
        error = left.abs().t() @ of_t + (self.m * 2.0**-24 + sums) * (left.abs().t() @ t.abs())
        if not wide:  # the other order: U = L^T x is rounded, and then multiplied by R
            u = left.t() @ rows
            of_u = self.m * 2.0**-24 * (left.abs().t() @ rows.abs())
            of_u = of_u + ROUNDING[self.dtype] * u.abs() + 2.0**-17 * u.abs().amax((1, 2), keepdim=True)
            error = torch.maximum(error, of_u @ right.abs() + self.n * 2.0**-24 * (u.abs() @ right.abs()))
        y, error = y.reshape(-1, self.features), error.reshape(-1, self.features)
        largest = y.abs().amax(-1)
        ratios = torch.tensor(self.clip_ratios, dtype=torch.float64, device=x.device)
        scales = torch.where(largest == 0, 1.0, ratios[:, None] * largest / 7.0)
        return y, error, scales

    def truth(self, inputs: Inputs) -> Tensors:
        y, _, scales = self._exact(inputs)
        q = (y / scales[..., None]).round().clamp(-8, 7)
        return (q, scales) if self.clips > 1 else (q[0], scales[0])

    def tolerance(self, inputs: Inputs, truth: Tensors) -> Tensors:
        """What the nearest integer can be when Y, and the scale with it, is off by the error of the kernel."""
        y, error, scales = self._exact(inputs)
        largest, worst = y.abs().amax(-1), error.amax(-1)
        of_scale = worst / largest.clamp(min=1e-300) + 2.0**-22
        quotient = y / scales[..., None]
        off = error / scales[..., None] + quotient.abs() * of_scale[:, None] + 2.0**-19
        near = [(quotient + sign * off).round().clamp(-8, 7) for sign in (-1, 1)]
        exact = quotient.round().clamp(-8, 7)
        of_q = torch.maximum((near[0] - exact).abs(), (near[1] - exact).abs())
        bounds = of_q, scales * of_scale
        return bounds if self.clips > 1 else (bounds[0][0], bounds[1][0])

    def spec(self, variant: str = "auto") -> cost.Spec:
        tokens = 1 << max(0, self.tokens - 1).bit_length()
        clamp = min(self.clip_ratios) < 1.0
        aligned = self.features * self.dtype.itemsize % 16 == 0
        return cost.Spec(
            self.dtype, self.m, self.n, tokens, self.packed, False, self.clips, clamp, aligned, variant
        )  # fmt: skip

    def choice(self, hardware: Hardware | None, variant: str = "auto") -> Choice:
        return cost.choose(self.spec(variant), hardware)

    def sources(self, hardware: Hardware) -> list[Source]:
        spec = self.spec()
        able = [c for c in cost.candidates(spec, hardware) if c.variant != "reference" and not c.refused]
        return [op.source(spec, candidate) for candidate in able]

    def memory(self) -> dict[str, int]:
        """Bytes of the activations: as they come, and in both forms of the result with their scales."""
        count, name = self.tokens * self.features, str(self.dtype).removeprefix("torch.")
        held = {name: count * self.dtype.itemsize, "int8": count + 4 * self.tokens}
        return held | {"int32": count // 2 + 4 * self.tokens} if self.features % 8 == 0 else held

    @property
    def bytes(self) -> int:
        out = self.clips * (self.features // 2 if self.packed else self.features) + 4 * self.clips
        transforms = (self.m**2 + self.n**2) * self.dtype.itemsize
        return self.tokens * (self.features * self.dtype.itemsize + out) + transforms

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.features * (self.m + self.n)


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SIZES = ((64, 64), (64, 80), (64, 128), (86, 128), (112, 128), (128, 224))

COMPARED: tuple[FlatQuantCase, ...] = (
    *(FlatQuantCase(tokens, 64, 64) for tokens in (1, 128, 4096, 16384)),
    FlatQuantCase(16384, 64, 128),
    *(FlatQuantCase(tokens, 86, 128) for tokens in (1, 16384)),
)
"""What is measured beside a compiled peer too, which takes a minute to compile for each."""

BENCH: tuple[FlatQuantCase, ...] = (
    *COMPARED,
    *(FlatQuantCase(tokens, m, n) for m, n in ((64, 64), (86, 128)) for tokens in (16, 1024)),
    *(FlatQuantCase(4096, m, n) for m, n in SIZES[1:]),
    *(FlatQuantCase(4096, 64, 64, dtype) for dtype in DTYPES[1:]),
    FlatQuantCase(4096, 64, 64, packed=False),
    FlatQuantCase(4096, 64, 64, clip=0.9),
    FlatQuantCase(4096, 64, 64, clips=3),
)
"""What a GPU is measured on: hidden and intermediate sizes of Llama and Qwen, the forms of the result, every dtype."""

DETAILED: tuple[FlatQuantCase, ...] = tuple(
    FlatQuantCase(tokens, m, n, dtype, packed=packed)
    for tokens in (16, 1024)
    for m, n in SIZES
    for dtype in DTYPES
    for packed in (True, False)
)
"""What ``nybble bench run flatquant --detailed`` adds: every dtype and form of the result at the sizes of models."""

SMALL: tuple[FlatQuantCase, ...] = tuple(FlatQuantCase(8, 16, 32, dtype) for dtype in DTYPES)
"""What a CPU can run in a moment."""

GATE: tuple[FlatQuantCase, ...] = (
    *(FlatQuantCase(tokens, m, n, dtype) for m, n in SIZES for dtype in DTYPES for tokens in (1, 16384)),
    *(FlatQuantCase(16384, m, n, packed=False, clip=0.9) for m, n in SIZES),
    *(FlatQuantCase(16384, 64, 64, clips=3, packed=packed) for packed in (True, False)),
    *(FlatQuantCase(64, m, n, dtype) for m, n in ((256, 256), (256, 64), (9, 24), (1, 8)) for dtype in DTYPES),
    *(FlatQuantCase(64, 7, 9, dtype, packed=False) for dtype in DTYPES),
)
"""What the compile gate builds: sizes of real models with one and with many tokens, the largest, odd ones."""


def parse(shape: dict[str, int], dtype: torch.dtype, **options: Any) -> FlatQuantCase:
    """The case for a shape such as ``{"tokens": 8, "m": 64, "n": 64}``; options are those of :class:`FlatQuantCase`.

    Raises:
        ValueError: a dimension is missing or unknown.
    """
    tokens, m, n = take("flatquant", shape, {"tokens": 1, "m": 64, "n": 64})
    return FlatQuantCase(tokens, m, n, dtype, **options)


def gate(hardware: Hardware = H200) -> list[Source]:
    """Every specialisation the compile gate builds for a GPU, without repeats."""
    return list(dict.fromkeys(source for case in GATE for source in case.sources(hardware)))
