"""FlatQuant's kernel on a GPU against float64: sizes, dtypes, forms of the result, strides and extreme values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checks import check_case

import nybble
from nybble.ops.flatquant.cases import DTYPES, SIZES, FlatQuantCase

quantize = nybble.flatquant_dynamic_quantize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 133, 700])
def test_sizes_of_models(m: int, n: int, tokens: int, dtype: torch.dtype) -> None:
    check_case(FlatQuantCase(tokens, m, n, dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n"),
    [
        (1, 1), (1, 8), (8, 1), (7, 9), (9, 24), (17, 40), (33, 200), (80, 250), (130, 130), (256, 64), (256, 128),
        (256, 256),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [3, 300])
def test_every_size(m: int, n: int, tokens: int, dtype: torch.dtype) -> None:
    for packed in {m * n % 8 == 0, False}:
        check_case(FlatQuantCase(tokens, m, n, dtype, packed=packed), "cuda")


VARIANTS = ("mma", "wgmma", "turned", "few")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n"), [*SIZES, (22, 80), (2, 64), (70, 128), (128, 128), (100, 224)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant(m: int, n: int, variant: str, dtype: torch.dtype) -> None:
    """Whatever the cost model would pick: one token, some, and more than run at once."""
    if variant == "turned" and n not in (64, 128):
        pytest.skip("not for such an N")
    for tokens in (1, 9, 1700):
        check_case(FlatQuantCase(tokens, m, n, dtype), "cuda", variant=variant)
    check_case(FlatQuantCase(37, m, n, dtype, packed=False, clip=0.9), "cuda", variant=variant)
    check_case(FlatQuantCase(37, m, n, dtype, clips=3), "cuda", variant=variant)


@pytest.mark.parametrize("tokens", [5, 1000])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("clips", [1, 2, 4])
def test_ratios(tokens: int, packed: bool, clips: int) -> None:
    for m, n in ((64, 64), (86, 128)):
        check_case(FlatQuantCase(tokens, m, n, packed=packed, clip=0.9, clips=clips), "cuda")


@pytest.mark.parametrize("deviation", [1e3, 1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("tokens", [4, 500])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_overflows_or_vanishes(deviation: float, tokens: int, variant: str) -> None:
    case = FlatQuantCase(tokens, 64, 64, deviation=deviation)
    inputs = case.make("cuda")
    if deviation == 1e3:
        inputs.x.clamp_(-60000.0, 60000.0)[1] = 60000.0  # all finite: the outliers' deviation is 20000
        ones = torch.ones(64, 64, dtype=torch.float16, device="cuda") / 8  # 480000 before the second transform
        inputs = inputs._replace(left=ones, right=ones)
    check_case(case, "cuda", variant=variant, inputs=inputs)


@pytest.mark.parametrize(
    ("dtype", "variant"), [*((dtype, "auto") for dtype in DTYPES), *((torch.float16, v) for v in VARIANTS)]
)
@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_zeros_and_rows_that_are_not_finite(dtype: torch.dtype, variant: str, packed: bool) -> None:
    case = FlatQuantCase(400, 64, 64 if variant == "turned" else 80, dtype, packed=packed)
    inputs = case.make("cuda")
    clean, clean_scales = case.run(inputs, variant)
    inputs.x[1], inputs.x[2, 100], inputs.x[3, 0] = 0.0, float("nan"), float("-inf")
    q, scales = case.run(inputs, variant)
    assert scales[1] == 1.0
    assert scales[[2, 3]].isnan().all()
    assert not q[1:4].any()
    assert torch.equal(q[4:], clean[4:])
    assert torch.equal(scales[4:], clean_scales[4:])


def test_strided_and_unaligned_rows() -> None:
    for tokens in (6, 600):
        case = FlatQuantCase(tokens, 64, 64)
        inputs = case.make("cuda")
        want = case.run(inputs, "mma")  # the one that takes rows that begin anywhere
        for start, width in ((0, 8192), (64, 4200), (3, 4099)):
            wide = torch.full((tokens, width), float("nan"), device="cuda", dtype=torch.float16)
            wide[:, start : start + 4096] = inputs.x
            got = quantize(wide[:, start : start + 4096], *inputs[1:], pack_int32=True, variant="mma")
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
        shifted = torch.empty(4097, device="cuda", dtype=torch.float16)[1:].view(64, 64).copy_(inputs.left)
        for x, left in ((inputs.x, shifted), (inputs.x.t().contiguous().t(), inputs.left)):
            assert torch.equal(quantize(x, left, inputs.right, pack_int32=True, variant="mma")[0], want[0])


def test_beside_the_reference_and_offset_binary() -> None:
    case = FlatQuantCase(300, 64, 64, torch.float32)
    inputs = case.make("cuda")
    q, scales = quantize(*inputs, pack_int32=True)
    check_case(case, "cuda", variant="reference", inputs=inputs)
    binary, _ = quantize(*inputs, pack_int32=True, offset_binary=True)
    back = [nybble.dequantize_int4(words, scales, True, offset_binary=words is binary) for words in (q, binary)]
    assert torch.equal(*back)


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_same_in_every_run(variant: str) -> None:
    case = FlatQuantCase(3000, 86, 128)
    inputs = case.make("cuda")
    first = case.run(inputs, variant)
    for _ in range(5):
        for got, want in zip(case.run(inputs, variant), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chain_waits_for_each_link(variant: str) -> None:
    """Transforms and rows that the kernel before has just written; with a pause between them the same bits."""
    inputs = FlatQuantCase(64, 64, 64).make("cuda")

    def chain(pause: bool) -> list[torch.Tensor]:
        x, kept = inputs.x, []
        for _ in range(12):
            q, scales = quantize(x, inputs.left, inputs.right, variant=variant)
            x = nybble.rmsnorm(nybble.dequantize_int4(q, scales), inputs.right.new_ones(4096))
            if pause:
                torch.cuda.synchronize()
            kept += [q, scales]
        return kept

    for got, want in zip(chain(False), chain(True), strict=True):
        assert torch.equal(got, want)


def test_opcheck_graph_and_device_errors() -> None:
    case = FlatQuantCase(70, 64, 64)
    inputs = case.make("cuda")
    torch.library.opcheck(torch.ops.nybble.flatquant.default, (*inputs, [1.0, 0.5], True, False, "auto"))
    case.run(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.run(inputs)
    inputs.x.copy_(case.make("cuda", 1).x)
    graph.replay()
    for got, want in zip(results, case.run(inputs), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="left_trans: expected device cuda:0"):
        quantize(inputs.x, inputs.left.cpu(), inputs.right)
    with pytest.raises(ValueError, match="left_trans: expected a square matrix"):
        quantize(inputs.x, inputs.left[0, 0], inputs.right)
    with pytest.raises(ValueError, match="input_tensor: expected shape"):
        quantize(inputs.x[0, 0], inputs.left, inputs.right)
    with pytest.raises(ValueError, match="clip_ratio"):
        quantize(*inputs, 1.5)
    check_case(replace(case, tokens=9), "cuda")
