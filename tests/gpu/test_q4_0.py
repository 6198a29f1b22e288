"""Q4_0 times Q8_1 on a GPU: against float64 on the same quantised activations, and against the bits of the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from checks import check_case

import nybble
from nybble.formats.gguf_q4_0 import unpack_q8_1
from nybble.formats.tiles import PackedWeight
from nybble.ops.q4_0 import cost, op
from nybble.ops.q4_0.cases import KINDS, Q4Case, activations
from nybble.runtime.choice import Candidate
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import current

FUSED, GIVEN = "gemm_q4_0_fp16", "gemm_q4_0_q8_1"
PRODUCTS = (FUSED, GIVEN)


def hopper() -> None:
    card = current()
    if card is None or card.capability != (9, 0):
        pytest.skip("q4_0.cu is for Hopper")


def form_id(form: cost.Form) -> str:
    return "-".join(map(str, form))


@pytest.mark.parametrize("exact_sum", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", cost.FLOATS, ids=str)
def test_quantizing_gives_the_bits_of_the_reference(dtype: torch.dtype, kind: str, exact_sum: bool) -> None:
    for m, k in ((1, 32), (3, 4096), (257, 224)):
        x = activations(kind, m, k, dtype, "cpu", 3)
        got = unpack_q8_1(nybble.quantize_q8_1(x.cuda(), exact_sum=exact_sum).cpu())
        want = unpack_q8_1(nybble.quantize_q8_1(x, exact_sum=exact_sum))
        assert torch.equal(got.q, want.q)
        assert torch.equal(got.d, want.d)
        if not exact_sum:
            assert torch.equal(got.s, want.s)
        else:  # added up in another order
            error = (got.s.double() - want.s.double()).abs()
            bound = 2.0**-18 * x.double().unflatten(-1, (-1, 32)).abs().sum(-1)
            assert (error <= 2.0**-10 * want.s.double().abs() + bound + 2.0**-24).all()


@pytest.mark.parametrize("function", PRODUCTS)
@pytest.mark.parametrize("dtype", cost.FLOATS, ids=str)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 8, 9, 16, 17, 32, 33, 64, 65, 200, 1030])
def test_every_number_of_rows(m: int, dtype: torch.dtype, function: str) -> None:
    hopper()
    for n, k in ((256, 1024), (72, 224), (4096, 4096), (136, 8224)):
        check_case(Q4Case(m, n, k, dtype, function=function), "cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", cost.FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 12, 70])
def test_every_result_and_kind_of_activations(m: int, out: torch.dtype, kind: str) -> None:
    hopper()
    for function in PRODUCTS:
        check_case(Q4Case(m, 200, 736, torch.float16, out, kind, function), "cuda")


@pytest.mark.parametrize("m", [1, 16, 64, 512])
@pytest.mark.parametrize(("n", "k"), [(12288, 4096), (4096, 14336), (14336, 4096), (8192, 28672)])
def test_shapes_of_real_models(n: int, k: int, m: int) -> None:
    hopper()
    check_case(Q4Case(m, n, k, function=FUSED), "cuda")


@pytest.mark.parametrize("form", [*cost.ONCE, *cost.FORMS], ids=form_id)
def test_every_form(form: cost.Form) -> None:
    """Several jobs a worker, rows that change within one, the last tile not full, parts of K of different lengths."""
    hopper()
    card = current()
    assert card is not None
    for m, n, k in ((form.tile_m - 3, 12296, 1120), (3 * form.tile_m + 1, 1032, 4064)):
        for function, variant in ((FUSED, "fused"), (GIVEN, "separate")):
            case = Q4Case(m, n, k, function=function)
            candidate = Candidate(variant, tuple(cost.constants(form, k).items()))
            ready = op.make(case.spec(), 0, candidate)
            inputs = case.make("cuda")
            truth = case.truth(inputs)
            y = op.execute(ready, inputs.x, inputs.weight, case.out_dtype)
            assert ((y.double() - truth[0]).abs() <= case.tolerance(inputs, truth)[0]).all()


def test_a_form_beyond_shared_memory_is_refused_with_its_bytes() -> None:
    hopper()
    form = cost.Form(64, 2, 1, 1, 2, 4, 16, 2)
    case = Q4Case(64, 256, 28672)
    need = cost.shared_bytes(form, case.k)
    with pytest.raises(UnsupportedError, match=f"64 rows of 28672 features need {need} bytes of shared memory a block"):
        op.make(case.spec(), 0, Candidate("fused", tuple(cost.constants(form, case.k).items())))


@pytest.mark.parametrize("m", [1, 7, 16, 40, 100, 600])
@pytest.mark.parametrize("variant", ["auto", "fused", "separate", "w4a16", "reference"])
def test_every_way_is_the_product_within_what_quantising_takes(variant: str, m: int) -> None:
    hopper()
    for out in (torch.float32, torch.float16):
        check_case(Q4Case(m, 328, 1024, out_dtype=out), "cuda", variant=variant)


def test_fused_and_separate_give_the_same_bits() -> None:
    hopper()
    for m in (1, 16):  # the same tile: sums in the same order
        inputs = Q4Case(m, 4096, 4096, kind="outliers").make("cuda")
        form = next(f for f in cost.FORMS if f.tile_m == (8 if m == 1 else 16) and f.cluster == 2)
        config = tuple(cost.constants(form, 4096).items())
        spec = Q4Case(m, 4096, 4096).spec()
        a, b = (
            op.execute(op.make(spec, 0, Candidate(v, config)), inputs.x, inputs.weight, torch.float32)
            for v in ("fused", "separate")
        )
        assert torch.equal(a, b)


def test_what_is_quantised_already_is_only_multiplied() -> None:
    hopper()
    case = Q4Case(5, 256, 512, function=GIVEN)
    inputs = case.make("cuda")
    assert torch.equal(nybble.q4_0_linear(inputs.x, inputs.weight), case.run(inputs)[0])
    with pytest.raises(UnsupportedError, match="the activations are quantised already"):
        nybble.q4_0_linear(inputs.x, inputs.weight, variant="fused")


def test_strided_and_unaligned_inputs() -> None:
    hopper()
    case = Q4Case(6, 128, 256, function=FUSED)
    inputs = case.make("cuda")
    want = case.run(inputs)[0]
    wide = torch.zeros(6, 512, device="cuda", dtype=torch.float16)
    wide[:, ::2] = inputs.x
    shifted = torch.zeros(6 * 256 + 1, device="cuda", dtype=torch.float16)[1:].view(6, 256)
    shifted.copy_(inputs.x)
    for x in (wide[:, ::2], shifted, inputs.x.view(2, 3, 256)):
        assert torch.equal(nybble.gemm_q4_0_fp16(x, inputs.weight).view(6, 128), want)
        blocks = nybble.quantize_q8_1(x)
        assert torch.equal(nybble.gemm_q4_0_q8_1(blocks, inputs.weight).view(6, 128), want)


@pytest.mark.parametrize("m", [6, 20, 40, 100])
@pytest.mark.parametrize("variant", ["fused", "separate"])
def test_extreme_values_stay_in_their_row(variant: str, m: int) -> None:
    hopper()
    inputs = Q4Case(m, 192, 512).make("cuda")
    run = partial(nybble.q4_0_linear, weight=inputs.weight, variant=variant)
    clean = run(inputs.x)
    inputs.x[1, 7], inputs.x[2, 9], inputs.x[3] = float("nan"), float("inf"), 0.0
    got = run(inputs.x)
    others = [0, 4, 5, *range(6, m)]
    assert torch.equal(got[others], clean[others])
    assert got[1].isnan().all()
    assert not got[2].isfinite().any()
    assert (got[3] == 0).all()


@pytest.mark.parametrize("function", PRODUCTS)
def test_the_same_bits_from_run_to_run(function: str) -> None:
    hopper()
    for m, n, k in ((1, 4096, 4096), (16, 12288, 4096), (33, 4096, 8192), (300, 1024, 4096)):
        case = Q4Case(m, n, k, function=function)
        inputs = case.make("cuda")
        want = case.run(inputs)[0].clone()
        assert all(torch.equal(case.run(inputs)[0], want) for _ in range(30))


@pytest.mark.parametrize("function", PRODUCTS)
def test_a_weight_that_was_just_written(function: str) -> None:
    """The kernel asks for weights before the previous kernel is complete, unless that may have written them."""
    hopper()
    case = Q4Case(1, 4096, 4096, function=function)
    first, second = case.make("cuda", 0), case.make("cuda", 1)
    want = [case.run(replace(first, weight=inputs.weight))[0].clone() for inputs in (first, second)]
    weight = replace(first.weight, qweight=first.weight.qweight.clone(), scales=first.weight.scales.clone())
    for _ in range(20):
        for source, expected in zip((second, first), reversed(want), strict=True):
            weight.qweight.copy_(source.weight.qweight)
            weight.scales.copy_(source.weight.scales)
            assert torch.equal(case.run(replace(first, weight=weight))[0], expected)


@pytest.mark.parametrize("variant", ["fused", "separate", "auto"])
@pytest.mark.parametrize("m", [1, 8, 40])
def test_a_chain_waits_for_each_link(m: int, variant: str) -> None:
    """Kernels that may overlap the one before, eagerly and in a graph: the same bits as with a pause between them."""
    hopper()
    there, back = Q4Case(m, 2048, 512).make("cuda"), Q4Case(m, 512, 2048).make("cuda", seed=7)

    def chain(pause: bool = False) -> list[torch.Tensor]:
        x, kept = there.x, []
        for _ in range(12):
            for weight in (there.weight, back.weight):
                x = nybble.q4_0_linear(x, weight, out_dtype=torch.float16, variant=variant)
                if pause:
                    torch.cuda.synchronize()
                kept.append(x)
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


def test_two_streams_share_no_memory() -> None:
    hopper()
    inputs = [Q4Case(16, 4096, 4096).make("cuda", seed) for seed in range(2)]
    want = [nybble.q4_0_linear(i.x, i.weight, variant="separate") for i in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        got = []
        for stream, i in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(nybble.q4_0_linear(i.x, i.weight, variant="separate"))
        torch.cuda.synchronize()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_opcheck() -> None:
    inputs = Q4Case(3, 72, 224).make("cuda")
    weight = inputs.weight
    for variant in ("auto", "fused", "separate"):
        arguments = (inputs.x, weight.qweight, weight.scales, 224, 72, torch.float32, variant)
        torch.library.opcheck(torch.ops.nybble.q4_0.default, arguments)
    torch.library.opcheck(torch.ops.nybble.quantize_q8_1.default, (inputs.x, False))


def test_compiled_without_a_break() -> None:
    hopper()
    inputs = Q4Case(3, 256, 512).make("cuda")

    def run(x: torch.Tensor, weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
        return nybble.q4_0_linear(x, weight), nybble.gemm_q4_0_q8_1(nybble.quantize_q8_1(x), weight)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for m in (3, 5):
        x = inputs.x[:1].expand(m, -1).contiguous()
        for got, want in zip(compiled(x, inputs.weight), run(x, inputs.weight), strict=True):
            assert torch.equal(got, want)
