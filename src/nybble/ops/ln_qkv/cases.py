"""Inputs of the norm with queries, keys and values behind it, for tests, benches and the compile gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from nybble.formats.gptq import pack_gptq
from nybble.formats.grouped import GROUP_SIZES
from nybble.ops.case import Tensors, take
from nybble.ops.ln_qkv import op
from nybble.ops.w4a16 import cost
from nybble.ops.w4a16.cases import EPS, Inputs, W4A16Case
from nybble.runtime.errors import wrong_value
from nybble.runtime.hardware import H200, Hardware
from nybble.runtime.source import Source


@dataclass(frozen=True)
class QkvInputs(Inputs):
    """The linear's inputs, and the weight once more as GPTQ has it on disk."""

    gptq: dict[str, Tensor] = field(default_factory=dict)
    never_read: ClassVar[tuple[str, ...]] = ("quantized", "weight")


@dataclass(frozen=True)
class LnQkvCase(W4A16Case):
    """One request: ``m`` rows of ``k`` hidden features; the first ``k`` of ``n`` results are queries, half of the
    others keys, the rest values."""

    n: int = 12288
    norm: str = "layernorm"
    op: ClassVar[str] = "ln_qkv"
    function: str = field(default="fused_ln_qkv_gptq", init=False)

    @property
    def kv_features(self) -> int | None:
        """Width of keys and of values; ``None`` where all three are as wide as the input."""
        return None if self.n == 3 * self.k else (self.n - self.k) // 2

    @property
    def splits(self) -> tuple[int, int]:
        width = self.kv_features or self.k
        return self.n - 2 * width, self.n - width

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> QkvInputs:
        made = super().make(device, seed)
        gptq = pack_gptq(made.quantized, checkpoint_format="gptq")
        if not self.act_order:
            del gptq["g_idx"]
        x = made.x.view(1, self.m, self.k)
        return QkvInputs(x, made.weight, made.bias, made.quantized, made.norm, gptq=gptq)

    def bind(self, inputs: Inputs, variant: str = "auto") -> Callable[[], Any]:
        assert isinstance(inputs, QkvInputs)
        assert inputs.norm is not None
        return partial(
            op.fused_ln_qkv_gptq,
            inputs.x,
            inputs.gptq["qweight"],
            inputs.gptq["qzeros"],
            inputs.gptq["scales"],
            inputs.norm.weight,
            inputs.norm.bias,
            group_size=self.group_size,
            eps=EPS,
            g_idx=inputs.gptq.get("g_idx"),
            bias=inputs.bias,
            kind=self.norm,
            kv_features=self.kv_features,
            variant=variant,
        )

    def run(self, inputs: Inputs, variant: str = "auto") -> Tensors:
        result = self.bind(inputs, variant)()
        return result if isinstance(result, tuple) else (result,)

    def apart(self, y: Tensor) -> Tensors:
        """``[..., n]`` as the function returns it."""
        parts = y.tensor_split(self.splits, -1)
        return (torch.stack(parts),) if self.kv_features is None else tuple(parts)

    def truth(self, inputs: Inputs) -> Tensors:
        return self.apart(super().truth(inputs)[0])

    def tolerance(self, inputs: Inputs, truth: Tensors) -> Tensors:
        """The linear's: splitting changes no value."""
        whole = torch.cat(tuple(truth[0]) if self.kv_features is None else truth, -1)
        return self.apart(self.bound(inputs, whole, composed=True))

    def spec(self, variant: str = "auto") -> cost.Spec:
        return super().spec(variant)._replace(splits=self.splits)


BENCH: tuple[LnQkvCase, ...] = tuple(LnQkvCase(m) for m in (1, 16, 64, 256, 512, 1024, 1536, 4096))
"""What a GPU is measured on."""

SMALL: tuple[LnQkvCase, ...] = (
    LnQkvCase(4, 768, 256, 128, torch.float32),
    LnQkvCase(4, 384, 256, 64, torch.float32, symmetric=False, act_order=True, bias=True, norm="rmsnorm"),
)
"""What a CPU can run in a moment; the second has grouped queries."""

_PLAIN = LnQkvCase(1)
GATE: tuple[LnQkvCase, ...] = (
    *(replace(_PLAIN, m=m, dtype=d) for m in (1, 16, 32, 64) for d in cost.HALF),
    *(replace(_PLAIN, m=m, norm="rmsnorm", n=4096 + 2 * 1024) for m in (1, 16, 64)),
    *(
        replace(_PLAIN, m=m, group_size=g, symmetric=False, act_order=True, bias=True)
        for m in (1, 16)
        for g in (32, 64, -1)
    ),
    LnQkvCase(16, 2560 + 2 * 640, 2560, 64, torch.bfloat16, symmetric=False),
)
"""What the compile gate builds: both norms, equal and unequal planes, every option of the weight."""


def parse(shape: dict[str, int], dtype: torch.dtype, **options: Any) -> LnQkvCase:
    """The case for a shape such as ``{"m": 8, "n": 12288, "k": 4096}``; options are the fields of :class:`LnQkvCase`.

    Raises:
        ValueError: a dimension is unknown, or the features left by the queries are no two widths of keys and values.
    """
    m, n, k, group_size = take("ln_qkv", shape, {"m": 1, "n": 12288, "k": 4096, "group_size": 128})
    if k < 8 or k % 8:
        raise wrong_value("ln_qkv", "k", "a positive multiple of 8", k)
    if n <= k or (n - k) % 16:
        raise wrong_value("ln_qkv", "n", f"k = {k} and twice a multiple of 8", n)
    if group_size != -1 and group_size not in GROUP_SIZES:
        raise wrong_value("ln_qkv", "group_size", f"-1 or one of {GROUP_SIZES}", group_size)
    return LnQkvCase(m, n, k, group_size, dtype, **options)


def gate(hardware: Hardware = H200) -> list[Source]:
    """Every specialisation the compile gate builds for a GPU, without repeats."""
    return list(dict.fromkeys(source for case in GATE for source in case.sources(hardware)))
