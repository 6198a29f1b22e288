"""Which form of the attention kernel runs: how many blocks share the keys of a head, and how many warps a block has."""

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
"""Of a head's width, of query heads a kv head, and of sinks: what ``decode_attention.cu`` is written for."""
SPLITS, WARPS = (1, 2, 4, 8), (4, 8)
LAUNCH_US = 2.0
"""From the end of the kernel before to the first score, and from the last to the result, where nobody shares keys."""
MERGE_US = {1: 0.0, 2: 0.5, 4: 0.5, 8: 0.6}
"""Of blocks that share keys: to meet, and to send their sums."""
TILE_US = 0.4
"""A tile of a warp once its rows are there."""
BLOCK_US = 0.8
"""A block that begins when another ends: its first rows have not been asked for before."""
READ_US = 1.2
"""From asking for rows to having them, while all of memory is busy: a warp asks for one tile at a time."""
SM_SHARE = 1.6
"""What one multiprocessor can read at most, in shares of the bandwidth that all of them have together."""


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
    """Microseconds of a form."""
    blocks, each = spec.pairs * splits, resident(spec, splits, warps, hardware)
    turns = math.ceil(blocks / at_once(splits, each, hardware))
    tiles = math.ceil(math.ceil(spec.slots / TILE) / splits)  # of a block
    read, sms = (hardware.read_tbps or 1.0) * 1e6, hardware.sms  # bytes a microsecond
    busy = min(spec.pairs * min(splits, math.ceil(spec.slots / TILE)), sms)
    # a multiprocessor reads what its warps have asked for
    asking = min(each, math.ceil(blocks / sms)) * min(warps, tiles)
    of_one = min(SM_SHARE * read / sms, asking * TILE * spec.d * 4 / READ_US)
    memory = spec.pairs * spec.slots * spec.d * 4 / min(read, busy * of_one)
    latency = turns * math.ceil(tiles / warps) * TILE_US + (turns - 1) * BLOCK_US
    return LAUNCH_US + MERGE_US[splits] + max(latency, memory) + 0.3 * min(latency, memory)


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
        return [Candidate("cuda", (), None, reason, refused=True), reference]
    forms = [(predict(spec, s, w, hardware), s, w) for s in SPLITS for w in WARPS]
    us, splits, warps = min(form for form in forms if shared_bytes(spec, form[1], form[2]) <= hardware.shared_bytes)
    config = {"SPLITS": splits, "WARPS": warps, "SHARED": shared_bytes(spec, splits, warps)}
    shared = f"{splits} blocks share the keys of a head" if splits > 1 else "a block has all keys of a head"
    return [Candidate("cuda", tuple(config.items()), us, f"{shared}, {warps} warps each"), reference]


def choose(spec: Spec, hardware: Hardware | None) -> Choice:
    """The variant for this request; pure, so it is the same printed anywhere.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    return pick("decode_attention", candidates(spec, hardware), spec.variant)
