"""Which variant of the 4-bit or 8-bit linear runs, and with which tile."""

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
AROUND_US = 2.2
"""What a kernel around the product adds to a chain of them, for few rows."""
WGMMA: tuple[tuple[int, float, float], ...] = (
    (1, 1.8, 1.1), (2, 2.0, 1.1), (4, 2.5, 1.1), (8, 2.7, 1.25), (16, 3.5, 1.28), (32, 4.6, 1.55), (64, 6.0, 3.1),
)  # fmt: skip
"""(rows, us of a call, how many times longer than a plain read the weights take) of wgmma.cu, fitted to
results/h200/w4a16.jsonl. Beyond 32 rows the blocks of a cluster exchange more sums than weights."""
WIDE = {4: 1.2, 8: 1.8}
"""How many times longer again for up to 32 rows when it takes clusters of 4 or 8 to hold x: fewer fit on the GPU."""
FEW: tuple[tuple[int, float, float], ...] = (
    (1, 0.9, 1.55), (2, 1.4, 1.6), (4, 2.0, 1.7), (8, 3.0, 1.9), (16, 4.2, 2.1), (64, 9.0, 5.0),
)  # fmt: skip
"""The same of stream.cu, measured at 1, 16 and 64 rows and guessed between."""
GATHER_US = 2.0
"""With act-order wgmma.cu gathers one row itself; more are gathered by a kernel before it, in about so long. What comes
after it starts later than after another product, so that few rows lose more."""
BYTES_STREAM = 1.1
"""How many times longer than a plain read weights of 8 bits take wgmma.cu at least: what those of 4 take at one row."""
Form = tuple[int, int, int, int, int, int]
"""Of gemm.cu: TILE_M, TEAMS, SLICES, CLUSTER, WAYS, STREAM_K. Tiles of 256 rows, and of 128 with three TEAMS, have
rounded weights."""
GEMM_FORMS = (
    (2, 1, 1, 1, 1), (2, 1, 2, 1, 1), (4, 1, 1, 1, 1), (3, 1, 1, 1, 1), (1, 1, 1, 1, 1),
    (2, 1, 1, 1, 0), (2, 1, 2, 1, 0), (1, 1, 1, 1, 0), (1, 1, 2, 2, 0), (2, 1, 2, 2, 0), (3, 1, 2, 2, 0),
    (3, 1, 1, 1, 0), (1, 2, 1, 1, 0), (1, 2, 2, 2, 0), (1, 4, 1, 1, 0), (1, 4, 2, 2, 0), (2, 2, 2, 2, 0),
)  # fmt: skip
"""What comes after TILE_M in the forms that are compared: TEAMS, SLICES, CLUSTER, WAYS, STREAM_K. Of the 32 that there
are, those that were within 2 % of the fastest for some shape and number of rows, and what small N or zero points leave
of them. Clusters of four lose: 30 of them run at once, of two 66. (3, 1, 1, 1, 0) is for 128 rows: 192 features are 128
tiles of 12288 x 4096 at 256 rows, where there are 132 SMs."""
UNIT_US = {
    16: (0.118, 0.112, 0.114, 0.093), 32: (0.177, 0.182, 0.155, 0.145), 64: (0.3, 0.246, 0.223, 0.215),
    128: (0.437, 0.373, 0.35), 256: (0.723, 0.7),
}  # fmt: skip
"""us that gemm.cu's block takes for each of its warpgroups' units of 64 by 128 weights, by the tile's rows and the
number of warpgroups: one has nothing to hide its unpacking behind. Fitted to results/h200/w4a16.jsonl."""
LONG = 0.21
"""How much longer very long calls take: the GPU lowers its clock. Half of it at 600 us."""
LEFT_US = (1.9, 1.2e-5, 3e-5)
"""us of a share of tiles that begins or ends within one, and, by the square of a tile's rows of 64 features, of what is
left to another block: twice the sums are read by threads with half the registers for it. The last is of 128 rows by 192
features: three warpgroups have fewer registers than two."""
GEMM_US = (1.9, 0.9, 0.12, 2.0)
"""us of a call, of each turn of tiles, and of adding up one more part of K in a turn; with rounded weights and the part
in the other block so much more."""
GEMM_STREAM = 1.2
"""How many times longer than a plain read it takes the weights at least."""
L2_BYTES_US = 60e3
"""Bytes a us that a block gets from L2 while all ask, with weights of 8 bits. A guess: 52e3 were seen with 4 bits."""
SHORT_RING = 1.4
"""How many times longer tiles take with two stages only. A guess: half a stage is too short for the next to come."""
PAIRS = 66
"""Clusters of two blocks, one block an SM, that run at once on 132 SMs."""


DIGITS_US = (1.55, 1e-4, 1.02, 3.3)
"""us of a call of digits.cu, and of one feature of x; how many times longer than a plain read the weights take; us of
the shortest call, as it waits for one thing after the other.
Fitted to results/h200/w4a16.jsonl."""
DIGITS_NORM_US = {"": 0.0, "layernorm": 1.4, "rmsnorm": 0.4}
"""What a norm adds to it: every block has one of the whole row."""
DIGITS_SHARE = 1.3
"""What one multiprocessor can read at most, in shares of the bandwidth that all of them have together."""


ONLY_NIBBLES = "for 4-bit weights; wgmma.cu and gemm.cu have those of 8"


class Spec(NamedTuple):
    """All that affects compilation or choice.

    Attributes:
        m: rows, rounded up to a power of two; the exact number is a launch argument.
        n, k: output and input features.
        group_size: as :class:`nybble.PackedWeight` holds it.
        dtype: of x, and of y. scale_dtype: of the scales.
        zeros, perm, bias: whether there are zero points other than 8 (128), an act-order permutation, a bias.
        variant: ``"auto"`` or a name.
        norm: ``"layernorm"`` or ``"rmsnorm"`` of x before the product. norm_bias: whether it has a bias.
        activation: ``"gelu"``, ``"gelu_tanh"`` or ``"silu_mul"`` after the product.
        residual: whether one is added last.
        splits: the output features at which a second and a third plane of the result begin; none for one plane.
        bits: of a value of the weight, 4 or 8.
        out_dtype: of y, where that is another.
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
    bits: int = 4
    out_dtype: torch.dtype | None = None

    @property
    def weight_bytes(self) -> int:
        """Of the values alone."""
        return self.n * self.k * self.bits // 8

    @property
    def inner(self) -> Spec:
        """What a composition asks for after its norm; without a norm, the product alone."""
        if self.norm:
            return self._replace(variant="auto", norm="", norm_bias=False)
        return self._replace(variant="auto", activation="", residual=False, splits=())

    @property
    def around(self) -> int:
        """Kernels that a composition runs besides the product: norm, activation, residual, a copy a plane."""
        epilogue = {"": 0, "silu_mul": 2}.get(self.activation, 1)
        return bool(self.norm) + epilogue + self.residual + 3 * bool(self.splits)


def stream_shape(spec: Spec, hardware: Hardware) -> dict[str, int] | str:
    """The constants of ``stream.cu`` for a request, or why it can't run it."""
    if spec.bits != 4:
        return ONLY_NIBBLES
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


def _unit_bytes(spec: Spec, parts: int) -> int:
    """Of 64 by 128 weights in a stage, with the scales and zero points of their ``parts`` groups."""
    return 1024 * spec.bits + parts * (64 * spec.scale_dtype.itemsize + 8 * spec.bits * spec.zeros)


def wgmma_shape(spec: Spec, hardware: Hardware) -> dict[str, int] | str:
    """The constants of ``wgmma.cu`` for a request, or why it can't run it."""
    pairs, size = spec.activation == "silu_mul", spec.group_size
    if hardware.capability != (9, 0):
        return "needs the wgmma of compute capability 9.0"
    if spec.m > 64:
        return "for at most 64 rows"
    if size not in (16, 32, 64) and size % 128 and size < spec.k:
        return f"group_size {size} is neither 16, 32, 64 nor a multiple of 128"
    if pairs and spec.n % 128:
        return f"silu_mul pairs 64 features of the two halves: N must be a multiple of 128, not {spec.n}"
    tile, chunks = max(8, spec.m), math.ceil(spec.k / 64)
    parts = 128 // size if size < min(128, spec.k) else 1
    once = math.ceil(spec.n / 64) <= PAIRS
    # (TEAMS, SLICES, CLUSTER, AHEAD, BUFFERS), best first: the first that fits is taken. Small clusters, as 66 of two
    # fit where 30 of four and 15 of eight do; 64 features a block, as a stage is then one copy of 16 KB.
    forms: list[tuple[int, int, int, int, int]] = []
    if tile == 8:
        if once:
            forms += [(1, 3, 2, 4, 2)] if spec.k <= 8192 else []
        elif spec.n <= 64 * 3 * PAIRS and spec.k <= 4608 and not pairs and not spec.norm:
            # Three blocks an SM; with a norm they would all be at it at once: 13.1 us for 8.4.
            forms += [(1, 2, 2, 3 if spec.bits == 4 else 2, 2)]
        forms += [(1, 4, 2, 4, 2), (1, 4, 2, 3, 2)]
    elif tile == 16:
        forms += [(1, 3, 2, 3, 1)] if once and spec.k <= 8192 else []
        forms += [(1, 4, 2, 3 if spec.k <= 4608 else 4, 2), (1, 4, 2, 3, 1), (2, 2, 4, 4, 2)]
    elif tile == 32:
        forms += [(1, 3, 2, 3, 1)] if once else []
        forms += [(1, 3, 2, 4, 2), (1, 3, 2, 3, 1)]
        forms += [(1, 2, 2, 4, 1)] if spec.bits == 8 else []
        forms += [(2, 2, 4, 4, 2)]
    else:
        forms += [(3, 1, 4, 4, 2)] if not pairs and parts == 1 else []
        forms += [(2, 1, 4, 4, 2), (2, 1, 4, 3, 2)]
    if tile < 64:
        forms += [(1, 4, 4, 4, 2), (1, 4, 4, 3, 2), (2, 2, 4, 3, 1), (2, 2, 4, 2, 1), (4, 1, 8, 3, 1), (4, 1, 8, 2, 1)]
    forms += [(2, 1, 8, 4, 2), (2, 1, 8, 3, 2), (4, 1, 8, 2, 1)]
    for teams, slices, cluster, ahead, buffers in forms:
        if pairs:
            teams, slices = max(2, teams), max(1, min(slices, 2))  # a pair of warpgroups has the pairs of features
            if 4 * teams // cluster % 2 or teams % 2:
                continue
        crowded = parts >= 4 or (spec.bits == 8 and spec.zeros and tile == 32)
        if crowded and teams * slices == 4:  # 17 warps leave 96 registers a thread, and small groups need more
            slices -= 1
            if not slices:
                continue
        units = math.ceil(chunks / (2 * cluster))
        if teams == 1 and slices == 4 and -(-units // 3) * 3 < -(-units // 4) * 4:
            slices = 3  # fewer warpgroups wait in the last stage
        at_once = min(tile, 16 if teams == 3 else 32)
        stage = teams * slices * _unit_bytes(spec, parts)
        sums = buffers * slices * at_once * 64 * teams + (
            (cluster * max(tile, 4 * teams * slices) + tile) * 4 if spec.norm else 0
        )
        shared = 2 * units * tile * 128 + ahead * stage + 4 * sums + (2 * ahead + 2 * buffers + 1) * 8
        row = math.ceil(spec.k / 8) * 16  # of x, before it is gathered
        gathered = spec.perm and (spec.m > 1 or shared + row > hardware.shared_bytes)
        shared += row if spec.perm and not gathered else 0
        if shared <= hardware.shared_bytes:
            return {
                "TILE_M": tile, "TEAMS": teams, "SLICES": slices, "CLUSTER": cluster, "AHEAD": ahead,
                "SUM_ROWS": at_once, "BUFFERS": buffers, "GATHERED": int(gathered),
                "BLOCKS": 3 if (tile, teams, slices, cluster, buffers) == (8, 1, 2, 2, 2) else 1, "SHARED": shared,
            }  # fmt: skip
    return f"{spec.m} rows of {spec.k} features do not fit in the shared memory of a cluster"


def digits_shape(spec: Spec, hardware: Hardware) -> dict[str, int] | str:
    """The constants of ``digits.cu`` for a request, or why it can't run it."""
    if hardware.capability != (9, 0):
        return "needs the wgmma of compute capability 9.0"
    if spec.bits != 4:
        return "for 4-bit weights"
    if spec.m > 1:
        return "for one row"
    if spec.group_size not in (32, 64) and spec.group_size % 128 and spec.group_size < spec.k:
        return f"group_size {spec.group_size} is neither 32, 64 nor a multiple of 128"
    pairs = spec.activation == "silu_mul"
    if pairs and spec.n % 128:
        return f"silu_mul pairs 64 features of the two halves: N must be a multiple of 128, not {spec.n}"
    tried = [digits_form(spec, form) for form in _digit_forms(spec)]
    fits = (config for config in tried if config["BLOCKS"] * (config["SHARED"] + 1024) <= hardware.shared_bytes + 1024)
    return next(fits, f"{spec.k} features do not fit in shared memory")


DigitForm = tuple[int, int, int, int, int, int]
"""Of digits.cu: TEAMS, SLICES, PER, CLUSTER, AHEAD, BLOCKS."""


def _digit_forms(spec: Spec) -> list[DigitForm]:
    """The forms of ``digits.cu`` for a request, the best first; the first that fits is taken."""
    units, parts = math.ceil(spec.k / 256), 128 // min(128, spec.group_size)  # of one of two blocks; groups of a unit
    one_turn = spec.n <= 64 * PAIRS
    if spec.activation == "silu_mul":
        turns = spec.n / (256 * PAIRS)
        # 16.2 us beside 17.3 at 28672 x 4096; 14.7 beside 13.5 at 22016 x 4096, where the second turn is nearly empty.
        wide: list[DigitForm] = [(4, 1, 1, 2, 6, 1), (4, 1, 1, 2, 4, 1)]
        pairs: list[DigitForm] = [(2, 2, 2, 2, 5, 1), (2, 2, 2, 2, 3, 1)]
        first = [*wide, *pairs] if turns > 0.74 * math.ceil(turns) else [*pairs, *wide]
        if parts > 1:  # more sums of their own: 17.7 us beside 19.5 with groups of 64, 19.3 beside 21.9 with 32
            first = [(4, 1, 1, 2, 4, 1)] if parts == 2 else [(2, 1, 1, 2, 6, 2)]
        return [*first, (2, 2, 1, 2, 4, 2), (2, 2, 1, 2, 2, 1), (2, 2, 1, 4, 2, 1), (4, 1, 1, 8, 2, 1)]
    # Two units at a time hide half of their latency, where a group is not so small that their sums are too many.
    if parts > 1 and spec.k > 4608:  # 11.0 us beside 11.7 at 4096 x 14336, groups of 32
        forms: list[DigitForm] = [(1, 4, 1, 2, 4, 1), (1, 4, 1, 2, 2, 1)]
    elif parts == 4:  # 8.9 us at 12288 x 4096, 4.3 at 4096 x 4096, 10.1 at 14336 x 4096; two units 10.1, 4.4, 10.5
        forms = [(1, 3, 1, 2, 4, 2)] if one_turn else [(1, 2, 1, 2, 3 if spec.n <= 192 * PAIRS else 4, 2)]
    elif spec.k > 4608:  # 9.8 us beside 10.9 at 4096 x 14336, 28.4 beside 30.5 at 28672 x 8192
        deep: list[DigitForm] = [] if one_turn else [(1, 4, 2, 2, 6, 1)]  # 28.4 us beside 29.3 there
        forms = [*deep, (1, 4, 2, 2, 4, 1), (1, 4, 2, 2, 3, 1), (1, 4, 2, 2, 2, 1)]
    elif 8 < units <= 12:  # two stages of six; in a layer of Pythia-2.8B 1.9 us less than (1, 2, 1, 2, 5, 3), twice
        forms = [(1, 3, 2, 2, 2, 2), (1, 2, 2, 2, 3, 2)]
    elif spec.norm or parts == 2:
        forms = [(1, 2, 2, 2, 3, 2), (1, 2, 2, 2, 4, 2)]
    elif not one_turn and spec.n <= 11264:  # 7.6 us beside 8.1 at 11008 x 4096, 8.6 beside 8.0 at 12288 x 4096
        forms = [(1, 2, 2, 2, 3, 3), (1, 2, 2, 2, 4, 2)]
    else:
        forms = [(1, 2, 2, 2, 4, 2), (1, 2, 2, 2, 3, 3)]
    return [*forms, (1, 2, 1, 2, 5, 3), (1, 2, 1, 2, 4, 2), (1, 2, 1, 2, 2, 1), (1, 2, 1, 4, 2, 1)]


def digits_form(spec: Spec, form: DigitForm) -> dict[str, int]:
    """The constants of ``digits.cu`` in one of its forms."""
    teams, slices, per, cluster, ahead, blocks = form
    parts = 128 // spec.group_size if spec.group_size < min(128, spec.k) else 1
    units, warps = math.ceil(math.ceil(spec.k / 64) / (2 * cluster)), 4 * teams * slices
    stages = math.ceil(units / (slices * per)) * math.ceil(spec.n / (64 * teams * PAIRS))  # of a worker, or more
    ahead, buffers = min(ahead, max(2, stages)), 2
    x = units * 8 * 80 + 128
    stage = teams * slices * per * _unit_bytes(spec, parts)
    counts = math.ceil(units / 4) * 4 + units * parts * 8
    sums = buffers * slices * 4 * teams * 16 + 4 * warps * bool(spec.norm)
    whole = spec.k * 2 * spec.perm
    shared = math.ceil((x + ahead * stage) / 16) * 16 + 4 * (counts + sums) + whole + (2 * ahead + 2 * buffers) * 8
    if blocks == per == 2:  # and no third one, or three are on one multiprocessor and one on another: 7.0 us beside 5.7
        shared = max(shared, (228 << 10) // 3 - 1024 + 16)
    return {
        "TEAMS": teams, "SLICES": slices, "PER": per, "CLUSTER": cluster, "AHEAD": ahead, "BUFFERS": buffers,
        "BLOCKS": blocks, "SHARED": shared,
    }  # fmt: skip


def _both(a: float, b: float) -> float:
    """Of two things that go on at a time: hardly more than the longer one, unless they are as long."""
    return (a**4 + b**4) ** 0.25


def _gemm_form(spec: Spec, hardware: Hardware, form: Form) -> tuple[float, dict[str, int]] | None:
    """The predicted us of a form of ``gemm.cu``, and its constants; ``None`` where it can't be built."""
    tile, teams, slices, cluster, ways, stream_k = form
    pairs, size, warpgroups = spec.activation == "silu_mul", spec.group_size, teams * slices
    wide, units, parts = cluster // ways, math.ceil(spec.k / 128), 128 // size if size < min(128, spec.k) else 1
    most = {128: 3 if spec.m > 128 else 2, 256: 2}.get(tile, 4)
    if (pairs and teams % 2) or warpgroups > most or (tile >= 128 and slices > 1):
        return None
    fold = tile == 256 or (tile == 128 and teams == 3)  # up to 128 rows the weight is not rounded
    if tile == 256 and teams == 1 and stream_k:
        return None  # one warpgroup waits for its own exchange: 43.4 us beside 41.2
    crowded = slices > 1 or cluster > 1 or parts > 1 or spec.zeros or spec.bias or spec.bits == 8
    if tile == 64 and (slices == 3 or (warpgroups == 4 and crowded)):
        return None  # spills
    of_block = math.ceil(units / ways)
    stages = math.ceil(of_block / slices)
    stage = slices * (2 * tile * 128 + teams * _unit_bytes(spec, parts))
    own, rows = tile // ways, {128: 32, 256: 8}.get(tile, 16)
    rest = teams * min(rows, own) * 68 * 4 + (ways * slices - 1) * teams * own * 64 * 4 + 16
    stage = math.ceil(stage / 1024) * 1024
    fits = (hardware.shared_bytes - rest) // (stage + 16)
    ahead = min(8, max(2, stages), fits)  # two at the least: the next tile's first while this one's last is read
    least = 2 if spec.bits == 8 and tile == 256 else 3  # all that fits beside 256 rows of x
    if ahead < min(least, max(2, stages)) or (ways - 1) * of_block >= units:
        return None
    at_once = hardware.sms // cluster if cluster < 4 else hardware.sms // 4 - 3
    turns = math.ceil(spec.m / tile) * math.ceil(spec.n / (64 * teams * wide)) / at_once
    turns = max(turns, 1 / stages) if stream_k else math.ceil(turns)
    start, turn, sums, sent = GEMM_US
    # Each further group of a unit adds its sums up apart: by the count of instructions, a fused multiply-add a cycle.
    unit = UNIT_US[tile][warpgroups - 1] + (parts - 1) * (not fold) * tile * 0.00028
    us = turns * stages * warpgroups * unit
    if spec.bits == 8:
        fetched = slices * (2 * tile * 128 // wide + teams * _unit_bytes(spec, parts))
        us = max(us, turns * stages * fetched / L2_BYTES_US)
    us += math.ceil(turns) * (turn + sums * (ways * slices - 1) + sent * fold * (ways - 1))
    # What a block leaves in memory, and adds again: once, of every block that another's tile ends in.
    us += stream_k * (LEFT_US[0] + LEFT_US[1 + (fold and teams == 3)] * (tile * teams) ** 2 * max(1.0, 1 / turns))
    us *= SHORT_RING if ahead < min(3, stages) else 1.0
    us *= 1 + LONG * us / (us + 600)
    memory = (GEMM_STREAM if spec.bits == 4 else 1.0) * spec.weight_bytes / ((hardware.read_tbps or 1.0) * 1e6) + turn
    config = {
        "TILE_M": tile, "TEAMS": teams, "SLICES": slices, "CLUSTER": cluster, "WAYS": ways,
        "STREAM_K": stream_k, "EARLY": int(tile > 16), "AHEAD": ahead, "PASS_M": rows,
        "SHARED": ahead * (stage + 16) + rest, "GATHERED": int(spec.perm),
    }  # fmt: skip
    slower = 1.06 if spec.zeros or parts >= 4 or spec.dtype == torch.bfloat16 else 1.0  # 12.0 to 12.4 us beside 11.3
    return start + slower * _both(us, memory) + 1.4 * GATHER_US * spec.perm, config


def gemm_shapes(
    spec: Spec, hardware: Hardware, forms: tuple[Form, ...] = ()
) -> list[tuple[float, dict[str, int]]] | str:
    """The predicted us and the constants of ``gemm.cu`` for a request in every form it has, the fastest first, or why
    it can't run it. ``forms``, where given, are those to choose from."""
    pairs, size = spec.activation == "silu_mul", spec.group_size
    if hardware.capability != (9, 0):
        return "needs the wgmma of compute capability 9.0"
    if spec.norm:
        return "no norm before it; composed instead"
    if size not in (16, 32, 64) and size % 128 and size < spec.k:
        return f"group_size {size} is neither 16, 32, 64 nor a multiple of 128"
    if pairs and spec.n % 128:
        return f"silu_mul pairs 64 features of the two halves: N must be a multiple of 128, not {spec.n}"
    tiles = [min(128, max(16, spec.m))] + ([64] if spec.m > 64 else []) + ([256] if spec.m > 128 else [])
    forms = forms or tuple((t, *rest) for t in tiles for rest in GEMM_FORMS)
    built = [found for form in forms if (found := _gemm_form(spec, hardware, form))]
    return sorted(built, key=lambda found: found[0]) or "no form of it fits this GPU's registers and shared memory"


def _gemms(spec: Spec, hardware: Hardware) -> list[Candidate]:
    found = gemm_shapes(spec, hardware)
    if isinstance(found, str):
        return [Candidate("gemm", (), None, found, refused=True)]
    candidates = []
    for us, config in found:
        reason = f"{config['TILE_M']} rows x {64 * config['TEAMS']} features a tile"
        parts = config["WAYS"] * config["SLICES"]
        reason += f", K in {parts} parts" if parts > 1 else ", shared by units of K" if config["STREAM_K"] else ""
        candidates.append(Candidate("gemm", tuple(config.items()), us, reason))
    return candidates


def _whole(spec: Spec, hardware: Hardware, variant: str) -> Candidate:
    """The kernel that has everything around the product in it."""
    config = wgmma_shape(spec, hardware) if variant == "wgmma" else stream_shape(spec, hardware)
    if isinstance(config, str):
        return Candidate(variant, (), None, config, refused=True)
    start, slower = next((us, times) for rows, us, times in (WGMMA if variant == "wgmma" else FEW) if spec.m <= rows)
    turns = spec.n / (64 * PAIRS)  # of all pairs of SMs; the last one is as long when it is not full
    memory = spec.weight_bytes / ((hardware.read_tbps or 1.0) * 1e6) * max(1.0, math.ceil(turns) / turns / 1.03)
    features = 64 * config["TEAMS"] if variant == "wgmma" else 16 * config["STRIPS"] * config["WARPS_N"]
    reason = f"{config['TILE_M']} rows x {features} features a tile, K in {config['CLUSTER'] * config['SLICES']} parts"
    if variant == "wgmma":
        start += 1.2e-4 * max(0, spec.k - 4096) * (spec.m <= 8)  # more of x before the first product
        if config.get("GATHERED"):
            start, reason = start + 1.2 * GATHER_US, f"{reason}, x gathered before"
        elif spec.perm:
            start += 1.4
        if spec.norm:  # of every row in every cluster, while no weights can be used
            start += 1.7 + 0.2 * spec.m + (1.5 + 0.5 * spec.m) * spec.perm
        slower *= WIDE.get(config["CLUSTER"], 1.0) if spec.m <= 32 else 1.0
        if spec.zeros or spec.group_size < 64 or spec.dtype == torch.bfloat16:
            slower *= 1.14
        if spec.activation == "silu_mul":
            slower *= 1.22  # pairs of warpgroups, of which two are a block
        units, slices = math.ceil(spec.k / (128 * config["CLUSTER"])), config["SLICES"]
        slower *= math.ceil(units / slices) * slices / units
        slower *= 1.15 if spec.k % 128 else 1.0  # one block of a cluster has a stage more, and half of it
    elif spec.zeros or spec.perm or spec.group_size < 64 or spec.k % 512:
        start, slower = 1.6 * start, 1.4 * slower  # more loads a chunk than registers to have them on their way in
    if variant == "stream" and spec.norm:
        start += 9.0 * spec.k / 4096  # a warp a row
    if spec.bits == 8:  # as much arithmetic as with 4 bits, for twice the bytes
        slower = max(slower / 2, BYTES_STREAM)
    return Candidate(variant, tuple(config.items()), start + slower * memory, reason)


def _by_digits(spec: Spec, hardware: Hardware, config: dict[str, int] | str) -> Candidate:
    """``digits.cu`` with these constants, predicted."""
    if isinstance(config, str):
        return Candidate("digits", (), None, config, refused=True)
    # Blocks are spread over the GPU evenly, so that one multiprocessor has one more than another.
    blocks = math.ceil(spec.n / (64 * config["TEAMS"])) * config["CLUSTER"]
    each = blocks / hardware.sms
    uneven = math.ceil(each) / each if each > 1 else max(1.0, 1 / (DIGITS_SHARE * each))
    uneven = 1.1 if spec.activation == "silu_mul" else uneven  # several tiles a worker, not all at once
    start, feature, slower, least = DIGITS_US
    slower *= 1.12 if spec.group_size < min(128, spec.k) else 1.0
    memory = spec.weight_bytes / ((hardware.read_tbps or 1.0) * 1e6)
    us = max(least, start + feature * spec.k + slower * uneven * memory) + DIGITS_NORM_US[spec.norm] + 0.4 * spec.perm
    parts = config["CLUSTER"] * config["SLICES"]
    return Candidate(
        "digits", tuple(config.items()), us, f"one row x {64 * config['TEAMS']} features a tile, K in {parts} parts"
    )


def candidates(spec: Spec, hardware: Hardware | None) -> list[Candidate]:
    """Every variant for this request, predicted or refused. ``hardware`` is ``None`` on a CPU."""
    weight_bytes = spec.weight_bytes
    flops = 2 * spec.m * spec.n * spec.k
    # Dequantising writes and reads fp32, about 20 bytes a weight in all; the product is fp32 on CUDA cores.
    read, single = ((hardware.read_tbps or 1.0), 50.0) if hardware else (0.02, 0.1)
    us = 40.0 + 20 * spec.n * spec.k / (read * 1e6) + flops / (single * 1e6)
    reference = Candidate("reference", (), us, "PyTorch: dequantise, then multiply in fp32")
    reason = ""
    if hardware is None:
        reason = "no CUDA device"
    elif hardware.capability < (8, 0):
        reason = f"needs compute capability 8.0, this GPU has {'.'.join(map(str, hardware.capability))}"
    elif spec.dtype not in HALF:
        reason = f"needs float16 or bfloat16 activations, got {spec.dtype}"
    if reason or hardware is None:
        names = ("mma", "digits", "wgmma", "gemm", "stream", *(("composed",) if spec.around else ()))
        return [*(Candidate(name, (), None, reason, refused=True) for name in names), reference]
    tile, slices, slower = next((t for t in TILES if spec.m <= t[0]), TILES[-1])
    slices = min(slices, 4) if spec.perm else slices
    memory = STREAM * slower * weight_bytes / (read * 1e6)
    maths = flops / ((hardware.half_tflops or 300.0) * MATHS * 1e6)
    reason = f"{tile} rows x 64 features a block, {slices} slices along K"
    config = (("TILE_M", tile), ("SLICES", slices))
    mma = Candidate("mma", config, LAUNCH_US + max(memory, maths), reason)
    if spec.bits != 4:
        mma = Candidate("mma", (), None, ONLY_NIBBLES, refused=True)
    whole = [_by_digits(spec, hardware, digits_shape(spec, hardware)), _whole(spec, hardware, "wgmma")]
    whole += [_gemms(spec, hardware)[0], _whole(spec, hardware, "stream")]
    if spec.out_dtype is not None:
        mma, whole[3] = (Candidate(name, (), None, "writes the dtype of x", refused=True) for name in ("mma", "stream"))
    if not spec.around:
        return [mma, *whole, reference]
    # Each kernel around the product starts, and moves about one tensor in and one out.
    moved = 2 * spec.m * max(spec.n, spec.k) * spec.dtype.itemsize / (read * 1e6)
    inner = choose(spec.inner, hardware).pick
    apart = 1 if spec.norm else spec.around
    us = (inner.us or 0.0) + apart * (AROUND_US + moved)
    reason = f"the norm, then {inner.variant}" if spec.norm else f"{inner.variant}, and {apart} kernels after it"
    refused = Candidate("mma", (), None, "no prologue or epilogue; composed instead", refused=True)
    return [refused, *whole, Candidate("composed", (), us, reason), reference]


CONTENDERS, BEHIND = 8, 1.5
"""How many forms of gemm.cu are worth measuring, and how many times slower than the fastest they may be predicted. Of
digits.cu there are few, all measured."""


def contenders(spec: Spec, hardware: Hardware) -> list[Candidate]:
    """What tuning measures: every variant that can run, ``gemm.cu`` and ``digits.cu`` in several forms, but for the
    reference."""
    able = [c for c in candidates(spec, hardware) if not c.refused and c.variant not in ("gemm", "digits", "reference")]
    if not isinstance(digits_shape(spec, hardware), str):
        tried = [digits_form(spec, form) for form in dict.fromkeys(_digit_forms(spec))]
        able += [_by_digits(spec, hardware, config) for config in tried if config["SHARED"] <= hardware.shared_bytes]
    forms = [c for c in _gemms(spec, hardware) if not c.refused][:CONTENDERS]
    return able + [c for c in forms if (c.us or 0.0) <= BEHIND * (forms[0].us or 0.0)]


def key(spec: Spec) -> str:
    """What a measured choice is of: all of a request that changes which kernel is the fastest."""
    named = {name: getattr(spec, name) for name in ("m", "n", "k", "group_size")}
    named |= {"dtype": str(spec.dtype).removeprefix("torch."), "scales": str(spec.scale_dtype).removeprefix("torch.")}
    named |= {name: getattr(spec, name) for name in ("zeros", "perm", "norm", "activation", "residual", "splits")}
    named |= {"bits": spec.bits if spec.bits != 4 else False}
    said = " ".join(f"{name}={value}" for name, value in named.items() if value not in (False, "", ()))
    return f"w4a16 {said}"


def choose(spec: Spec, hardware: Hardware | None) -> Choice:
    """The variant for this request; pure, so it is the same printed anywhere.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    return pick("w4a16_linear", candidates(spec, hardware), spec.variant)
