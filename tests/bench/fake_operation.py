"""A tiny operation with providers that are right, wrong, missing and failing, for the harness to be tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from nybble.bench.peers import Inapplicable, Peer
from nybble.bench.timing import Call
from nybble.ops.case import Case, Tensors
from nybble.runtime.choice import Candidate, Choice, choose
from nybble.runtime.hardware import Hardware


@dataclass(frozen=True)
class FakeCase(Case):
    """``y = 2 x``; ``off`` is added by Nybble's own kernel, which is then wrong."""

    n: int = 8
    dtype: torch.dtype = torch.float32
    off: float = 0.0
    twice: bool = False
    function: str = "double"
    op: ClassVar[str] = "fake"

    def shape(self) -> dict[str, int]:
        return {"n": self.n}

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(self.n, generator=draw).to(device, self.dtype)}

    def run(self, inputs: dict[str, torch.Tensor], variant: str = "auto") -> Tensors:
        return (2 * inputs["x"] + self.off,)

    def bind(self, inputs: dict[str, torch.Tensor], variant: str = "auto") -> Callable[[], Any]:
        return partial(self.run, inputs, variant)

    def truth(self, inputs: dict[str, torch.Tensor]) -> Tensors:
        return (2 * inputs["x"].double(),)

    def tolerance(self, inputs: dict[str, torch.Tensor], truth: Tensors) -> Tensors:
        return (1e-6 * truth[0].abs() + 1e-6,)

    def choice(self, hardware: Hardware | None, variant: str = "auto") -> Choice:
        kernel = Candidate("cuda", (), 1.0, "fast", refused=hardware is None)
        other = Candidate("tiled", (("TILE", 8),), 2.0, "slower", refused=hardware is None)
        return choose("double", [kernel, other, Candidate("reference", (), 9.0, "the oracle")], variant)

    @property
    def bytes(self) -> int:
        return 2 * self.n * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 0


def _right(case: Case, inputs: Any) -> Call:
    return Call(lambda x: x + x, (inputs["x"],))


def _wrong(case: Case, inputs: Any) -> Call:
    return Call(lambda x: 2 * x + 0.5, (inputs["x"],))


def _nan(case: Case, inputs: Any) -> Call:
    return Call(lambda x: x * float("nan"), (inputs["x"],))


def _misshapen(case: Case, inputs: Any) -> Call:
    return Call(lambda x: (2 * x)[:1], (inputs["x"],))


def _raises(case: Case, inputs: Any) -> Call:
    raise RuntimeError("its interface changed\nand here is a long story")


def _raises_later(case: Case, inputs: Any) -> Call:
    def call(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    return Call(call, (inputs["x"],))


def _inapplicable(case: Case, inputs: Any) -> Call:
    raise Inapplicable("doubles only halves")


RIGHT = Peer("right", "add", "torch", _right)
WRONG = Peer("wrong", "off", "torch", _wrong)
NAN = Peer("nan", "nan", "torch", _nan)
MISSHAPEN = Peer("misshapen", "short", "torch", _misshapen)
RAISES = Peer("raises", "build", "torch", _raises)
RAISES_LATER = Peer("raises", "call", "torch", _raises_later)
INAPPLICABLE = Peer("picky", "halves", "torch", _inapplicable)
MISSING = Peer("missing", "any", "no_such_package_anywhere", _right)
