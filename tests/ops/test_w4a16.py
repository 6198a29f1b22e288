"""The 4-bit linear on a CPU: the reference against float64, the operator, the choice, and what bad input gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checks import check_case
from hypothesis import given, settings
from hypothesis import strategies as st

import nybble
from nybble.ops.w4a16 import cost
from nybble.ops.w4a16.cases import W4A16Case
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import H200

SMALL = W4A16Case(3, 72, 200, 32, torch.float16, symmetric=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("act_order", [False, True])
def test_matches_float64(group_size: int, act_order: bool, dtype: torch.dtype) -> None:
    check_case(W4A16Case(5, 72, 512, group_size, dtype, symmetric=False, act_order=act_order, bias=True))


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
        (ValueError, r"variant: expected 'auto' or one of \['mma', 'reference'\], got 'marlin'", {"variant": "marlin"}),
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


def test_opcheck() -> None:
    inputs = SMALL.make()
    arguments = (inputs.x, *inputs.weight.tensors, None, 200, 72, 32, "auto")
    torch.library.opcheck(torch.ops.nybble.w4a16.default, arguments)


def test_compiles_whole_with_dynamic_rows() -> None:
    inputs = SMALL.make()
    compiled = torch.compile(
        lambda x: nybble.w4a16_linear(x, inputs.weight) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (2, 5):
        x = torch.randn(rows, 200, dtype=torch.float16)
        torch.testing.assert_close(compiled(x), nybble.w4a16_linear(x, inputs.weight) * 2)


def test_choice_is_pure_and_says_why() -> None:
    spec = W4A16Case(1, 4096, 4096).spec()
    pick = cost.choose(spec, H200).pick
    assert (pick.variant, dict(pick.config)) == ("mma", {"TILE_M": 8, "SLICES": 8})
    assert dict(cost.choose(spec._replace(m=4096), H200).pick.config)["TILE_M"] == 64
    single = cost.choose(spec._replace(dtype=torch.float32), H200)
    assert single.pick.variant == "reference"
    assert "needs float16 or bfloat16 activations, got torch.float32" in [c.reason for c in single.candidates]
    times = [cost.choose(spec._replace(m=m), H200).pick.us or 0.0 for m in (1, 64, 1024, 4096)]
    assert times == sorted(times)
