"""The 4-bit linear's kernels on a GPU against float64, over rows, features, groups and every option of the format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checks import check_case

import nybble
from nybble.formats.tiles import PackedWeight
from nybble.ops.w4a16.cases import W4A16Case

HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("m", [0, 1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 200, 1030])
def test_every_number_of_rows(m: int, dtype: torch.dtype) -> None:
    check_case(W4A16Case(m, 256, 1024, 128, dtype), "cuda", variant="mma")


@pytest.mark.parametrize("m", [1, 12, 31, 70])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("act_order", [False, True])
def test_every_group_with_every_option(group_size: int, act_order: bool, m: int) -> None:
    case = W4A16Case(m, 192, 1024, group_size, symmetric=False, act_order=act_order, bias=True)
    for dtype in HALF:
        check_case(replace(case, dtype=dtype), "cuda", variant="mma")


@pytest.mark.parametrize("m", [1, 16, 70])
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [
        (8, 8, -1), (8, 16, 16), (72, 200, 128), (64, 64, 64), (136, 264, 32), (1000, 520, -1), (520, 8256, 64),
        (8200, 264, 128),
    ],
)  # fmt: skip
def test_features_off_the_tile(n: int, k: int, group_size: int, m: int) -> None:
    check_case(W4A16Case(m, n, k, group_size, symmetric=False, bias=True), "cuda", variant="mma")


@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (12288, 4096), (11008, 4096)])
def test_shapes_of_real_models(n: int, k: int, m: int) -> None:
    check_case(W4A16Case(m, n, k), "cuda")


def test_scales_of_another_dtype() -> None:
    """fp16 scales beside bf16 activations, as checkpoints have them: the scale is not rounded again."""
    check_case(W4A16Case(5, 128, 512, 128, torch.bfloat16, scale_dtype=torch.float16), "cuda", variant="mma")
    check_case(W4A16Case(5, 128, 512, 128, torch.float16, scale_dtype=torch.float32), "cuda", variant="mma")


def test_float32_activations_run_the_reference() -> None:
    check_case(W4A16Case(5, 128, 512, 128, torch.float32), "cuda")
    with pytest.raises(nybble.runtime.errors.UnsupportedError, match="needs float16 or bfloat16 activations"):
        check_case(W4A16Case(5, 128, 512, 128, torch.float32), "cuda", variant="mma")


def test_packing_on_the_gpu_is_the_same() -> None:
    quantized = W4A16Case(1, 136, 520, 64, symmetric=False, act_order=True).quantized("cpu")
    here = PackedWeight.from_quantized(quantized)
    moved = nybble.QuantizedWeight(
        quantized.q.cuda(), quantized.zeros.cuda(), quantized.scales.cuda(), 64, quantized.g_idx.cuda()
    )
    there = PackedWeight.from_quantized(moved)
    for ours, theirs in zip(here.tensors, there.tensors, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs.cpu())


def test_strided_and_unaligned_inputs() -> None:
    case = W4A16Case(6, 128, 256)
    inputs = case.make("cuda")
    want = case.run(inputs)[0]
    wide = torch.zeros(6, 512, device="cuda", dtype=torch.float16)
    wide[:, ::2] = inputs.x
    shifted = torch.zeros(6 * 256 + 1, device="cuda", dtype=torch.float16)[1:].view(6, 256)
    shifted.copy_(inputs.x)
    for x in (wide[:, ::2], shifted, inputs.x.view(2, 3, 256)):
        assert torch.equal(nybble.w4a16_linear(x, inputs.weight).view(6, 128), want)


@pytest.mark.parametrize("m", [6, 20, 40, 100])
def test_extreme_values_stay_in_their_row(m: int) -> None:
    case = W4A16Case(m, 192, 512, 64, symmetric=False)
    inputs = case.make("cuda")
    clean = case.run(inputs)[0]
    inputs.x[1, 7], inputs.x[2, 9], inputs.x[3] = float("nan"), float("inf"), 0.0
    got = case.run(inputs)[0]
    others = [0, 4, 5, *range(6, m)]
    assert torch.equal(got[others], clean[others])
    assert got[1].isnan().all()
    assert not got[2].isfinite().any()
    assert (got[3] == 0).all()
    inputs = case.make("cuda")
    inputs.x.fill_(65504.0)
    check_case(replace(case, dtype=torch.bfloat16), "cuda", inputs=replace(inputs, x=inputs.x.bfloat16()))


def test_results_are_the_same_in_every_run() -> None:
    case = W4A16Case(40, 512, 2048)
    inputs = case.make("cuda")
    first = case.run(inputs)[0]
    for _ in range(5):
        assert torch.equal(case.run(inputs)[0], first)


def test_opcheck() -> None:
    inputs = W4A16Case(3, 72, 200, 32, symmetric=False, act_order=True, bias=True).make("cuda")
    arguments = (inputs.x, *inputs.weight.tensors, inputs.bias, 200, 72, 32, "auto")
    torch.library.opcheck(torch.ops.nybble.w4a16.default, arguments)
