"""GPTQ's bit layout against a slow reading of it in Python integers, nibble by nibble and byte by byte."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.formats.gptq import pack_gptq, unpack_gptq
from nybble.formats.grouped import BITS, GROUP_SIZES, QuantizedWeight
from nybble.runtime.errors import CheckpointError

ANY_WORD = (-(2**31), 2**31)


def random_words(*shape: int, seed: int = 0) -> torch.Tensor:
    """int32 with every bit in play, the sign bit included."""
    return torch.randint(*ANY_WORD, shape, dtype=torch.int64, generator=torch.Generator().manual_seed(seed)).int()


def layer(k: int, n: int, group_size: int, seed: int = 0, bits: int = 4) -> dict[str, torch.Tensor]:
    groups = 1 if group_size == -1 else -(-k // group_size)
    scales = torch.randn(groups, n, generator=torch.Generator().manual_seed(seed)).half()
    return {
        "qweight": random_words(k * bits // 32, n, seed=seed),
        "qzeros": random_words(groups, n * bits // 32, seed=seed + 1),
        "scales": scales,
    }


def slow_values(qweight: torch.Tensor, bits: int = 4) -> list[list[int]]:
    """``q[k][n]``: bits 4*(k%8) of word k//8, or 8*(k%4) of word k//4."""
    words, each = qweight.tolist(), 32 // bits
    return [[(words[k // each][n] & 0xFFFFFFFF) >> (bits * (k % each)) & 2**bits - 1 for n in range(qweight.shape[1])]
            for k in range(each * qweight.shape[0])]  # fmt: skip


def slow_zeros(qzeros: torch.Tensor, checkpoint_format: str, bits: int = 4) -> list[list[int]]:
    """``z[g][n]``: bits 4*(n%8) of word n//8, v1 words restored by adding 0x11111111 modulo 2^32; or of bytes."""
    rows, each, one = [], 32 // bits, {4: 0x11111111, 8: 0x01010101}[bits]
    for row in qzeros.tolist():
        stored = [word & 0xFFFFFFFF for word in row]
        if checkpoint_format == "gptq":
            stored = [(word + one) % 2**32 for word in stored]
        rows.append([stored[n // each] >> (bits * (n % each)) & 2**bits - 1 for n in range(each * len(row))])
    return rows


@given(
    words=st.integers(1, 12),
    columns=st.integers(1, 3),
    group_size=st.sampled_from([*GROUP_SIZES, -1]),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_unpack_reads_what_the_format_says(
    words: int, columns: int, group_size: int, checkpoint_format: str, bits: int, seed: int
) -> None:
    k, n = 8 * words, 8 * columns
    tensors = layer(k, n, group_size, seed, bits)
    w = unpack_gptq(**tensors, group_size=group_size, bits=bits, checkpoint_format=checkpoint_format)
    assert w.bits == bits
    assert w.q.tolist() == slow_values(tensors["qweight"], bits)
    assert w.zeros.tolist() == slow_zeros(tensors["qzeros"], checkpoint_format, bits)
    assert w.group_size == (k if group_size == -1 else group_size)
    assert w.scales is tensors["scales"] and w.g_idx is None


@given(
    words=st.integers(1, 12),
    columns=st.integers(1, 3),
    group_size=st.sampled_from([*GROUP_SIZES, -1]),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
    bits=st.sampled_from(BITS),
    shuffled=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_pack_is_the_exact_inverse(
    words: int, columns: int, group_size: int, checkpoint_format: str, bits: int, shuffled: bool, seed: int
) -> None:
    k, n = 8 * words, 8 * columns
    tensors = layer(k, n, group_size, seed, bits)
    g_idx = torch.arange(k, dtype=torch.int32) // (k if group_size == -1 else group_size)
    if shuffled:
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]
    w = unpack_gptq(**tensors, g_idx=g_idx, group_size=group_size, bits=bits, checkpoint_format=checkpoint_format)
    packed = pack_gptq(w, checkpoint_format=checkpoint_format)
    assert packed.keys() == {"qweight", "qzeros", "scales", "g_idx"}
    for name, tensor in {**tensors, "g_idx": g_idx}.items():
        assert packed[name].dtype == tensor.dtype, name
        assert torch.equal(packed[name], tensor), name


@pytest.mark.parametrize(
    ("stored", "checkpoint_format", "zeros"),
    [
        (0x77777777, "gptq", [8] * 8),
        (0x88888888, "gptq_v2", [8] * 8),
        # true zero points 0 8 8 8 8 8 8 8: the 0 borrows from the 8 above it
        (0x88888880 - 0x11111111, "gptq", [0, 8, 8, 8, 8, 8, 8, 8]),
        (0xEEEEEEEF, "gptq", [0, 0, 0, 0, 0, 0, 0, 0]),
        (0xFEDCBA98 - 0x11111111, "gptq", [8, 9, 10, 11, 12, 13, 14, 15]),
        (0x01234567, "gptq_v2", [7, 6, 5, 4, 3, 2, 1, 0]),
    ],
)
def test_zero_points_of_known_words(stored: int, checkpoint_format: str, zeros: list[int]) -> None:
    word = stored - 2**32 if stored >= 2**31 else stored
    tensors = {**layer(16, 8, 16), "qzeros": torch.tensor([[word]], dtype=torch.int32)}
    if zeros == [0] * 8:  # 0x00000000 - 0x11111111 modulo 2^32
        assert stored == (0 - 0x11111111) % 2**32
    w = unpack_gptq(**tensors, group_size=16, checkpoint_format=checkpoint_format)
    assert w.zeros.tolist() == [zeros]
    assert torch.equal(pack_gptq(w, checkpoint_format=checkpoint_format)["qzeros"], tensors["qzeros"])


@pytest.mark.parametrize(
    ("stored", "checkpoint_format", "zeros"),
    [
        (0x7F7F7F7F, "gptq", [128] * 4),
        (0x80808080, "gptq_v2", [128] * 4),
        # true zero points 0 128 128 128: the 0 borrows from the 128 above it
        (0x80808000 - 0x01010101, "gptq", [0, 128, 128, 128]),
        (0xFEFEFEFF, "gptq", [0, 0, 0, 0]),
        (0xFF00017F, "gptq_v2", [127, 1, 0, 255]),
    ],
)
def test_8_bit_zero_points_of_known_words(stored: int, checkpoint_format: str, zeros: list[int]) -> None:
    word = stored - 2**32 if stored >= 2**31 else stored
    tensors = {**layer(16, 8, 16, bits=8), "qzeros": torch.full((1, 2), word, dtype=torch.int32)}
    w = unpack_gptq(**tensors, group_size=16, bits=8, checkpoint_format=checkpoint_format)
    assert w.zeros.tolist() == [zeros * 2]
    assert w.symmetric == (zeros == [128] * 4)
    assert torch.equal(pack_gptq(w, checkpoint_format=checkpoint_format)["qzeros"], tensors["qzeros"])


def test_dequantize_is_scale_times_difference() -> None:
    tensors = layer(64, 16, 32)
    g_idx = torch.randint(2, (64,), dtype=torch.int32)
    got = unpack_gptq(**tensors, g_idx=g_idx, group_size=32).dequantize()
    q, z = slow_values(tensors["qweight"]), slow_zeros(tensors["qzeros"], "gptq")
    scales = tensors["scales"].tolist()
    expected = [[scales[g][n] * (q[k][n] - z[g][n]) for n in range(16)] for k, g in enumerate(g_idx.tolist())]
    assert got.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(dtype: torch.dtype) -> None:
    tensors = layer(32, 8, 16)
    scales = tensors.pop("scales").to(dtype)
    assert unpack_gptq(**tensors, scales=scales, group_size=16).scales.dtype == dtype


def test_tensors_of_any_stride() -> None:
    tensors = layer(64, 16, 32)
    expected = unpack_gptq(**tensors, group_size=32)
    transposed = {name: tensor.t().contiguous().t() for name, tensor in tensors.items()}
    got = unpack_gptq(**transposed, group_size=32)
    assert torch.equal(got.q, expected.q) and torch.equal(got.zeros, expected.zeros)


def test_arguments_are_left_as_they_were() -> None:
    tensors = layer(64, 16, 32)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    pack_gptq(unpack_gptq(**tensors, group_size=32), checkpoint_format="gptq")
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


# ---- g_idx


def test_a_trivial_g_idx_is_dropped() -> None:
    g_idx = torch.arange(80, dtype=torch.int32) // 32  # the last group is short
    assert unpack_gptq(**layer(80, 8, 32), g_idx=g_idx, group_size=32).g_idx is None


def test_one_group_makes_g_idx_all_zero() -> None:
    g_idx = torch.zeros(64, dtype=torch.int32)
    assert unpack_gptq(**layer(64, 8, -1), g_idx=g_idx, group_size=-1).g_idx is None


def test_an_act_order_g_idx_is_kept() -> None:
    g_idx = (torch.arange(64, dtype=torch.int32) // 32).flip(0)
    w = unpack_gptq(**layer(64, 8, 32), g_idx=g_idx, group_size=32)
    assert w.g_idx is not None and torch.equal(w.g_idx, g_idx)


def test_a_g_idx_of_uneven_groups_is_kept() -> None:
    """All zero though there are two groups: unusual, but a meaning; what can't be packed is for the packer to say."""
    g_idx = torch.zeros(64, dtype=torch.int32)
    w = unpack_gptq(**layer(64, 8, 32), g_idx=g_idx, group_size=32)
    assert w.g_idx is not None and torch.equal(w.group_of(), g_idx.long())


@pytest.mark.parametrize("wrong", [-1, 2])
def test_a_g_idx_out_of_range_is_refused(wrong: int) -> None:
    g_idx = torch.arange(64, dtype=torch.int32) // 32
    g_idx[5] = wrong
    low, high = int(g_idx.min()), int(g_idx.max())
    with pytest.raises(CheckpointError) as caught:
        unpack_gptq(**layer(64, 8, 32), g_idx=g_idx, group_size=32, file="f", name="m")
    assert str(caught.value) == f"f: m.g_idx: expected groups 0..1, got {low}..{high}"


# ---- the wrong format name


@pytest.mark.parametrize(("says", "word"), [("gptq", -0x77777778), ("gptq_v2", 0x77777777)])
def test_a_mislabelled_symmetric_file_is_read_as_what_it_is(says: str, word: int) -> None:
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[says]
    tensors = {**layer(64, 16, 32), "qzeros": torch.full((2, 2), word, dtype=torch.int32)}
    with pytest.warns(UserWarning) as caught:
        w = unpack_gptq(
            **tensors, group_size=32, checkpoint_format=says, symmetric=True, file="a.safetensors", name="m"
        )
    assert (w.zeros == 8).all()
    assert [str(warning.message) for warning in caught] == [
        f"a.safetensors: says checkpoint_format {says!r} and sym, "
        f"but its zero points are stored as {other!r} stores 8; read as {other!r}"
    ]


@pytest.mark.parametrize(("says", "word"), [("gptq", -0x7F7F7F80), ("gptq_v2", 0x7F7F7F7F)])
def test_a_mislabelled_symmetric_file_of_8_bits(says: str, word: int) -> None:
    tensors = {**layer(64, 16, 32, bits=8), "qzeros": torch.full((2, 4), word, dtype=torch.int32)}
    with pytest.warns(UserWarning, match="stores 128; read as"):
        w = unpack_gptq(**tensors, group_size=32, bits=8, checkpoint_format=says, symmetric=True)
    assert (w.zeros == 128).all()


@pytest.mark.parametrize("bits", [2, 3, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"^unpack_gptq: bits: expected one of \(4, 8\), got {bits}$"):
        unpack_gptq(**layer(64, 16, 32), group_size=32, bits=bits)


@pytest.mark.parametrize("symmetric", [False, None])
def test_zeros_of_nine_are_believed_where_the_file_is_not_symmetric(symmetric: bool | None) -> None:
    tensors = {**layer(64, 16, 32), "qzeros": torch.full((2, 2), -0x77777778, dtype=torch.int32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = unpack_gptq(**tensors, group_size=32, checkpoint_format="gptq", symmetric=symmetric)
    assert (w.zeros == 9).all()


def test_one_other_word_is_no_mislabelling() -> None:
    qzeros = torch.full((2, 2), -0x77777778, dtype=torch.int32)
    qzeros[1, 1] = 0x77777777
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = unpack_gptq(**{**layer(64, 16, 32), "qzeros": qzeros}, group_size=32, symmetric=True)
    assert w.zeros.tolist() == [[9] * 16, [9] * 8 + [8] * 8]


@pytest.mark.parametrize(("says", "word"), [("gptq", 0x77777777), ("gptq_v2", -0x77777778)])
def test_a_rightly_labelled_symmetric_file_gives_no_warning(says: str, word: int) -> None:
    tensors = {**layer(64, 16, 32), "qzeros": torch.full((2, 2), word, dtype=torch.int32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = unpack_gptq(**tensors, group_size=32, checkpoint_format=says, symmetric=True)
    assert (w.zeros == 8).all()


# ---- refusals

BAD_TENSORS = [
    # one original text gives qzeros as [G, g/8]; on disk it is [G, N/8]
    ("qzeros", torch.zeros(4, 4, dtype=torch.int32), "expected shape [G, N/8] = [4, 2], got [4, 4]"),
    ("qzeros", torch.zeros(8, dtype=torch.int32), "expected shape [G, N/8] = [4, 2], got [8]"),
    ("qzeros", torch.zeros(4, 2, dtype=torch.int64), "expected torch.int32, got torch.int64"),
    ("scales", torch.ones(2, 16).half(), "expected shape [G, N] = [4, 16], got [2, 16]"),
    (
        "scales",
        torch.ones(4, 16, dtype=torch.int32),
        "expected torch.float16 or torch.bfloat16 or torch.float32, got torch.int32",
    ),
    ("g_idx", torch.zeros(64, dtype=torch.int32), "expected shape [K] = [128], got [64]"),
    ("g_idx", torch.zeros(128, dtype=torch.int64), "expected torch.int32, got torch.int64"),
    ("qweight", torch.zeros(16, 16), "expected torch.int32, got torch.float32"),
    ("qweight", torch.zeros(16, dtype=torch.int32), "expected 2 dimensions, none of them 0, got [16]"),
    ("qweight", torch.zeros(0, 16, dtype=torch.int32), "expected 2 dimensions, none of them 0, got [0, 16]"),
    (
        "qweight",
        torch.zeros(16, 12, dtype=torch.int32),
        "expected N (out_features) to be a multiple of 8, got 12",
    ),
]


@pytest.mark.parametrize(("tensor", "value", "reason"), BAD_TENSORS)
def test_a_wrong_tensor_is_named(tensor: str, value: torch.Tensor, reason: str) -> None:
    tensors = {**layer(128, 16, 32), tensor: value}
    with pytest.raises(CheckpointError) as caught:
        unpack_gptq(**tensors, group_size=32, file="model.safetensors", name="model.layers.0.mlp.up_proj")
    assert str(caught.value) == f"model.safetensors: model.layers.0.mlp.up_proj.{tensor}: {reason}"
    assert (caught.value.file, caught.value.tensor) == ("model.safetensors", f"model.layers.0.mlp.up_proj.{tensor}")
    wrong_type = "torch." in reason
    with pytest.raises(TypeError if wrong_type else ValueError) as plain:
        unpack_gptq(**tensors, group_size=32)
    assert str(plain.value) == f"unpack_gptq: {tensor}: {reason}"
    assert not isinstance(plain.value, CheckpointError)


@pytest.mark.parametrize("tensor", ["qweight", "qzeros", "scales", "g_idx"])
def test_what_is_no_tensor_is_a_type_error(tensor: str) -> None:
    with pytest.raises(TypeError, match=f"^unpack_gptq: {tensor}: expected a torch.Tensor, got list$"):
        unpack_gptq(**{**layer(128, 16, 32), tensor: [1]}, group_size=32)


@pytest.mark.parametrize("group_size", [0, -2, 8, 48, 512])
def test_an_unsupported_group_size_is_refused(group_size: int) -> None:
    text = rf"^unpack_gptq: group_size: expected -1, one of \(16, 32, 64, 128, 256\), or K = 128, got {group_size}$"
    with pytest.raises(ValueError, match=text):
        unpack_gptq(**layer(128, 16, 32), group_size=group_size)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint_format: expected one of \('gptq', 'gptq_v2'\), got 'marlin'"):
        unpack_gptq(**layer(128, 16, 32), group_size=32, checkpoint_format="marlin")
    with pytest.raises(ValueError, match=r"^pack_gptq: checkpoint_format: expected"):
        pack_gptq(unpack_gptq(**layer(128, 16, 32), group_size=32), checkpoint_format="marlin")


@pytest.mark.parametrize(("k", "n", "axis"), [(12, 8, "K \\(in_features\\)"), (16, 12, "N \\(out_features\\)")])
def test_sides_that_fill_no_words_are_not_packed(k: int, n: int, axis: str) -> None:
    zeros = torch.zeros(1, n, dtype=torch.uint8)
    w = QuantizedWeight(torch.zeros(k, n, dtype=torch.uint8), zeros, torch.ones(1, n), k)
    with pytest.raises(ValueError, match=f"^pack_gptq: qweight: expected {axis} to be a multiple of 8, got 12$"):
        pack_gptq(w)
