"""The 4-bit linear on a CPU: the reference against float64, the operator, the choice, and what bad input gets."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nybble
from nybble.bench.run import dtype_name, options
from nybble.ops.w4a16 import cost, op
from nybble.ops.w4a16.cases import BENCH, W4A16Case
from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import A100, H200

SMALL = W4A16Case(3, 72, 200, 32, torch.float16, symmetric=False)

PLAIN = r"\['mma', 'digits', 'wgmma', 'gemm', 'stream', 'reference'\]"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_matches_float64(bits: int, group_size: int, act_order: bool, dtype: torch.dtype) -> None:
    check_case(W4A16Case(5, 72, 512, group_size, dtype, symmetric=False, act_order=act_order, bias=True, bits=bits))
    check_case(W4A16Case(5, 72, 512, group_size, dtype, act_order=act_order, bits=bits))


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(0, 4),
    n=st.integers(1, 20).map(lambda v: 8 * v),
    k=st.integers(2, 40).map(lambda v: 8 * v),
    group_size=st.sampled_from([16, 32, 64, 128, -1]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(
    m: int, n: int, k: int, group_size: int, symmetric: bool, act_order: bool, bias: bool, seed: int
) -> None:
    case = W4A16Case(m, n, k, group_size, torch.float32, symmetric=symmetric, act_order=act_order, bias=bias)
    check_case(case, seed=seed)


def test_leading_shape_and_strides() -> None:
    inputs = SMALL.make()
    x = torch.randn(2, 3, 400, dtype=torch.float16)[..., ::2]
    got = nybble.w4a16_linear(x, inputs.weight)
    assert got.shape == (2, 3, 72)
    assert got.is_contiguous()
    assert torch.equal(got, nybble.w4a16_linear(x.contiguous(), inputs.weight))


def test_nan_stays_in_its_row() -> None:
    inputs = SMALL.make()
    clean = SMALL.run(inputs)[0]
    inputs.x[1, 7] = float("nan")
    got = SMALL.run(inputs)[0]
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().all()


def test_bad_input_is_named() -> None:
    inputs = SMALL.make()
    weight, x = inputs.weight, inputs.x
    bad: list[tuple[type[Exception], str, dict[str, object]]] = [
        (TypeError, "x: expected float16, bfloat16 or float32, got torch.int8", {"x": x.to(torch.int8)}),
        (ValueError, r"x: expected shape \[..., in_features\] = \[..., 200\], got \[3, 64\]", {"x": x[:, :64]}),
        (TypeError, "bias: expected torch.float16, the dtype of x, got torch.float32", {"bias": torch.zeros(72)}),
        (ValueError, r"bias: expected shape \[out_features\] = \[72\], got \[8\]", {"bias": torch.zeros(8).half()}),
        (TypeError, "weight: expected a nybble.PackedWeight, got Tensor", {"weight": x}),
        (ValueError, "weight.qweight: expected device meta, that of x, got cpu", {"x": x.to("meta")}),
        (ValueError, rf"variant: expected 'auto' or one of {PLAIN}", {"variant": "marlin"}),
        (UnsupportedError, "mma: no CUDA device", {"variant": "mma"}),
    ]  # fmt: skip
    for error, message, change in bad:
        arguments: dict[str, object] = {"x": x, "weight": weight, **change}
        with pytest.raises(error, match=message):
            nybble.w4a16_linear(arguments.pop("x"), arguments.pop("weight"), **arguments)  # type: ignore[arg-type]


def test_a_packed_weight_checks_itself_and_so_does_the_operator() -> None:
    inputs = SMALL.make()
    weight = inputs.weight
    bad: list[tuple[type[Exception], str, dict[str, object]]] = [
        (ValueError, r"qweight: expected contiguous \[2, 4, 512\], got \[1, 4, 512\]", {"qweight": weight.qweight[:1]}),
        (TypeError, "qweight: expected torch.int32, got torch.int64", {"qweight": weight.qweight.long()}),
        (ValueError, r"scales: expected contiguous \[2, 8, 64\]", {"scales": weight.scales[:, :1]}),
        (ValueError, r"qzeros: expected contiguous \[2, 8, 32\]", {"qzeros": weight.scales.to(torch.uint8)}),
        (ValueError, r"perm: expected contiguous \[200\], got \[3\]", {"perm": torch.zeros(3, dtype=torch.int32)}),
        (ValueError, "scales: expected device cpu, that of qweight, got meta", {"scales": weight.scales.to("meta")}),
        (ValueError, "out_features: expected a positive multiple of 8, got 71", {"out_features": 71}),
    ]  # fmt: skip
    names = ("qweight", "scales", "qzeros", "perm", "in_features", "out_features", "group_size")
    for error, message, change in bad:
        with pytest.raises(error, match=message):
            replace(weight, **change)  # type: ignore[arg-type]
        fields = {**{name: getattr(weight, name) for name in names}, **change}
        tensors, sizes = [fields[name] for name in names[:4]], [fields[name] for name in names[4:]]
        with pytest.raises(error, match=message):
            torch.ops.nybble.w4a16(inputs.x, *tensors, None, *sizes, "auto")


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits: int) -> None:
    inputs = replace(SMALL, bits=bits).make()
    around = (None, None, None, 1e-5, "", "", 0, 0, bits)
    arguments = (inputs.x, *inputs.weight.tensors, None, 200, 72, 32, "auto", *(around if bits != 4 else ()))
    torch.library.opcheck(torch.ops.nybble.w4a16.default, arguments)


def test_compiles_whole_with_dynamic_rows() -> None:
    inputs = SMALL.make()
    compiled = torch.compile(
        lambda x: nybble.w4a16_linear(x, inputs.weight) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (2, 5):
        x = torch.randn(rows, 200, dtype=torch.float16)
        torch.testing.assert_close(compiled(x), nybble.w4a16_linear(x, inputs.weight) * 2)


def test_8_bits_reach_the_operator_and_the_plan(plans: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a compiled graph, and as a constant and a key of what is built."""
    inputs = replace(SMALL, bits=8).make()
    compiled = torch.compile(lambda x: nybble.w4a16_linear(x, inputs.weight), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs.x), nybble.w4a16_linear(inputs.x, inputs.weight))
    _pick(
        monkeypatch, "wgmma",
        TILE_M=8, TEAMS=1, SLICES=2, CLUSTER=2, AHEAD=2, SUM_ROWS=8, BUFFERS=1, GATHERED=0, BLOCKS=1, SHARED=60000,
    )  # fmt: skip
    for case in (SMALL, replace(SMALL, bits=8)):
        these = case.make()
        op._launch(these.x, these.weight, None, "auto")
    assert [dict(plan.source.constants)["BITS"] for plan in plans] == [4, 8]


def test_8_bits_are_for_wgmma_and_gemm() -> None:
    spec = W4A16Case(1, 12288, 4096, bits=8).spec()
    for variant in ("mma", "stream"):
        with pytest.raises(
            UnsupportedError, match=rf"{variant}: for 4-bit weights; wgmma.cu and gemm.cu have those of 8"
        ):
            cost.choose(spec._replace(variant=variant), H200)
    assert cost.choose(spec, A100).pick.variant == "reference"
    for m in (1, 16, 64, 200, 4096):
        four, eight = W4A16Case(m, 12288, 4096), W4A16Case(m, 12288, 4096, bits=8)
        assert eight.bytes - four.bytes == 12288 * 4096 // 2
        pick = eight.choice(H200).pick
        assert pick.variant in ("wgmma", "gemm")
        assert (pick.us or 0.0) > max(eight.floor_us(H200), four.choice(H200).pick.us or 0.0)
    assert cost.choose(spec._replace(norm="layernorm", m=4096), H200).pick.variant == "composed"
    assert cost.key(spec) == cost.key(spec._replace(bits=4)) + " bits=8"
    # a stage of the ring has twice the bytes of weights, and of zero points
    four, eight = (cost.wgmma_shape(spec._replace(bits=bits, zeros=True, n=28672), H200) for bits in (4, 8))
    assert isinstance(four, dict) and isinstance(eight, dict)
    assert {**four, "SHARED": 0} == {**eight, "SHARED": 0}
    assert eight["SHARED"] - four["SHARED"] == 4 * 4 * (4096 + 32)


def test_forms_of_one_row_are_those_that_the_kernel_has() -> None:
    for case in (
        W4A16Case(1, 12288, 4096), W4A16Case(1, 4096, 14336, 32, symmetric=False),
        W4A16Case(1, 7680, 2560, act_order=True), W4A16Case(1, 28672, 4096, activation="silu_mul"),
        W4A16Case(1, 22016, 4096, 64, norm="rmsnorm", activation="silu_mul"),
    ):  # fmt: skip
        forms = [dict(c.config) for c in cost.contenders(case.spec(), H200) if c.variant == "digits"]
        assert len(forms) > 3
        for form in forms:
            strips = 4 * form["TEAMS"] / form["CLUSTER"]  # of 16 features, that a block stores
            assert strips >= 1 and strips.is_integer()
            assert not case.activation or (form["TEAMS"] % 2 == 0 and strips % 2 == 0)
            assert form["TEAMS"] * form["SLICES"] <= 4


def test_choice_is_pure_and_says_why() -> None:
    spec = W4A16Case(1, 4096, 4096).spec()
    picks = [cost.choose(spec._replace(m=m), H200).pick.variant for m in (1, 2, 16, 64, 128)]
    assert picks == ["stream", "wgmma", "gemm", "gemm", "gemm"]
    assert [cost.choose(spec._replace(n=12288, m=m), H200).pick.variant for m in (1, 2)] == ["digits", "wgmma"]
    assert [cost.choose(spec._replace(m=m), A100).pick.variant for m in (1, 128)] == ["stream", "mma"]
    pick = cost.choose(spec._replace(variant="mma"), H200).pick
    assert dict(pick.config) == {"TILE_M": 8, "SLICES": 8}
    assert dict(cost.choose(spec._replace(m=4096), H200).pick.config)["TILE_M"] == 256
    single = cost.choose(spec._replace(dtype=torch.float32), H200)
    assert single.pick.variant == "reference"
    assert "needs float16 or bfloat16 activations, got torch.float32" in [c.reason for c in single.candidates]
    times = [cost.choose(spec._replace(m=m), H200).pick.us or 0.0 for m in (1, 64, 1024, 4096)]
    assert times == sorted(times)


# --- what goes around the product ---

AROUND = [
    {"norm": norm, "activation": activation, "residual": residual}
    for norm in ("", "layernorm", "rmsnorm")
    for activation in ("", "gelu", "gelu_tanh", "silu_mul")
    for residual in (False, True)
][1:]
FULL = W4A16Case(
    5, 128, 512, 64, symmetric=False, act_order=True, bias=True, norm="layernorm", activation="silu_mul", residual=True
)


class OneRounding(W4A16Case):
    """Held to a single rounding at the end, which a composition of kernels does not keep."""

    def tolerance(self, inputs: Any, truth: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (self.bound(inputs, truth[0], composed=False),)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("around", AROUND, ids=str)
def test_everything_around_the_product_matches_float64(around: dict[str, Any], dtype: torch.dtype) -> None:
    check_case(OneRounding(5, 128, 512, 64, dtype, symmetric=False, act_order=True, bias=True, **around))
    check_case(OneRounding(0, 64, 64, 32, dtype, **around))


def composed(case: W4A16Case, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The composition, with the reference as its product."""

    def launch(
        x: Tensor, weight: Any, bias: Any, variant: str, residual: Any = None, activation: str = "", **planes: int
    ) -> Tensor:
        if residual is None and not activation:
            return op._reference(x, weight, bias)
        return op._composed(x, weight, bias, residual, None, None, 1e-5, "", activation, **planes)

    monkeypatch.setattr(op, "_launch", launch)
    norm = inputs.norm or (None, None, 1e-5, "")
    return op._composed(inputs.x, inputs.weight, inputs.bias, inputs.residual, *norm, case.activation, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("around", AROUND, ids=str)
def test_the_composition_is_within_its_own_bound(
    around: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = W4A16Case(5, 128, 512, 64, dtype, symmetric=False, bias=True, **around)
    inputs = case.make()
    (truth,) = case.truth(inputs)
    off = (composed(case, inputs, monkeypatch).double() - truth).abs()
    assert (off <= case.bound(inputs, truth, composed=True)).all()
    if not case.norm:  # the rounding of the norm's result, common to both, covers the rest
        assert not (off <= case.bound(inputs, truth, composed=False)).all()


def test_no_part_can_be_left_out() -> None:
    inputs = FULL.make()
    (truth,) = FULL.truth(inputs)
    norm = inputs.norm
    assert norm is not None
    assert norm.bias is not None
    less = [
        {"norm": None},
        {"norm": norm._replace(bias=None)},
        {"norm": norm._replace(kind="rmsnorm", bias=None)},
        {"norm": norm._replace(eps=1.0)},
        {"residual": None},
        {"bias": None},
    ]
    for change in less:
        wrong = FULL.run(replace(inputs, **change))[0].double()
        assert not ((wrong - truth).abs() <= FULL.tolerance(inputs, (truth,))[0]).all(), change


def test_silu_mul_takes_the_first_half_as_the_gate() -> None:
    case = W4A16Case(3, 64, 128, 32, torch.float32, activation="silu_mul", bias=True)
    inputs = case.make()
    both = inputs.x @ inputs.quantized.dequantize() + inputs.bias
    want = torch.nn.functional.silu(both[:, :32]) * both[:, 32:]
    torch.testing.assert_close(case.run(inputs)[0], want)


def test_leading_shape_and_strides_around_the_product() -> None:
    inputs = FULL.make()
    want = FULL.run(inputs)[0][:4]
    x, residual = inputs.x[:4].view(2, 2, 512), torch.zeros(2, 2, 128).half()[..., ::2]
    residual.copy_(inputs.residual[:4].view(2, 2, 64))
    got = nybble.w4a16_linear(
        x, inputs.weight, bias=inputs.bias, norm=inputs.norm, activation="silu_mul", residual=residual
    )
    assert torch.equal(got, want.view(2, 2, 64))
    assert got.is_contiguous()


def test_bad_input_around_the_product_is_named() -> None:
    inputs = FULL.make()
    norm, half = inputs.norm, torch.zeros(512).half()
    bad: list[tuple[type[Exception], str, dict[str, object]]] = [
        (TypeError, "norm: expected a nybble.Norm or None, got Tensor", {"norm": half}),
        (ValueError, r"norm.kind: expected one of \['layernorm', 'rmsnorm'\], got 'batchnorm'",
         {"norm": norm._replace(kind="batchnorm")}),
        (ValueError, r"norm.kind: expected one of \['layernorm', 'rmsnorm'\], got ''",
         {"norm": norm._replace(kind="")}),
        (ValueError, "norm.bias: expected None with rmsnorm, got a tensor. Only",
         {"norm": norm._replace(kind="rmsnorm")}),
        (ValueError, r"norm.weight: expected shape \[in_features\] = \[512\], got \[8\]",
         {"norm": norm._replace(weight=half[:8])}),
        (TypeError, "norm.bias: expected torch.float16, the dtype of x, got torch.float32",
         {"norm": norm._replace(bias=torch.zeros(512))}),
        (ValueError, "norm.weight: expected device cpu, that of x, got meta",
         {"norm": norm._replace(weight=half.to("meta"))}),
        (ValueError, "norm.eps: expected a finite number >= 0, got -1.0", {"norm": norm._replace(eps=-1.0)}),
        (ValueError, r"activation: expected None or one of \['gelu', 'gelu_tanh', 'silu_mul'\], got 'relu'",
         {"activation": "relu"}),
        (ValueError, r"residual: expected shape that of the result = \[5, 64\], got \[5, 128\]",
         {"residual": torch.zeros(5, 128).half()}),
        (TypeError, "residual: expected torch.float16, the dtype of x", {"residual": torch.zeros(5, 64)}),
        (UnsupportedError, "composed: no CUDA device", {"variant": "composed"}),
    ]  # fmt: skip
    given: dict[str, Any] = {"norm": norm, "activation": "silu_mul", "residual": inputs.residual}
    for error, message, change in bad:
        with pytest.raises(error, match=message):
            nybble.w4a16_linear(inputs.x, inputs.weight, **{**given, **change})
    with pytest.raises(ValueError, match=rf"variant: expected 'auto' or one of {PLAIN}, got 'composed'"):
        nybble.w4a16_linear(inputs.x, inputs.weight, variant="composed")
    arguments = (inputs.x, *inputs.weight.tensors, None, 512, 128, 64, "auto")
    for message, around in (
        ("norm.weight: expected a weight with a kind of norm, got None", (None, None, None, 1e-5, "rmsnorm")),
        ("norm.weight: expected a kind of norm with its weight, got a weight alone", (None, half, None, 1e-5, "")),
        ("split1, split2: expected two multiples of 8 that rise, within 128 output features, got \\(64, 60\\)",
         (None, None, None, 1e-5, "", "", 64, 60)),
        ("split1, split2: expected 0 with silu_mul or a residual",
         (None, None, None, 1e-5, "", "silu_mul", 64, 72)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            torch.ops.nybble.w4a16(*arguments, *around)


@pytest.mark.parametrize("splits", [(0, 0), (64, 96)])
def test_opcheck_around_the_product(splits: tuple[int, int]) -> None:
    inputs = FULL.make()
    norm = inputs.norm
    assert norm is not None
    rest = (None, *norm, "", *splits) if splits[0] else (inputs.residual, *norm, "silu_mul", 0, 0)
    arguments = (inputs.x, *inputs.weight.tensors, inputs.bias, 512, 128, 64, "auto", *rest)
    torch.library.opcheck(torch.ops.nybble.w4a16.default, arguments)


def test_compiles_whole_with_a_norm_made_inside() -> None:
    inputs = FULL.make()
    weight, bias = inputs.norm.weight, inputs.norm.bias

    def step(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        norm = nybble.Norm(weight, bias, 1e-5)
        return nybble.w4a16_linear(x, inputs.weight, norm=norm, activation="silu_mul", residual=residual) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5):
        x, residual = torch.randn(rows, 512).half(), torch.randn(rows, 64).half()
        torch.testing.assert_close(compiled(x, residual), step(x, residual))


def test_a_backward_raises_whatever_needs_the_gradient() -> None:
    inputs = FULL.make()
    scale = inputs.norm.weight.clone().requires_grad_()
    y = nybble.w4a16_linear(inputs.x, inputs.weight, norm=inputs.norm._replace(weight=scale))
    with pytest.raises(RuntimeError, match="no backward"):
        y.sum().backward()


def test_a_copy_for_timing_has_its_own_of_what_is_read() -> None:
    inputs = W4A16Case(2, 64, 64, bias=True, norm="rmsnorm").make()
    other = copy.deepcopy(inputs)
    assert other.quantized is inputs.quantized
    assert other.norm is not None
    assert inputs.norm is not None
    for mine, yours in (
        (other.x, inputs.x), (other.weight.qweight, inputs.weight.qweight), (other.bias, inputs.bias),
        (other.norm.weight, inputs.norm.weight),
    ):  # fmt: skip
        assert mine is not None
        assert mine.data_ptr() != yours.data_ptr()
        torch.testing.assert_close(mine, yours)


@pytest.mark.parametrize(
    "case",
    BENCH,
    ids=lambda case: f"{case.m}x{case.n}x{case.k}-{options(case)}",
)
def test_the_pick_is_within_5_percent_of_the_fastest_row(case: W4A16Case) -> None:
    """Of what was measured on an H200, kernel by kernel; a row of another tile than today's does not count."""
    choice = cost.choose(case.spec(), H200)
    now = {c.variant: dict(c.config) for c in choice.candidates if not c.refused}
    rows = Path(__file__).parents[2] / "results" / "h200" / "w4a16.jsonl"
    measured = {}
    for row in map(json.loads, rows.read_text().splitlines()):
        same = (
            row["shape"] == case.shape()
            and row["dtype"] == dtype_name(case)
            and row.get("options", {}) == options(case)
        )
        if (
            same
            and row["provider"] == "nybble"
            and row.get("config", now.get(row["variant"])) == now.get(row["variant"])
        ):
            measured[row["variant"]] = row["us"]
    assert measured, "a case that was never measured"
    pick = choice.pick.variant
    assert pick in measured, "the tile that is chosen was never measured"
    assert measured[pick] <= 1.05 * min(measured.values()), (pick, measured)


# us on an H200, side by side, of the forms of gemm.cu that were within 6 % of the fastest of those compared.
FORMS_US: list[tuple[tuple[int, int, int], dict[tuple[int, ...], float]]] = [
    ((256, 12288, 4096), {(128, 3, 1, 1, 1, 0): 35.3}),
    ((512, 12288, 4096), {(128, 3, 1, 1, 1, 0): 73.9, (256, 2, 1, 1, 1, 1): 78.2}),
    (
        (1024, 12288, 4096),
        {(256, 2, 1, 1, 1, 0): 141.1, (128, 3, 1, 1, 1, 0): 143.3, (256, 2, 1, 1, 1, 1): 145.5},
    ),
    ((256, 6144, 4096), {(128, 3, 1, 2, 2, 0): 21.5}),
    ((512, 6144, 4096), {(128, 3, 1, 1, 1, 0): 35.1}),
    ((1024, 6144, 4096), {(128, 3, 1, 1, 1, 0): 70.0, (256, 2, 1, 1, 1, 1): 73.5}),
    ((256, 10240, 2560), {(128, 3, 1, 1, 1, 0): 22.8}),
    (
        (512, 10240, 2560),
        {
            (128, 3, 1, 1, 1, 1): 45.1, (256, 2, 1, 1, 1, 1): 45.9,
            (128, 3, 1, 1, 1, 0): 46.0, (128, 2, 1, 1, 1, 1): 46.2,
        },
    ),
    (
        (1024, 10240, 2560),
        {
            (256, 2, 1, 1, 1, 1): 83.4, (128, 3, 1, 1, 1, 1): 84.3,
            (256, 1, 1, 1, 1, 0): 85.7, (128, 2, 1, 1, 1, 1): 87.4,
        },
    ),
    (
        (512, 5120, 5120),
        {
            (128, 3, 1, 1, 1, 0): 43.4, (128, 2, 1, 1, 1, 1): 43.8,
            (128, 3, 1, 1, 1, 1): 44.1, (256, 2, 1, 1, 1, 1): 45.1,
        },
    ),
    ((1024, 5120, 5120), {(256, 2, 1, 1, 1, 1): 80.4, (128, 3, 1, 1, 1, 1): 82.4}),
    ((2048, 5120, 5120), {(256, 2, 1, 1, 1, 1): 153.0, (128, 3, 1, 1, 1, 1): 160.4}),
    ((4096, 4096, 4096), {(256, 2, 1, 1, 1, 0): 195.0, (256, 2, 1, 1, 1, 1): 198.1}),
    ((2048, 2560, 10240), {(256, 2, 1, 1, 1, 1): 150.2}),
    (
        (256, 28672, 4096),
        {(256, 2, 1, 1, 1, 1): 91.5, (128, 3, 1, 1, 1, 1): 91.9, (256, 2, 1, 1, 1, 0): 95.4},
    ),
    (
        (256, 4096, 14336),
        {(128, 2, 1, 2, 2, 0): 49.6, (128, 3, 1, 1, 1, 1): 50.2, (128, 2, 1, 1, 1, 1): 52.3},
    ),
    (
        (512, 4096, 14336),
        {
            (256, 1, 1, 1, 1, 0): 83.7, (256, 2, 1, 1, 1, 1): 86.5,
            (128, 2, 1, 1, 1, 0): 87.6, (128, 3, 1, 1, 1, 1): 87.7,
        },
    ),
    ((512, 7680, 2560), {(256, 2, 1, 1, 1, 0): 31.4}),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "measured"), FORMS_US, ids=[str(shape) for shape, _ in FORMS_US])
def test_the_form_of_many_rows_is_within_5_percent_of_the_fastest(
    shape: tuple[int, int, int], measured: dict[tuple[int, ...], float]
) -> None:
    pick = cost.choose(W4A16Case(*shape).spec(), H200).pick
    config = dict(pick.config)
    form = tuple(config[name] for name in ("TILE_M", "TEAMS", "SLICES", "CLUSTER", "WAYS", "STREAM_K"))
    assert measured.get(form, 1e9) <= 1.05 * min(measured.values()), form


@pytest.mark.parametrize("around", AROUND, ids=str)
def test_a_plain_kernel_is_refused_with_anything_around_it(around: dict[str, Any]) -> None:
    choice = cost.choose(W4A16Case(16, 4096, 4096, **around).spec(), H200)
    why = {c.variant: c.reason for c in choice.candidates if c.refused}
    assert why["mma"] == "no prologue or epilogue; composed instead"
    assert not [c for c in choice.candidates if c.refused and c.variant == "composed"]
    assert choice.pick.variant != "reference"
    assert ("gemm" in why) == bool(around["norm"])
    plain = cost.choose(W4A16Case(16, 4096, 4096).spec(), H200).pick.us or 0.0
    assert min(c.us or 0.0 for c in choice.candidates if c.variant == "composed") > plain


# --- the launch, without a GPU: tensors of a CPU and a plan that writes down what it gets ---

NORM = ("norm_weight", "norm_bias", "eps", "norm_kind")
CONFIG = {"TILE_M": 4, "WARPS_N": 2, "STRIPS": 2, "SLICES": 4, "CLUSTER": 2, "SHARED": 50000}
STREAM = Candidate("stream", tuple(CONFIG.items()), 1.0, "test")


class Recorder:
    """A plan's stand-in."""

    def __init__(self, binary: Any, parameters: str, **given: Any) -> None:
        self.source, self.parameters, self.given = binary, parameters, given
        self.overlap, self.cluster = given.get("overlap", False), given.get("cluster", 1)
        self.launches: list[tuple[Any, ...]] = []
        Recorder.made.append(self)

    made: list[Recorder] = []  # noqa: RUF012

    def launch(self, grid: Any, *arguments: Any, alone: bool = False) -> None:
        assert len(arguments) == {"8q": 8, "11qd": 12, "128s8q": 9, "4q": 4}[self.parameters]
        self.launches.append((grid, arguments, alone))

    def clusters_at_once(self) -> int:
        return 1

    def tensor_map(self, matrix: Tensor, rows: int, tile_rows: int) -> bytes:
        return f"{matrix.data_ptr()} {rows} {tile_rows}".encode()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    def choose(spec: cost.Spec, hardware: Any) -> Choice:
        return Choice(STREAM, (STREAM,))

    monkeypatch.setattr(op, "_PLANS", {})
    monkeypatch.setattr(op.cost, "choose", choose)
    monkeypatch.setattr(op.hardware, "current", lambda device: H200)
    monkeypatch.setattr(op, "compile_kernel", lambda source, arch: source)
    monkeypatch.setattr(op, "Plan", Recorder)
    Recorder.made = []
    return Recorder.made


def test_a_stream_launch_gets_every_argument_in_its_place(plans: list[Recorder]) -> None:
    inputs = FULL.make()
    norm, weight = inputs.norm, inputs.weight
    y = op._launch(inputs.x, weight, inputs.bias, "auto", inputs.residual, *norm, "silu_mul")
    (plan,) = plans
    assert y.shape == (5, 64)
    ((grid, arguments, alone),) = plan.launches
    assert grid == (2 * 2, 2, 1)  # 128 features, 64 a block of the cluster of 2; 5 rows, 4 a block
    tensors = (inputs.x, *weight.tensors, inputs.bias, inputs.residual, norm.weight, norm.bias, y)
    assert arguments == (*(t.data_ptr() for t in tensors), 5, 1e-5)
    assert alone
    assert plan.parameters == "11qd"
    assert plan.given == {"device": -1, "threads": 256, "shared_bytes": 50000, "cluster": 2, "overlap": True}
    constants = dict(plan.source.constants)
    assert plan.source.path.name == "stream.cu"
    around = ("NORM", "NORM_BIAS", "ACT", "RESIDUAL", "SPLIT1", "SPLIT2")
    assert [constants[name] for name in around] == [1, True, 3, True, 128, 128]
    assert {name: constants[name] for name in CONFIG} == CONFIG


def test_a_plain_stream_launch_has_nothing_around_it(plans: list[Recorder]) -> None:
    inputs = SMALL.make()
    y = op._launch(inputs.x, inputs.weight, None, "auto")
    (plan,) = plans
    ((grid, arguments, _),) = plan.launches
    weight = inputs.weight
    assert grid == (2 * 2, 1, 1)
    pointers = (inputs.x, weight.qweight, weight.scales, weight.qzeros)
    assert arguments == (*(t.data_ptr() for t in pointers), 0, 0, 0, 0, 0, y.data_ptr(), 3, 1e-5)
    constants = dict(plan.source.constants)
    around = ("NORM", "NORM_BIAS", "ACT", "RESIDUAL", "SPLIT1", "SPLIT2")
    assert [constants[name] for name in around] == [0, False, 0, False, 72, 72]


def _pick(monkeypatch: pytest.MonkeyPatch, variant: str, **config: int) -> None:
    candidate = Candidate(variant, tuple(config.items()), 1.0, "test")
    monkeypatch.setattr(op.cost, "choose", lambda spec, hardware: Choice(candidate, (candidate,)))


def test_a_gemm_launch_describes_x_once(plans: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    _pick(monkeypatch, "gemm", TILE_M=16, TEAMS=2, CLUSTER=2, WAYS=1, STREAM_K=0, AHEAD=2, SHARED=60000, GATHERED=0)
    monkeypatch.setattr(Recorder, "clusters_at_once", lambda self: 4)
    case = W4A16Case(40, 320, 256, 64, bias=True, residual=True)
    inputs, weight = case.make(), case.make().weight
    for _ in range(2):
        y = op._launch(inputs.x, weight, inputs.bias, "auto", inputs.residual)
    (plan,) = plans
    (grid, arguments, alone), (_, _, again) = plan.launches
    assert grid == (2 * 4, 1, 1)  # 3 tiles of rows, 2 of twice 128 features, 4 of these clusters at once
    assert arguments[0] == f"{inputs.x.data_ptr()} 40 8".encode()
    pointers = (weight.qweight, weight.scales, None, inputs.bias, inputs.residual)
    assert arguments[1:6] == tuple(0 if t is None else t.data_ptr() for t in pointers)
    assert plan.launches[1][1][-3:] == (y.data_ptr(), 0, 40)  # no workspace
    assert (alone, again) == (True, False)
    assert plan.given["threads"] == 2 * 128 + 128
    (ready,) = op._PLANS.values()
    assert isinstance(ready, op.Ready)
    assert list(ready.maps) == [(inputs.x.data_ptr(), 40)]


@pytest.mark.parametrize("m", [129, 256])
def test_weights_are_rounded_from_129_rows_on_only(m: int) -> None:
    """What W4A16Case.bound allows for: in tiles of 256 rows, and in those of 128 rows and three warpgroups."""

    def forms(rows: int) -> set[tuple[int, int]]:
        found = cost.gemm_shapes(W4A16Case(rows, 4096, 4096).spec(), H200)
        assert not isinstance(found, str)
        return {(config["TILE_M"], config["TEAMS"]) for _, config in found if config["TILE_M"] >= 128}

    assert forms(128) == {(128, 1), (128, 2)}
    assert forms(m) == {(128, 1), (128, 2), (128, 3), (256, 1), (256, 2)}


@pytest.mark.parametrize(
    ("m", "form", "options"),
    [
        (128, (128, 3, 1, 1, 1, 0), {}),  # rounds
        (256, (128, 3, 1, 1, 1, 0), {"activation": "silu_mul"}),  # has pairs of warpgroups
        (256, (128, 4, 1, 1, 1, 0), {}),
        (256, (128, 1, 2, 1, 1, 0), {}),
        (256, (256, 3, 1, 1, 1, 0), {}),
    ],
)
def test_forms_of_many_rows_that_there_are_not(m: int, form: cost.Form, options: dict[str, Any]) -> None:
    assert cost.gemm_shapes(W4A16Case(m, 4096, 4096, **options).spec(), H200, (form,)) == (
        "no form of it fits this GPU's registers and shared memory"
    )


@pytest.mark.parametrize(("at_once", "k", "clusters"), [(4, 256, 4), (100, 256, 12), (5000, 4096, 64)])
def test_stream_k_has_as_many_workers_as_there_is_work_for(
    at_once: int, k: int, clusters: int, plans: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 tiles of rows, 2 of twice 128 features, of 2 or 32 units; flags for 64 clusters of 2 blocks of 2 x 4 warps."""
    _pick(
        monkeypatch, "gemm",
        TILE_M=16, TEAMS=2, CLUSTER=2, WAYS=1, STREAM_K=1, AHEAD=2, SHARED=60000, GATHERED=0,
    )  # fmt: skip
    asked: list[int] = []
    monkeypatch.setattr(Recorder, "clusters_at_once", lambda self: at_once)
    monkeypatch.setattr(op.workspace, "FLAG_BYTES", 64 * 2 * 2 * 4 * 4)
    monkeypatch.setattr(op.workspace, "address", lambda device, size: asked.append(size) or 7)
    inputs = W4A16Case(40, 320, k, 64).make()
    op._launch(inputs.x, inputs.weight, None, "auto")
    ((grid, arguments, _),) = plans[0].launches
    assert (grid, arguments[-2]) == ((2 * clusters, 1, 1), 7)
    assert asked == [op.workspace.FLAG_BYTES + min(at_once, 64) * 2 * 128 * 16 * 4]


def test_act_order_is_gathered_before_the_product(plans: list[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    _pick(
        monkeypatch, "wgmma",
        TILE_M=16, TEAMS=1, SLICES=3, CLUSTER=2, AHEAD=2, SUM_ROWS=16, BUFFERS=1, GATHERED=1, BLOCKS=1, SHARED=60000,
    )  # fmt: skip
    inputs = W4A16Case(16, 320, 256, 64, act_order=True).make()
    op._launch(inputs.x, inputs.weight, None, "auto")
    product, gather = plans
    ((grid, (source, order, ordered, rows), alone),) = gather.launches
    assert inputs.weight.perm is not None
    assert (grid, source, order, rows) == ((4, 1, 1), inputs.x.data_ptr(), inputs.weight.perm.data_ptr(), 16)
    ((grid, arguments, _),) = product.launches
    assert (grid, arguments[0], alone) == ((2, 1, 1), ordered, True)
    assert product.given["threads"] == 3 * 128 + 32


def test_planes_have_one_allocation_and_their_own_plan(plans: list[Recorder]) -> None:
    inputs = W4A16Case(3, 96, 64, 32).make()
    equal = op._launch(inputs.x, inputs.weight, None, "auto", split1=32, split2=64)
    flat = op._launch(inputs.x, inputs.weight, None, "auto", split1=64, split2=80)
    whole = op._launch(inputs.x, inputs.weight, None, "auto")
    assert (equal.shape, flat.shape, whole.shape) == ((3, 3, 32), (288,), (3, 96))
    splits = [(dict(p.source.constants)["SPLIT1"], dict(p.source.constants)["SPLIT2"]) for p in plans]
    assert splits == [(32, 64), (64, 80), (96, 96)]


def test_odd_tensors_are_made_plain_or_refused_on_the_warm_path(plans: list[Recorder]) -> None:
    inputs = FULL.make()
    norm, weight = inputs.norm, inputs.weight

    given = {"x": inputs.x, "bias": inputs.bias, "residual": inputs.residual, **dict(zip(NORM, norm, strict=True))}

    def launch(**change: Any) -> None:
        use = {**given, **change}
        around = (use[name] for name in ("residual", *NORM))
        op._launch(use["x"], weight, use["bias"], "auto", *around, "silu_mul")

    def spaced(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack((tensor, tensor), -1)[..., 0]

    launch()
    (plan,) = plans
    straight = {t.data_ptr() for t in given.values() if isinstance(t, torch.Tensor)}
    for name, at in (("x", 0), ("bias", 5), ("residual", 6), ("norm_weight", 7), ("norm_bias", 8)):
        odd = spaced(given[name])
        launch(**{name: odd})
        assert plan.launches[-1][1][at] not in {odd.data_ptr(), *straight}
        with pytest.raises(ValueError, match="expected shape"):
            launch(**{name: given[name][..., :8]})
        if name != "x":  # of another dtype it is another request
            with pytest.raises(TypeError, match=f"{name.replace('norm_', 'norm.')}: expected torch.float16"):
                launch(**{name: given[name].double()})
    with pytest.raises(ValueError, match="eps"):
        launch(eps=float("nan"))
    with pytest.raises(ValueError, match="residual: expected shape"):
        launch(residual=inputs.residual[:4])
    with pytest.raises(ValueError, match=r"x: expected shape \[..., in_features\]"):
        launch(x=torch.zeros((), dtype=torch.float16))
    assert len(plans) == 1


def test_a_weight_waits_once_and_after_every_change(plans: list[Recorder]) -> None:
    inputs = SMALL.make()
    weight = inputs.weight

    def alone(of: Any) -> bool:
        op._launch(inputs.x, of, None, "auto")
        return plans[-1].launches[-1][2]

    assert [alone(weight) for _ in range(3)] == [True, False, False]
    for tensor in (weight.qweight, weight.scales, weight.qzeros):
        tensor.copy_(tensor.clone())
        assert [alone(weight) for _ in range(2)] == [True, False]
    for other in (copy.deepcopy(weight), copy.copy(weight), replace(weight)):  # the tensors of a copy are new
        assert [alone(other) for _ in range(2)] == [True, False]
    with torch.inference_mode():
        frozen = copy.deepcopy(weight)
    assert frozen.qweight.is_inference()
    assert [alone(frozen) for _ in range(2)] == [True, False]
