"""The 4-bit linear's kernels on a GPU against float64, over rows, features, groups and every option of the format."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from checks import check_case

import nybble
from nybble.formats.tiles import PackedWeight
from nybble.ops.w4a16 import cost, op
from nybble.ops.w4a16.cases import W4A16Case
from nybble.runtime.choice import Candidate
from nybble.runtime.hardware import current

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


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits: int) -> None:
    inputs = W4A16Case(3, 72, 200, 32, symmetric=False, act_order=True, bias=True, bits=bits).make("cuda")
    around = (None, None, None, 1e-5, "", "", 0, 0, bits)
    arguments = (inputs.x, *inputs.weight.tensors, inputs.bias, 200, 72, 32, "auto", *(around if bits != 4 else ()))
    torch.library.opcheck(torch.ops.nybble.w4a16.default, arguments)


# --- what goes around the product ---


class OneRounding(W4A16Case):
    """Held to a single rounding at the end, which only a kernel that takes everything in can keep."""

    def tolerance(self, inputs: Any, truth: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (self.bound(inputs, truth[0], composed=False),)


def check_around(case: W4A16Case) -> None:
    """Every variant that can run it: the composition within its own bound, kernels within that of one rounding."""
    able = [c.variant for c in case.choice(current()).candidates if not c.refused]
    assert "composed" in able
    for variant in able:
        given = {field.name: getattr(case, field.name) for field in fields(case) if field.init}
        check_case(case if variant == "composed" else OneRounding(**given), "cuda", variant=variant)


ROWS = [1, 3, 8, 16, 17, 64]


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_norm_before_the_product(dtype: torch.dtype, norm: str, m: int) -> None:
    check_around(W4A16Case(m, 256, 1024, 128, dtype, norm=norm))


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("activation", ["", "gelu", "gelu_tanh", "silu_mul"])
@pytest.mark.parametrize("residual", [False, True])
def test_an_epilogue(residual: bool, activation: str, m: int) -> None:
    if not residual and not activation:
        return
    for dtype in HALF:
        check_around(W4A16Case(m, 256, 1024, 128, dtype, activation=activation, residual=residual, bias=m % 2 == 0))


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("act_order", [False, True])
def test_all_of_it_with_every_option(act_order: bool, group_size: int, m: int) -> None:
    for norm, activation in (("layernorm", "silu_mul"), ("rmsnorm", "gelu_tanh")):
        around = {"norm": norm, "activation": activation, "residual": True}
        check_around(W4A16Case(m, 384, 1024, group_size, symmetric=False, act_order=act_order, bias=True, **around))


@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize(("n", "k", "group_size"), [(72, 200, 32), (144, 264, -1), (208, 520, 64), (1040, 8256, 64)])
def test_features_off_the_tile_with_something_around(n: int, k: int, group_size: int, m: int) -> None:
    """With silu_mul half of N is no multiple of 64 here."""
    for around in ({"norm": "layernorm"}, {"activation": "silu_mul"}, {"activation": "gelu", "residual": True}):
        check_around(W4A16Case(m, n, k, group_size, symmetric=False, bias=True, **around))


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize(("n", "k"), [(12288, 4096), (22016, 4096), (4096, 11008)])
def test_layers_of_real_models(n: int, k: int, m: int) -> None:
    check_around(W4A16Case(m, n, k, norm="layernorm"))
    check_around(W4A16Case(m, n, k, norm="rmsnorm", activation="silu_mul"))
    check_around(W4A16Case(m, n, k, residual=True))


@pytest.mark.parametrize("variant", ["auto", "composed"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_row_far_from_zero_keeps_its_digits(dtype: torch.dtype, variant: str) -> None:
    """Mean 100, deviation 1: squares less the square of the mean would leave nothing in fp32."""
    case = W4A16Case(5, 128, 1024, 128, dtype, norm="layernorm")
    inputs = case.make("cuda")
    far = replace(inputs, x=(inputs.x.float() + 100).to(dtype))
    check_case(case, "cuda", variant=variant, inputs=far)


def test_strided_and_unaligned_tensors_around_the_product() -> None:
    case = W4A16Case(6, 128, 256, norm="layernorm", residual=True, bias=True)
    inputs = case.make("cuda")
    want = case.run(inputs)[0]

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)

    def spaced(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack((tensor, tensor), -1)[..., 0]

    norm = inputs.norm
    assert norm is not None
    assert norm.bias is not None
    assert inputs.residual is not None
    for odd in (shifted, spaced):
        for change in (
            {"residual": odd(inputs.residual)},
            {"bias": odd(inputs.bias)},
            {"norm": norm._replace(weight=odd(norm.weight), bias=odd(norm.bias))},
        ):
            assert torch.equal(case.run(replace(inputs, **change))[0], want)


def test_tensors_of_another_device_or_dtype_are_named_when_warm_too() -> None:
    case = W4A16Case(6, 128, 256, norm="layernorm", residual=True, bias=True)
    inputs = case.make("cuda")
    norm = inputs.norm
    assert norm is not None
    assert inputs.residual is not None
    assert inputs.bias is not None
    for _ in range(2):
        case.run(inputs)
        for name, change in (
            ("bias", {"bias": inputs.bias.cpu()}),
            ("residual", {"residual": inputs.residual.cpu()}),
            ("norm.weight", {"norm": norm._replace(weight=norm.weight.cpu())}),
        ):
            with pytest.raises(ValueError, match=f"{name}: expected device cuda:0, that of x, got cpu"):
                case.run(replace(inputs, **change))
        with pytest.raises(TypeError, match=r"residual: expected torch\.float16"):
            case.run(replace(inputs, residual=inputs.residual.float()))


@pytest.mark.parametrize("m", [6, 20, 40])
def test_extreme_values_stay_in_their_row_through_a_norm(m: int) -> None:
    case = W4A16Case(m, 256, 512, 64, norm="layernorm", activation="silu_mul", residual=True)
    inputs = case.make("cuda")
    clean = case.run(inputs)[0]
    inputs.x[1, 7], inputs.x[2, 9], inputs.x[3] = float("nan"), float("inf"), 0.0
    got = case.run(inputs)[0]
    others = [0, 4, 5, *range(6, m)]
    assert torch.equal(got[others], clean[others])
    assert got[1].isnan().all()
    assert not got[2].isfinite().any()
    assert got[3].isfinite().all()


@pytest.mark.parametrize("m", [1, 8, 40])
def test_a_chain_of_layers_waits_for_each_link(m: int) -> None:
    """Kernels that may overlap the one before, eagerly and in a graph: the same bits as with a pause between them."""
    wide = W4A16Case(m, 2048, 512, norm="layernorm", activation="silu_mul").make("cuda")
    back = W4A16Case(m, 512, 1024, residual=True).make("cuda", seed=7)

    def chain(pause: bool = False) -> list[torch.Tensor]:
        x, kept = wide.x, []
        for _ in range(12):
            h = nybble.w4a16_linear(x, wide.weight, norm=wide.norm, activation="silu_mul")
            if pause:
                torch.cuda.synchronize()
            x = nybble.w4a16_linear(h, back.weight, residual=x)
            if pause:
                torch.cuda.synchronize()
            kept += [h, x]
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


@pytest.mark.parametrize("m", [1, 16])
def test_a_weight_written_just_before_is_read_as_written(m: int) -> None:
    """The kernel reads weights before it waits for its predecessor, unless that may be what wrote them."""
    case = W4A16Case(m, 4096, 4096)
    inputs, other = case.make("cuda"), case.make("cuda", seed=3)
    want = [case.run(replace(inputs, weight=weight))[0] for weight in (other.weight, inputs.weight)]
    torch.cuda.synchronize()
    weight = inputs.weight
    first = (weight.qweight.clone(), weight.scales.clone())
    second = (other.weight.qweight, other.weight.scales)
    for turn in range(20):
        for tensor, values in zip((weight.qweight, weight.scales), (second, first)[turn % 2], strict=True):
            tensor.copy_(values)
        got = case.run(inputs)[0]
        assert torch.equal(got, want[turn % 2])
        fresh = PackedWeight(weight.qweight + 0, weight.scales + 0, None, None, 4096, 4096, 128)
        assert torch.equal(case.run(replace(inputs, weight=fresh))[0], want[turn % 2])


def test_one_launch_takes_everything_in() -> None:
    """Where a kernel can, that is: the profiler sees one kernel of a call."""
    case = W4A16Case(16, 2048, 1024, norm="layernorm", activation="silu_mul", residual=True, bias=True)
    if case.choice(current()).pick.variant == "composed":
        pytest.skip("composed is what the cost model picks here")
    inputs = case.make("cuda")
    case.run(inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        case.run(inputs)
        torch.cuda.synchronize()
    kernels = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels


def test_opcheck_around_the_product() -> None:
    inputs = W4A16Case(3, 128, 192, 32, norm="layernorm", activation="silu_mul", residual=True).make("cuda")
    assert inputs.norm is not None
    rest = (inputs.residual, *inputs.norm, "silu_mul", 0, 0)
    arguments = (inputs.x, *inputs.weight.tensors, None, 192, 128, 32, "auto", *rest)
    torch.library.opcheck(torch.ops.nybble.w4a16.default, arguments)


def _runs(variant: str) -> None:
    card = current()
    assert card is not None
    if variant in ("digits", "wgmma", "gemm") and card.capability != (9, 0):
        pytest.skip("wgmma and the copy engine are of Hopper only")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("variant", ["stream", "wgmma"])
def test_kernels_for_few_rows(variant: str, m: int, dtype: torch.dtype) -> None:
    _runs(variant)
    for n, k, group_size in (
        (256, 1024, 128), (72, 200, 32), (4096, 4096, 64), (136, 8200, -1), (12288, 4096, 128), (4160, 2048, 256),
    ):  # fmt: skip
        case = W4A16Case(m, n, k, group_size, dtype, symmetric=n % 64 == 0, act_order=k == 200, bias=n % 64 != 0)
        check_case(case, "cuda", variant=variant)


@pytest.mark.parametrize("m", [1, 7, 16, 30, 64])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("variant", ["stream", "wgmma"])
def test_kernels_for_few_rows_with_all_around(variant: str, norm: str, m: int) -> None:
    _runs(variant)
    for n, k, activation in ((4096, 4096, "gelu"), (384, 1024, "silu_mul"), (2048, 11008, "gelu_tanh"), (256, 328, "")):
        case = W4A16Case(m, n, k, 64, bias=True, norm=norm, activation=activation, residual=True, act_order=k == 328)
        if any(c.variant == variant and c.refused for c in case.choice(current()).candidates):
            continue  # 64 rows of 11008 features fit in no cluster
        check_case(case, "cuda", variant=variant)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_row_by_integers(dtype: torch.dtype) -> None:
    _runs("digits")
    for n, k, group_size in (
        (256, 1024, 128), (72, 200, 32), (4096, 4096, 64), (136, 8200, -1), (12288, 4096, 128), (4160, 2048, 256),
        (4096, 14336, 128), (1608, 1600, 32), (12288, 2560, 128), (264, 28672, 64),
    ):  # fmt: skip
        case = W4A16Case(
            1, n, k, group_size, dtype, symmetric=n % 64 == 0, act_order=k in (200, 2048), bias=n % 64 != 0
        )
        check_case(case, "cuda", variant="digits")
    for norm in ("layernorm", "rmsnorm"):
        for n, k, activation in (
            (4096, 4096, "gelu"),
            (384, 1024, "silu_mul"),
            (28672, 4096, "silu_mul"),
            (2048, 11008, "gelu_tanh"),
            (256, 328, ""),
        ):
            around = {
                "norm": norm,
                "activation": activation,
                "residual": True,
                "bias": True,
                "act_order": k in (328, 1024),
            }
            check_case(W4A16Case(1, n, k, 64 if k < 4096 else 128, dtype, **around), "cuda", variant="digits")


def test_every_form_of_one_row() -> None:
    _runs("digits")
    card = current()
    assert card is not None
    for case in (
        W4A16Case(1, 12288, 4096), W4A16Case(1, 4096, 8192, 32, symmetric=False, act_order=True),
        W4A16Case(1, 2560, 2560, norm="layernorm", bias=True),
        W4A16Case(1, 28672, 4096, norm="rmsnorm", activation="silu_mul"),
    ):  # fmt: skip
        inputs = case.make("cuda")
        forms = [c for c in cost.contenders(case.spec(), card) if c.variant == "digits"]
        assert len(forms) > 3
        for candidate in forms:
            with op.forced(case.spec(), candidate, {}):
                results = [check_case(case, "cuda", inputs=inputs)[0].clone() for _ in range(5)]
            assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("act_order", [False, True])
def test_one_row_that_is_not_finite(value: float, act_order: bool) -> None:
    case = W4A16Case(1, 192, 1024, act_order=act_order)
    inputs = case.make("cuda")
    inputs.x[0, 700] = value
    assert case.run(inputs, "digits")[0].isnan().all()
    assert not case.run(replace(inputs, residual=torch.zeros_like(case.run(inputs)[0])), "digits")[0].isfinite().any()


def test_one_row_of_all_magnitudes() -> None:
    """What is small beside its neighbours counts where they are multiplied by nothing."""
    for dtype, largest in ((torch.float16, 6e4), (torch.bfloat16, 1e30)):
        case = W4A16Case(1, 192, 1024, dtype=dtype)
        inputs = case.make("cuda")
        steps = torch.linspace(0.0, 1.0, 1024, device="cuda")
        inputs.x[0] = (largest * 2.0 ** (-38 * steps) * inputs.x[0].float().sign()).to(dtype)
        check_case(case, "cuda", variant="digits", inputs=inputs)
        inputs.x.zero_()
        assert (case.run(inputs, "digits")[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 17, 33, 64, 100, 256, 1000])
def test_gemm_at_every_number_of_rows(m: int, dtype: torch.dtype) -> None:
    _runs("gemm")
    for n, k, group_size in ((256, 1024, 128), (72, 200, 32), (4096, 4096, 64), (136, 8200, -1), (12288, 2048, 256)):
        case = W4A16Case(m, n, k, group_size, dtype, symmetric=n % 64 == 0, act_order=k == 200, bias=n % 64 != 0)
        check_case(case, "cuda", variant="gemm")
    for activation in ("gelu", "gelu_tanh", "silu_mul"):
        check_case(W4A16Case(m, 384, 1024, 64, dtype, activation=activation, residual=True), "cuda", variant="gemm")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 3, 8, 16, 17, 33, 64])
def test_8_bits_for_few_rows(m: int, dtype: torch.dtype) -> None:
    _runs("wgmma")
    for n, k, group_size in (
        (256, 1024, 128), (72, 200, 32), (4096, 4096, 64), (136, 8200, -1), (12288, 4096, 128), (264, 520, 16),
    ):  # fmt: skip
        case = W4A16Case(m, n, k, group_size, dtype, symmetric=n == 12288, act_order=k == 200, bits=8)
        check_case(case, "cuda", variant="wgmma")
    for norm, activation in (("layernorm", "silu_mul"), ("rmsnorm", "gelu")):
        around = {"norm": norm, "activation": activation, "residual": True, "bias": True}
        check_around(W4A16Case(m, 512, 1024, 64, dtype, symmetric=False, bits=8, **around))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [0, 1, 17, 33, 64, 100, 256, 1000])
def test_8_bits_for_many_rows(m: int, dtype: torch.dtype) -> None:
    _runs("gemm")
    for n, k, group_size in ((256, 1024, 128), (72, 200, 32), (4096, 4096, 64), (136, 8200, -1), (12288, 2048, 16)):
        case = W4A16Case(m, n, k, group_size, dtype, symmetric=n == 4096, act_order=k == 200, bits=8)
        check_case(case, "cuda", variant="gemm")
        check_case(case, "cuda")
    check_case(W4A16Case(m, 384, 1024, 64, dtype, activation="silu_mul", residual=True, bits=8), "cuda", variant="gemm")


def test_8_bits_elsewhere_run_the_reference() -> None:
    check_case(W4A16Case(5, 128, 512, 128, torch.float32, symmetric=False, bits=8), "cuda")
    with pytest.raises(nybble.runtime.errors.UnsupportedError, match="for 4-bit weights"):
        check_case(W4A16Case(5, 128, 512, bits=8), "cuda", variant="mma")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", cost.GEMM_FORMS, ids=str)
@pytest.mark.parametrize("m", [13, 31, 61, 200])
def test_every_form_of_gemm(
    m: int, form: tuple[int, int, int, int, int], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles a block, the last not full, and parts of K of different lengths; over and over, in a graph too."""
    _runs("gemm")
    monkeypatch.setattr(cost, "GEMM_FORMS", (form,))
    case, card = W4A16Case(m, 12296, 1096, 128, bias=m != 61, bits=bits), current()
    assert card is not None
    found = cost.gemm_shapes(case.spec(), card)
    if isinstance(found, str):
        pytest.skip("too many registers or too much shared memory")
    for us, config in found:  # of every number of rows a tile
        inputs = case.make("cuda")
        with op.forced(case.spec(), Candidate("gemm", tuple(config.items()), us), {}):
            (want,) = check_case(case, "cuda", inputs=inputs)
            assert all(torch.equal(case.run(inputs)[0], want) for _ in range(20))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                several = [case.run(inputs)[0] for _ in range(3)]
        for _ in range(3):
            graph.replay()
        assert all(torch.equal(y, want) for y in several)


def test_streams_and_graphs_leave_sums_in_places_of_their_own() -> None:
    _runs("gemm")
    big, small = W4A16Case(64, 28672, 4096), W4A16Case(16, 28672, 2048)  # the second fits in what the first needs
    cases = [(case, case.make("cuda", seed)) for seed in range(2) for case in (small, big)]
    forms = []
    for case, _ in cases:
        found = cost.gemm_shapes(case.spec(), current() or pytest.fail("no GPU"), ((case.m, 4, 1, 1, 1, 1),))
        assert not isinstance(found, str)
        forms.append(Candidate("gemm", tuple(found[0][1].items()), 1.0))
    plans: list[dict[Any, Any]] = [{} for _ in cases]

    def run(i: int) -> torch.Tensor:
        case, inputs = cases[i]
        with op.forced(case.spec(), forms[i], plans[i]):
            return case.run(inputs)[0]

    want = [check_case(case, "cuda", inputs=inputs)[0] for case, inputs in cases]
    want = [run(i).clone() for i in range(len(cases))]
    streams = [torch.cuda.Stream() for _ in cases]
    graphs = []
    for i in range(len(cases)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.append((graph, [run(j) for j in (i, 0, 1)]))
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got.append(run(i))
                graphs[i][0].replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for i, (_, results) in enumerate(graphs):
        assert all(torch.equal(y, want[j]) for y, j in zip(results, (i, 0, 1), strict=True))


@pytest.mark.parametrize("variant", ["stream", "digits", "wgmma", "gemm"])
def test_the_same_bits_from_run_to_run(variant: str) -> None:
    _runs(variant)
    for m, n, k in (
        ((1, 4096, 4096), (1, 12288, 8192))
        if variant == "digits"
        else ((1, 4096, 4096), (16, 12288, 4096), (33, 4096, 8192))
    ):
        for bits in (4,) if variant in ("stream", "digits") else (4, 8):
            case = W4A16Case(m, n, k, bits=bits)
            inputs = case.make("cuda")
            want = case.run(inputs, variant)[0].clone()
            assert all(torch.equal(case.run(inputs, variant)[0], want) for _ in range(50))


@pytest.mark.parametrize("variant", ["stream", "digits", "wgmma", "gemm"])
def test_a_weight_that_was_just_written(variant: str) -> None:
    """Both kernels ask for weights before the previous kernel is complete, unless that may have written them."""
    _runs(variant)
    case = W4A16Case(1, 4096, 4096)
    first, second = case.make("cuda", 0), case.make("cuda", 1)
    want = [case.run(replace(first, weight=inputs.weight), variant)[0].clone() for inputs in (first, second)]
    weight = replace(first.weight, qweight=first.weight.qweight.clone(), scales=first.weight.scales.clone())
    for _ in range(20):
        for source, expected in zip((second, first), reversed(want), strict=True):
            weight.qweight.copy_(source.weight.qweight)
            weight.scales.copy_(source.weight.scales)
            assert torch.equal(case.run(replace(first, weight=weight), variant)[0], expected)
