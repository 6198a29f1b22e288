"""FlatQuant's public functions on a CPU: values, packing, errors, and the choice of a form."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checks import check_case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nybble
from nybble.bench.run import dtype_name, options
from nybble.ops.flatquant import cost, op
from nybble.ops.flatquant.cases import BENCH, DTYPES, SIZES, SMALL, FlatQuantCase
from nybble.ops.flatquant.op import cuda
from nybble.ops.flatquant.reference import pack, unpack
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import A100, H200

quantize = nybble.flatquant_dynamic_quantize


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_cases(case: FlatQuantCase) -> None:
    for packed, clips in itertools.product((True, False), (1, 3)):
        check_case(replace(case, packed=packed, clips=clips, clip=0.9))


def test_the_transform_by_kronecker() -> None:
    """The paper's form: a row times the Kronecker product of both transforms."""
    inputs = FlatQuantCase(5, 6, 4, torch.float32).make()
    big = torch.kron(inputs.left.double(), inputs.right.double())
    y = inputs.x.double() @ big
    q, scales = quantize(*inputs)
    torch.testing.assert_close(scales.double(), y.abs().amax(1) / 7, rtol=1e-6, atol=0)
    assert ((q.double() - y / scales.double()[:, None]).abs() <= 0.5 + 1e-5).all()


def test_ties_go_to_even_and_values_are_clamped() -> None:
    one = torch.ones(1, 1)
    eye = torch.eye(8)
    row = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -7.0, 0.0]])
    q, scales = quantize(row, one, eye)
    assert scales.tolist() == [1.0]
    assert q.tolist() == [[7, 0, 2, 2, 0, -2, -7, 0]]
    q, scales = quantize(row, one, eye, 0.5)
    assert scales.tolist() == [0.5]
    assert q.tolist() == [[7, 1, 3, 5, -1, -3, -8, 0]]


def test_a_row_of_zeros_has_the_scale_one() -> None:
    q, scales = quantize(torch.zeros(2, 16), torch.eye(4), torch.eye(4), 0.5, True)
    assert scales.tolist() == [1.0, 1.0]
    assert not q.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    inputs = FlatQuantCase(4, 8, 8, torch.float32, packed=False).make()
    clean, clean_scales = quantize(*inputs)
    inputs.x[2, 5] = value
    q, scales = quantize(*inputs)
    assert scales[2].isnan()
    assert not q[2].any()
    others = [0, 1, 3]
    assert torch.equal(q[others], clean[others])
    assert torch.equal(scales[others], clean_scales[others])


def test_words() -> None:
    """Element i in bits 4 (i % 8), two's complement, and the offset form of a published kernel."""
    row = torch.tensor([[7.0, -7.0, 1.0, 0.0, -1.0, 2.0, -2.0, 3.0]])
    one, eye = torch.ones(1, 1), torch.eye(8)
    word = int(quantize(row, one, eye, pack_int32=True)[0]) & 0xFFFFFFFF
    assert word == 0x3E2F0197
    assert int(quantize(row, one, eye, pack_int32=True, offset_binary=True)[0]) & 0xFFFFFFFF == word ^ 0x88888888


@given(st.lists(st.integers(-8, 7), min_size=8, max_size=64).filter(lambda v: len(v) % 8 == 0), st.booleans())
def test_packing_is_undone(values: list[int], offset: bool) -> None:
    q = torch.tensor([values], dtype=torch.int8)
    assert torch.equal(unpack(pack(q, offset), offset), q)


@pytest.mark.parametrize("packed", [True, False])
def test_dequantise(packed: bool) -> None:
    case = FlatQuantCase(6, 16, 32, torch.float32, packed=packed)
    inputs = case.make()
    q, scales = quantize(*inputs, pack_int32=packed)
    y = (inputs.left.double().t() @ inputs.x.double().view(-1, 16, 32) @ inputs.right.double()).view(6, -1)
    back = nybble.dequantize_int4(q, scales, packed, torch.float32)
    assert ((back.double() - y).abs() <= 0.5001 * scales.double()[:, None]).all()
    assert nybble.dequantize_int4(q, scales, packed).dtype == torch.float16
    if packed:
        binary, _ = quantize(*inputs, pack_int32=True, offset_binary=True)
        assert torch.equal(nybble.dequantize_int4(binary, scales, True, torch.float32, offset_binary=True), back)


def test_several_ratios_share_the_transform() -> None:
    inputs = FlatQuantCase(5, 8, 16).make()
    q, scales = quantize(*inputs, [1.0, 0.75, 0.5], True)
    assert q.shape == (3, 5, 16)
    for i, clip in enumerate((1.0, 0.75, 0.5)):
        alone, its_scales = quantize(*inputs, clip, True)
        assert torch.equal(q[i], alone)
        assert torch.equal(scales[i], its_scales)


def test_strided_rows_and_no_rows() -> None:
    inputs = FlatQuantCase(6, 8, 8).make()
    want = quantize(*inputs)
    wide = torch.zeros(6, 200, dtype=torch.float16)
    wide[:, 8:72] = inputs.x
    for x in (wide[:, 8:72], inputs.x.t().contiguous().t(), inputs.x[::2].repeat_interleave(2, 0)[::2]):
        got = quantize(x, *inputs[1:])
        assert torch.equal(got[0], want[0][: len(x)] if len(x) == 6 else want[0][::2])
    for packed, width, dtype in ((True, 8, torch.int32), (False, 64, torch.int8)):
        q, scales = quantize(inputs.x[:0], *inputs[1:], 1.0, packed)
        assert (q.shape, q.dtype, scales.shape) == ((0, width), dtype, (0,))


def bad() -> list[tuple[str, type[Exception], str]]:
    return [
        ("x=x.int()", TypeError, "input_tensor: expected float16, bfloat16 or float32"),
        ("x=x[0]", ValueError, r"input_tensor: expected shape \[batch_tokens, features\]"),
        ("left=left.half()", TypeError, "left_trans: expected torch.float32, the dtype of input_tensor"),
        ("left=left[0, 0]", ValueError, "left_trans: expected a square matrix"),
        ("x=x[0, 0]", ValueError, "input_tensor: expected shape"),
        ("right=right[:3]", ValueError, "right_trans: expected a square matrix"),
        ("left=left.t()", ValueError, r"left_trans: expected a contiguous matrix.*contiguous\(\)"),
        ("x=x[:, :24]", ValueError, "features = M \\* N = 4 \\* 8 = 32.*get_decompose_dim"),
        ("left=torch.eye(300)", ValueError, "left_trans: expected a square matrix of 1 to 256 rows"),
        ("clip=0.0", ValueError, r"clip_ratio: expected a number in \(0, 1\], got 0.0"),
        ("clip=1.5", ValueError, "clip_ratio"),
        ("clip=float('nan')", ValueError, "clip_ratio"),
        ("clip=[]", ValueError, "clip_ratio: expected a number or 1 to 4 of them, got 0"),
        ("clip=[1.0] * 5", ValueError, "clip_ratio: expected a number or 1 to 4 of them, got 5"),
        ("x=x[:, :4]; left=left[:1, :1].contiguous(); right=torch.eye(4); packed=True", ValueError, "pack_int32"),
        ("offset=True", ValueError, "offset_binary: expected False without pack_int32"),
        ("left=left.to('meta')", ValueError, "left_trans: expected device cpu"),
    ]


@pytest.mark.parametrize(("change", "error", "text"), bad())
@pytest.mark.parametrize("path", ["cpu", "meta", "cuda"])
def test_bad_input_is_refused(change: str, error: type[Exception], text: str, path: str) -> None:
    """In the same words everywhere; what runs on a GPU gets as far as this without one."""
    given: dict[str, object] = {
        "torch": torch, "x": torch.randn(3, 32), "left": torch.randn(4, 4), "right": torch.randn(8, 8), "clip": 1.0,
        "packed": False, "offset": False,
    }  # fmt: skip
    exec(change, given)
    tensors = [given[name] for name in ("x", "left", "right")]
    if path == "meta":
        if "meta" in change:
            pytest.skip("all of them are meta tensors then")
        tensors = [t.to("meta") for t in tensors if isinstance(t, Tensor)]
    with pytest.raises(error, match=text):
        if path == "cuda":
            clip = given["clip"]
            ratios = clip if isinstance(clip, list) else [clip]
            cuda(*tensors, ratios, given["packed"], given["offset"], "auto")  # type: ignore[arg-type]
        else:
            quantize(*tensors, given["clip"], given["packed"], offset_binary=given["offset"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "quantized: expected torch.int8"),
        ({"packed": True}, TypeError, "quantized: expected torch.int32"),
        ({"scales": torch.ones(3)}, ValueError, "scales: expected shape"),
        ({"scales": torch.ones(2, dtype=torch.int32)}, TypeError, "scales"),
        ({"dtype": torch.int8}, TypeError, "dtype"),
    ],
)
def test_dequantise_refuses(change: dict[str, object], error: type[Exception], text: str) -> None:
    given = {"q": torch.zeros(2, 8, dtype=torch.int8), "scales": torch.ones(2), "packed": False, "dtype": torch.float16}
    given |= change
    with pytest.raises(error, match=text):
        nybble.dequantize_int4(given["q"], given["scales"], given["packed"], given["dtype"])  # type: ignore[arg-type]


def test_decompose() -> None:
    known = {4096: (64, 64), 5120: (64, 80), 8192: (64, 128), 11008: (86, 128), 14336: (112, 128), 28672: (128, 224)}
    assert {n: nybble.get_decompose_dim(n) for n in known} == known
    for n in range(1, 500):
        if n % 4 == 2:
            with pytest.raises(ValueError, match="n % 4"):
                nybble.get_decompose_dim(n)
            continue
        m, k = nybble.get_decompose_dim(n)
        assert m * k == n
        # By brute force: the nearest pair of divisors of which both are even or both odd.
        pairs = [(a, n // a) for a in range(1, n + 1) if n % a == 0 and a <= n // a and (n // a - a) % 2 == 0]
        assert (m, k) == min(pairs, key=lambda pair: pair[1] - pair[0])
    for n in (0, -4):
        with pytest.raises(ValueError, match="positive"):
            nybble.get_decompose_dim(n)
    with pytest.raises(TypeError, match="an integer"):
        nybble.get_decompose_dim(16.0)  # type: ignore[arg-type]


def test_a_gradient_is_refused_and_it_compiles() -> None:
    inputs = FlatQuantCase(3, 4, 8, torch.float32, packed=False).make()
    x = inputs.x.clone().requires_grad_()
    _, scales = quantize(x, *inputs[1:])
    with pytest.raises(RuntimeError, match="inference only"):
        scales.sum().backward()
    compiled = torch.compile(quantize, fullgraph=True, dynamic=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), quantize(*inputs), strict=True):
        assert torch.equal(got, want)
    arguments = (*inputs, [1.0, 0.5], False, False, "auto")
    torch.library.opcheck(torch.ops.nybble.flatquant.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("card", [H200, A100], ids=lambda card: card.slug)
def test_every_size_has_a_form(tokens: int, dtype: torch.dtype, card: object) -> None:
    """All sizes: what is asked for fits in shared memory and registers, and has a warp for every column."""
    for m, n in [*SIZES, *itertools.product((1, 7, 16, 33, 80, 129, 200, 256), repeat=2)]:
        for packed, aligned in itertools.product((m * n % 8 == 0, False), (True, False)):
            spec = cost.Spec(dtype, m, n, tokens, packed, False, 1, False, aligned, "auto")
            config = cost.shape(spec, card)  # type: ignore[arg-type]
            warps, groups, nw = int(config["WARPS"]), int(config["GROUPS"]), int(config["NW"])
            assert int(config["SHARED"]) <= card.shared_bytes  # type: ignore[attr-defined]
            assert warps * groups <= 32
            assert config["ALIGNED"] <= (aligned and n % 8 == 0)
            assert warps * nw >= n or (int(config["PARTS"]) > 1 or warps == 8)
            assert config["BUFFERS"] or dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_variants_of_hopper(tokens: int, dtype: torch.dtype) -> None:
    """What is asked for fits; what can't run says why; no other GPU is asked."""
    for m, n in [*SIZES, *itertools.product((1, 2, 33, 64, 80, 128, 129, 200), (16, 64, 80, 128, 129, 192, 224, 256))]:
        case = FlatQuantCase(tokens, m, n, dtype, packed=m * n % 8 == 0)
        spec = case.spec()
        known = {c.variant: c for c in cost.candidates(spec, H200)}
        assert not known["mma"].refused
        half = dtype != torch.float32
        assert known["wgmma"].refused == (not half or m > 128 or n not in (64, 80, 128, 224) or not spec.aligned)
        assert known["turned"].refused == (not half or m > 128 or n not in (64, 128) or not spec.aligned)
        fits = n <= 256 and n % (16 if n <= 128 else 32) == 0
        assert known["few"].refused == (not half or m > 128 or m % 2 == 1 or not fits or not spec.aligned)
        for candidate in (known["wgmma"], known["turned"], known["few"]):
            assert candidate.reason
            if not candidate.refused:
                assert int(dict(candidate.config)["SHARED"]) <= H200.shared_bytes
                assert op.threads(spec, candidate) <= 1024
                assert op.cluster(spec, candidate) <= 8
        assert {c.variant for c in cost.candidates(spec, A100) if not c.refused} <= {"mma", "reference"}
    unaligned = FlatQuantCase(tokens, 64, 64, dtype).spec()._replace(aligned=False)
    assert cost.choose(unaligned, H200).pick.variant == "mma"


def test_a_variant_is_asked_for_by_name() -> None:
    inputs = FlatQuantCase(4, 8, 8).make()
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        quantize(*inputs, variant="wgmma")
    with pytest.raises(ValueError, match="variant: expected 'auto' or one of"):
        quantize(*inputs, variant="fast")
    assert torch.equal(quantize(*inputs, variant="reference")[0], quantize(*inputs)[0])


ROWS = Path(__file__).parents[2] / "results" / "h200" / "flatquant.jsonl"


@pytest.mark.skipif(not ROWS.exists(), reason="nothing is measured yet")
@pytest.mark.parametrize("case", BENCH, ids=str)
def test_the_pick_is_within_5_percent_of_the_fastest_row(case: FlatQuantCase) -> None:
    """Of what was measured on an H200, kernel by kernel; a row of another form than today's does not count."""
    choice = cost.choose(case.spec(), H200)
    now = {c.variant: json.loads(json.dumps(dict(c.config))) for c in choice.candidates if not c.refused}
    measured = {
        row["variant"]: row["us"]
        for row in map(json.loads, ROWS.read_text().splitlines())
        if (row["shape"], row["dtype"]) == (case.shape(), dtype_name(case))
        and (row["provider"], row.get("options", {})) == ("nybble", options(case))
        and row.get("config", now.get(row["variant"])) == now.get(row["variant"])
    }
    pick = choice.pick.variant
    assert pick in measured, "the form that is chosen was never measured"
    assert measured[pick] <= 1.05 * min(measured.values()), (pick, measured)


def test_sizes_of_models_run_in_one_pass_from_shared_memory() -> None:
    for m, n in SIZES:
        config = cost.shape(FlatQuantCase(16384, m, n).spec(), H200)
        assert config["RESIDENT"]
        assert int(config["PARTS"]) == 1
        assert int(config["WARPS"]) * int(config["NW"]) >= n
