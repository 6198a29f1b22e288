"""A norm with queries, keys and values behind it, on a CPU: against float64, what is remembered, what bad input
gets."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from checks import check_case

import nybble
from nybble.ops.ln_qkv import op
from nybble.ops.ln_qkv.cases import LnQkvCase, parse
from nybble.ops.w4a16 import cost
from nybble.ops.w4a16.cases import W4A16Case
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import H200

EQUAL = LnQkvCase(3, 192, 64, 32, torch.float16, symmetric=False, bias=True)
GROUPED = LnQkvCase(3, 96, 64, 32, torch.float16, symmetric=False)


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    nybble.release_packed()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("n", [768, 256 + 2 * 64])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_matches_float64(m: int, n: int, norm: str, dtype: torch.dtype) -> None:
    for group_size, act_order in ((32, False), (64, True), (128, False), (-1, False)):
        case = LnQkvCase(m, n, 256, group_size, dtype, False, act_order, True, norm=norm)
        results = check_case(case)
        assert len(results) == (1 if n == 768 else 3)


def arguments(case: LnQkvCase) -> tuple[tuple[torch.Tensor, ...], dict[str, Any], Any]:
    inputs = case.make()
    assert inputs.norm is not None
    weights = tuple(inputs.gptq[name] for name in ("qweight", "qzeros", "scales"))
    options = {"group_size": case.group_size, "bias": inputs.bias, "kv_features": case.kv_features}
    return (inputs.x, *weights, inputs.norm.weight, inputs.norm.bias), options, inputs


def test_is_the_norm_then_the_product() -> None:
    given, options, inputs = arguments(EQUAL)
    normed = nybble.layernorm(inputs.x, inputs.norm.weight, inputs.norm.bias)
    want = nybble.w4a16_linear(normed, inputs.weight, bias=inputs.bias)
    got = nybble.fused_ln_qkv_gptq(*given, **options)
    assert got.shape == (3, 1, 3, 64)
    assert got.is_contiguous()
    for plane, part in zip(got, want.chunk(3, -1), strict=True):
        assert torch.equal(plane, part)
    assert torch.equal(nybble.ln_qkv(inputs.x, inputs.weight, inputs.norm, bias=inputs.bias), got)


def test_a_packed_weight_of_8_bits() -> None:
    inputs = W4A16Case(3, 192, 64, 32, torch.float32, symmetric=False, act_order=True, norm="layernorm", bits=8).make()
    assert inputs.norm is not None
    got = nybble.ln_qkv(inputs.x, inputs.weight, inputs.norm)
    normed = torch.nn.functional.layer_norm(inputs.x, (64,), inputs.norm.weight, inputs.norm.bias, inputs.norm.eps)
    want = (normed @ inputs.quantized.dequantize()).unflatten(-1, (3, 64)).movedim(-2, 0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_grouped_queries_are_three_tensors_of_one_allocation() -> None:
    given, options, inputs = arguments(GROUPED)
    normed = nybble.layernorm(inputs.x, inputs.norm.weight, inputs.norm.bias)
    want = nybble.w4a16_linear(normed, inputs.weight).split((64, 16, 16), -1)
    both = (
        nybble.fused_ln_qkv_gptq(*given, **options),
        nybble.ln_qkv(inputs.x, inputs.weight, inputs.norm, kv_features=16),
    )
    for got in both:
        assert isinstance(got, tuple)
        assert len({t.untyped_storage().data_ptr() for t in got}) == 1
        for ours, theirs in zip(got, want, strict=True):
            assert ours.is_contiguous()
            assert torch.equal(ours, theirs)
    equal_but_not_hidden = nybble.ln_qkv(inputs.x, inputs.weight, inputs.norm, kv_features=32)
    assert [list(t.shape) for t in equal_but_not_hidden] == [[1, 3, 32]] * 3
    assert isinstance(equal_but_not_hidden, tuple)
    assert torch.equal(torch.cat(equal_but_not_hidden, -1), torch.cat(want, -1))


@pytest.mark.parametrize("lead", [(), (2,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("case", [EQUAL, GROUPED], ids=["equal", "grouped"])
def test_any_leading_shape(case: LnQkvCase, lead: tuple[int, ...]) -> None:
    given, options, _ = arguments(case)
    got = nybble.fused_ln_qkv_gptq(torch.randn(*lead, 64).half(), *given[1:], **options)
    assert [t.shape for t in got] == [(*lead, 64)] * 3 if case is EQUAL else [(*lead, 64), (*lead, 16), (*lead, 16)]


def test_both_ways_to_store_zero_points() -> None:
    from nybble.formats.gptq import pack_gptq

    given, options, inputs = arguments(EQUAL)
    second = pack_gptq(inputs.quantized, checkpoint_format="gptq_v2")
    assert not torch.equal(second["qzeros"], given[2])
    got = nybble.fused_ln_qkv_gptq(
        given[0], second["qweight"], second["qzeros"], *given[3:], **options, checkpoint_format="gptq_v2"
    )
    assert torch.equal(got, nybble.fused_ln_qkv_gptq(*given, **options))


# --- what is remembered ---


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each packing."""
    made: list[int] = []
    pack = op.PackedWeight.from_quantized
    monkeypatch.setattr(op.PackedWeight, "from_quantized", lambda weight: made.append(1) or pack(weight))
    return made


def test_a_weight_is_packed_once(packs: list[int]) -> None:
    given, options, _ = arguments(EQUAL)
    packs.clear()
    first = nybble.fused_ln_qkv_gptq(*given, **options)
    assert torch.equal(nybble.fused_ln_qkv_gptq(*given, **options), first)
    assert len(packs) == 1
    assert nybble.release_packed(given[2]) == 0  # not a qweight
    assert nybble.release_packed(given[1]) == 1
    assert nybble.release_packed() == 0
    nybble.fused_ln_qkv_gptq(*given, **options)
    assert len(packs) == 2
    assert nybble.release_packed() == 1


@pytest.mark.parametrize("which", [1, 2, 3], ids=["qweight", "qzeros", "scales"])
def test_a_weight_that_changes_in_place_is_packed_again(which: int) -> None:
    given, options, _ = arguments(EQUAL)
    before = nybble.fused_ln_qkv_gptq(*given, **options)
    given[which].copy_(given[which].flip(1))
    after = nybble.fused_ln_qkv_gptq(*given, **options)
    assert not torch.equal(after, before)
    fresh = nybble.fused_ln_qkv_gptq(given[0], *(t.clone() for t in given[1:4]), *given[4:], **options)
    assert torch.equal(after, fresh)


def test_a_weight_is_forgotten_with_its_tensors() -> None:
    given, options, inputs = arguments(EQUAL)
    for which in (1, 2, 3):
        tensors = list(given)
        tensors[which] = given[which].clone()
        nybble.fused_ln_qkv_gptq(*tensors, **options)
        assert len(op._PACKED) == 1
        del tensors
        gc.collect()
        assert len(op._PACKED) == 0
    del inputs


def test_inference_tensors_are_remembered_too(packs: list[int]) -> None:
    with torch.inference_mode():
        given, options, _ = arguments(EQUAL)
        packs.clear()
        for _ in range(2):
            nybble.fused_ln_qkv_gptq(*given, **options)
    assert len(packs) == 1


@pytest.mark.parametrize("case", [EQUAL, GROUPED], ids=["equal", "grouped"])
def test_a_warm_cuda_call_checks_the_weight_no_more(case: LnQkvCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA implementation, with tensors of a CPU and nothing launched."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(op.linear, "cuda", lambda *arguments: calls.append(arguments))
    given, options, _ = arguments(case)
    rest = (None, options["bias"], case.group_size, 1e-5, "layernorm")
    op._cuda(*given, *rest, case.kv_features, "gptq", "auto")
    checks: list[int] = []
    check = op._check
    monkeypatch.setattr(op, "_check", lambda *arguments: checks.append(1) or check(*arguments))
    op._cuda(*given, *rest, case.kv_features, "gptq", "auto")
    assert checks == []
    first, second = calls
    assert first[1] is second[1]
    assert first[2:] == second[2:]
    assert first[9:12] == ("", *case.splits)
    for at, wrong in ((10, ""), (11, 96), (11, -8)):
        odd = [*given, *rest, case.kv_features, "gptq", "auto"]
        odd[at] = wrong
        with pytest.raises(ValueError, match="kind: expected" if at == 10 else "kv_features: expected"):
            op._cuda(*odd)
    checks.clear()
    given[1].add_(1)
    op._cuda(*given, *rest, case.kv_features, "gptq", "auto")
    assert checks
    assert calls[-1][1] is not first[1]


# --- operator, errors, choice ---


@pytest.mark.parametrize("case", [EQUAL, GROUPED], ids=["equal", "grouped"])
def test_opcheck(case: LnQkvCase) -> None:
    given, options, _ = arguments(case)
    rest = (None, options["bias"], case.group_size, 1e-5, "layernorm", case.kv_features, "gptq", "auto")
    torch.library.opcheck(torch.ops.nybble.fused_ln_qkv_gptq.default, (*given, *rest))


@pytest.mark.parametrize("case", [EQUAL, GROUPED], ids=["equal", "grouped"])
def test_compiles_whole_and_packs_once(case: LnQkvCase, packs: list[int]) -> None:
    given, options, inputs = arguments(case)
    packs.clear()

    def from_gptq(x: torch.Tensor) -> Any:
        q, k, v = nybble.fused_ln_qkv_gptq(x, *given[1:], **options)
        return q, k * 2, v

    def from_packed(x: torch.Tensor) -> Any:
        q, k, v = nybble.ln_qkv(x, inputs.weight, inputs.norm, bias=inputs.bias, kv_features=case.kv_features)
        return q, k * 2, v

    for function in (from_gptq, from_packed):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (2, 5):
            x = torch.randn(1, rows, 64).half()
            torch.testing.assert_close(compiled(x), function(x))
    assert len(packs) == 1


def test_a_backward_raises() -> None:
    given, options, _ = arguments(EQUAL)
    y = nybble.fused_ln_qkv_gptq(given[0].requires_grad_(), *given[1:], **options)
    with pytest.raises(RuntimeError, match="no backward"):
        y.sum().backward()


def test_bad_input_is_named() -> None:
    given, options, _ = arguments(EQUAL)
    names = ("input", "qweight", "qzeros", "scales", "ln_weight", "ln_bias")
    good: dict[str, Any] = {**dict(zip(names, given, strict=True)), **options}
    half = torch.zeros(64).half()
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"qzeros: expected shape \[G, N/8\] = \[2, 24\], got \[2, 4\]. \[G, group_size/8\] is a mistake",
         {"qzeros": torch.zeros(2, 4, dtype=torch.int32)}),
        (ValueError, r"qzeros: expected shape \[G, N/8\] = \[2, 24\], got \[2, 3\]$",
         {"qzeros": torch.zeros(2, 3, dtype=torch.int32)}),
        (TypeError, "qzeros: expected torch.int32, got torch.int64", {"qzeros": given[2].long()}),
        (TypeError, "qweight: expected torch.int32, got torch.float32", {"qweight": given[1].float()}),
        (ValueError, r"scales: expected shape \[G, N\] = \[2, 192\], got \[1, 192\]", {"scales": given[3][:1]}),
        (ValueError, "scales: expected device cpu, that of qweight, got meta", {"scales": given[3].to("meta")}),
        (ValueError, r"g_idx: expected shape \[K\] = \[64\], got \[8\]", {"g_idx": torch.zeros(8, dtype=torch.int32)}),
        (ValueError, r"input: expected shape \[..., hidden\] = \[..., 64\], got \[1, 3, 32\]",
         {"input": given[0][..., :32]}),
        (TypeError, "input: expected float16, bfloat16 or float32, got torch.int64", {"input": given[0].long()}),
        (TypeError, "ln_weight: expected torch.float16, the dtype of input, got torch.float32",
         {"ln_weight": torch.zeros(64)}),
        (ValueError, r"ln_bias: expected shape \[in_features\] = \[64\], got \[8\]", {"ln_bias": half[:8]}),
        (ValueError, "ln_bias: expected None with rmsnorm", {"kind": "rmsnorm"}),
        (ValueError, r"kind: expected one of \['layernorm', 'rmsnorm'\], got 'batchnorm'", {"kind": "batchnorm"}),
        (ValueError, r"kind: expected one of \['layernorm', 'rmsnorm'\], got ''", {"kind": ""}),
        (ValueError, "eps: expected a finite number >= 0, got -1.0", {"eps": -1.0}),
        (ValueError, r"bias: expected shape \[out_features\] = \[192\], got \[64\]", {"bias": half}),
        (ValueError, "group_size: expected -1, one of", {"group_size": 48}),
        (ValueError, "checkpoint_format: expected one of", {"checkpoint_format": "awq"}),
        (ValueError, "kv_features: expected a positive multiple of 8 below half of the 192", {"kv_features": 96}),
        (ValueError, "kv_features: expected a positive multiple of 8", {"kv_features": 12}),
        (ValueError, "kv_features: expected a positive multiple of 8", {"kv_features": -8}),
        (ValueError, "variant: expected 'auto' or one of", {"variant": "marlin"}),
        (UnsupportedError, "composed: no CUDA device", {"variant": "composed"}),
        (TypeError, "Expected a value of type 'Tensor'", {"qweight": "a string"}),
    ]  # fmt: skip
    for error, message, change in bad:
        with pytest.raises(error, match=message) as caught:
            nybble.fused_ln_qkv_gptq(**{**good, **change})
        if error is not UnsupportedError and "variant" not in message and "type 'Tensor'" not in message:
            assert str(caught.value).startswith("fused_ln_qkv_gptq: ")
    assert len(op._PACKED) <= 1  # refused before anything is packed, but for the variant
    grouped = arguments(GROUPED)[0]
    with pytest.raises(ValueError, match=r"qweight: expected 3 \* hidden = 192 output features, got 96. For grouped"):
        nybble.fused_ln_qkv_gptq(*grouped, group_size=32)


def test_bad_input_of_the_packed_form_is_named() -> None:
    inputs = GROUPED.make()
    with pytest.raises(TypeError, match=r"ln_qkv: weight: expected a nybble.PackedWeight, got Tensor"):
        nybble.ln_qkv(inputs.x, inputs.x, inputs.norm)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"ln_qkv: norm: expected a nybble.Norm, got NoneType"):
        nybble.ln_qkv(inputs.x, inputs.weight, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ln_qkv: weight: expected 3 \* hidden = 192 output features, got 96"):
        nybble.ln_qkv(inputs.x, inputs.weight, inputs.norm)
    with pytest.raises(TypeError, match="ln_qkv: kv_features: expected an int or None, got float"):
        nybble.ln_qkv(inputs.x, inputs.weight, inputs.norm, kv_features=16.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: expected shape"):
        nybble.ln_qkv(inputs.x[..., :8], inputs.weight, inputs.norm, kv_features=16)


def test_choice_and_case() -> None:
    spec = LnQkvCase(16).spec()
    assert (spec.norm, spec.norm_bias, spec.splits) == ("layernorm", True, (4096, 8192))
    assert LnQkvCase(16, 4096 + 2048).spec().splits == (4096, 5120)
    assert cost.choose(spec, H200).pick.variant != "reference"
    assert parse({"m": 2, "k": 64, "n": 96}, torch.float16).kv_features == 16
    for shape in ({"n": 4096}, {"n": 4096 + 8}, {"k": 12}, {"group_size": 48}):
        with pytest.raises(ValueError, match="ln_qkv"):
            parse(shape, torch.float16)
