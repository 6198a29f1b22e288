"""The norm family on a CPU: the reference against PyTorch in float64, the operators, and what bad input gets."""

from __future__ import annotations

import pytest
import torch
from checks import check_case
from hypothesis import given, settings
from hypothesis import strategies as st

import nybble
from nybble.ops.norm import cost
from nybble.ops.norm.cases import DTYPES, FUNCTIONS, NormCase
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import A100, H200


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 8), (2, 2561), (5, 4096), (1, 65536), (0, 64)])
def test_matches_float64(function: str, rows: int, hidden: int, dtype: torch.dtype) -> None:
    check_case(NormCase(function, rows, hidden, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_large_mean_keeps_its_digits(function: str, dtype: torch.dtype) -> None:
    """E[x^2] - E[x]^2 in fp32 is wrong by a factor here."""
    check_case(NormCase(function, 4, 4096, dtype, mean=1e4))


@settings(max_examples=30, deadline=None)
@given(
    function=st.sampled_from(FUNCTIONS),
    rows=st.integers(0, 5),
    hidden=st.integers(1, 700),
    seed=st.integers(0, 2**20),
    deviation=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_any_shape(function: str, rows: int, hidden: int, seed: int, deviation: float) -> None:
    check_case(NormCase(function, rows, hidden, torch.float32, deviation=deviation), seed=seed)


def test_agrees_with_hugging_face_modules() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, residual = torch.randn(2, 7, 96), torch.randn(2, 7, 96)
    theirs = LlamaRMSNorm(96, eps=1e-6)
    torch.nn.init.normal_(theirs.weight)
    normed, h = nybble.add_rmsnorm(x, residual, theirs.weight.detach(), 1e-6)
    torch.testing.assert_close(normed, theirs(x + residual).detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(h, x + residual)

    norm = torch.nn.LayerNorm(96)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    normed = nybble.layernorm(x, norm.weight.detach(), norm.bias.detach())
    torch.testing.assert_close(normed, norm(x).detach(), rtol=1e-6, atol=2e-6)


def test_bias_may_be_missing() -> None:
    x, weight = torch.randn(3, 40), torch.randn(40)
    assert torch.equal(nybble.layernorm(x, weight), nybble.layernorm(x, weight, torch.zeros(40)))
    with pytest.raises(ValueError, match=r"add_dual_layernorm: b2: expected both b1 and b2, or neither"):
        nybble.add_dual_layernorm(x, x, x, weight, weight, weight, None)


def test_strided_inputs_and_leading_shape() -> None:
    x = torch.randn(3, 5, 128)[:, ::2, ::2]
    weight = torch.randn(128)[::2]
    got = nybble.layernorm(x, weight)
    assert got.shape == x.shape
    assert got.is_contiguous()
    assert torch.equal(got, nybble.layernorm(x.contiguous(), weight.contiguous()))


def test_nan_and_inf_stay_in_their_row() -> None:
    x = torch.randn(4, 64)
    clean = nybble.layernorm(x, torch.ones(64))
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    got = nybble.layernorm(x, torch.ones(64))
    assert torch.equal(got[[0, 3]], clean[[0, 3]])
    assert got[1].isnan().all()
    assert got[2].isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8).int()}, TypeError, "x: expected float32, float16 or bfloat16, got torch.int32"),
        ({"residual": torch.zeros(2, 8).half()}, TypeError, "residual: expected torch.float32, the dtype of x, got"),
        ({"residual": torch.zeros(1, 8)}, ValueError, r"residual: expected shape \[2, 8\], that of x, got \[1, 8\]"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight: expected shape \[hidden\] = \[8\], got \[7\]"),
        ({"bias": torch.zeros(2, 8)}, ValueError, r"bias: expected shape \[hidden\] = \[8\], got \[2, 8\]"),
        ({"weight": torch.zeros(8, device="meta")}, ValueError, "weight: expected device cpu, that of x, got meta"),
        ({"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number"),
        ({"x": torch.zeros(()), "residual": torch.zeros(())}, ValueError, r"x: expected shape \[..., hidden\]"),
        ({"variant": "fast"}, ValueError, r"variant: expected 'auto' or one of \['cuda', 'triton', 'reference'\]"),
        ({"variant": "cuda"}, UnsupportedError, "no variant can run this here .cuda: no CUDA device"),
        ({"variant": "triton"}, UnsupportedError, "no variant can run this here .triton: no CUDA device"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.zeros(2, 8), "residual": torch.zeros(2, 8), "weight": torch.ones(8), "bias": torch.zeros(8),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        nybble.add_layernorm(**{**arguments, **change})  # type: ignore[arg-type]


def test_tracing_meets_the_same_errors() -> None:
    """Through torch.ops on meta tensors, as torch.compile does it."""
    x, weight = torch.zeros(2, 8, device="meta"), torch.ones(7, device="meta")
    with pytest.raises(ValueError, match=r"rmsnorm: weight: expected shape \[hidden\] = \[8\], got \[7\]"):
        torch.ops.nybble.rmsnorm(x, weight, 1e-6, "auto")


def test_a_python_list_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="x"):
        nybble.layernorm([1.0, 2.0], torch.ones(2))  # type: ignore[arg-type]


def test_backward_says_inference_only() -> None:
    weight = torch.ones(8, requires_grad=True)
    result = nybble.layernorm(torch.randn(2, 8), weight)
    with pytest.raises(RuntimeError, match="nybble::layernorm has no backward"):
        result.sum().backward()
    with torch.no_grad():
        assert not nybble.layernorm(torch.randn(2, 8), weight).requires_grad


@pytest.mark.parametrize("function", FUNCTIONS)
def test_opcheck(function: str) -> None:
    case = NormCase(function, 3, 40, torch.float32)
    operator = getattr(torch.ops.nybble, function).default
    torch.library.opcheck(operator, (*case.make().values(), 1e-5, "auto"))


def test_compiles_whole_with_dynamic_rows() -> None:
    weight = torch.ones(32)

    def step(x: torch.Tensor) -> torch.Tensor:
        return nybble.add_rmsnorm(x, x, weight)[0] * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(compiled(x), step(x))


def test_choice_is_pure_and_says_why() -> None:
    spec = NormCase("add_layernorm", 1, 2560, torch.float16).spec()

    def config(**changes: object) -> dict[str, object]:
        return dict(cost.choose(spec._replace(**changes), H200).pick.config)  # type: ignore[arg-type]

    few = {
        "VEC": 8,
        "THREADS": 320,
        "ROWS": 1,
        "CLUSTER": 1,
        "KEEP": True,
        "EARLY": True,
        "AHEAD": True,
        "STREAM": False,
    }
    assert cost.choose(spec, H200).pick.variant == "cuda"
    assert config() == few
    assert config(rows=512) == {**few, "EARLY": False, "AHEAD": False}
    assert config(rows=4096)["THREADS"] == 160
    assert config(rows=4096, hidden=768)["THREADS"] == 96, "64 threads would leave a third of the last round idle"
    assert config(rows=4096, function="layernorm_residual")["STREAM"] is True
    assert config(rows=16384, hidden=4096, function="layernorm_residual")["STREAM"] is False
    short = config(rows=1 << 17, hidden=128)
    assert (short["THREADS"], short["ROWS"]) == (16, 8)
    assert config(rows=1 << 17, hidden=128, function="rmsnorm")["THREADS"] == 8
    assert config(rows=512, dtype=torch.float32)["THREADS"] == 320
    assert config(rows=4096, dtype=torch.float32)["THREADS"] == 320
    assert config(hidden=2561)["VEC"] == 1
    assert config(hidden=2564)["VEC"] == 4
    assert config(alignment=4)["VEC"] == 2
    assert config(rows=512, hidden=4096)["THREADS"] == 256
    assert (config(hidden=65536)["CLUSTER"], config(hidden=65536)["THREADS"]) == (8, 256)
    assert config(hidden=1 << 19)["KEEP"] is False
    assert dict(cost.choose(spec._replace(hidden=65536), A100).pick.config)["CLUSTER"] == 1
    large = NormCase("layernorm_residual", 16384, 4096, torch.float32).spec()
    assert cost.choose(large, H200).pick.variant == "triton"
    assert cost.choose(large._replace(rows=4096), H200).pick.variant == "cuda"
    assert cost.choose(large._replace(dtype=torch.float16), H200).pick.variant == "cuda"
    assert cost.choose(spec, None).pick.variant == "reference"
    old = A100._replace(capability=(7, 5))
    assert cost.choose(spec, old).pick.variant == "reference"
    assert "needs compute capability 8.0, this GPU has 7.5" in cost.candidates(spec, old)[0].reason
