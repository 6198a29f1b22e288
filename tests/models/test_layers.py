from __future__ import annotations

import copy

import pytest
import torch

from nybble import PackedWeight, QuantizedWeight, w4a16_linear
from nybble.models.layers import W4A16Linear

K, N, GROUP = 96, 40, 32


def make_weight(seed: int, *, full: bool) -> tuple[QuantizedWeight, torch.Tensor | None]:
    """A weight with zero points and act-order, and a bias; or with none of them."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (K, N), generator=generator, dtype=torch.uint8)
    zeros = torch.full((K // GROUP, N), 8, dtype=torch.uint8)
    g_idx = bias = None
    if full:
        zeros = torch.randint(0, 16, zeros.shape, generator=generator, dtype=torch.uint8)
        g_idx = (torch.randperm(K, generator=generator) // GROUP).to(torch.int32)
        bias = torch.randn(N, generator=generator)
    scales = torch.rand(K // GROUP, N, generator=generator).half()
    return QuantizedWeight(q, zeros, scales, GROUP, g_idx), bias


def make_layer(seed: int, *, full: bool) -> W4A16Linear:
    weight, bias = make_weight(seed, full=full)
    return W4A16Linear.from_packed(PackedWeight.from_quantized(weight), bias)


@pytest.mark.parametrize("full", [False, True])
def test_forward_is_the_operation(full: bool) -> None:
    layer, x = make_layer(0, full=full), torch.randn(2, 3, K)
    weight, bias = make_weight(0, full=full)
    expected = x @ weight.dequantize() + (0 if bias is None else bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(layer(x), w4a16_linear(x, PackedWeight.from_quantized(weight), bias=bias))


def test_a_layer_of_8_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(0, 256, (K, N), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 256, (K // GROUP, N), generator=generator, dtype=torch.uint8)
    scales = torch.rand(K // GROUP, N, generator=generator).half() / 16
    weight = QuantizedWeight(q, zeros, scales, GROUP, bits=8)
    layer, x = W4A16Linear.from_packed(PackedWeight.from_quantized(weight)), torch.randn(2, 3, K)
    assert layer.bits == 8 and "bits=8" in repr(layer)
    torch.testing.assert_close(layer(x), x @ weight.dequantize(), rtol=1e-5, atol=1e-3)
    assert copy.deepcopy(layer).packed().bits == layer.packed().to("meta").bits == 8


@pytest.mark.parametrize("full", [False, True])
def test_state_dict_carries_everything(full: bool) -> None:
    layer, other, x = make_layer(0, full=full), make_layer(1, full=full), torch.randn(2, K)
    assert set(layer.state_dict()) == {"qweight", "scales", *(("qzeros", "perm", "bias") if full else ())}
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("name", ["qweight", "scales", "qzeros", "perm"])
def test_the_held_weight_follows_each_parameter(name: str) -> None:
    layer, other = make_layer(0, full=True), make_layer(1, full=True)
    assert layer.packed() is layer.packed()
    setattr(layer, name, getattr(other, name))
    assert getattr(layer.packed(), name) is getattr(other, name)


def test_the_held_weight_follows_what_is_loaded_or_copied() -> None:
    layer, other, x = make_layer(0, full=True), make_layer(1, full=True), torch.randn(2, K)
    layer(x)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer(x), other(x))
    twin = copy.deepcopy(layer)
    assert twin.packed().qweight is twin.qweight is not layer.qweight


def test_deepcopy_shares_nothing() -> None:
    layer, x = make_layer(0, full=True), torch.randn(2, K)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_change_of_dtype_reaches_scales_and_bias_only(dtype: torch.dtype) -> None:
    layer = make_layer(0, full=True)
    qweight = layer.qweight.clone()
    layer.to(dtype)
    assert layer.scales.dtype == dtype
    assert layer.bias is not None and layer.bias.dtype == dtype
    assert layer.qzeros is not None and layer.qzeros.dtype == torch.uint8
    assert layer.perm is not None and layer.perm.dtype == torch.int32
    assert torch.equal(layer.qweight, qweight)
    assert layer(torch.randn(2, K, dtype=dtype)).dtype == dtype


def test_to_moves_every_tensor() -> None:
    layer = make_layer(0, full=True).to("meta")
    packed = layer.packed()
    assert all(t is not None and t.is_meta for t in (packed.qweight, packed.scales, packed.qzeros, packed.perm))


def test_no_parameter_wants_a_gradient_and_repr_names_the_kind() -> None:
    layer = make_layer(0, full=True)
    assert not any(p.requires_grad for p in layer.parameters())
    assert repr(layer) == (
        "W4A16Linear(in_features=96, out_features=40, group_size=32, bits=4, bias=True, zero points, act-order)"
    )
