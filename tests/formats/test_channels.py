"""The layout of an int4 weight with one scale a channel."""

from __future__ import annotations

import copy

import pytest
import torch

from nybble.formats.channels import ChannelWeight


def weight(k: int = 136, n: int = 72) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-8, 8, (k, n), dtype=torch.int8), torch.rand(n) + 0.1


@pytest.mark.parametrize(("k", "n"), [(8, 8), (64, 64), (136, 72), (256, 200)])
def test_unpacking_gives_it_back(k: int, n: int) -> None:
    q, scales = weight(k, n)
    packed = ChannelWeight.from_values(q, scales)
    for got, want in zip(packed.unpack(), (q, scales), strict=True):
        assert torch.equal(got, want)
    assert packed.nbytes == packed.qweight.numel() * 4 + packed.scales.numel() * 4


def test_the_diagram() -> None:
    """One value at a time, found where the module's diagram has it."""
    for k, n, value in ((0, 0, 7), (3, 9, -8), (37, 5, -1), (77, 24, 3), (126, 63, 5), (130, 70, -3)):
        q = torch.zeros(136, 72, dtype=torch.int8)
        q[k, n] = value
        words = ChannelWeight.from_values(q, torch.ones(72)).qweight
        strip, row = n % 64 // 16, n % 16
        step, half, t, byte = k % 64 // 32, k % 32 // 16, k % 16 // 4, k % 4
        lane = row % 8 * 4 + t
        at = words[n // 64, k // 64, strip * 128 + lane * 4 + 2 * step + half]
        nibble = int(at) >> (8 * byte + (4 if row < 8 else 0)) & 15
        assert (nibble ^ 8) - 8 == value
        assert int((words != 0).sum()) == 1


def test_from_float_rounds_to_the_nearest() -> None:
    original = torch.randn(72, 136)
    original[5] = 0.0
    q, scales = ChannelWeight.from_float(original).unpack()
    assert torch.equal(scales[[0, 5]], torch.stack((original[0].abs().max() / 7, torch.tensor(1.0))))
    assert ((q.t() * scales[:, None] - original).abs() <= 0.5001 * scales[:, None]).all()
    assert q.abs().amax(0)[torch.arange(72) != 5].eq(7).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda q, s: (q.int(), s), TypeError, "q: expected torch.int8"),
        (lambda q, s: (q[:7], s), ValueError, "multiples of 8"),
        (lambda q, s: (q, s[:8]), ValueError, r"scales: expected shape \[N\]"),
        (lambda q, s: (q, s.int()), TypeError, "scales"),
        (lambda q, s: (q * 2, s), ValueError, "values -8 .. 7"),
    ],
)
def test_bad_values_are_refused(change: object, error: type[Exception], text: str) -> None:
    q, scales = weight()
    q[0, 0] = 7
    with pytest.raises(error, match=text):
        ChannelWeight.from_values(*change(q, scales))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"qweight": lambda t: t.short()}, TypeError, "qweight: expected torch.int32"),
        ({"qweight": lambda t: t[:, :1]}, ValueError, "from_values"),
        ({"scales": lambda t: t.half()}, TypeError, "scales: expected torch.float32"),
        ({"scales": lambda t: t.to("meta")}, ValueError, "scales: expected device cpu"),
        ({"in_features": lambda k: 12}, ValueError, "in_features: expected a positive multiple of 8"),
    ],
)
def test_bad_tensors_are_refused(change: dict, error: type[Exception], text: str) -> None:
    packed = ChannelWeight.from_values(*weight())
    fields = {name: getattr(packed, name) for name in ("qweight", "scales", "in_features", "out_features")}
    fields |= {name: to(fields[name]) for name, to in change.items()}
    with pytest.raises(error, match=text):
        ChannelWeight(**fields)


def test_settles_once_and_after_a_change() -> None:
    packed = ChannelWeight.from_values(*weight())
    assert packed.settle()
    assert not packed.settle()
    packed.qweight.zero_()
    assert packed.settle()
    assert copy.deepcopy(packed).settle()
