"""Inputs of attention of one new token, for tests, benches and the compile gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nybble.ops.case import ROUNDING, Case, Tensors, take
from nybble.ops.decode_attention import cost, op
from nybble.ops.norm.cases import TINY
from nybble.runtime.choice import Choice
from nybble.runtime.errors import wrong_value
from nybble.runtime.hardware import H200, Hardware
from nybble.runtime.source import Source

EPS = 1e-6


class Inputs(NamedTuple):
    """The public function's tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    slot: Tensor
    seen: Tensor
    angles: tuple[Tensor, Tensor] | None
    norms: tuple[Tensor, Tensor] | None
    sinks: op.Sinks | None


@dataclass(frozen=True)
class AttentionCase(Case):
    """One request.

    Attributes:
        batch, heads, kv_heads, d, slots: sizes.
        seen: tokens before this one, -1 for a cache that is full with this one; more than ``slots`` where tokens have
            been evicted.
        rotary: -1 for all of ``d``. norm: of queries and keys. sinks: slots that are rotated anew.
        angles: dtype of cosines and sines, ``None`` for that of the rest. together: q, k and v lie side by side for
            each head, as GPT-NeoX has them.
        size: of the scores' deviation: large ones leave a few keys to count.
        settled: as the operation has it.
    """

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    d: int = 128
    slots: int = 640
    dtype: torch.dtype = torch.float16
    seen: int = -1
    rotary: int = -1
    norm: bool = False
    sinks: int = 0
    angles: torch.dtype | None = None
    together: bool = False
    size: float = 1.0
    settled: bool = True
    function: str = op.FUNCTION
    op: ClassVar[str] = "decode_attention"

    def shape(self) -> dict[str, int]:
        return {
            "batch": self.batch, "heads": self.heads, "kv_heads": self.kv_heads, "d": self.d, "slots": self.slots,
        }  # fmt: skip

    @property
    def before(self) -> int:
        return self.slots - 1 if self.seen < 0 else self.seen

    @property
    def used(self) -> int:
        return min(self.before + 1, self.slots)

    @property
    def slot(self) -> int:
        """Where a ring behind the sinks has the token."""
        return self.sinks + (self.before - self.sinks) % (self.slots - self.sinks)

    @property
    def turning(self) -> int:
        return self.d if self.rotary < 0 else self.rotary

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        draw = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device).to(dtype)

        b, h, d, turning = self.batch, self.kv_heads, self.d, self.turning
        if self.together:
            q, k, v = normal(b, h, 3, d).unbind(2)
        else:
            q, k, v = normal(b, self.heads, d), normal(b, h, d), normal(b, h, d)
        q = q.mul_(self.size)
        keys, values = normal(b, h, self.slots, d), normal(b, h, self.slots, d)
        keys[:, :, self.used :], values[:, :, self.used :] = float("nan"), float("nan")  # nobody may look there
        angles = norms = sinks = None
        if turning:
            # a step of transformers gives each text its own row
            turn = torch.rand(b, turning // 2, generator=draw, device=device) * 6.3
            turn = torch.cat((turn, turn), -1)
            kind = self.angles or self.dtype
            angles = turn.cos().to(kind), turn.sin().to(kind)
        if self.norm:
            norms = normal(d) * 0.2 + 1, normal(d) * 0.2 + 1
        if self.sinks:
            still = normal(b, h, self.sinks, turning, dtype=torch.float32)
            first, second = still.chunk(2, -1)
            turn = torch.rand(self.sinks, turning // 2, generator=draw, device=device) * 6.3
            turn = torch.cat((turn, turn), -1)
            sinks = op.Sinks(still, torch.cat((-second, first), -1), turn.cos(), turn.sin())
        slot, seen = (torch.tensor([n], device=device) for n in (self.slot, self.before))
        return Inputs(q, k, v, keys, values, slot, seen, angles, norms, sinks)

    def bind(self, inputs: Inputs, variant: str = "auto") -> Callable[[], Any]:
        *tensors, angles, norms, sinks = inputs
        return partial(
            op.decode_attention, *tensors, angles=angles, norms=norms, sinks=sinks, eps=EPS, settled=self.settled,
            variant=variant,
        )  # fmt: skip

    def run(self, inputs: Inputs, variant: str = "auto") -> Tensors:
        return (self.bind(inputs, variant)(),)

    def _prepared(self, inputs: Inputs, x: Tensor, weight: Tensor | None) -> Tensor:
        """float64 queries or keys, normed and rotated; by complex numbers."""
        y = x.double()
        if weight is not None:
            y = y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
        if inputs.angles is None:
            return y
        cos, sin = (a.double()[:, None, : self.turning // 2] for a in inputs.angles)
        first, second = y[..., : self.turning].chunk(2, -1)
        both = torch.complex(first, second) * torch.complex(cos, sin)
        return torch.cat((both.real, both.imag, y[..., self.turning :]), -1)

    def new_key(self, inputs: Inputs) -> Tensor:
        """float64 ``[B, Hkv, D]``: what is to be in the slot."""
        return self._prepared(inputs, inputs.k, None if inputs.norms is None else inputs.norms[1])

    def _rounded(self, exact: Tensor) -> tuple[Tensor, Tensor]:
        """What the kernel rounds, rounded; and by how much it may be another number, as fp32 has come near a tie."""
        near = 2.0**-20 * exact.abs().amax(-1, keepdim=True)
        low, high = (exact - near).to(self.dtype).double(), (exact + near).to(self.dtype).double()
        return exact.to(self.dtype).double(), high - low

    def _attended(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """float64 queries ``[B, Hkv, G, D]``, keys and values ``[B, Hkv, used, D]``; the doubt in queries and keys."""
        keys, values = inputs.keys[:, :, : self.used].double(), inputs.values[:, :, : self.used].double()
        doubt = torch.zeros_like(keys)
        if inputs.sinks is not None:
            still, _, cos, sin = inputs.sinks
            half = self.turning // 2
            first, second = still.double().chunk(2, -1)
            both = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, :half]
            now = (slice(None), slice(None), slice(self.sinks), slice(self.turning))
            keys[now], doubt[now] = self._rounded(torch.cat((both.real, both.imag), -1))
        keys[:, :, self.slot], doubt[:, :, self.slot] = self._rounded(self.new_key(inputs))
        values[:, :, self.slot] = inputs.v.double()
        q, in_q = self._rounded(self._prepared(inputs, inputs.q, None if inputs.norms is None else inputs.norms[0]))
        shape = (self.batch, self.kv_heads, self.heads // self.kv_heads, self.d)
        return q.view(shape), keys, values, in_q.view(shape), doubt

    def truth(self, inputs: Inputs) -> Tensors:
        """Of queries and keys rounded once, as the operation is defined."""
        q, keys, values, _, _ = self._attended(inputs)
        weights = (q @ keys.transpose(2, 3) * self.d**-0.5).softmax(-1)
        return ((weights @ values).view(self.batch, self.heads, self.d),)

    def rounding(self, inputs: Inputs) -> Tensor:
        """float64 ``[B, Hkv, D]``: how far the key in the slot may be from :meth:`new_key`.

        One rounding to the dtype, and fp32's part: rotation and norm are a few operations on what is no larger.
        """
        made = self.new_key(inputs)
        return ROUNDING[self.dtype] * made.abs() + 2.0**-20 * made.abs().amax(-1, keepdim=True) + TINY[self.dtype]

    def tolerance(self, inputs: Inputs, truth: Tensors) -> Tensors:
        """The absolute error each element may have.

        Queries and keys that may have been rounded the other way, and fp32 sums of D products, change a score by
        ``off`` at most, its weight by ``exp(2 off) - 1`` of itself, in numerator and total. A weight is rounded where
        it multiplies a value, relative or where it is subnormal; the power of two has 2 units in the last place of its
        own, and the rounding of a score that large.
        """
        q, keys, values, in_q, in_keys = self._attended(inputs)
        unit, tiny, scale = ROUNDING[self.dtype], TINY[self.dtype], self.d**-0.5
        across = keys.transpose(2, 3)
        size = (q.abs() @ across.abs()) * scale
        scores = q @ across * scale
        off = (in_q @ across.abs() + (q.abs() + in_q) @ in_keys.transpose(2, 3)) * scale
        off = off + size * (self.d + 32) * 2.0**-24 + scores.abs().amax(-1, keepdim=True) * 2.0**-21
        change = torch.expm1(2 * off) * 1.01 + unit + self.used * 2.0**-24 + 2.0**-20
        error = (scores.softmax(-1) * change) @ values.abs() + 2 * tiny * values.abs().sum(2, keepdim=True)
        error = error.view(self.batch, self.heads, self.d)
        return (error * (1 + unit) + unit * truth[0].abs() + tiny,)

    def spec(self, variant: str = "auto") -> cost.Spec:
        angles = self.dtype if not self.turning or self.angles is None else self.angles
        return cost.Spec(
            self.dtype, angles, self.d, self.heads // self.kv_heads, self.turning, self.norm, self.sinks,
            self.batch * self.kv_heads, cost.rounded(self.slots), True, variant,
        )  # fmt: skip

    def choice(self, hardware: Hardware | None, variant: str = "auto") -> Choice:
        return cost.choose(self.spec(variant), hardware)

    def sources(self, hardware: Hardware) -> list[Source]:
        spec = self.spec()
        return [
            op.source(spec, c) for c in cost.candidates(spec, hardware) if c.variant != "reference" and not c.refused
        ]

    @property
    def bytes(self) -> int:
        new = self.batch * (self.heads + 2 * self.kv_heads) * self.d
        cache = 2 * self.batch * self.kv_heads * (self.used + 1) * self.d
        return (new + self.batch * self.heads * self.d + cache) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.used * self.d


HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
_PYTHIA = {"heads": 32, "kv_heads": 32, "d": 80, "rotary": 20, "together": True}

BENCH: tuple[AttentionCase, ...] = (
    *(AttentionCase(slots=slots) for slots in (128, 640, 2048, 8192, 32768, 131072)),
    *(AttentionCase(batch) for batch in (8, 32, 64)),
    *(AttentionCase(batch, slots=640, **_PYTHIA) for batch in (1, 8, 32)),
    AttentionCase(heads=25, kv_heads=25, d=64, rotary=0),
    AttentionCase(heads=16, kv_heads=8, norm=True),
    AttentionCase(slots=1024, sinks=4, seen=5000),
)
"""What a GPU is measured on: the heads of Llama-3-8B, Pythia-2.8B, GPT-2 XL and Qwen3-0.6B, and a streaming cache."""

SMALL: tuple[AttentionCase, ...] = (
    AttentionCase(1, 4, 2, 16, 64, FLOAT),
    AttentionCase(2, 4, 4, 32, 64, FLOAT, rotary=8),
)
"""What a CPU can run in a moment."""

GATE: tuple[AttentionCase, ...] = (
    *(AttentionCase(batch, dtype=d) for batch in (1, 8, 64) for d in (HALF, BRAIN)),
    *(AttentionCase(batch, slots=32768) for batch in (1, 8)),
    *(AttentionCase(batch, dtype=d, **_PYTHIA) for batch in (1, 8, 64) for d in (HALF, BRAIN)),
    *(AttentionCase(batch, 25, 25, 64, rotary=0) for batch in (1, 8)),
    *(AttentionCase(batch, 16, 8, norm=True, angles=a) for batch in (1, 8) for a in (None, FLOAT)),
    *(AttentionCase(1, 8 * group, 8, 128) for group in (1, 7, 8, 16)),
    *(AttentionCase(1, 8 * group, 8, d) for group, d in ((7, 64), (1, 96))),
    *(AttentionCase(batch, 8 * group, 8, 256, norm=True) for group in (1, 2, 8) for batch in (1, 8)),
    *(AttentionCase(batch, slots=1024, sinks=4, dtype=BRAIN) for batch in (1, 8)),
    AttentionCase(1, 64, 8, 256, 1024, sinks=4, norm=True),
    AttentionCase(1, 32, 32, 80, 1024, sinks=4, rotary=20),
    *(AttentionCase(3, 6, 2, d, 100) for d in (8, 24, 40, 72, 88, 104, 120, 200)),
)  # fmt: skip
"""What the compile gate builds: heads of real models with few and many texts, and every width of a last access."""


def parse(shape: dict[str, int], dtype: torch.dtype, **options: Any) -> AttentionCase:
    """The case for a shape such as ``{"batch": 1, "slots": 2048}``; options are the fields of :class:`AttentionCase`.

    Raises:
        ValueError: a dimension is missing or unknown.
    """
    defaults = {"batch": 1, "heads": 32, "kv_heads": 8, "d": 128, "slots": 640}
    batch, heads, kv_heads, d, slots = take("decode_attention", shape, defaults)
    for name, size in (("kv_heads", kv_heads), ("d", d), ("slots", slots)):
        if size < 1:
            raise wrong_value("decode_attention", name, "a positive number", size)
    if heads < 1 or heads % kv_heads:
        raise wrong_value("decode_attention", "heads", f"a multiple of kv_heads = {kv_heads}", heads)
    return AttentionCase(batch, heads, kv_heads, d, slots, dtype, **options)


def gate(hardware: Hardware = H200) -> list[Source]:
    """Every specialisation the compile gate builds for a GPU, without repeats."""
    return list(dict.fromkeys(source for case in GATE for source in case.sources(hardware)))
