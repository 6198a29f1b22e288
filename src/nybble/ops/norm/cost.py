"""Which form of the norm kernel runs: a row kept in registers by one block, or read again in each pass."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.choice import choose as pick
from nybble.runtime.hardware import Hardware

MAX_KEPT = 32
"""Values a thread keeps: 32 of its 64 registers at 1024 threads, as measured by the compile gate (no spills)."""
THREADS, MANY_THREADS, MANY = 512, 128, 1 << 21
"""Threads a row, and how many once there are MANY elements and the row is fp32 or a residual is added after the norm:
smaller blocks overlap one row's reading with another's writing. layernorm_residual, 16384 x 4096: 112 us beside 144;
fp32 add_layernorm, 4096 x 2560: 42.5 beside 47.4. The other functions in 16 bits are even or slower that way."""
EARLY_ROWS = 128
"""Up to as many rows the weights are asked for together with the row: it saves 0.1 to 0.4 us of 2.4 to 3.3 at 1 to 128
rows of 2560; from 256 rows on it is even or slower, at worst 6.4 us beside 5.3 (add_dual_layernorm, 512 rows)."""
LAUNCH_US = 2.2
"""A call with one row as a node of a CUDA graph: 2.0 to 2.6 us on an H200 (results/h200/norm.jsonl)."""


class Spec(NamedTuple):
    """All that affects compilation or choice.

    Attributes:
        function: public function name.
        dtype: of every tensor.
        hidden: row length.
        bias: a bias is given (for both norms of the dual form).
        aligned: every pointer and the row length allow 16-byte accesses.
        rows: rounded up to a power of two; the exact number is a launch argument.
        variant: ``"auto"`` or a name.
    """

    function: str
    dtype: torch.dtype
    hidden: int
    bias: bool
    aligned: bool
    rows: int
    variant: str


class Form(NamedTuple):
    """What a public function asks of the kernel."""

    addends: int
    norms: int
    rms: bool
    after: bool
    store_sum: bool


FORMS: dict[str, Form] = {
    "layernorm": Form(1, 1, False, False, False),
    "rmsnorm": Form(1, 1, True, False, False),
    "layernorm_residual": Form(1, 1, False, True, False),
    "add_layernorm": Form(2, 1, False, False, True),
    "add_rmsnorm": Form(2, 1, True, False, True),
    "add_dual_layernorm": Form(3, 2, False, False, True),
}


def passes(function: str) -> int:
    """Tensors of ``[rows, hidden]`` that cross memory: inputs read once, outputs written once."""
    form = FORMS[function]
    return form.addends + form.after + form.norms + form.store_sum


def vector(spec: Spec) -> int:
    """Elements of one access: 16 bytes where pointers and row length allow it, else one element."""
    full = 16 // spec.dtype.itemsize
    return full if spec.aligned and spec.hidden % full == 0 else 1


def candidates(spec: Spec, hardware: Hardware | None) -> list[Candidate]:
    """Every variant for this request, predicted or refused. ``hardware`` is ``None`` on a CPU."""
    read = (hardware.read_tbps or 1.0) if hardware else 0.02
    tensor_us = spec.rows * spec.hidden * spec.dtype.itemsize / (read * 1e6)
    # About a dozen kernels, each reading and writing the row in fp32.
    reference_us = 12 * (LAUNCH_US + 2 * tensor_us * 4 / spec.dtype.itemsize)
    reference = Candidate("reference", (), reference_us, "PyTorch, about a dozen kernels; what runs on a CPU")
    if hardware is None:
        refused = Candidate("cuda", (), None, "no CUDA device", refused=True)
        return [refused, reference]
    if hardware.capability < (8, 0):
        reason = f"needs compute capability 8.0, this GPU has {'.'.join(map(str, hardware.capability))}"
        return [Candidate("cuda", (), None, reason, refused=True), reference]
    width = vector(spec)
    vectors = spec.hidden // width
    many = spec.rows * spec.hidden >= MANY and spec.hidden <= MANY_THREADS * MAX_KEPT
    narrow = many and (FORMS[spec.function].after or spec.dtype == torch.float32)
    threads = min(MANY_THREADS if narrow else THREADS, -(-vectors // 32) * 32)
    if -(-vectors // threads) * width > MAX_KEPT:
        threads = 1024
    kept = -(-vectors // threads) * width
    keep = kept <= MAX_KEPT
    traffic = passes(spec.function) if keep else passes(spec.function) + 2 * FORMS[spec.function].addends
    us = LAUNCH_US + traffic * tensor_us
    reason = f"{threads} threads a row, {width * spec.dtype.itemsize}-byte accesses, " + (
        f"{kept} values a thread in registers" if keep else "the row is read three times: too wide for registers"
    )
    early = keep and -(-vectors // threads) <= 2 and spec.rows <= EARLY_ROWS
    config = (("VEC", width), ("THREADS", threads), ("KEEP", keep), ("EARLY", early))
    return [Candidate("cuda", config, us, reason), reference]


def choose(spec: Spec, hardware: Hardware | None) -> Choice:
    """The variant for this request; pure, so it is the same printed anywhere.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    return pick(spec.function, candidates(spec, hardware), spec.variant)
