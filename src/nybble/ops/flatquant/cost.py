"""Which FlatQuant kernel runs and in which form: columns a warp, tokens a block, and what fits in shared memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.choice import choose as pick
from nybble.runtime.hardware import Hardware

WARPS = 8
"""Of a block, at 255 registers each."""
LEAST = 136
"""Registers of a thread, however few columns its warp has: 130 with 16 columns of 64 rows."""
WIDEST = {2: 128, 4: 64}
"""Accumulators of Y a thread, by the bytes of an element of x. Beside them are those of T: half as many registers when
rounded to 16 bits, as many in fp32."""
ONE_US, KILOBYTE_US, MANY_US = 1.0, 0.07, 4.0
"""A call of ``mma.cu``: with at most a token a multiprocessor, and each kilobyte of a token and of both transforms
besides, which one multiprocessor reads; and with more. Here and below: fitted to 64 x 64 to 128 x 224 on an H200."""
MMA_RATE = 0.43
"""The part of the tensor cores' fp16 rate that it reaches."""
WGMMA_US, TURNED_US, WGMMA_KILOBYTE_US = 1.5, 1.7, 0.065
"""A call of ``wgmma.cu`` and of ``turned.cu``, and each kilobyte of the transforms besides."""
WGMMA_RATE, ALONE_RATE, TURNED_RATE, MEMORY_RATE = 0.82, 0.71, 0.74, 0.9
"""The part of the fp16 rate that they reach, padding being flops; the second where a multiprocessor has one token at a
time; and of the memory's bandwidth."""
CLIP_US = {"mma": 0.21, "wgmma": 0.11}
"""Rounding and packing a million values for each further clip ratio; with many tokens in flight loads hide half."""
FEW_US, FEW_KILOBYTE_US, FEW_ROW_US, FEW_MORE_US = 1.15, 0.04, 0.0055, 0.00035
"""A call of ``few.cu``; each kilobyte that a block reads; with 32 columns a block, each row; and each kilobyte of all
blocks."""


class Spec(NamedTuple):
    """All that affects compilation or choice.

    Attributes:
        dtype: of x and of both transforms.
        m, n: sizes of the transforms. tokens: rounded up to a power of two.
        packed: eight values a word. offset: words of ``q + 8``.
        clips: how many clip ratios. clamp: whether one of them is below 1.
        aligned: rows of x begin at multiples of 16 bytes. variant: ``"auto"`` or a name.
    """

    dtype: torch.dtype
    m: int
    n: int
    tokens: int
    packed: bool
    offset: bool
    clips: int
    clamp: bool
    aligned: bool
    variant: str


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


def _bytes(spec: Spec, nw: int, parts: int, groups: int, warps: int, buffers: int, resident: bool, staged: bool) -> int:
    """Of shared memory, as ``mma.cu`` adds them up."""
    size, wide = spec.dtype.itemsize, spec.dtype == torch.float32
    mp, nk, nc = _up(spec.m, 16), _up(spec.n, 16), _up(spec.n, nw)
    mc = parts * math.ceil(mp // 16 / parts) * 16
    padding = 4 if wide else 8
    rs = nc + (8 if nc % 32 == 0 else 24) if wide else nc + padding
    ls = mc + (20 if wide and mc % 32 else padding)
    elements = (nk * rs + mp * ls if resident else 0) + groups * buffers * mp * (nk + padding)
    return elements * size + groups * (_up(spec.m * spec.n, 16) if staged else 0) + groups * warps * 4


def shape(spec: Spec, hardware: Hardware) -> dict[str, int | bool]:
    """The constants of ``mma.cu`` for a request, beyond those it asks for itself."""
    size, wide = spec.dtype.itemsize, spec.dtype == torch.float32
    mp, budget = _up(spec.m, 16), hardware.shared_bytes

    def build(nw: int, warps: int, parts: int, groups: int, blocks: int = 1) -> dict[str, int | bool] | None:
        staged = spec.n % (nw // 4) != 0
        aligned = spec.aligned and spec.n % 8 == 0
        for resident in (True, False):
            for buffers in (2, 1, 0) if wide and not aligned else (2, 1):
                shared = _bytes(spec, nw, parts, groups, warps, buffers, resident, staged)
                fits = shared * blocks <= budget - 1024 * (blocks - 1)
                if fits and (resident or parts > 1 or mp <= 64):
                    return {
                        "NW": nw, "WARPS": warps, "PARTS": parts, "GROUPS": groups, "BUFFERS": buffers,
                        "STAGED": staged, "ALIGNED": aligned, "RESIDENT": resident, "BLOCKS": blocks, "SHARED": shared,
                    }  # fmt: skip
        return None

    widths = [nw for nw in (64, 32, 16) if mp * nw // 32 <= WIDEST[size]]
    # The widest of those that waste the fewest columns: the fewer warps share a token, the less is read twice.
    widths.sort(key=lambda nw: (_up(spec.n, nw), -nw))
    if spec.tokens <= hardware.sms:  # a token has a block to itself: over as many warps as it has columns for
        widths.sort()
    for nw in widths:
        warps = math.ceil(spec.n / nw)
        registers = (2 if wide else 1.5) * mp * nw / 32 + (90 if wide else 60)
        if registers > min(255, 65536 // (32 * warps) // 8 * 8):
            continue
        of_block = 65536 // 32 // _up(max(LEAST, int(registers)), 8)
        groups = 1 if spec.tokens <= hardware.sms else min(15, max(1, of_block // warps))
        while groups:
            # Two blocks of four tokens were faster than one of eight: 17.8 us beside 18.5 for 4096 tokens of 64 x 64.
            halves = build(nw, warps, 1, groups // 2, 2) if warps == 1 and groups % 2 == 0 else None
            found = halves or build(nw, warps, 1, groups)
            if found and (groups == 1 or (found["BUFFERS"] == 2 and found["RESIDENT"])):
                return found
            groups -= 1
    # Too large for the registers of a block: piece by piece, twice.
    warps, parts = min(WARPS, math.ceil(spec.n / 16)), min(8, mp // 16)
    found = build(16, warps, parts, 1)
    if found is None:  # fp32 that does not fit in shared memory is read in place
        spec = spec._replace(aligned=False)
        found = build(16, warps, parts, 1)
        assert found is not None, "the form that needs next to no shared memory"
    return found


REGISTERS = {64: 80, 80: 96, 128: 128, 224: 255}
"""Of a thread of ``wgmma.cu``, by N: those that the compiler takes, and a little room."""


WIDTHS = (64, 88, 112, 128)
"""Columns of a product of ``turned.cu``, which has as many as M or the next more."""


def hopper(
    spec: Spec, hardware: Hardware, groups: int = 0, buffers: int = 0, blocks: int = 1
) -> dict[str, int | bool] | str:
    """The constants of ``wgmma.cu`` for a request, or why it can't run.

    Args:
        spec: the request. hardware: where.
        groups, buffers: tokens a block and rooms of each; 0 for as many as fit. blocks: of an SM.
    """
    if hardware.capability != (9, 0):
        return "needs the wgmma of compute capability 9.0"
    if spec.dtype.itemsize != 2:
        return f"needs float16 or bfloat16, got {spec.dtype}"
    if spec.n not in REGISTERS or spec.m > 128:
        return f"has M up to 128 and N of {sorted(REGISTERS)}, not {spec.m} and {spec.n}"
    if not spec.aligned:
        return "needs rows that begin at multiples of 16 bytes"
    tiles, rows = math.ceil(spec.m / 64), _up(spec.m, 16)
    columns = _up(spec.n, 64)
    right, left, room = columns * spec.n * 2, rows * (64 * tiles + 8) * 2, columns * rows * 2
    # The fragments of L beside the sums of the first product, or the most that is needed later.
    registers = max(REGISTERS[spec.n], rows // 4 + spec.n // 2 + 32)
    most = 65536 // registers // (128 * tiles) // blocks
    groups = groups or most  # for few tokens too: all threads bring the transforms
    budget = hardware.shared_bytes if blocks == 1 else hardware.shared_bytes // blocks - 1024
    rest = right + left + groups * tiles * 16
    buffers = buffers or (2 if rest + 2 * groups * room <= budget else 1)
    shared = rest + groups * buffers * room
    if groups > most or shared > budget:
        return f"{groups} tokens a block of {shared} bytes are too many for this GPU"
    return {"GROUPS": groups, "BUFFERS": buffers, "BLOCKS": blocks, "SHARED": shared}


def turned(
    spec: Spec, hardware: Hardware, groups: int = 0, buffers: int = 0, blocks: int = 1
) -> dict[str, int | bool] | str:
    """The constants of ``turned.cu`` for a request, or why it can't run; arguments as :func:`hopper`."""
    if hardware.capability != (9, 0):
        return "needs the wgmma of compute capability 9.0"
    if spec.dtype.itemsize != 2:
        return f"needs float16 or bfloat16, got {spec.dtype}"
    if spec.n not in (64, 128) or spec.m > WIDTHS[-1]:
        return f"has M up to 128 and N of 64 or 128, not {spec.m} and {spec.n}"
    if not spec.aligned:
        return "needs rows that begin at multiples of 16 bytes"
    width = next(width for width in WIDTHS if width >= spec.m)
    warpgroups, pitch = spec.n // 64, spec.n // 2 + 8 if spec.packed else spec.n + 16
    rest = math.ceil(width / 64) * _up(spec.m, 16) * 128 + spec.n * (spec.n + 8) * 2
    room, each = width * spec.n * 2, width * pitch + 16 * warpgroups
    # The fragments of R beside the sums of the first product, or the most that is needed later.
    registers = _up(max(spec.n // 4 + width // 2 + 32, width // 2 + width // 4 + 32), 8)
    most = 65536 // registers // (128 * warpgroups) // blocks
    groups = groups or most  # for few tokens too: all threads bring the transforms
    budget = hardware.shared_bytes if blocks == 1 else hardware.shared_bytes // blocks - 1024
    buffers = buffers or (2 if rest + groups * (2 * room + each) <= budget else 1)
    shared = rest + groups * (buffers * room + each)
    if groups > most or shared > budget:
        return f"{groups} tokens a block of {shared} bytes are too many for this GPU"
    return {"MC": width, "GROUPS": groups, "BUFFERS": buffers, "BLOCKS": blocks, "SHARED": shared}


def shared_out(spec: Spec, hardware: Hardware, columns: int = 0) -> dict[str, int | bool] | str:
    """The constants of ``few.cu`` for a request, or why it can't run. ``columns``: of a block; 0: as few as can be."""
    if hardware.capability != (9, 0):
        return "needs the clusters of compute capability 9.0"
    if spec.dtype.itemsize != 2:
        return f"needs float16 or bfloat16, got {spec.dtype}"
    columns = columns or (16 if spec.n <= 128 else 32)
    if spec.m > 128 or spec.m % 2 or spec.n % columns or spec.n > 8 * columns:
        return (
            f"has even M up to 128 and N up to 256, a multiple of 16 to 128 and of 32 beyond, not {spec.m} and {spec.n}"
        )
    if not spec.aligned:
        return "needs rows that begin at multiples of 16 bytes"
    rows, blocks = _up(spec.m, 16), spec.n // columns
    shared = 2 * (rows * (spec.n + 8) + rows * (rows + 8) + spec.n * (columns + 8))
    shared += columns // 16 * rows // 8 * 512 + blocks * rows + 8
    return {"NW": columns, "SHARED": shared}


def _mma(spec: Spec, hardware: Hardware, memory: float) -> Candidate:
    config, size = shape(spec, hardware), spec.dtype.itemsize
    if int(config["PARTS"]) > 1 and hardware.capability < (9, 0):
        reason = f"transforms of {spec.m} and {spec.n} are too large for this GPU's registers and shared memory"
        return Candidate("mma", (), None, reason, refused=True)
    flops = 2 * spec.tokens * spec.m * spec.n * (spec.m + spec.n)
    padded = _up(spec.m, 16) * _up(spec.n, int(config["NW"])) / (spec.m * spec.n)
    maths = padded * flops / ((hardware.half_tflops or 300.0) * MMA_RATE * 1e6) * (6 if size == 4 else 1)
    twice = 1 if math.ceil(spec.n / int(config["NW"])) * int(config["PARTS"]) <= int(config["WARPS"]) else 10
    if spec.tokens <= hardware.sms:
        us = ONE_US + KILOBYTE_US * (spec.m**2 + spec.n**2 + spec.m * spec.n) * size / 1024 + maths * twice / 2
    else:
        us = MANY_US + max(memory, maths) * twice
    us += _clips(spec, "mma")
    reason = f"{config['NW']} columns a warp, {config['WARPS']} warps a token, {config['GROUPS']} tokens a block"
    reason += "" if twice == 1 else ", piece by piece: too large for the registers of a block"
    return Candidate("mma", tuple(config.items()), us, reason)


def _clips(spec: Spec, variant: str) -> float:
    return CLIP_US[variant] * (spec.clips - 1) * spec.tokens * spec.m * spec.n / 1e6


def _pipelined(spec: Spec, hardware: Hardware, memory: float, flops: int, rate: float) -> float:
    """us of ``wgmma.cu`` or ``turned.cu`` beyond those of any call, at this part of the fp16 rate."""
    transforms = WGMMA_KILOBYTE_US * (spec.m**2 + spec.n**2) * spec.dtype.itemsize / 1024
    maths = flops / (hardware.half_tflops * rate * 1e6)
    return transforms + max(memory / MEMORY_RATE, maths) + _clips(spec, "wgmma")


def _wgmma(spec: Spec, hardware: Hardware, memory: float) -> Candidate:
    config = hopper(spec, hardware)
    if isinstance(config, str):
        return Candidate("wgmma", (), None, config, refused=True)
    tiles = math.ceil(spec.m / 64)
    flops = 2 * spec.tokens * 64 * tiles * spec.n * (_up(spec.m, 16) + spec.n)
    rate = WGMMA_RATE if int(config["GROUPS"]) * int(config["BLOCKS"]) > 1 else ALONE_RATE
    us = WGMMA_US + _pipelined(spec, hardware, memory, flops, rate)
    reason = f"{tiles} x 64 rows a token, {config['GROUPS']} tokens a block"
    return Candidate("wgmma", tuple(config.items()), us, reason)


def _turned(spec: Spec, hardware: Hardware, memory: float) -> Candidate:
    config = turned(spec, hardware)
    if isinstance(config, str):
        return Candidate("turned", (), None, config, refused=True)
    flops = 2 * spec.tokens * int(config["MC"]) * spec.n * (_up(spec.m, 16) + spec.n)
    us = TURNED_US + _pipelined(spec, hardware, memory, flops, TURNED_RATE)
    reason = f"{config['MC']} rows a token, {config['GROUPS']} tokens a block"
    return Candidate("turned", tuple(config.items()), us, reason)


def _few(spec: Spec, hardware: Hardware) -> Candidate:
    best: Candidate | None = None
    for columns in (16, 32):
        config = shared_out(spec, hardware, columns)
        if isinstance(config, str):
            continue
        blocks = spec.n // columns
        kilobytes = (spec.m * spec.n + spec.m**2 + spec.n * columns) * spec.dtype.itemsize / 1024
        us = FEW_US + FEW_KILOBYTE_US * kilobytes + FEW_MORE_US * spec.tokens * blocks * kilobytes
        us += FEW_ROW_US * _up(spec.m, 16) if columns == 32 else 0.0
        if best is None or us < (best.us or 0.0):
            best = Candidate("few", tuple(config.items()), us, f"{blocks} blocks a token, {columns} columns each")
    reason = shared_out(spec, hardware)
    return best or Candidate("few", (), None, str(reason), refused=True)


def candidates(spec: Spec, hardware: Hardware | None) -> list[Candidate]:
    """Every variant for this request, predicted or refused. ``hardware`` is ``None`` on a CPU."""
    features, size = spec.m * spec.n, spec.dtype.itemsize
    read = (hardware.read_tbps or 1.0) if hardware else 0.02
    # PyTorch: two products, then about eight kernels over float32.
    eager = 28.0 + 18 * spec.tokens * features * 4 / (read * 1e6)
    reference = Candidate("reference", (), eager, "PyTorch, about a dozen kernels; what runs on a CPU")
    if hardware is None or hardware.capability < (8, 0):
        reason = "no CUDA device"
        if hardware is not None:
            reason = f"needs compute capability 8.0, this GPU has {'.'.join(map(str, hardware.capability))}"
        return [
            *(Candidate(name, (), None, reason, refused=True) for name in ("mma", "wgmma", "turned", "few")),
            reference,
        ]
    memory = spec.tokens * features * (size + spec.clips * (0.5 if spec.packed else 1.0)) / (read * 1e6)
    hopper_only = [_wgmma(spec, hardware, memory), _turned(spec, hardware, memory), _few(spec, hardware)]
    return [_mma(spec, hardware, memory), *hopper_only, reference]


def choose(spec: Spec, hardware: Hardware | None) -> Choice:
    """The variant for this request; pure, so it is the same printed anywhere.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    return pick("flatquant_dynamic_quantize", candidates(spec, hardware), spec.variant)
