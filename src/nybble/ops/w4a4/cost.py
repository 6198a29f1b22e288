"""Which tile of the W4A4 kernel runs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.choice import choose as pick
from nybble.runtime.hardware import Hardware

HALF = (torch.float16, torch.bfloat16)
Form = tuple[int, int, int, int]
"""TILE_M, TEAMS, SLICES, CLUSTER."""
FORMS: tuple[Form, ...] = (
    *(
        (tile, teams, slices, 1)
        for tile in (8, 16, 32, 64)
        for teams, slices in ((1, 4), (1, 3), (2, 2), (3, 1), (4, 1))
    ),
    *((tile, teams, 1, cluster) for tile in (128, 256) for teams in (1, 2) for cluster in (1, 2)),
)
START_US, TURN_US, STREAM = 2.0, 0.75, 1.1
"""A call, the results of a tile, and how many times longer than a plain read the weights take: fitted to the rows of
results/h200/w4a4.jsonl, as are those below; all within 9 % of what they predict."""
UNPACK_US, ROW_US = 0.06, 1.15e-3
"""Of 64 output by 128 input features: unpacking them, and a row times them. 8192 products, at 4096 a cycle and
multiprocessor, are two cycles at 1.8 GHz."""
FILLING = 2.1
"""Less than one in so many of the multiprocessors can't fill the memory's bandwidth."""


class Spec(NamedTuple):
    """All that affects compilation or choice.

    Attributes:
        m: rows, rounded up to a power of two. n: output, k: input features.
        dtype: of the result and the bias. bias: there is one. variant: ``"auto"`` or a name.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    bias: bool
    variant: str


def shape(spec: Spec, hardware: Hardware, form: Form) -> tuple[float, dict[str, int]] | None:
    """The predicted us of a form and its constants; ``None`` where it can't be built."""
    tile, teams, slices, cluster = form
    units = math.ceil(spec.k / 128)
    stages = math.ceil(units / slices)
    stage = slices * (tile * 128 + teams * 4096)
    rest = teams * min(tile, 64) * 128 + (slices - 1) * teams * tile * 256
    fits = (hardware.shared_bytes - rest) // (stage + 16)
    ahead = min(8, max(2, stages), fits)  # two at the least: the next tile's first while this one's last is read
    if ahead < min(3, max(2, stages)) or stage % 1024:
        return None
    tiles = math.ceil(spec.m / tile) * math.ceil(spec.n / (64 * teams * cluster))
    turns = math.ceil(tiles / (hardware.sms // cluster))
    # One warpgroup alone can't unpack and multiply at the same time.
    unit = UNPACK_US * (max(teams, 2) if tile >= 128 else teams) + ROW_US * teams * tile
    if tile >= 128 and cluster == 1:
        unit *= 1.04  # each block fetches all of x itself
    us = turns * (stages * slices * unit + TURN_US)
    alone = min(1.0, FILLING * min(tiles * cluster, hardware.sms) / hardware.sms)
    memory = STREAM * spec.n * spec.k / 2 / ((hardware.read_tbps or 1.0) * 1e6) / alone
    config = {
        "TILE_M": tile, "TEAMS": teams, "SLICES": slices, "CLUSTER": cluster, "AHEAD": ahead,
        "SHARED": ahead * (stage + 16) + rest,
    }  # fmt: skip
    return START_US + max(us, memory + TURN_US), config


def _gemms(spec: Spec, hardware: Hardware) -> list[Candidate]:
    tile = min(256, max(8, spec.m))
    wanted = {tile} | ({128} if spec.m > 64 else set())
    built = [found for form in FORMS if form[0] in wanted and (found := shape(spec, hardware, form))]
    candidates = []
    for us, config in sorted(built, key=lambda found: found[0]):
        reason = f"{config['TILE_M']} rows x {64 * config['TEAMS']} features a tile"
        reason += f", K in {config['SLICES']} parts" if config["SLICES"] > 1 else ""
        candidates.append(Candidate("gemm", tuple(config.items()), us, reason))
    return candidates


def candidates(spec: Spec, hardware: Hardware | None) -> list[Candidate]:
    """Every variant for this request, predicted or refused. ``hardware`` is ``None`` on a CPU."""
    flops = 2 * spec.m * spec.n * spec.k
    single = 50.0 if hardware else 0.1
    us = 40.0 + 40 * spec.n * spec.k / ((hardware.read_tbps or 1.0) * 1e6 if hardware else 2e4) + flops / (single * 1e6)
    reference = Candidate("reference", (), us, "PyTorch: unpack, then multiply in fp32 or fp64")
    reason = ""
    if hardware is None:
        reason = "no CUDA device"
    elif hardware.capability != (9, 0):
        reason = "needs the wgmma of compute capability 9.0"
    elif spec.dtype not in HALF:
        reason = f"needs float16 or bfloat16 results, got {spec.dtype}"
    elif spec.k % 16:
        reason = f"the copy engine needs K to be a multiple of 16, not {spec.k}"
    if reason or hardware is None:
        return [Candidate("gemm", (), None, reason, refused=True), reference]
    return [*_gemms(spec, hardware), reference]


def choose(spec: Spec, hardware: Hardware | None) -> Choice:
    """The variant for this request; pure, so it is the same printed anywhere.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    return pick("w4a4_linear", candidates(spec, hardware), spec.variant)
