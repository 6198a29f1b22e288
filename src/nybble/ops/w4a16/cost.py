"""Which variant of the 4-bit linear runs, and with which tile."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.choice import choose as pick
from nybble.runtime.hardware import Hardware

HALF = (torch.float16, torch.bfloat16)
TILES: tuple[tuple[int, int, float], ...] = ((8, 8, 1.0), (16, 4, 1.3), (32, 2, 1.7), (64, 2, 3.3))
"""(TILE_M, SLICES, time of a pass over the weights, that of the first being 1) of mma.cu. More slices keep more weights
in flight, fewer leave registers for more rows: at TILE_M 16, or with act-order's gather, eight slices (64 registers a
thread) spill, four do not; at TILE_M 32 and group_size 32 four (128 registers) spill, two do not."""
LAUNCH_US, STREAM, MATHS = 5.5, 2.45, 0.24
"""Fitted to results/h200/w4a16.jsonl: start and end of a call in us; how many times longer than a plain read the
weights take; the part of the fp16 rate that many rows reach."""
AROUND_US = 3.0
"""Start and end of a kernel of the composition; a guess."""


class Spec(NamedTuple):
    """All that affects compilation or choice.

    Attributes:
        m: rows, rounded up to a power of two; the exact number is a launch argument.
        n, k: output and input features.
        group_size: as :class:`nybble.PackedWeight` holds it.
        dtype: of x and y. scale_dtype: of the scales.
        zeros, perm, bias: whether there are zero points other than 8, an act-order permutation, a bias.
        variant: ``"auto"`` or a name.
        norm: ``"layernorm"`` or ``"rmsnorm"`` of x before the product. norm_bias: whether it has a bias.
        activation: ``"gelu"``, ``"gelu_tanh"`` or ``"silu_mul"`` after the product.
        residual: whether one is added last.
        splits: the output features at which a second and a third plane of the result begin; none for one plane.
    """

    m: int
    n: int
    k: int
    group_size: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    zeros: bool
    perm: bool
    bias: bool
    variant: str
    norm: str = ""
    activation: str = ""
    residual: bool = False
    norm_bias: bool = False
    splits: tuple[int, ...] = ()

    @property
    def around(self) -> int:
        """Kernels that a composition runs besides the product: norm, activation, residual, a copy a plane."""
        epilogue = {"": 0, "silu_mul": 2}.get(self.activation, 1)
        return bool(self.norm) + epilogue + self.residual + 3 * bool(self.splits)


def candidates(spec: Spec, hardware: Hardware | None) -> list[Candidate]:
    """Every variant for this request, predicted or refused. ``hardware`` is ``None`` on a CPU."""
    weight_bytes = spec.n * spec.k // 2
    flops = 2 * spec.m * spec.n * spec.k
    # Dequantising writes and reads fp32, about 20 bytes a weight in all; the product is fp32 on CUDA cores.
    read, single = ((hardware.read_tbps or 1.0), 50.0) if hardware else (0.02, 0.1)
    us = 40.0 + 40 * weight_bytes / (read * 1e6) + flops / (single * 1e6)
    reference = Candidate("reference", (), us, "PyTorch: dequantise, then multiply in fp32")
    reason = ""
    if hardware is None:
        reason = "no CUDA device"
    elif hardware.capability < (8, 0):
        reason = f"needs compute capability 8.0, this GPU has {'.'.join(map(str, hardware.capability))}"
    elif spec.dtype not in HALF:
        reason = f"needs float16 or bfloat16 activations, got {spec.dtype}"
    if reason or hardware is None:
        names = ("mma", "composed") if spec.around else ("mma",)
        return [*(Candidate(name, (), None, reason, refused=True) for name in names), reference]
    tile, slices, slower = next((t for t in TILES if spec.m <= t[0]), TILES[-1])
    slices = min(slices, 4) if spec.perm else slices
    memory = STREAM * slower * weight_bytes / (read * 1e6)
    maths = flops / ((hardware.half_tflops or 300.0) * MATHS * 1e6)
    reason = f"{tile} rows x 64 features a block, {slices} slices along K"
    config = (("TILE_M", tile), ("SLICES", slices))
    mma = Candidate("mma", config, LAUNCH_US + max(memory, maths), reason)
    if not spec.around:
        return [mma, reference]
    # Each kernel around the product starts, and moves about one tensor in and one out.
    moved = 2 * spec.m * max(spec.n, spec.k) * spec.dtype.itemsize / (read * 1e6)
    us = LAUNCH_US + max(memory, maths) + spec.around * (AROUND_US + moved)
    reason = f"the product alone and {spec.around} kernels around it"
    refused = Candidate("mma", (), None, "no prologue or epilogue; composed instead", refused=True)
    return [refused, Candidate("composed", (), us, reason), reference]


def choose(spec: Spec, hardware: Hardware | None) -> Choice:
    """The variant for this request; pure, so it is the same printed anywhere.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    return pick("w4a16_linear", candidates(spec, hardware), spec.variant)
