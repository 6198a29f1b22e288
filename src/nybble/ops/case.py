"""A case: one request of an operation with seeded inputs, its truth and its floor. Tests, benches and the compile
gate all draw their inputs from here, so what is timed is what was checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from nybble.runtime.choice import Choice
from nybble.runtime.errors import wrong_value
from nybble.runtime.hardware import Hardware

Tensors = tuple[torch.Tensor, ...]

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place, relative: what one rounding may change."""


class Case(ABC):
    """Subclasses are frozen dataclasses holding the numbers of one request.

    ``inputs`` is whatever ``make`` returns; everything but ``make`` treats it as read-only.
    """

    op: ClassVar[str]
    """The operation's folder name: ``"norm"``, ``"w4a16"``."""

    function: str
    """The public function, such as ``"add_layernorm"``."""

    dtype: torch.dtype

    @abstractmethod
    def shape(self) -> dict[str, int]:
        """The operation's dimensions by name, as results are keyed."""

    peer_error: ClassVar[float | None] = None
    """The relative error a peer may have; where ``None``, that of the dtype."""

    def readable(self, results: Tensors) -> Tensors:
        """The results as numbers to compare with :meth:`truth`, where they are packed; never timed."""
        return results

    def result_dtypes(self, count: int) -> tuple[torch.dtype, ...]:
        """Of readable results."""
        return (self.dtype,) * count

    @abstractmethod
    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> Any:
        """Fresh inputs, the same for a seed and a kind of device."""

    @abstractmethod
    def run(self, inputs: Any, variant: str = "auto") -> Tensors:
        """The public function on these inputs."""

    @abstractmethod
    def bind(self, inputs: Any, variant: str = "auto") -> Callable[[], Any]:
        """The public function with these arguments and nothing around it: what host time is measured on."""

    @abstractmethod
    def truth(self, inputs: Any) -> Tensors:
        """The result in float64, on the inputs' device, by arithmetic that shares no code with the kernels."""

    @abstractmethod
    def tolerance(self, inputs: Any, truth: Tensors) -> Tensors:
        """The absolute error each element of the result may have, from the arithmetic of the kernel."""

    @abstractmethod
    def choice(self, hardware: Hardware | None, variant: str = "auto") -> Choice:
        """What would run on this hardware, and why."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Fewest bytes that must cross device memory: every input read once, every output written once."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """Matrix operations that must be done (0 where none count)."""

    def floor_us(self, hardware: Hardware) -> float:
        """The time below which no version runs: the larger of bytes over bandwidth and flops over the fp16 rate."""
        memory = self.bytes / (hardware.read_tbps * 1e6) if hardware.read_tbps else 0.0
        maths = self.flops / (hardware.half_tflops * 1e6) if hardware.half_tflops else 0.0
        return max(memory, maths)


def relative_error(got: Tensors, truth: Tensors) -> float:
    """``|got - truth| / |truth|`` in the 2-norm, over all outputs together."""
    difference = sum(float((g.double() - t.double()).square().sum()) for g, t in zip(got, truth, strict=True))
    scale = sum(float(t.double().square().sum()) for t in truth)
    return (difference / scale) ** 0.5 if scale else difference**0.5


def take(operation: str, shape: dict[str, int], defaults: dict[str, int]) -> list[int]:
    """The dimensions of ``shape`` in the order of ``defaults``, which fill in what is missing.

    Raises:
        ValueError: a dimension the operation does not have, or one below 0.
    """
    for name, value in shape.items():
        if name not in defaults:
            raise wrong_value(operation, "shape", f"dimensions {list(defaults)}", repr(name))
        if value < 0 and (name, value) != ("group_size", -1):
            raise wrong_value(operation, name, "a number >= 0", value)
    return [shape.get(name, default) for name, default in defaults.items()]
