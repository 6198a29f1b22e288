"""Which way a Q4_0 weight is multiplied, and with which tile.

The times of ``q4_0.cu`` are estimates: bytes over bandwidth, and instructions of the inner loop, counted in the
compiled kernel. Those of the 4-bit linear are its own model's, which is fitted to measurements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nybble.formats.gguf_q4_0 import BLOCK
from nybble.ops.w4a16 import cost as linear
from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.choice import choose as pick
from nybble.runtime.hardware import Hardware

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
START: tuple[tuple[int, float], ...] = ((1, 1.9), (2, 2.1), (4, 2.5), (8, 3.2), (16, 3.6), (1 << 30, 4.4))
"""us of a call besides its work, up to so many rows: what the 4-bit linear's kernel of the same shape takes."""
STREAM = 1.12
"""How many times longer than a plain read the weights take."""
CLOCK = 0.9e3
"""Cycles a us that the inner loop gets done, counted by issue slots: of 1.7e3, as measured on an H200."""
QUANTIZE_US = 1.3
"""The kernel that quantises the activations, in a chain, for few rows."""
CAST_US = 5.0
"""The kernel that turns the 4-bit linear's fp32 result into the other 16-bit dtype, for few rows."""


class Form(NamedTuple):
    """A tile of ``q4_0.cu``, its constants' names in lower case."""

    tile_m: int
    teams: int
    strips: int
    slices: int
    cluster: int
    ahead: int
    sum_rows: int
    buffers: int
    blocks: int = 1

    @property
    def warps(self) -> int:
        """That compute; one more asks for the weights."""
        return self.teams * 4 // self.strips * self.slices

    @property
    def features(self) -> int:
        """Output features of a job."""
        return 64 * self.teams


ONCE = (Form(8, 1, 1, 3, 2, 4, 8, 2), Form(16, 1, 1, 3, 2, 4, 16, 2))
"""For at most as many features as pairs of SMs have jobs of 64 of them."""
FORMS = (
    Form(8, 1, 1, 2, 2, 3, 8, 2, 3),
    Form(8, 1, 1, 4, 2, 4, 8, 2),
    Form(8, 1, 1, 4, 4, 4, 8, 2),
    Form(8, 2, 1, 2, 8, 4, 8, 2),
    Form(16, 1, 1, 4, 2, 4, 16, 2),
    Form(16, 1, 1, 4, 4, 4, 16, 2),
    Form(16, 2, 1, 2, 8, 4, 16, 2),
    Form(32, 1, 2, 4, 2, 4, 16, 2),
    Form(32, 2, 2, 2, 2, 4, 16, 2),
    Form(32, 4, 2, 1, 2, 4, 16, 2),
    Form(32, 1, 2, 4, 4, 4, 16, 1),
    Form(32, 2, 2, 2, 8, 3, 16, 1),
    Form(64, 1, 1, 2, 2, 4, 16, 2),
    Form(64, 2, 1, 1, 2, 4, 16, 2),
)
"""What is compared. Clusters of two wherever x fits: 66 of them run at once, of four 30 and of eight 15. More warps, or
64 rows with two strips a warp, would spill registers."""
AT_ONCE = {1: 132, 2: 66, 4: 30, 8: 15}


class Spec(NamedTuple):
    """All that affects compilation or choice.

    Attributes:
        m: rows, rounded up to a power of two; the exact number is a launch argument.
        n, k: output and input features.
        dtype: of x; ``torch.uint8`` for blocks of Q8_1.
        out_dtype: of y.
        variant: ``"auto"`` or a name.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    variant: str = "auto"


def shared_bytes(form: Form, k: int) -> int:
    """Shared memory of a block of ``q4_0.cu``."""
    units = math.ceil(math.ceil(k / 64) / (2 * form.cluster))
    x = 2 * units * form.tile_m * 72
    stage = form.teams * form.slices * (4096 + 512)
    sums = form.cluster * form.slices * (4 * form.teams // form.cluster) * (form.sum_rows // 8) * 512
    return x + form.ahead * stage + form.buffers * sums + (2 * form.ahead + 2 * form.buffers) * 8


def constants(form: Form, k: int) -> dict[str, int]:
    """The compile-time constants of a form."""
    return {name.upper(): value for name, value in form._asdict().items()} | {"SHARED": shared_bytes(form, k)}


def refused(form: Form, k: int, hardware: Hardware) -> str:
    """Why this GPU can't run a form for ``k`` input features, or ``""``."""
    need, room = shared_bytes(form, k), hardware.shared_bytes // form.blocks - 1024 * (form.blocks > 1)
    if need <= room:
        return ""
    return f"{form.tile_m} rows of {k} features need {need} bytes of shared memory a block, this GPU has {room} for it"


def forms(spec: Spec, hardware: Hardware) -> list[tuple[float, Form]] | str:
    """The predicted us of the product in every form that can run it, the fastest first; or why none can. For a float x
    quantising inside the kernel is part of it."""
    if hardware.capability != (9, 0):
        return "needs the copies and clusters of compute capability 9.0"
    if spec.k <= BLOCK:
        return f"needs more than one block of {BLOCK} input features"
    tiles = {8} if spec.m <= 8 else {16} if spec.m <= 16 else {32} if spec.m <= 32 else {32, 64}
    once = math.ceil(spec.n / 64) <= AT_ONCE[2]
    wanted = [form for form in (*(ONCE if once else ()), *FORMS) if form.tile_m in tiles]
    able = [form for form in wanted if not refused(form, spec.k, hardware)]
    if not able:
        least = min(wanted, key=lambda form: shared_bytes(form, spec.k))
        return refused(least, spec.k, hardware)
    return sorted(((_us(spec, form, hardware), form) for form in able), key=lambda found: found[0])


def _us(spec: Spec, form: Form, hardware: Hardware) -> float:
    chunks, rows = math.ceil(spec.k / 64), math.ceil(spec.m / form.tile_m)
    jobs = rows * math.ceil(spec.n / form.features)
    at_once = AT_ONCE[form.cluster] * form.blocks * hardware.sms // 132
    turns = math.ceil(jobs / min(jobs, at_once))
    blocks_m = form.tile_m // 8
    units = math.ceil(chunks / form.cluster / 2 / form.slices) * 2  # chunks of a warp in a job
    # Of a chunk, by the compiled loop: instructions of a scheduler, and cycles of shared memory, whichever are more.
    issue = math.ceil(form.warps / 4) * (20 * form.strips + blocks_m * (6 + 18 * form.strips))
    shared = form.warps * (5 * form.strips + 7 * blocks_m)
    work = turns * form.blocks * (units * max(issue, shared) + 300 * form.tile_m // form.sum_rows) / CLOCK
    read = spec.n * spec.k * (0.5 + 2 / BLOCK) / ((hardware.read_tbps or 1.0) * 1e6)
    elements = form.tile_m * math.ceil(chunks / form.cluster) * 64 * math.ceil(turns / math.ceil(jobs / rows))
    brought = elements * (8 if spec.dtype != torch.uint8 else 2) / 128 / CLOCK * form.blocks
    start = next(us for upto, us in START if spec.m <= upto)
    waste = max(1.0, turns * at_once / jobs / 1.03) if turns > 1 else 1.0  # of the last turn, when it is not full
    return start + brought + max(STREAM * read * waste * linear.WIDE.get(form.cluster, 1.0), work)


def _quantize_us(spec: Spec, hardware: Hardware) -> float:
    return QUANTIZE_US + spec.m * spec.k * (spec.dtype.itemsize + 1.125) / ((hardware.read_tbps or 1.0) * 0.6e6)


def candidates(spec: Spec, hardware: Hardware | None) -> list[Candidate]:
    """Every way for this request, predicted or refused. ``hardware`` is ``None`` on a CPU."""
    read, single = ((hardware.read_tbps or 1.0), 50.0) if hardware else (0.02, 0.1)
    us = 200.0 + 20 * spec.n * spec.k / (read * 1e6) + 4 * spec.m * spec.n * spec.k / (single * 1e6)
    reference = Candidate("reference", (), us, "PyTorch: quantise, then a product a block of 32")
    if hardware is None:
        names = ("fused", "separate", "w4a16")
        return [*(Candidate(name, (), None, "no CUDA device", refused=True) for name in names), reference]
    found = [_product(spec, hardware, "fused"), _product(spec, hardware, "separate"), _linear(spec, hardware)]
    return [*found, reference]


def _product(spec: Spec, hardware: Hardware, variant: str) -> Candidate:
    given = spec.dtype == torch.uint8
    if variant == "fused" and given:
        return Candidate(variant, (), None, "the activations are quantised already", refused=True)
    inner = spec._replace(dtype=torch.uint8) if variant == "separate" else spec
    found = forms(inner, hardware)
    if isinstance(found, str):
        return Candidate(variant, (), None, found, refused=True)
    us, form = found[0]
    parts = form.cluster * form.slices
    reason = f"{form.tile_m} rows x {form.features} features a tile, K in {parts} parts"
    if variant == "separate" and not given:
        us, reason = us + _quantize_us(spec, hardware), f"quantise, then {reason}"
    return Candidate(variant, tuple(constants(form, spec.k).items()), us, reason)


def _linear(spec: Spec, hardware: Hardware) -> Candidate:
    if spec.dtype not in linear.HALF:
        got = "blocks of Q8_1" if spec.dtype == torch.uint8 else spec.dtype
        return Candidate("w4a16", (), None, f"needs float16 or bfloat16 activations, got {got}", refused=True)
    inner = linear.choose(linear_spec(spec), hardware).pick
    us, reason = inner.us or 0.0, f"the 4-bit linear's {inner.variant}, x not quantised"
    if spec.out_dtype not in (spec.dtype, torch.float32):
        us += CAST_US + spec.m * spec.n * (4 + spec.out_dtype.itemsize) / ((hardware.read_tbps or 1.0) * 1e6)
        reason += ", result converted"
    return Candidate("w4a16", (), us, reason)


def linear_spec(spec: Spec) -> linear.Spec:
    """The 4-bit linear's request for the same product."""
    out = None if spec.out_dtype == spec.dtype else torch.float32
    return linear.Spec(
        spec.m, spec.n, spec.k, BLOCK, spec.dtype, torch.float16,
        zeros=False, perm=False, bias=False, variant="auto", out_dtype=out,
    )  # fmt: skip


def choose(spec: Spec, hardware: Hardware | None) -> Choice:
    """The way for this request; pure, so it is the same printed anywhere.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    return pick("q4_0_linear", candidates(spec, hardware), spec.variant)
