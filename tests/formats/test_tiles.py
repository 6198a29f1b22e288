"""The packed layout: an exact round trip, and every bit where the diagram says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.formats.grouped import BITS, QuantizedWeight
from nybble.formats.tiles import PackedWeight
from nybble.ops.w4a16.cases import W4A16Case


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 25).map(lambda v: 8 * v),
    k=st.integers(2, 40).map(lambda v: 8 * v),
    group_size=st.sampled_from([16, 32, 64, 128, 256, -1]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 2**20),
)
def test_round_trip_is_exact(
    n: int, k: int, group_size: int, symmetric: bool, act_order: bool, bits: int, seed: int
) -> None:
    case = W4A16Case(1, n, k, group_size, torch.float16, symmetric=symmetric, act_order=act_order, bits=bits)
    weight = case.quantized(seed=seed)
    again = PackedWeight.from_quantized(weight).unpack()
    assert torch.equal(again.q, weight.q)
    assert torch.equal(again.zeros, weight.zeros)
    assert torch.equal(again.scales, weight.scales)
    assert torch.equal(again.group_of(), weight.group_of())
    assert again.group_size == weight.group_size
    assert again.bits == bits


def test_every_value_is_where_the_diagram_says() -> None:
    """The layout of the docstring, one nibble at a time, in plain Python."""
    weight = W4A16Case(1, 128, 192, 64, torch.float16, symmetric=False).quantized()
    packed = PackedWeight.from_quantized(weight)
    words = packed.qweight.reshape(2, 3, 4, 32, 4).tolist()
    scales = packed.scales.reshape(2, 3, 4, 8, 2)
    assert packed.qzeros is not None
    zeros = packed.qzeros.reshape(2, 3, 4, 8)
    draw = torch.Generator().manual_seed(1)
    for _ in range(2000):
        n, k = int(torch.randint(128, (), generator=draw)), int(torch.randint(192, (), generator=draw))
        strip, row = n % 64 // 16, n % 16
        tile, column = k % 64 // 16, k % 16
        lane = row % 8 * 4 + column % 8 // 2
        nibble = row // 8 + 2 * (column // 8) + 4 * (column % 2)
        word = words[n // 64][k // 64][strip][lane][tile] & 0xFFFFFFFF
        assert word >> (4 * nibble) & 15 == int(weight.q[k, n])
        group = k // 64
        assert scales[n // 64, group, strip, row % 8, row // 8] == weight.scales[group, n]
        assert int(zeros[n // 64, group, strip, row % 8]) >> (4 * (row // 8)) & 15 == int(weight.zeros[group, n])


def test_every_byte_is_where_the_diagram_says() -> None:
    weight = W4A16Case(1, 128, 192, 64, torch.float16, symmetric=False, bits=8).quantized()
    packed = PackedWeight.from_quantized(weight)
    words = packed.qweight.reshape(2, 3, 2, 4, 32, 2, 2).tolist()
    assert packed.qzeros is not None
    zeros = packed.qzeros.reshape(2, 3, 4, 8, 2)
    draw = torch.Generator().manual_seed(1)
    for _ in range(2000):
        n, k = int(torch.randint(128, (), generator=draw)), int(torch.randint(192, (), generator=draw))
        strip, row = n % 64 // 16, n % 16
        half, tile, column = k % 64 // 32, k % 32 // 16, k % 16
        lane = row % 8 * 4 + column % 8 // 2
        byte = column % 2 + 2 * (row // 8)
        word = words[n // 64][k // 64][half][strip][lane][tile][column // 8] & 0xFFFFFFFF
        assert word >> (8 * byte) & 255 == int(weight.q[k, n])
        assert zeros[n // 64, k // 64, strip, row % 8, row // 8] == weight.zeros[k // 64, n]


@pytest.mark.parametrize("bits", BITS)
def test_padding_has_weight_zero(bits: int) -> None:
    """A padded value equals its zero point, or lies in a group of scale zero: no kernel needs to know where N ends."""
    from nybble.ops.w4a16.reference import dequantize

    case = W4A16Case(1, 72, 200, 128, torch.float16, symmetric=False, bits=bits)
    packed = PackedWeight.from_quantized(case.quantized())
    whole = dequantize(packed.qweight, packed.scales, packed.qzeros, 256, 128, 128, bits=bits)
    assert (whole[200:] == 0).all()
    assert (whole[:, 72:] == 0).all()
    assert (whole[:200, :72] != 0).any()


def test_symmetric_weights_store_no_zero_points() -> None:
    assert PackedWeight.from_quantized(W4A16Case(1, 64, 128, 64).quantized()).qzeros is None
    packed = PackedWeight.from_quantized(W4A16Case(1, 64, 128, 64, symmetric=False).quantized())
    assert packed.qzeros is not None
    assert packed.nbytes == 64 * 128 // 2 + 2 * 64 * 2 + 2 * 64 // 2
    assert PackedWeight.from_quantized(W4A16Case(1, 64, 128, 64, bits=8).quantized()).qzeros is None
    packed = PackedWeight.from_quantized(W4A16Case(1, 64, 128, 64, symmetric=False, bits=8).quantized())
    assert packed.nbytes == 64 * 128 + 2 * 64 * 2 + 2 * 64


def test_act_order_that_is_already_sorted_needs_no_permutation() -> None:
    weight = W4A16Case(1, 64, 128, 32).quantized()
    trivial = QuantizedWeight(weight.q, weight.zeros, weight.scales, 32, torch.arange(128, dtype=torch.int32) // 32)
    assert PackedWeight.from_quantized(trivial).perm is None


def test_refusals_are_named() -> None:
    weight = W4A16Case(1, 64, 128, 32).quantized()
    uneven = torch.arange(128, dtype=torch.int32) // 32
    uneven[0] = 3
    with pytest.raises(ValueError, match=r"g_idx: expected 32 features in group 0 \(group_size 32\), got 31"):
        PackedWeight.from_quantized(QuantizedWeight(weight.q, weight.zeros, weight.scales, 32, uneven))
    odd = QuantizedWeight(weight.q[:, :60].contiguous(), weight.zeros[:, :60], weight.scales[:, :60], 32)
    with pytest.raises(ValueError, match=r"N \(out_features\): expected a multiple of 8, got 60"):
        PackedWeight.from_quantized(odd)
    with pytest.raises(ValueError, match="group_size: expected one of"):
        QuantizedWeight(weight.q, weight.zeros, weight.scales, 48)
    with pytest.raises(TypeError, match=r"q: expected torch\.uint8, got torch\.int32"):
        QuantizedWeight(weight.q.int(), weight.zeros, weight.scales, 32)
    with pytest.raises(ValueError, match=r"zeros: expected shape \[G, N\] = \[4, 64\], got \[4, 8\]"):
        QuantizedWeight(weight.q, weight.zeros[:, :8], weight.scales, 32)
    with pytest.raises(ValueError, match=r"scales: expected device cpu, that of q, got meta"):
        QuantizedWeight(weight.q, weight.zeros, weight.scales.to("meta"), 32)
    with pytest.raises(ValueError, match=r"g_idx: expected device cpu, that of q, got meta"):
        QuantizedWeight(weight.q, weight.zeros, weight.scales, 32, uneven.to("meta"))
    with pytest.raises(ValueError, match=r"q: expected values 0..15, got 16"):
        QuantizedWeight(weight.q + 1, weight.zeros, weight.scales, 32)
    with pytest.raises(ValueError, match=r"QuantizedWeight: bits: expected one of \(4, 8\), got 3"):
        QuantizedWeight(weight.q, weight.zeros, weight.scales, 32, bits=3)
    packed = PackedWeight.from_quantized(weight)
    with pytest.raises(ValueError, match=r"PackedWeight: bits: expected one of \(4, 8\), got 2"):
        replace(packed, bits=2)
    with pytest.raises(ValueError, match=r"qweight: expected contiguous \[1, 2, 1024\], got \[1, 2, 512\]"):
        replace(packed, bits=8)
    with pytest.raises(ValueError, match=r"g_idx: expected groups 0..3, got 0..9"):
        QuantizedWeight(weight.q, weight.zeros, weight.scales, 32, (uneven * 3).to(torch.int32))
