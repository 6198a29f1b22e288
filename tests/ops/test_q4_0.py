"""Q4_0 times Q8_1 on a CPU: the reference against float64, accuracy, the choice, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import check_case

import nybble
from nybble.formats.gguf_q4_0 import quantize_q8_1
from nybble.formats.tiles import PackedWeight
from nybble.ops.case import relative_error
from nybble.ops.q4_0 import cost, op
from nybble.ops.q4_0.cases import FUNCTIONS, KINDS, Q4Case
from nybble.ops.w4a16.cases import W4A16Case
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import A100, H200

SMALL = Q4Case(3, 72, 224)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", cost.FLOATS, ids=str)
def test_the_reference_is_the_product(dtype: torch.dtype, function: str, kind: str) -> None:
    for out in cost.FLOATS:
        check_case(Q4Case(5, 72, 352, dtype, out, kind, function))
    check_case(Q4Case(0, 72, 352, dtype, torch.float32, kind, function))
    check_case(Q4Case(2, 8, 32, dtype, torch.float32, kind, function))


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    # Of normal values a block's largest is 2.15 deviations at the median, so that half a step is 0.0085 of one:
    # uniformly spread 0.0085 / sqrt(3) = 0.49 %, and the mean over blocks is a little more.
    [("normal", 0.0045, 0.0062), ("uniform", 0.0030, 0.0042), ("outliers", 0.006, 0.015), ("zeros", 0.0045, 0.0062)],
)
def test_how_much_eight_bits_cost(kind: str, low: float, high: float) -> None:
    case = Q4Case(16, 256, 4096, torch.float32, kind=kind)
    inputs = case.make()
    assert low < relative_error(case.run(inputs), case.truth(inputs)) < high


def test_leading_dimensions_and_strides() -> None:
    inputs = SMALL.make()
    want = SMALL.run(inputs)[0]
    wide = torch.zeros(3, 448, dtype=torch.float16)
    wide[:, ::2] = inputs.x
    for x in (wide[:, ::2], inputs.x.view(3, 1, 224)):
        assert torch.equal(nybble.q4_0_linear(x, inputs.weight).view(3, 72), want)
        blocks = nybble.quantize_q8_1(x)
        assert blocks.shape == (*x.shape[:-1], 7, 36)
        assert torch.equal(nybble.gemm_q4_0_q8_1(blocks, inputs.weight).view(3, 72), want)
    assert nybble.q4_0_linear(inputs.x[0], inputs.weight).shape == (72,)


def test_extreme_values_stay_in_their_row() -> None:
    inputs = Q4Case(6, 72, 224).make()
    clean = nybble.q4_0_linear(inputs.x, inputs.weight)
    inputs.x[1, 7], inputs.x[2, 9], inputs.x[3] = float("nan"), float("inf"), 0.0
    got = nybble.q4_0_linear(inputs.x, inputs.weight)
    assert torch.equal(got[[0, 4, 5]], clean[[0, 4, 5]])
    assert got[1].isnan().all()
    assert not got[2].isfinite().any()
    assert (got[3] == 0).all()


def test_a_unit_outlier_moves_only_its_own_block() -> None:
    x = torch.ones(1, 96)
    x[0, 40] = 1000.0
    q = quantize_q8_1(x).q[0]
    assert q[0].tolist() == q[2].tolist() == [127] * 32
    assert q[1].tolist().count(0) == 31


def of(case: W4A16Case) -> PackedWeight:
    return PackedWeight.from_quantized(case.quantized())


def refusals() -> list[tuple[type[Exception], str, dict[str, Any]]]:
    inputs = SMALL.make()
    q4 = W4A16Case(1, 72, 224, 32)
    return [
        (TypeError, r"x: expected float16, bfloat16, float32, or uint8 blocks of Q8_1, got torch\.int64",
         {"x": inputs.x.long()}),
        (ValueError, r"x: expected shape \[..., in_features\] = \[..., 224\], got \[3, 192\]",
         {"x": inputs.x[:, :192]}),
        (ValueError, r"x: expected shape", {"x": torch.tensor(1.0)}),
        (ValueError, r"x: expected blocks of Q8_1, \[..., in_features / 32, 36\] = \[..., 7, 36\], got \[3, 6, 36\]",
         {"x": nybble.quantize_q8_1(inputs.x)[:, :6]}),
        (TypeError, r"out_dtype: expected torch\.float32, torch\.float16 or torch\.bfloat16, got torch\.int8",
         {"out_dtype": torch.int8}),
        (TypeError, "weight: expected a nybble.PackedWeight, got Tensor", {"weight": inputs.x}),
        (ValueError, r"weight\.group_size: expected 32, got 64", {"weight": of(replace(q4, group_size=64))}),
        (ValueError, r"weight\.in_features: expected a multiple of 32, got 216", {"weight": of(replace(q4, k=216))}),
        (ValueError, r"weight\.qzeros: expected None", {"weight": of(replace(q4, symmetric=False))}),
        (ValueError, r"weight\.perm: expected None", {"weight": of(replace(q4, act_order=True))}),
        (TypeError, r"weight\.scales: expected torch\.float16, got torch\.float32",
         {"weight": of(replace(q4, scale_dtype=torch.float32))}),
        (ValueError, "weight.qweight: expected device meta, that of x, got cpu", {"x": inputs.x.to("meta")}),
        (ValueError, "variant: expected 'auto' or one of", {"variant": "fastest"}),
        (UnsupportedError, "fused: no CUDA device", {"variant": "fused"}),
    ]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), refusals(), ids=lambda value: str(value)[:40])
def test_what_is_refused_says_why(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    inputs = SMALL.make()
    arguments: dict[str, Any] = {"x": inputs.x, "weight": inputs.weight, **change}
    with pytest.raises(error, match=message):
        nybble.q4_0_linear(arguments.pop("x"), arguments.pop("weight"), **arguments)


def test_the_other_functions_refuse_what_is_not_theirs() -> None:
    inputs = SMALL.make()
    blocks = nybble.quantize_q8_1(inputs.x)
    with pytest.raises(
        TypeError, match=r"gemm_q4_0_q8_1: q8_1: expected torch\.uint8 blocks of Q8_1, got torch\.float16"
    ):
        nybble.gemm_q4_0_q8_1(inputs.x, inputs.weight)
    with pytest.raises(TypeError, match=r"gemm_q4_0_fp16: x: expected float16, bfloat16 or float32, got torch\.uint8"):
        nybble.gemm_q4_0_fp16(blocks, inputs.weight)
    with pytest.raises(TypeError, match=r"quantize_q8_1: x: expected float16, bfloat16 or float32, got torch\.int32"):
        nybble.quantize_q8_1(inputs.x.int())
    with pytest.raises(ValueError, match=r"quantize_q8_1: x: expected shape \[..., K\] with K a multiple of 32"):
        nybble.quantize_q8_1(inputs.x[:, :40])


def test_a_backward_raises() -> None:
    inputs = Q4Case(3, 72, 224, torch.float32).make()
    y = nybble.q4_0_linear(inputs.x.requires_grad_(), inputs.weight)
    with pytest.raises(RuntimeError, match="nybble::q4_0 has no backward"):
        y.sum().backward()


def test_opcheck() -> None:
    inputs = SMALL.make()
    weight, blocks = inputs.weight, nybble.quantize_q8_1(inputs.x)
    for x in (inputs.x, blocks):
        arguments = (x, weight.qweight, weight.scales, 224, 72, torch.float32, "auto")
        torch.library.opcheck(torch.ops.nybble.q4_0.default, arguments)
    torch.library.opcheck(torch.ops.nybble.quantize_q8_1.default, (inputs.x, False))


def test_compiles_whole_with_dynamic_rows() -> None:
    weight = SMALL.make().weight

    def run(x: torch.Tensor) -> torch.Tensor:
        return nybble.q4_0_linear(x, weight) + nybble.gemm_q4_0_q8_1(nybble.quantize_q8_1(x), weight)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5):
        x = torch.randn(rows, 224, dtype=torch.float16)
        torch.testing.assert_close(compiled(x), run(x), rtol=0, atol=0)


def test_choice_is_pure_and_says_why() -> None:
    spec = Q4Case(1, 12288, 4096).spec()
    assert {cost.choose(spec._replace(m=m), H200).pick.variant for m in (1, 16, 512, 2048)} == {"w4a16"}
    floats = spec._replace(dtype=torch.float32)
    assert [cost.choose(floats._replace(m=m), H200).pick.variant for m in (1, 512)] == ["fused", "fused"]
    given = cost.choose(spec._replace(dtype=torch.uint8), H200)
    assert given.pick.variant == "separate"
    assert "the activations are quantised already" in [c.reason for c in given.candidates]
    single = cost.choose(spec._replace(dtype=torch.float32, m=512), H200)
    assert single.pick.variant in ("fused", "separate")
    assert "needs float16 or bfloat16 activations, got torch.float32" in [c.reason for c in single.candidates]
    older = {c.variant: c for c in cost.choose(spec, A100).candidates}
    assert older["fused"].refused
    assert "compute capability 9.0" in older["fused"].reason
    assert cost.choose(spec, A100).pick.variant == "w4a16"
    for variant in ("fused", "separate", "w4a16"):
        times = [cost.choose(spec._replace(m=m, variant=variant), H200).pick.us or 0.0 for m in (1, 16, 64, 512, 4096)]
        assert times == sorted(times)


def test_a_function_that_is_one_way_has_one_candidate() -> None:
    for function, variant in (("gemm_q4_0_fp16", "fused"), ("gemm_q4_0_q8_1", "separate")):
        case = Q4Case(16, 4096, 4096, function=function)
        assert [c.variant for c in case.choice(H200).candidates] == [variant]
        assert case.choice(None).pick.variant == "reference"


def test_no_form_needs_more_shared_memory_than_there_is() -> None:
    for k in (64, 4096, 11008, 14336, 28672):
        for m in (1, 16, 32, 64, 512):
            found = cost.forms(Q4Case(m, 4096, k).spec(), H200)
            assert not isinstance(found, str)
            assert all(cost.shared_bytes(form, k) <= H200.shared_bytes for _, form in found)
    found = cost.forms(Q4Case(64, 4096, 1 << 20).spec(), H200)
    assert isinstance(found, str)
    assert "features need" in found
    assert f"this GPU has {H200.shared_bytes} for it" in found


@pytest.mark.parametrize("form", [*cost.ONCE, *cost.FORMS], ids=lambda form: "-".join(map(str, form)))
def test_the_shared_memory_of_a_form_is_what_its_kernel_says(form: cost.Form) -> None:
    """One byte less than :func:`cost.shared_bytes` and the kernel's own count refuses to compile."""
    from nybble.runtime.build import compile_kernel
    from nybble.runtime.errors import CompileError

    case = Q4Case(form.tile_m, 128, 640, function="gemm_q4_0_fp16")
    config = cost.constants(form, case.k)
    short = config | {"SHARED": config["SHARED"] - 1}
    sources = [op.source(case.spec(), op.Candidate("fused", tuple(c.items()))) for c in (config, short)]
    compile_kernel(sources[0], "sm_90a")
    with pytest.raises(CompileError, match="the launch must ask for this much shared memory"):
        compile_kernel(sources[1], "sm_90a")
