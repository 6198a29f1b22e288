"""Inputs of the norm family for tests, benches and the compile gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nybble.ops.case import ROUNDING, Case, Tensors, take
from nybble.ops.norm import cost, op
from nybble.runtime.choice import Choice
from nybble.runtime.hardware import H200, Hardware
from nybble.runtime.source import Source

EPS = 1e-5
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}

_ROWS = {
    "layernorm": ("x",),
    "rmsnorm": ("x",),
    "layernorm_residual": ("x", "residual"),
    "add_layernorm": ("x", "residual"),
    "add_rmsnorm": ("x", "residual"),
    "add_dual_layernorm": ("hidden", "attn", "mlp"),
}
_PAIRS = {"add_dual_layernorm": (("w1", "b1"), ("w2", "b2"))}


@dataclass(frozen=True)
class NormCase(Case):
    """One request: a function, rows x hidden, a dtype, and the mean and deviation of its inputs."""

    function: str = "add_layernorm"
    rows: int = 1
    hidden: int = 2560
    dtype: torch.dtype = torch.float16
    mean: float = 0.0
    deviation: float = 1.0
    op: ClassVar[str] = "norm"

    def shape(self) -> dict[str, int]:
        return {"rows": self.rows, "hidden": self.hidden}

    @property
    def form(self) -> cost.Form:
        return cost.FORMS[self.function]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return _PAIRS.get(self.function, (("weight", "bias"),))

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """The public function's tensors, by argument name."""
        draw = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device)

        inputs: dict[str, Tensor] = {}
        for i, name in enumerate(_ROWS[self.function]):
            offset = self.mean if i == 0 else 0.0
            inputs[name] = normal(self.rows, self.hidden) * self.deviation + offset
        for weight, bias in self.pairs:
            inputs[weight] = 1.0 + 0.1 * normal(self.hidden)
            if not self.form.rms:
                inputs[bias] = 0.1 * normal(self.hidden)
        return {name: tensor.to(device, self.dtype) for name, tensor in inputs.items()}

    def bind(self, inputs: dict[str, Tensor], variant: str = "auto") -> Callable[[], Any]:
        # Positional as far as they go: a public function's tensors, then eps.
        tensors = list(inputs.values())
        return partial(getattr(op, self.function), *tensors, EPS, variant=variant)

    def run(self, inputs: dict[str, Tensor], variant: str = "auto") -> Tensors:
        result = self.bind(inputs, variant)()
        return result if isinstance(result, tuple) else (result,)

    def truth(self, inputs: dict[str, Tensor]) -> Tensors:
        """PyTorch's own layer_norm and rms_norm, in float64."""
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        rows = [wide[name] for name in _ROWS[self.function]]
        after = rows.pop() if self.form.after else None
        h = torch.stack(rows).sum(0)
        outputs = []
        for weight, bias in self.pairs:
            if self.form.rms:
                y = F.rms_norm(h, (self.hidden,), wide[weight], EPS)
            else:
                y = F.layer_norm(h, (self.hidden,), wide[weight], wide.get(bias), EPS)
            outputs.append(y if after is None else y + after)
        return (*outputs, h) if self.form.store_sum else tuple(outputs)

    def tolerance(self, inputs: dict[str, Tensor], truth: Tensors) -> Tensors:
        """One rounding of the result, plus fp32's part: 1e-6 of the row's largest value, and the rounding of the sum
        where there is one, as the normalisation amplifies it."""
        wide = [inputs[name].double() for name in _ROWS[self.function][: self.form.addends]]
        size = torch.stack(wide).abs().sum(0)
        sum_rounding = (self.form.addends - 1) * 2.0**-24 * size
        h = torch.stack(wide).sum(0)
        centred = h if self.form.rms else h - h.mean(-1, keepdim=True)
        spread = centred.square().mean(-1, keepdim=True)
        gain = max(float(inputs[w].double().abs().max()) for w, _ in self.pairs)
        amplified = sum_rounding.amax(-1, keepdim=True) * gain / (spread + EPS).sqrt()
        unit, tiny = ROUNDING[self.dtype], TINY[self.dtype]
        normed = [
            unit * y.abs() + 1e-6 * y.abs().amax(-1, keepdim=True) + 2 * amplified + tiny
            for y in truth[: self.form.norms]
        ]
        if self.form.store_sum:
            normed.append(unit * truth[-1].abs() + 2 * sum_rounding + tiny)
        return tuple(normed)

    def spec(self, variant: str = "auto") -> cost.Spec:
        rows = 1 << max(0, self.rows - 1).bit_length()
        return cost.Spec(self.function, self.dtype, self.hidden, not self.form.rms, 16, rows, variant)

    def choice(self, hardware: Hardware | None, variant: str = "auto") -> Choice:
        return cost.choose(self.spec(variant), hardware)

    def sources(self, hardware: Hardware) -> list[Source]:
        spec = self.spec()
        return [
            op.source(spec, c.config) for c in cost.candidates(spec, hardware) if c.variant == "cuda" and not c.refused
        ]

    @property
    def bytes(self) -> int:
        weights = len(self.pairs) * (1 if self.form.rms else 2) * self.hidden
        return (cost.passes(self.function) * self.rows * self.hidden + weights) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 0


FUNCTIONS = tuple(_ROWS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NAMED = ("layernorm_residual", "add_layernorm", "add_rmsnorm", "add_dual_layernorm")
_POINTS = ((1, 2560), (8, 2560), (512, 2560), (4096, 2560), (16384, 4096))

BENCH: tuple[NormCase, ...] = (
    *(NormCase(function, rows, hidden, dtype) for dtype in DTYPES for function in _NAMED for rows, hidden in _POINTS),
    *(NormCase(function, rows, 4096) for function in _NAMED for rows in (1, 8, 64, 512, 4096)),
    *(NormCase("add_layernorm", rows, hidden) for hidden in (2561, 2564, 2600, 65536) for rows in (512, 4096)),
    *(NormCase("rmsnorm", rows, hidden) for rows, hidden in ((1 << 17, 128), (4096, 2560))),
)
"""What a GPU is measured on: the shapes of GPT-NeoX and Llama, row lengths off every vector beside one on it, rows as
wide as a cluster, and the short rows of a query or key norm."""

SMALL: tuple[NormCase, ...] = tuple(NormCase(function, 8, 512, torch.float32) for function in FUNCTIONS)
"""What a CPU can run in a moment."""

GATE: tuple[NormCase, ...] = (
    *(NormCase(f, 1, hidden, d) for f in FUNCTIONS for d in DTYPES for hidden in (768, 2560, 4096, 5120, 8192)),
    *(NormCase(f, 1, hidden, d) for f in ("add_dual_layernorm", "rmsnorm") for d in DTYPES for hidden in (2561, 65536)),
    *(NormCase(f, 4096, hidden, d) for f in FUNCTIONS for d in DTYPES for hidden in (2560, 4096)),
    *(NormCase(f, 512, hidden, d) for f in FUNCTIONS for d in DTYPES for hidden in (2560, 1 << 17, 1 << 19)),
    *(NormCase(f, 1 << 17, 128, d) for f in FUNCTIONS for d in DTYPES),
)
"""What the compile gate builds: hidden sizes of real models with few and with many rows, an odd one, a cluster's, one
too wide for any registers, and short rows."""


def parse(shape: dict[str, int], dtype: torch.dtype, **options: Any) -> NormCase:
    """The case for a shape such as ``{"rows": 8, "hidden": 4096}``; options are ``function``, ``mean``, ``deviation``.

    Raises:
        ValueError: a dimension is missing or unknown.
    """
    rows, hidden = take("norm", shape, {"rows": 1, "hidden": 2560})
    return NormCase(rows=rows, hidden=hidden, dtype=dtype, **options)


def gate(hardware: Hardware = H200) -> list[Source]:
    """Every specialisation the compile gate builds for a GPU, without repeats."""
    return list(dict.fromkeys(source for case in GATE for source in case.sources(hardware)))
