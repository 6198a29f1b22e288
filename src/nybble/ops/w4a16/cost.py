"""Which variant of the 4-bit linear runs, and with which tile."""

from __future__ import annotations

import math
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


def stream_shape(spec: Spec, hardware: Hardware) -> dict[str, int] | str:
    """The constants of ``stream.cu`` for a request, or why it can't run it."""
    if spec.m > 64:
        return "for at most 64 rows"
    if spec.activation == "silu_mul" and spec.n % 32:
        return f"silu_mul pairs strips of 16 features, so N must be a multiple of 32, not {spec.n}"
    few, chunks, pairs = spec.m <= 8, math.ceil(spec.k / 64), spec.activation == "silu_mul"
    hopper = hardware.capability >= (9, 0)
    # Registers of a strip's 64 features on their way: the weights, and scales and zero points of its groups.
    groups = 64 // min(64, spec.group_size)
    warps_n, strips, slices = (1, 2, 8) if few else (8, 1 if spec.m == 64 and groups > 1 and not pairs else 2, 1)
    chunk = 4 + groups * (max(1, spec.scale_dtype.itemsize // 2) + spec.zeros)
    clusters = (1, 2, 4, 8) if hopper else (1,)
    # Few rows: the fewest blocks that hold all of x in half the shared memory, so that two are on an SM. More: as many
    # as measured best, 8 up to 16 rows and 4 beyond.
    budget, shared = (hardware.shared_bytes - 4096) // (2 if few else 1), 0
    for cluster in clusters if few else (c for c in clusters if c >= min(8 if spec.m <= 16 else 4, clusters[-1])):
        reach = math.ceil(chunks / cluster)
        for buffers in (2, 1):
            x_bytes = math.ceil(spec.m * (reach * 64 + 8) * 2 / 16) * 16
            statistics = math.ceil(spec.m * 12 / 16) * 16 if spec.norm else 0
            sums = buffers * slices * spec.m * (16 * strips * warps_n + 4) * 4
            shared = x_bytes + 128 + statistics + sums
            if shared <= budget:
                rounds = math.ceil(reach / slices)
                ahead = 2
                if few:  # more spills at 128 registers; all of a tile's at once needs no pointers to go on with
                    once = rounds <= 8 and chunk == 5 and hopper and "gelu" not in spec.activation
                    ahead = 8 if once else (64 if chunk == 5 else 48 if groups <= 2 else 24) // (2 * chunk)
                return {
                    "TILE_M": spec.m, "WARPS_N": warps_n, "STRIPS": strips, "SLICES": slices, "CLUSTER": cluster,
                    "AHEAD": max(1, min(ahead, rounds)), "BUFFERS": buffers, "BLOCKS": 2 if few else 1,
                    "SHARED": shared,
                }  # fmt: skip
    return (
        f"{spec.m} rows of {spec.k} features need {shared} bytes of shared memory a block, this GPU has {budget} for it"
    )


def _stream(spec: Spec, hardware: Hardware) -> Candidate:
    config = stream_shape(spec, hardware)
    if isinstance(config, str):
        return Candidate("stream", (), None, config, refused=True)
    features = 16 * config["STRIPS"] * config["WARPS_N"]
    reason = f"{config['TILE_M']} rows x {features} features a tile, K in {config['CLUSTER'] * config['SLICES']} parts"
    return Candidate("stream", tuple(config.items()), None, f"{reason}; no rows yet to predict from, so never chosen")


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
        names = ("mma", "stream", "composed") if spec.around else ("mma", "stream")
        return [*(Candidate(name, (), None, reason, refused=True) for name in names), reference]
    tile, slices, slower = next((t for t in TILES if spec.m <= t[0]), TILES[-1])
    slices = min(slices, 4) if spec.perm else slices
    memory = STREAM * slower * weight_bytes / (read * 1e6)
    maths = flops / ((hardware.half_tflops or 300.0) * MATHS * 1e6)
    reason = f"{tile} rows x 64 features a block, {slices} slices along K"
    config = (("TILE_M", tile), ("SLICES", slices))
    mma = Candidate("mma", config, LAUNCH_US + max(memory, maths), reason)
    if not spec.around:
        return [mma, _stream(spec, hardware), reference]
    # Each kernel around the product starts, and moves about one tensor in and one out.
    moved = 2 * spec.m * max(spec.n, spec.k) * spec.dtype.itemsize / (read * 1e6)
    us = LAUNCH_US + max(memory, maths) + spec.around * (AROUND_US + moved)
    reason = f"the product alone and {spec.around} kernels around it"
    refused = Candidate("mma", (), None, "no prologue or epilogue; composed instead", refused=True)
    return [refused, _stream(spec, hardware), Candidate("composed", (), us, reason), reference]


def choose(spec: Spec, hardware: Hardware | None) -> Choice:
    """The variant for this request; pure, so it is the same printed anywhere.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    return pick("w4a16_linear", candidates(spec, hardware), spec.variant)
