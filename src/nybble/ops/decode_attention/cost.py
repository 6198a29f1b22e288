"""Which attention kernel runs, and its form: who shares the keys of a head, warps of a block, tiles on their way."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.choice import choose as pick
from nybble.runtime.hardware import Hardware

TILE = 16
"""Slots a warp takes at a time."""
LARGEST, MOST_GROUP, MOST_SINKS = 256, 16, 64
"""Of a head's width, of query heads a kv head, and of sinks: what the kernels are written for."""
SPLITS, WARPS = (1, 2, 4, 8), (4, 8)
STREAMS = ((8, 3, 1), (8, 2, 1), (4, 3, 2), (4, 2, 2), (4, 4, 1), (4, 2, 1))
"""Of ``stream.cu``: warps of a block, tiles a warp has on their way, blocks of a multiprocessor; of two that are
predicted the same, the first."""
LAUNCH_US = 2.0
"""From the end of the kernel before to the first score, and from the last to the result, where nobody shares keys."""
MERGE_US = {1: 0.0, 2: 0.5, 4: 0.5, 8: 0.6}
"""Of blocks that share keys: to meet, and to send their sums."""
TILE_US = 0.4
"""A tile of a warp once its rows are there."""
BLOCK_US = 0.8
"""A block that begins when another ends: its first rows have not been asked for before."""
READ_US = 1.2
"""From asking for rows to having them, while all of memory is busy."""
SM_SHARE = 1.44
"""What one multiprocessor can read at most, in shares of the bandwidth that all of them have together."""
STREAM_READ = 0.98
"""Of the bandwidth, at most."""


def cluster_read(warps: int) -> float:
    """Of the bandwidth, where this many warps of a multiprocessor have one tile each on its way: 0.80 with 8, all of it
    with 16, as measured."""
    return min(STREAM_READ, 0.62 + 0.0225 * warps)


SHARE_US = 1.5
"""To leave sums in memory, to see the others' and to add them."""
HEAD_US = 2.0
"""Of a block that goes on to another head: its queries, and the merging of its warps. Copies go on meanwhile."""


class Spec(NamedTuple):
    """All that affects compilation or choice.

    Attributes:
        dtype: of queries, keys, values and the result. angles: of cosines and sines.
        d: width of a head. group: query heads a kv head. rotary: dimensions that are rotated, 0 for none.
        norm: queries and keys are normed. sinks: slots whose keys are rotated anew.
        pairs: texts times kv heads. slots: rounded up by :func:`rounded`.
        aligned: the cache is 16-byte aligned. variant: ``"auto"`` or a name.
    """

    dtype: torch.dtype
    angles: torch.dtype
    d: int
    group: int
    rotary: int
    norm: bool
    sinks: int
    pairs: int
    slots: int
    aligned: bool = True
    variant: str = "auto"


def rounded(slots: int) -> int:
    """Up to one of four numbers between a power of two and the next."""
    step = max(TILE, 1 << max(0, (slots - 1).bit_length() - 3))
    return -(-slots // step) * step


def refused(spec: Spec) -> str:
    """Why the kernel can't serve a request, ``""`` when it can."""
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"its tensor cores take float16 and bfloat16, not {str(spec.dtype).removeprefix('torch.')}"
    if spec.d % 8 or not 8 <= spec.d <= LARGEST:
        return f"heads are multiples of 8 wide, up to {LARGEST}, not {spec.d}"
    if spec.group > (MOST_GROUP if spec.d <= 128 else MOST_GROUP // 2):
        return f"{spec.group} query heads of {spec.d} a kv head are more sums than there are registers"
    if spec.sinks > MOST_SINKS:
        return f"at most {MOST_SINKS} sinks, not {spec.sinks}"
    if not spec.aligned:
        return "keys and values must be 16-byte aligned"
    return ""


def shared_bytes(spec: Spec, splits: int, warps: int) -> int:
    """Of a block, as ``decode_attention.cu`` adds them up."""
    pitch, share = spec.d + 8, -(-spec.group * spec.d // 4 // splits)
    new = spec.group * pitch * 2
    sums = -(-(new + 4 * spec.d + spec.sinks * pitch * 2) // 16) * 16
    stats = sums + warps * spec.group * pitch * 4
    received = -(-(stats + warps * spec.group * 8) // 16) * 16
    return received + (splits * share * 16 + splits * spec.group * 16 if splits > 1 else 0) + 16


def stream_left(spec: Spec) -> int:
    """Bytes that a block of ``stream.cu`` leaves for another: sums of pairs of heads, their largest and totals."""
    pairs, steps = -(-spec.group // 2), (spec.d + 8) // 16
    return 16 * pairs * (1 + 8 * steps)


def stream_bytes(spec: Spec, warps: int, depth: int) -> int:
    """Shared memory of a block, as ``stream.cu`` adds it up."""
    pitch = (spec.d // 8 | 1) * 16
    return warps * depth * 2 * TILE * pitch + (spec.group + 2) * pitch + warps * stream_left(spec)


def registers(spec: Spec) -> int:
    """Of a thread, about: rows on their way, queries, sums, and what counts. 148 at 128 wide, 104 at 80."""
    products = -(-spec.group // 8)
    return min(255, 44 + spec.d // 2 + products * (spec.d // 8 + spec.d // 4))


def resident(spec: Spec, splits: int, warps: int, hardware: Hardware) -> int:
    """Blocks that one multiprocessor holds."""
    of_registers = 65536 // (32 * warps * -(-registers(spec) // 8) * 8)
    return max(1, min(of_registers, 2048 // (32 * warps), hardware.shared_bytes // shared_bytes(spec, splits, warps)))


def at_once(splits: int, each: int, hardware: Hardware) -> int:
    """Blocks that run at a time, ``each`` on a multiprocessor. Clusters stay inside groups of 16 or 18 of those, so
    that some are left over."""
    whole = {1: 1.0, 2: 1.0, 4: 0.91, 8: 0.85}[splits]
    return max(splits, int(hardware.sms * whole) * each // splits * splits)


def predict(spec: Spec, splits: int, warps: int, hardware: Hardware) -> float:
    """Microseconds of a form of ``decode_attention.cu``."""
    blocks, each = spec.pairs * splits, resident(spec, splits, warps, hardware)
    turns = math.ceil(blocks / at_once(splits, each, hardware))
    tiles = math.ceil(math.ceil(spec.slots / TILE) / splits)  # of a block
    read, sms = (hardware.read_tbps or 1.0) * 1e6, hardware.sms  # bytes a microsecond
    busy = min(spec.pairs * min(splits, math.ceil(spec.slots / TILE)), sms)
    # a multiprocessor reads what its warps have asked for
    beside = min(each, math.ceil(blocks / sms))
    asking = beside * min(warps, tiles)
    of_one = min(SM_SHARE * read / sms, asking * TILE * spec.d * 4 / READ_US)
    memory = spec.pairs * spec.slots * spec.d * 4 / min(cluster_read(beside * warps) * read, busy * of_one)
    latency, again = turns * math.ceil(tiles / warps) * TILE_US, (turns - 1) * BLOCK_US
    return LAUNCH_US + MERGE_US[splits] + again + max(latency, memory) + 0.15 * min(latency, memory)


def stream_blocks(pairs: int, slots: int, warps: int, each: int, sms: int) -> int:
    """Of a launch of ``stream.cu``: all that run at once, and no more than have a tile for each warp. Where a few blocks
    less are a multiple of the heads, no share is of two of them: 12.5 us beside 13.8 (8 heads of 8192 slots)."""
    most = sms * each
    whole = most // pairs * pairs
    most = whole if whole >= 0.95 * most else most
    return max(1, min(most, math.ceil(pairs * math.ceil(slots / TILE) / warps)))


def predict_stream(spec: Spec, warps: int, depth: int, each: int, hardware: Hardware) -> float:
    """Microseconds of a form of ``stream.cu``."""
    of_head = math.ceil(spec.slots / TILE)
    blocks = stream_blocks(spec.pairs, spec.slots, warps, each, hardware.sms)
    tiles = max(1, math.ceil(spec.pairs * of_head / blocks))  # of a block
    read, sms = (hardware.read_tbps or 1.0) * 1e6, hardware.sms
    asking = min(each, math.ceil(blocks / sms)) * min(warps * depth, tiles) * TILE * spec.d * 4
    of_one = min(SM_SHARE * read / sms, asking / READ_US)
    memory = spec.pairs * spec.slots * spec.d * 4 / min(STREAM_READ * read, min(blocks, sms) * of_one)
    # while a block changes heads, what its multiprocessor has asked for arrives
    change = max(0.3, HEAD_US - asking / (read / sms)) * math.ceil(max(0, tiles - 1) / of_head)
    latency = math.ceil(tiles / warps) * TILE_US
    shared = 0.0 if tiles % of_head == 0 else SHARE_US
    return LAUNCH_US + HEAD_US / 2 + shared + change + max(latency, memory) + 0.1 * min(latency, memory)


def candidates(spec: Spec, hardware: Hardware | None) -> list[Candidate]:
    """Every variant for this request, predicted or refused. ``hardware`` is ``None`` on a CPU."""
    read = (hardware.read_tbps or 1.0) if hardware else 0.02
    memory = spec.pairs * spec.slots * spec.d * 4 / (read * 1e6)
    reference = Candidate("reference", (), 60.0 + 8 * memory, "PyTorch, about two dozen kernels; what runs on a CPU")
    reason = refused(spec)
    if hardware is None:
        reason = "no CUDA device"
    elif hardware.capability < (9, 0):
        reason = f"needs compute capability 9.0, this GPU has {'.'.join(map(str, hardware.capability))}"
    if hardware is None or reason:
        return [*(Candidate(name, (), None, reason, refused=True) for name in ("cuda", "stream")), reference]
    most = hardware.shared_bytes
    forms = [(predict(spec, s, w, hardware), s, w) for s in SPLITS for w in WARPS]
    us, splits, warps = min(form for form in forms if shared_bytes(spec, form[1], form[2]) <= most)
    config = {"SPLITS": splits, "WARPS": warps, "SHARED": shared_bytes(spec, splits, warps)}
    shared = f"{splits} blocks share the keys of a head" if splits > 1 else "a block has all keys of a head"
    cluster = Candidate("cuda", tuple(config.items()), us, f"{shared}, {warps} warps each")
    # a multiprocessor has 1 KB more than a block may ask for, and of each block it holds 1 KB is the system's
    fit = [f for f in STREAMS if f[2] * (stream_bytes(spec, f[0], f[1]) + 1024) <= most + 1024]
    streams = [(predict_stream(spec, *form, hardware), i, form) for i, form in enumerate(fit)]
    us, _, (warps, depth, each) = min(streams)
    config = {"WARPS": warps, "DEPTH": depth, "EACH": each, "SHARED": stream_bytes(spec, warps, depth)}
    text = f"every block has an even share of all keys, {depth} tiles on their way to each of {warps} warps"
    return [cluster, Candidate("stream", tuple(config.items()), us, text), reference]


def choose(spec: Spec, hardware: Hardware | None) -> Choice:
    """The variant for this request; pure, so it is the same printed anywhere.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    return pick("decode_attention", candidates(spec, hardware), spec.variant)
