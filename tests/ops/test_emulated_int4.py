"""The kernels of FlatQuant and of the W4A4 linear on a CPU: every index, fragment and barrier, against float64."""

from __future__ import annotations

from typing import Any

import emulate
import pytest
import torch
from checks import within

from nybble.ops.flatquant import cost as flat_cost
from nybble.ops.flatquant import op as flat_op
from nybble.ops.flatquant.cases import FlatQuantCase, Inputs
from nybble.ops.flatquant.reference import pack, unpack
from nybble.ops.w4a4 import cost, op
from nybble.ops.w4a4.cases import W4A4Case
from nybble.runtime.choice import Candidate
from nybble.runtime.hardware import H200

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ is needed to compile the kernels for a CPU")

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def quantized(
    case: FlatQuantCase,
    inputs: Inputs,
    blocks: int,
    changed: dict[str, Any],
    *,
    variant: str = "mma",
    offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel writes, in a form with some constants other than the cost model's."""
    spec = case.spec()._replace(offset=offset)
    form = {"mma": flat_cost.shape, "wgmma": flat_cost.hopper, "turned": flat_cost.turned, "few": flat_cost.shared_out}[
        variant
    ](spec, H200)
    assert isinstance(form, dict), form
    config = {**form, **changed, "SHARED": 227 << 10}
    candidate = Candidate(variant, tuple(config.items()))
    q, scales = flat_op._results(inputs.x, case.clips, case.packed)
    q.fill_(0x55), scales.fill_(float("nan"))
    ratios = [*case.clip_ratios, 1.0, 1.0, 1.0][:4]
    emulate.launch(
        flat_op.source(spec, candidate), "qqqqqnndddd", (blocks * (across := flat_op.cluster(spec, candidate)), 1, 1),
        flat_op.threads(spec, candidate), *inputs, q, scales, case.tokens, inputs.x.stride(0), *ratios,
        shared_bytes=int(config["SHARED"]), cluster=across,
    )  # fmt: skip
    return (q, scales) if case.clips > 1 else (q[0], scales[0])


IN_PIECES = {"NW": 16, "WARPS": 2, "PARTS": 2, "GROUPS": 1, "RESIDENT": False}
QUANTIZED: list[tuple[FlatQuantCase, int, dict[str, Any]]] = [
    (FlatQuantCase(3, 64, 64), 2, {}),
    (FlatQuantCase(9, 16, 64), 2, {"NW": 64, "WARPS": 1, "GROUPS": 2}),
    (FlatQuantCase(5, 16, 64, packed=False, clip=0.8), 1, {"NW": 64, "WARPS": 1, "GROUPS": 2}),
    (FlatQuantCase(5, 32, 64, clips=3), 1, {"NW": 32, "WARPS": 2, "GROUPS": 2}),
    (FlatQuantCase(3, 22, 40, BRAIN, packed=False, clip=0.8), 2, {}),  # padding of M and N, runs of 4
    (FlatQuantCase(3, 22, 40, BRAIN), 1, {"BUFFERS": 1}),
    (FlatQuantCase(200, 9, 24), 2, {}),
    (FlatQuantCase(2, 86, 128), 1, {"NW": 32, "WARPS": 4}),
    (FlatQuantCase(5, 7, 9, packed=False), 1, {}),  # nothing aligned
    (FlatQuantCase(5, 8, 9, clips=3, clip=0.95), 2, {}),
    (FlatQuantCase(4, 1, 8), 1, {}),
    (FlatQuantCase(4, 8, 1), 1, {}),
    (FlatQuantCase(3, 20, 48, FLOAT), 2, {}),
    (FlatQuantCase(3, 40, 48, FLOAT, packed=False, clip=0.9), 1, {"NW": 32, "WARPS": 2, "GROUPS": 2, "BUFFERS": 1}),
    (FlatQuantCase(3, 12, 15, FLOAT, packed=False), 1, {}),
    (FlatQuantCase(2, 40, 48), 1, {**IN_PIECES, "BUFFERS": 1}),
    (FlatQuantCase(2, 40, 50, packed=False, clips=2), 1, {**IN_PIECES, "WARPS": 3}),
    (FlatQuantCase(2, 40, 48, FLOAT), 1, {**IN_PIECES, "BUFFERS": 0, "ALIGNED": False}),
]


@pytest.mark.parametrize(("case", "blocks", "changed"), QUANTIZED, ids=lambda value: str(value)[:110])
def test_flatquant(case: FlatQuantCase, blocks: int, changed: dict[str, Any]) -> None:
    inputs = case.make()
    within(case, inputs, quantized(case, inputs, blocks, changed))


HOPPER: list[tuple[FlatQuantCase, int, dict[str, Any]]] = [
    (FlatQuantCase(7, 64, 64), 2, {"GROUPS": 2}),
    (FlatQuantCase(3, 64, 64, packed=False), 2, {"GROUPS": 1, "BUFFERS": 1}),
    (FlatQuantCase(5, 22, 80), 1, {"GROUPS": 2}),  # padding of M; a part of 16 columns
    (FlatQuantCase(5, 9, 80, BRAIN, packed=False, clip=0.8), 1, {"GROUPS": 2, "BUFFERS": 1}),
    (FlatQuantCase(5, 64, 128, BRAIN, clip=0.9), 1, {"GROUPS": 3}),
    (FlatQuantCase(3, 86, 128), 1, {"GROUPS": 2}),  # two warpgroups, warps that have none of the rows
    (FlatQuantCase(3, 70, 128, packed=False, clips=3), 2, {"GROUPS": 1, "BUFFERS": 1}),
    (FlatQuantCase(2, 128, 224), 1, {}),
    (FlatQuantCase(3, 1, 224, packed=False, clips=2), 1, {"GROUPS": 2}),
]


@pytest.mark.parametrize(("case", "blocks", "changed"), HOPPER, ids=lambda value: str(value)[:110])
def test_flatquant_on_hopper(case: FlatQuantCase, blocks: int, changed: dict[str, Any]) -> None:
    inputs = case.make()
    within(case, inputs, quantized(case, inputs, blocks, changed, variant="wgmma"))


TURNED: list[tuple[FlatQuantCase, int, dict[str, Any]]] = [
    (FlatQuantCase(5, 64, 64), 2, {"GROUPS": 2}),
    (FlatQuantCase(3, 86, 128), 1, {"GROUPS": 2}),  # padding of M, and of a product's columns
    (FlatQuantCase(3, 112, 128, BRAIN, packed=False, clip=0.8), 1, {"GROUPS": 1, "BUFFERS": 1}),
    (FlatQuantCase(5, 9, 64, packed=False, clips=3), 1, {"GROUPS": 3}),
    (FlatQuantCase(3, 65, 64, clips=2), 2, {"GROUPS": 1, "BUFFERS": 1}),
]


@pytest.mark.parametrize(("case", "blocks", "changed"), TURNED, ids=lambda value: str(value)[:110])
def test_flatquant_turned(case: FlatQuantCase, blocks: int, changed: dict[str, Any]) -> None:
    inputs = case.make()
    within(case, inputs, quantized(case, inputs, blocks, changed, variant="turned"))


FEW: list[tuple[FlatQuantCase, dict[str, Any]]] = [
    (FlatQuantCase(2, 64, 64), {}),
    (FlatQuantCase(1, 64, 64, packed=False), {"NW": 32}),
    (FlatQuantCase(1, 86, 128), {}),
    (FlatQuantCase(1, 22, 80, BRAIN, packed=False, clip=0.8), {}),
    (FlatQuantCase(2, 2, 16, clips=3), {}),
    (FlatQuantCase(1, 128, 224, BRAIN), {}),
]


@pytest.mark.parametrize(("case", "changed"), FEW, ids=lambda value: str(value)[:110])
def test_flatquant_of_few_tokens(case: FlatQuantCase, changed: dict[str, Any]) -> None:
    inputs = case.make()
    within(case, inputs, quantized(case, inputs, case.tokens, changed, variant="few"))


@pytest.mark.parametrize("deviation", [1e3, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("nw", [16, 64, "wgmma", "turned", "few"])
def test_nothing_overflows_or_vanishes(deviation: float, nw: int | str) -> None:
    """fp16 whose intermediate passes 65504, and down to subnormals: the power of two between the products."""
    case = FlatQuantCase(3, 16, 64, deviation=deviation)
    inputs = case.make()
    if deviation == 1e3:
        inputs.x[1] = 60000.0
        # 480000 before the second transform, and 240000 where the left one is the first
        right = torch.ones(64, 64, dtype=HALF) / 8
        inputs = inputs._replace(right=right, left=torch.ones(16, 16, dtype=HALF) / 4)
    if isinstance(nw, str):
        within(case, inputs, quantized(case, inputs, case.tokens, {}, variant=nw))
    else:
        within(case, inputs, quantized(case, inputs, 1, {"NW": nw, "WARPS": 64 // nw}))


@pytest.mark.parametrize("variant", ["mma", "wgmma", "turned", "few"])
def test_offset_binary(variant: str) -> None:
    case = FlatQuantCase(3, 16, 64)
    inputs = case.make()
    plain, binary = (
        quantized(case, inputs, case.tokens, {}, variant=variant, offset=offset)[0] for offset in (False, True)
    )
    assert torch.equal(pack(unpack(plain), offset=True), binary)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("dtype", "variant"),
    [
        (HALF, "mma"),
        (BRAIN, "mma"),
        (FLOAT, "mma"),
        (HALF, "wgmma"),
        (BRAIN, "wgmma"),
        (HALF, "turned"),
        (BRAIN, "turned"),
        (HALF, "few"),
        (BRAIN, "few"),
    ],
    ids=str,
)
def test_rows_of_zeros_and_rows_that_are_not_finite(dtype: torch.dtype, variant: str, packed: bool) -> None:
    case = FlatQuantCase(5, 16, 32 if variant == "mma" else 64, dtype, packed=packed, clip=0.9)
    inputs = case.make()
    clean, clean_scales = quantized(case, inputs, case.tokens, {}, variant=variant)
    inputs.x[1], inputs.x[2, 100], inputs.x[3, 0] = 0.0, float("nan"), float("-inf")
    q, scales = quantized(case, inputs, case.tokens, {}, variant=variant)
    assert scales[1] == 1.0
    assert scales[[2, 3]].isnan().all()
    assert not q[1:4].any()
    assert torch.equal(q[[0, 4]], clean[[0, 4]])
    assert torch.equal(scales[[0, 4]], clean_scales[[0, 4]])


@pytest.mark.parametrize("variant", ["mma", "wgmma", "turned", "few"])
def test_rows_apart(variant: str) -> None:
    case = FlatQuantCase(4, 8, 64)
    inputs = case.make()
    wide = torch.full((4, 640), float("nan"), dtype=HALF)
    wide[:, 64:576] = inputs.x
    apart = inputs._replace(x=wide[:, 64:576])
    within(case, inputs, quantized(case, apart, case.tokens, {}, variant=variant))


# A form (TILE_M, TEAMS, SLICES, CLUSTER), stages ahead, and how many clusters.
MULTIPLIED: list[tuple[W4A4Case, cost.Form, int, int]] = [
    (W4A4Case(5, 72, 144), (8, 1, 1, 1), 2, 1),
    (W4A4Case(1, 128, 1024), (8, 1, 4, 1), 2, 1),
    (W4A4Case(20, 136, 400, BRAIN, bias=True), (16, 1, 3, 1), 2, 2),
    (W4A4Case(40, 512, 256), (32, 4, 1, 1), 2, 1),
    (W4A4Case(70, 264, 640, bias=True), (64, 2, 2, 1), 2, 2),
    (W4A4Case(130, 128, 512), (128, 1, 1, 2), 3, 1),
    (W4A4Case(300, 200, 400, BRAIN, bias=True), (128, 2, 1, 2), 2, 2),
    (W4A4Case(300, 200, 512), (256, 2, 1, 2), 3, 1),
    (W4A4Case(257, 72, 272), (256, 1, 1, 1), 2, 2),
    # One stage a tile, and several tiles: the ring, of the size that is chosen, must hold the next tile's as well.
    (W4A4Case(40, 200, 128), (32, 1, 1, 1), 0, 1),
    (W4A4Case(300, 264, 256), (64, 1, 2, 1), 0, 2),
    (W4A4Case(300, 264, 128), (128, 1, 1, 2), 0, 1),
]


@pytest.mark.parametrize(("case", "form", "ahead", "clusters"), MULTIPLIED, ids=lambda value: str(value)[:80])
def test_w4a4(case: W4A4Case, form: cost.Form, ahead: int, clusters: int) -> None:
    spec, inputs = case.spec(), case.make()
    found = cost.shape(spec, H200, form)
    assert found is not None
    config = found[1] | {"AHEAD": ahead or found[1]["AHEAD"], "SHARED": 227 << 10}
    tile, teams, slices, cluster = form
    y = torch.full((case.m, case.n), float("nan"), dtype=case.dtype)
    emulate.launch(
        op.source(spec, Candidate("gemm", tuple(config.items()))), "tqqqqqn", (clusters * cluster, 1, 1),
        128 * teams * slices + 128, (inputs.q_x.view(torch.int16), tile // cluster), *inputs.weight.tensors,
        inputs.scale_x, inputs.bias, y, case.m, shared_bytes=config["SHARED"], cluster=cluster,
    )  # fmt: skip
    within(case, inputs, (y,))
