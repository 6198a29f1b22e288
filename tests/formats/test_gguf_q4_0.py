"""Q4_0 and Q8_1 blocks against the gguf package's own quantisers, and an exact way to the kernels' layout and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.formats.gguf_q4_0 import (
    Q8_1,
    pack_q4_0,
    pack_q8_1,
    quantize_q4_0,
    quantize_q8_1,
    unpack_q4_0,
    unpack_q8_1,
)
from nybble.formats.grouped import QuantizedWeight
from nybble.formats.tiles import PackedWeight
from nybble.ops.q4_0.cases import KINDS, Q4Case, activations
from nybble.runtime.errors import CheckpointError

Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e3])
def test_quantizing_is_that_of_gguf_bit_for_bit(kind: str, scale: float) -> None:
    weight = activations(kind, 24, 320, torch.float32, "cpu", 5) * scale
    weight[0, 5], weight[0, 9] = -30 * scale, 30 * scale  # the first of two of the same magnitude counts
    weight[1, 5], weight[1, 9] = 30 * scale, -30 * scale
    theirs = torch.from_numpy(quants.quantize(weight.numpy(), Q4_0))
    assert torch.equal(quantize_q4_0(weight), theirs)


def test_values_are_those_of_gguf_bit_for_bit() -> None:
    data = torch.randint(0, 256, (40, 10, 18), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data[..., 1] &= 0x7B  # no infinite or NaN scale
    data = data.flatten(1)
    theirs = torch.from_numpy(quants.dequantize(data.numpy(), Q4_0))
    weight = unpack_q4_0(data)
    assert (weight.in_features, weight.out_features, weight.group_size) == (320, 40, 32)
    assert torch.equal(weight.dequantize(torch.float32), theirs.t())


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20).map(lambda v: 8 * v), blocks=st.integers(1, 12), seed=st.integers(0, 2**20))
def test_the_way_to_the_kernels_layout_and_back_is_exact(n: int, blocks: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (n, blocks, 18), generator=draw, dtype=torch.uint8)
    data[..., 1] &= 0xFB
    data = data.flatten(1)
    packed = PackedWeight.from_quantized(unpack_q4_0(data))
    assert packed.qzeros is None
    assert packed.perm is None
    assert torch.equal(pack_q4_0(packed.unpack()), data)


def test_q8_1_is_q8_0_of_gguf_with_the_sum_beside_it() -> None:
    for kind in KINDS:
        x = activations(kind, 16, 256, torch.float32, "cpu", 7)
        theirs = torch.from_numpy(quants.quantize(x.numpy(), Q8_0)).reshape(16, 8, 34)
        ours = quantize_q8_1(x)
        assert torch.equal(ours.d, theirs[..., :2].contiguous().view(torch.float16).squeeze(-1))
        assert torch.equal(ours.q, theirs[..., 2:].view(torch.int8))
        d = x.reshape(16, 8, 32).abs().amax(-1) / 127
        assert torch.equal(ours.s, (d * ours.q.sum(-1)).half())
        exact = quantize_q8_1(x, exact_sum=True)
        assert torch.equal(exact.q, ours.q)
        assert torch.equal(exact.s, x.reshape(16, 8, 32).sum(-1).half())


def test_q8_1_rounds_halves_away_from_zero() -> None:
    x = torch.zeros(1, 32)
    x[0, :8] = torch.tensor([127.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, -126.5])
    assert quantize_q8_1(x).q[0, 0, :8].tolist() == [127, 1, -1, 2, 3, -3, 0, -127]
    tiny = quantize_q8_1(torch.full((1, 32), 2.0**-126))
    assert not tiny.q.any()
    assert not tiny.d.any()


def test_q8_1_blocks_are_36_bytes_with_d_first() -> None:
    q = torch.arange(-16, 16, dtype=torch.int8).reshape(1, 1, 32)
    blocks = pack_q8_1(Q8_1(q, torch.tensor([[0.5]]).half(), torch.tensor([[-8.0]]).half()))
    assert blocks.shape == (1, 1, 36)
    assert bytes(blocks.flatten().tolist()) == np.array([0.5, -8.0], np.float16).tobytes() + q.numpy().tobytes()
    again = unpack_q8_1(blocks)
    assert torch.equal(again.q, q)
    assert (again.d.item(), again.s.item()) == (0.5, -8.0)


def test_what_is_refused_says_why() -> None:
    good = Q4Case(1, 16, 64).quantized()
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, K\] with K a multiple of 32, got \[8, 40\]"):
        quantize_q4_0(torch.zeros(8, 40))
    with pytest.raises(TypeError, match=r"data: expected torch\.uint8, got torch\.float32"):
        unpack_q4_0(torch.zeros(8, 18))
    with pytest.raises(CheckpointError, match=r"m\.gguf: w\.data: expected shape \[N, K / 32 \* 18\], got \[8, 20\]"):
        unpack_q4_0(torch.zeros(8, 20, dtype=torch.uint8), file="m.gguf", name="w")
    with pytest.raises(ValueError, match=r"weight\.zeros: expected 8 everywhere"):
        pack_q4_0(QuantizedWeight(good.q, good.zeros - 1, good.scales, 32))
    with pytest.raises(ValueError, match=r"weight\.scales: expected torch\.float16, got torch\.float32"):
        pack_q4_0(QuantizedWeight(good.q, good.zeros, good.scales.float(), 32))
    with pytest.raises(ValueError, match=r"blocks: expected shape \[..., K / 32, 36\]"):
        unpack_q8_1(torch.zeros(1, 34, dtype=torch.uint8))
