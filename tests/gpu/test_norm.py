"""The norm kernels on a GPU against float64, over shapes, dtypes, strides and extreme values."""

from __future__ import annotations

import pytest
import torch
from checks import check_case

import nybble
from nybble.ops.norm.cases import DTYPES, FUNCTIONS, NormCase

SHAPES = [
    (1, 1), (4, 8), (3, 33), (5, 64), (7, 768), (1, 2560), (9, 2561), (300, 4096), (2, 5120), (3, 8192),
    (2, 20001), (2, 32768), (2, 65536), (0, 2560), (5, 131072), (70, 2564),
    (999, 128), (1001, 72), (3000, 256), (2, 524288), (3000, 2560),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
@pytest.mark.parametrize("variant", ["cuda", "triton"])
def test_matches_float64(function: str, rows: int, hidden: int, dtype: torch.dtype, variant: str) -> None:
    check_case(NormCase(function, rows, hidden, dtype), "cuda", variant=variant)


@pytest.mark.parametrize("variant", ["cuda", "triton"])
def test_offsets_past_32_bits(variant: str) -> None:
    """The last rows of more elements than an int counts."""
    x = torch.empty(1 << 20, 2056, device="cuda", dtype=torch.float16)
    x[-3:] = torch.randn(3, 2056, device="cuda")
    weight = torch.ones(2056, device="cuda", dtype=torch.float16)
    got = nybble.rmsnorm(x, weight, variant=variant)[-3:]
    assert torch.equal(got, nybble.rmsnorm(x[-3:].clone(), weight, variant="reference"))


@pytest.mark.parametrize("rows", [1, 8, 300])
def test_a_chain_waits_for_each_link(rows: int) -> None:
    """Every kernel is scheduled while the one before it runs, and reads what that one writes; eagerly, in a graph, and
    where another stream joins in between. The same kernels with a pause between them must give the same bits."""
    weight, bias = torch.randn(2, 4096, device="cuda", dtype=torch.float16)
    start = torch.randn(2, rows, 4096, device="cuda", dtype=torch.float16)

    def chain(pause: bool = False) -> list[torch.Tensor]:
        x, residual = start[0], start[1]
        kept = []
        for link in range(24):
            x, residual = nybble.add_layernorm(x, residual, weight, bias)
            if link % 5 == 4:
                x = torch.roll(x, 1, 0)  # a kernel of somebody else's, which knows nothing of overlapping
            if link % 7 == 6:
                other = torch.cuda.Stream()
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    residual = nybble.layernorm_residual(residual, x, weight, bias)
                torch.cuda.current_stream().wait_stream(other)
            if pause:
                torch.cuda.synchronize()
            kept += [x, residual]
        return kept

    want = chain(pause=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(5):
        for got, expected in zip(chain(), want, strict=True):
            assert torch.equal(got, expected)
        for got in captured:
            got.fill_(float("nan"))
        graph.replay()
        for got, expected in zip(captured, want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [4096, 65536])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_large_mean_keeps_its_digits(function: str, hidden: int, dtype: torch.dtype) -> None:
    check_case(NormCase(function, 4, hidden, dtype, mean=1e4), "cuda")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_early_weights_change_no_bit(function: str, dtype: torch.dtype) -> None:
    """2 rows ask for the weights early, 65 late; in 16 bits with as many threads, so the arithmetic is the same."""
    many = NormCase(function, 65, 2560, dtype)
    inputs = many.make("cuda")
    few = {name: t[7:9] if t.dim() == 2 else t for name, t in inputs.items()}
    for whole, part in zip(many.run(inputs), many.run(few), strict=True):
        assert torch.equal(whole[7:9], part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_unaligned_inputs(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(2, 2560, device="cuda").to(dtype)
    strided = torch.randn(6, 2, 2 * 2560, device="cuda").to(dtype)[:, 0, ::2]
    unaligned = torch.randn(6 * 2560 + 1, device="cuda").to(dtype)[1:].view(6, 2560)
    for x in (strided, unaligned):
        got = nybble.layernorm(x, weight, bias)
        assert got.is_contiguous()
        want = torch.nn.functional.layer_norm(x.double(), (2560,), weight.double(), bias.double())
        unit = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
        assert ((got.double() - want).abs() <= unit * want.abs() + 1e-6 * want.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [100, 2560, 65536])
def test_extreme_values_stay_in_their_row(hidden: int, dtype: torch.dtype) -> None:
    weight = torch.ones(hidden, device="cuda", dtype=dtype)
    x = torch.randn(6, hidden, device="cuda").to(dtype)
    clean, _ = nybble.add_rmsnorm(x, torch.zeros_like(x), weight)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 0.0
    x[4] = 65504.0
    normed, h = nybble.add_rmsnorm(x, torch.zeros_like(x), weight)
    layer = nybble.layernorm(x, weight)
    assert torch.equal(normed[[0, 5]], clean[[0, 5]])
    assert torch.equal(h[[0, 3, 4, 5]], x[[0, 3, 4, 5]])
    assert normed[1].isnan().all()
    assert layer[1].isnan().all()
    assert layer[2].isnan().all()
    assert (normed[3] == 0).all()
    assert (layer[3] == 0).all()
    torch.testing.assert_close(normed[4], torch.ones_like(normed[4]), rtol=0, atol=1e-6)
    assert (layer[4] == 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_opcheck(function: str) -> None:
    case = NormCase(function, 3, 48, torch.float16)
    operator = getattr(torch.ops.nybble, function).default
    torch.library.opcheck(operator, (*case.make("cuda").values(), 1e-5, "auto"))


def test_same_errors_as_on_a_cpu() -> None:
    x = torch.zeros(2, 8, device="cuda")
    with pytest.raises(ValueError, match=r"weight: expected device cuda:0, that of x, got cpu"):
        nybble.layernorm(x, torch.ones(8))
    with pytest.raises(
        ValueError, match=r"variant: expected 'auto' or one of \['cuda', 'triton', 'reference'\], got 'fast'"
    ):
        nybble.layernorm(x, torch.ones(8, device="cuda"), variant="fast")
    with pytest.raises(RuntimeError, match="has no backward"):
        nybble.layernorm(x, torch.ones(8, device="cuda", requires_grad=True)).sum().backward()
