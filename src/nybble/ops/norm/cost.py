"""Which form of the norm kernel runs: how many threads, warps or blocks share a row, and what is fetched ahead."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.choice import choose as pick
from nybble.runtime.hardware import Hardware

MAX_THREADS, MAX_CLUSTER = 1024, 8
KEPT, WIDE_KEPT = 16, 32
"""Values a thread keeps of a row, up to which nothing spills: at 1024 threads, of 64 registers each, and at 512."""
WIDE = 256
"""Threads of a block that shares a row with others. add_layernorm 65536 wide, 32 and 512 rows: 9.2 and 99.9 us with 8
blocks of 256 threads, 10.9 and 100 with 4 of 512, 13.0 and 113 with 4 of 1024; one block that reads three times, 42 and
269."""
FEW_ROWS = 64
"""Up to as many rows the time is that of waiting: one vector a thread, weights asked for with the row, and all of it
brought into L2 while the previous kernel still runs. add_layernorm, 1 x 2560: 2.17 us without any of it, 1.55 with
programmatic dependent launch alone, 1.34 with all; 64 rows: 2.40, 1.75, 1.71. From some hundred rows on asking twice
costs more than it hides: 5.4 us beside 4.6 at 512 rows."""
RESIDENT_THREADS = 1536
"""Threads a multiprocessor holds, of 40 registers each. While all rows fit at once, 8 values a thread; beyond, two
16-byte vectors, as smaller blocks overlap one row's reading with another's writing. layernorm_residual, 4096 x 2560:
19.9 us with one vector a thread, 18.1 with two; 16384 x 4096: 131 and 108; add_layernorm, 512 x 4096: 5.64 and 4.84,
but 512 x 2560: 3.65 and 4.29. Four vectors win only for three addends in fp32 (391 us beside 408 at 16384 x 4096); for
layernorm_residual in fp32 they take 218 us beside 196."""
STREAM_BYTES = (8 << 20, 96 << 20)
"""Traffic of a 16-bit layernorm_residual between which streaming accesses pay: 15.2 us beside 18.1 at 63 MB. At 400 MB
they cost 4 %, and for every other function 2 to 4 %."""
RESIDUAL_BYTES, RESIDUAL_SLOWER = 256 << 20, 1.07
"""Traffic beyond which layernorm_residual in fp32 is that much slower than its bytes: 197.6 us at 16384 x 4096, where
the Triton twin takes 185.5; at 126 MB it is 32.5 beside 34.5. No other function or dtype shows it."""
LAUNCH_US = 1.2
"""A call with one row as a node of a CUDA graph behind another of ours: 1.2 to 1.5 us on an H200."""
TRITON_LAUNCH_US = 2.3
"""The same for the Triton twin, which does not overlap the kernel before it."""


class Spec(NamedTuple):
    """All that affects compilation or choice.

    Attributes:
        function: public function name.
        dtype: of every tensor.
        hidden: row length.
        bias: a bias is given (for both norms of the dual form).
        alignment: bytes, a power of two up to 16, that divide every pointer.
        rows: rounded up to a power of two; the exact number is a launch argument.
        variant: ``"auto"`` or a name.
    """

    function: str
    dtype: torch.dtype
    hidden: int
    bias: bool
    alignment: int
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
    """Elements of one access: the widest up to 16 bytes that pointers and row length allow."""
    size = spec.dtype.itemsize
    return max(1, math.gcd(16, spec.alignment, spec.hidden * size) // size)


def _threads(vectors: int, per_thread: int) -> int:
    """Whole warps that own a row's vectors, about so many each."""
    return 32 * math.ceil(vectors / (32 * max(1, per_thread)))


def _heavy(spec: Spec) -> bool:
    """Three addends in fp32 spill from 12 values on, at more threads than WIDE."""
    return FORMS[spec.function].addends == 3 and spec.dtype.itemsize == 4 and spec.rows > FEW_ROWS


def _sharing(spec: Spec, hardware: Hardware) -> tuple[int, int, int]:
    """Threads a row in a block, rows a block, blocks a row."""
    width, size = vector(spec), spec.dtype.itemsize
    vectors = spec.hidden // width
    if spec.hidden > MAX_THREADS * (KEPT // 2 if _heavy(spec) else KEPT):
        cluster = 1
        while hardware.capability >= (9, 0) and cluster < MAX_CLUSTER and spec.hidden > cluster * WIDE * WIDE_KEPT:
            cluster *= 2
        fits = spec.hidden <= cluster * WIDE * WIDE_KEPT
        return (min(_threads(vectors, cluster * WIDE_KEPT // width), WIDE), 1, cluster) if fits else (MAX_THREADS, 1, 1)
    one = _threads(vectors, 1)
    if spec.rows <= FEW_ROWS:
        return min(one, MAX_THREADS), 1, 1
    if vectors <= 32:  # short rows share warps, two vectors a thread where there is one tensor to read
        threads = 4
        while threads < 32 and threads * (2 if passes(spec.function) == 2 else 1) < vectors:
            threads *= 2
        return threads, (128 if threads < 32 else 256) // threads, 1
    eight = _threads(vectors, 8 // width)
    vectors_each = 4 if FORMS[spec.function].addends == 3 and size == 4 else 2
    several = _threads(vectors, vectors_each if width * size == 16 else 16 // width)
    resident = spec.rows * eight <= hardware.sms * RESIDENT_THREADS
    # Idle threads of a last, half-empty round are worse than fewer values each: 96 vectors are 96 threads, not 64.
    wasted = several * math.ceil(vectors / several) - vectors
    threads = eight if resident or wasted * 8 > vectors or width <= 2 else several
    # In fp32 12 values spill at 1024 threads, so twice as many at half as many threads.
    return min(threads, 512 if size == 4 and spec.hidden > 8 * MAX_THREADS else MAX_THREADS), 1, 1


def shape(spec: Spec, hardware: Hardware) -> dict[str, int | bool]:
    """The constants of ``norm.cu`` for a request, beyond those it asks for itself."""
    form, width, size = FORMS[spec.function], vector(spec), spec.dtype.itemsize
    threads, together, cluster = _sharing(spec, hardware)
    kept = math.ceil(spec.hidden // width / (cluster * threads)) * width
    keep = kept <= (WIDE_KEPT if threads <= 512 else KEPT // 2 if _heavy(spec) else KEPT)
    # Registers of the row and of its weights and biases; more than this spills.
    held = kept + kept * size // 4 * form.norms * (1 + spec.bias)
    few = keep and spec.rows <= FEW_ROWS
    traffic = passes(spec.function) * spec.rows * spec.hidden * size
    streams = form.after and size == 2 and width == 8 and STREAM_BYTES[0] < traffic <= STREAM_BYTES[1]
    return {
        "VEC": width,
        "THREADS": threads,
        "ROWS": together,
        "CLUSTER": cluster if keep else 1,
        "KEEP": keep,
        "EARLY": few and kept <= KEPT and held <= (24 if threads > 512 else 64),
        "AHEAD": few,
        "STREAM": keep and streams,
    }


def tile(spec: Spec) -> dict[str, int]:
    """The constants of the Triton twin for a request.

    Returns:
        ``BLOCK``, a power of two: the row padded, or a chunk of a row of more than 16384 elements (ptxas spills 56 to
        228 bytes a thread of layernorm_residual and add_dual_layernorm at 32768, none at 16384). ``WARPS`` of a
        program. ``ROWS`` of a program: rows too short to be worth one are put together once they fill the GPU.
    """
    size = spec.dtype.itemsize
    if spec.hidden > 16384:
        return {"BLOCK": 16384 // size, "WARPS": 16, "ROWS": 1}
    block = 1 << (spec.hidden - 1).bit_length()
    together = 1
    while together * block < 1024 and spec.rows >= 2048 * together:
        together *= 2
    values = (16 if spec.rows <= FEW_ROWS else 32) // size  # one or two 16-byte accesses a thread
    return {"BLOCK": block, "WARPS": max(1, min(16, together * block // (32 * values))), "ROWS": together}


def candidates(spec: Spec, hardware: Hardware | None) -> list[Candidate]:
    """Every variant for this request, predicted or refused. ``hardware`` is ``None`` on a CPU."""
    read = (hardware.read_tbps or 1.0) if hardware else 0.02
    tensor_us = spec.rows * spec.hidden * spec.dtype.itemsize / (read * 1e6)
    # About a dozen kernels, each reading and writing the row in fp32.
    reference_us = 12 * (TRITON_LAUNCH_US + 2 * tensor_us * 4 / spec.dtype.itemsize)
    reference = Candidate("reference", (), reference_us, "PyTorch, about a dozen kernels; what runs on a CPU")
    if hardware is None or hardware.capability < (8, 0):
        reason = "no CUDA device"
        if hardware is not None:
            reason = f"needs compute capability 8.0, this GPU has {'.'.join(map(str, hardware.capability))}"
        return [Candidate(name, (), None, reason, refused=True) for name in ("cuda", "triton")] + [reference]
    addends, crossing = FORMS[spec.function].addends, passes(spec.function)
    config = shape(spec, hardware)
    sharing = f"{config['THREADS']} threads a row"
    if int(config["CLUSTER"]) > 1:
        sharing += f" in each of {config['CLUSTER']} blocks"
    if int(config["ROWS"]) > 1:
        sharing += f", {config['ROWS']} rows a block"
    traffic = crossing if config["KEEP"] else crossing + 2 * addends
    reason = f"{sharing}, {int(config['VEC']) * spec.dtype.itemsize}-byte accesses, " + (
        "the row stays in registers" if config["KEEP"] else "the row is read three times: too wide for registers"
    )
    us = LAUNCH_US + traffic * tensor_us
    if FORMS[spec.function].after and spec.dtype.itemsize == 4 and crossing * tensor_us * read * 1e6 > RESIDUAL_BYTES:
        us *= RESIDUAL_SLOWER
    cuda = Candidate("cuda", tuple(config.items()), us, reason)
    tiles = tile(spec)
    reads = 1 if tiles["BLOCK"] >= spec.hidden else 3 if FORMS[spec.function].rms else 4
    us = TRITON_LAUNCH_US + (crossing + (reads - 1) * addends) * tensor_us
    whole = f"{tiles['ROWS']} x {tiles['BLOCK']} tile" if reads == 1 else f"the row is read {reads} times"
    triton = Candidate("triton", tuple(tiles.items()), us, f"{whole}, {tiles['WARPS']} warps")
    return [cuda, triton, reference]


def choose(spec: Spec, hardware: Hardware | None) -> Choice:
    """The variant for this request; pure, so it is the same printed anywhere.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    return pick(spec.function, candidates(spec, hardware), spec.variant)
