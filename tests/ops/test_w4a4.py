"""The W4A4 linear and its weight on a CPU: values, errors, and the choice of a tile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checks import check_case

import nybble
from nybble.bench.run import dtype_name, options
from nybble.formats.channels import ChannelWeight
from nybble.ops.w4a4 import cost
from nybble.ops.w4a4.cases import BENCH, PRODUCTS, SMALL, W4A4Case
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import A100, H200


@pytest.mark.parametrize("case", [*SMALL, W4A4Case(0, 64, 64), W4A4Case(2, 8, 8, torch.float32, bias=True)], ids=str)
def test_small_cases(case: W4A4Case) -> None:
    check_case(case)


def test_the_sum_is_exact_beyond_fp32() -> None:
    """Bytes, not only int4 values, and so many of them that an fp32 sum would round."""
    k = 70000 // 8 * 8
    q_x = torch.full((1, k), 127, dtype=torch.int8)
    q = torch.full((k, 8), 7, dtype=torch.int8)
    q[0, 0] = 6
    y = nybble.w4a4_linear(q_x, torch.ones(1), ChannelWeight.from_values(q, torch.ones(8)), dtype=torch.float32)
    exact = torch.tensor([127 * (7 * k - 1), 127 * 7 * k])
    assert torch.equal(y[0, :2], exact.float())


def test_quantise_then_multiply_is_the_linear_layer() -> None:
    """With orthogonal transforms on both sides, the product of the quantised is near that of the original."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size))[0] for size in (8, 16))
    x, weight = torch.randn(32, 128), torch.randn(64, 128) / 128**0.5
    packed = ChannelWeight.from_float(weight @ torch.kron(left, right))
    q_x, scale_x = nybble.flatquant_dynamic_quantize(x, left.contiguous(), right.contiguous())
    y = nybble.w4a4_linear(q_x, scale_x, packed, dtype=torch.float32)
    want = x @ weight.t()
    assert (y - want).norm() / want.norm() < 0.2


def test_leading_shapes() -> None:
    inputs = W4A4Case(6, 64, 128).make()
    want = nybble.w4a4_linear(inputs.q_x, inputs.scale_x, inputs.weight)
    got = nybble.w4a4_linear(inputs.q_x.view(2, 3, 128), inputs.scale_x.view(2, 3), inputs.weight)
    assert torch.equal(got.view(6, 64), want)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ("q_x=q_x.float()", TypeError, "q_x: expected int8.*pack_int32=False"),
        ("q_x=q_x[:, :8]", ValueError, r"q_x: expected shape \[..., in_features\]"),
        ("scale_x=scale_x.half()", TypeError, "scale_x: expected float32"),
        ("scale_x=scale_x[:1]", ValueError, "scale_x: expected shape"),
        ("bias=torch.zeros(64)", TypeError, "bias: expected torch.float16"),
        ("bias=torch.zeros(8, dtype=torch.float16)", ValueError, r"bias: expected shape \[out_features\]"),
        ("dtype=torch.int8", TypeError, "dtype: expected"),
        ("weight=weight.qweight", TypeError, "a nybble.ChannelWeight"),
        ("scale_x=scale_x.to('meta')", ValueError, "scale_x: expected device cpu"),
        ("variant='fast'", ValueError, "variant: expected"),
        ("variant='gemm'", UnsupportedError, "no CUDA device"),
    ],
)
def test_bad_input_is_refused(change: str, error: type[Exception], text: str) -> None:
    inputs = W4A4Case(3, 64, 128).make()
    given: dict[str, object] = {
        "torch": torch, "q_x": inputs.q_x, "scale_x": inputs.scale_x, "weight": inputs.weight, "bias": None,
        "dtype": torch.float16, "variant": "auto",
    }  # fmt: skip
    exec(change, given)
    options = {name: given[name] for name in ("bias", "dtype", "variant")}
    with pytest.raises(error, match=text):
        nybble.w4a4_linear(given["q_x"], given["scale_x"], given["weight"], **options)  # type: ignore[arg-type]


def test_opcheck_and_gradient() -> None:
    inputs = W4A4Case(3, 64, 128, torch.float32, bias=True).make()
    arguments = (
        inputs.q_x, inputs.scale_x, *inputs.weight.tensors, inputs.bias, 128, 64, torch.float32, "auto",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.nybble.w4a4.default, arguments)
    scale_x = inputs.scale_x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        nybble.w4a4_linear(inputs.q_x, scale_x, inputs.weight, dtype=torch.float32).sum().backward()


def test_choice() -> None:
    for case in BENCH:
        choice = case.choice(H200)
        config = dict(choice.pick.config)
        assert choice.pick.variant == "gemm"
        assert config["SHARED"] <= H200.shared_bytes
        assert (
            config["TILE_M"] in (128, 256)
            if case.m > 64
            else config["TILE_M"] == max(8, 1 << (case.m - 1).bit_length())
        )
        assert choice.pick.us == min(c.us for c in choice.candidates if c.us is not None)
    assert "9.0" in W4A4Case().choice(A100).candidates[0].reason
    assert "multiple of 16" in W4A4Case(1, 64, 72).choice(H200).candidates[0].reason
    assert W4A4Case(1, 64, 72).choice(H200).pick.variant == "reference"
    with pytest.raises(ValueError, match="variant"):
        cost.choose(W4A4Case().spec("fast"), H200)


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_the_prediction_is_within_a_tenth_of_the_row(case: W4A4Case) -> None:
    """Of the pick, as an H200 was measured; rows of another tile than today's do not count."""
    pick = case.choice(H200).pick
    rows = (Path(__file__).parents[2] / "results" / "h200" / "w4a4.jsonl").read_text().splitlines()
    measured = [
        row["us"]
        for row in map(json.loads, rows)
        if row["shape"] == case.shape()
        and (row["dtype"], row["provider"], row["variant"]) == (dtype_name(case), "nybble", pick.variant)
        and row.get("options", {}) == options(case)
        and row.get("config", dict(pick.config)) == dict(pick.config)
    ]
    assert measured, "a case or a tile that was never measured"
    assert pick.us == pytest.approx(measured[-1], rel=0.1)


TILES = {
    1: (8, 1, 4, 1),
    16: (16, 1, 4, 1),
    64: (64, 2, 2, 1),
    128: (128, 2, 1, 2),
    512: (128, 2, 1, 2),
    1024: (256, 2, 1, 2),
}
"""What the rows were measured with, by M; more rows as 1024."""


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_the_tile_is_that_of_the_rows(case: W4A4Case) -> None:
    config = dict(case.choice(H200).pick.config)
    form = tuple(config[name] for name in ("TILE_M", "TEAMS", "SLICES", "CLUSTER"))
    assert form == TILES[min(case.m, 1024)]
