"""AWQ GEMM's bit layout against a slow reading of it in Python integers, nibble by nibble."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.formats.awq import pack_awq, unpack_awq
from nybble.formats.grouped import GROUP_SIZES, QuantizedWeight
from nybble.runtime.errors import CheckpointError


def random_words(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=generator).int()


def layer(k: int, n: int, group_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    groups = 1 if group_size == -1 else -(-k // group_size)
    return {
        "qweight": random_words(k, n // 8, seed=seed),
        "qzeros": random_words(groups, n // 8, seed=seed + 1),
        "scales": torch.randn(groups, n, generator=torch.Generator().manual_seed(seed)).half(),
    }


def slow(words: torch.Tensor) -> list[list[int]]:
    """Nibble i of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight."""
    rows = []
    for row in words.tolist():
        values = [-1] * (8 * len(row))
        for c, word in enumerate(row):
            digits = f"{word & 0xFFFFFFFF:08x}"[::-1]  # the lowest nibble is the last hexadecimal digit
            for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                values[8 * c + column] = int(digits[i], 16)
        rows.append(values)
    return rows


@given(
    k=st.sampled_from([8, 16, 40, 96, 128]),
    columns=st.integers(1, 4),
    group_size=st.sampled_from([*GROUP_SIZES, -1]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_unpack_reads_what_the_format_says_and_pack_restores_it(
    k: int, columns: int, group_size: int, seed: int
) -> None:
    tensors = layer(k, 8 * columns, group_size, seed)
    w = unpack_awq(**tensors, group_size=group_size)
    assert w.q.tolist() == slow(tensors["qweight"])
    assert w.zeros.tolist() == slow(tensors["qzeros"])
    assert w.scales is tensors["scales"] and w.g_idx is None
    packed = pack_awq(w)
    assert packed.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert packed[name].dtype == tensor.dtype and torch.equal(packed[name], tensor), name


def test_a_known_word() -> None:
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    w = unpack_awq(word.repeat(16, 1), word, torch.ones(1, 8), group_size=16)
    assert w.q[3].tolist() == w.zeros[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("tensor", "value", "reason"),
    [
        ("qzeros", torch.zeros(4, 4, dtype=torch.int32), "expected shape [G, N/8] = [4, 2], got [4, 4]"),
        ("qzeros", torch.zeros(4, 2, dtype=torch.int16), "expected torch.int32, got torch.int16"),
        ("scales", torch.ones(16, 4), "expected shape [G, N] = [4, 16], got [16, 4]"),
        ("qweight", torch.zeros(128, 2, dtype=torch.uint8), "expected torch.int32, got torch.uint8"),
        (
            "qweight",
            torch.zeros(2, 128, 2, dtype=torch.int32),
            "expected 2 dimensions, none of them 0, got [2, 128, 2]",
        ),
        ("qweight", torch.zeros(124, 2, dtype=torch.int32), "expected K (in_features) to be a multiple of 8, got 124"),
    ],
)
def test_a_wrong_tensor_is_named(tensor: str, value: torch.Tensor, reason: str) -> None:
    tensors = {**layer(128, 16, 32), tensor: value}
    with pytest.raises(CheckpointError) as caught:
        unpack_awq(**tensors, group_size=32, file="f", name="m")
    assert str(caught.value) == f"f: m.{tensor}: {reason}"
    with pytest.raises(TypeError if "torch." in reason else ValueError) as plain:
        unpack_awq(**tensors, group_size=32)
    assert str(plain.value) == f"unpack_awq: {tensor}: {reason}"


def test_an_unsupported_group_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^unpack_awq: group_size: expected -1, one of .* got 48$"):
        unpack_awq(**layer(128, 16, 32), group_size=48)


def test_act_order_has_no_place_in_it() -> None:
    w = unpack_awq(**layer(64, 16, 32), group_size=32)
    shuffled = QuantizedWeight(w.q, w.zeros, w.scales, 32, (torch.arange(64, dtype=torch.int32) // 32).flip(0))
    with pytest.raises(ValueError, match=r"^pack_awq: w.g_idx: expected None, got act-order. AWQ GEMM has no g_idx"):
        pack_awq(shuffled)


@pytest.mark.parametrize(("k", "n"), [(12, 8), (16, 12)])
def test_sides_that_fill_no_words_are_not_packed(k: int, n: int) -> None:
    zeros = torch.zeros(1, n, dtype=torch.uint8)
    w = QuantizedWeight(torch.zeros(k, n, dtype=torch.uint8), zeros, torch.ones(1, n), k)
    with pytest.raises(ValueError, match=r"^pack_awq: qweight: expected .* to be a multiple of 8, got 12$"):
        pack_awq(w)
