"""The kernel of attention of one new token on a CPU: every index, fragment, barrier and cluster, against float64."""

from __future__ import annotations

from typing import Any

import emulate
import pytest
import torch
from checks import within

from nybble.ops.decode_attention import cost, op
from nybble.ops.decode_attention.cases import EPS, AttentionCase

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ is needed to compile the kernels for a CPU")

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
TOGETHER: dict[str, Any] = {"rotary": 20, "together": True}

# A case, blocks that share the keys of a head, warps.
CASES: list[tuple[AttentionCase, int, int]] = [
    (AttentionCase(1, 4, 1, 128, 256), 2, 4),  # two tiles a warp
    (AttentionCase(1, 4, 1, 128, 80), 8, 8),  # blocks and warps with nothing to do
    (AttentionCase(1, 8, 2, 128, 200, BRAIN), 4, 4),  # the last tile is not full
    (AttentionCase(2, 3, 3, 80, 100, seen=60, **TOGETHER), 4, 4),  # slots nobody has written
    (AttentionCase(3, 2, 2, 80, 33, seen=32, angles=FLOAT, **TOGETHER), 1, 4),
    (AttentionCase(1, 2, 2, 64, 64, rotary=0, seen=0), 8, 4),  # no token before
    (AttentionCase(1, 2, 2, 96, 64, rotary=0, seen=15), 2, 4),
    (AttentionCase(2, 12, 1, 72, 70, BRAIN, angles=FLOAT), 1, 8),  # twelve heads: two products
    (AttentionCase(1, 16, 1, 128, 150, norm=True), 2, 8),
    (AttentionCase(1, 8, 1, 256, 100, norm=True), 2, 4),
    (AttentionCase(1, 7, 1, 64, 100, seen=200), 4, 4),  # a ring that has gone around
    (AttentionCase(1, 4, 2, 128, 64, sinks=4, seen=300, norm=True), 2, 4),
    (AttentionCase(2, 2, 2, 80, 96, sinks=20, seen=50, **TOGETHER), 8, 4),  # sinks of two tiles
    (AttentionCase(1, 2, 1, 8, 48), 4, 4),  # less than a float4 for each block
    (AttentionCase(1, 6, 2, 24, 48), 2, 4),
    (AttentionCase(1, 3, 1, 40, 48, BRAIN), 1, 4),
    (AttentionCase(1, 2, 2, 104, 48), 1, 4),
    (AttentionCase(1, 2, 2, 120, 48), 2, 4),
    (AttentionCase(1, 2, 2, 200, 48, rotary=64), 1, 4),
    (AttentionCase(1, 4, 1, 128, 256, size=40.0), 4, 8),  # one key counts
]


def launch(case: AttentionCase, inputs: Any, splits: int, warps: int) -> torch.Tensor:
    spec = case.spec()
    shared = cost.shared_bytes(spec, splits, warps)
    config = (("SPLITS", splits), ("WARPS", warps), ("SHARED", shared))
    out = torch.full((case.batch, case.heads, case.d), float("nan"), dtype=case.dtype)
    angles, norms, sinks = inputs.angles or (None,) * 2, inputs.norms or (None,) * 2, inputs.sinks or (None,) * 4
    emulate.launch(
        op.source(spec, config), "q" * 16 + "n" * 9 + "dd", (case.batch * case.kv_heads * splits, 1, 1), 32 * warps,
        *op.arguments(*inputs[:7], *angles, *norms, *sinks, out, case.d**-0.5, EPS),
        shared_bytes=shared, cluster=splits,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("case", "splits", "warps"), CASES, ids=lambda value: str(value)[:90])
def test_attention(case: AttentionCase, splits: int, warps: int) -> None:
    inputs = case.make()
    before = inputs.keys.clone(), inputs.values.clone()
    key, bound = case.new_key(inputs), case.rounding(inputs)
    out = launch(case, inputs, splits, warps)
    within(case, inputs, (out,))
    assert torch.equal(launch(case, inputs, splits, warps), out)
    assert ((inputs.keys[:, :, case.slot].double() - key).abs() <= bound).all()
    assert torch.equal(inputs.values[:, :, case.slot], inputs.v)
    others = [j for j in range(case.slots) if j != case.slot]
    for now, then in zip((inputs.keys, inputs.values), before, strict=True):
        assert torch.equal(now[:, :, others].nan_to_num(7.0), then[:, :, others].nan_to_num(7.0))


def test_a_nan_in_a_slot_in_use_is_seen_by_its_head_alone() -> None:
    case = AttentionCase(1, 4, 2, 64, 100, rotary=0)
    inputs = case.make()
    clean = launch(case, inputs, 2, 4)
    for tensor in (inputs.keys, inputs.values):
        kept = tensor[0, 1, 40, 3].clone()
        tensor[0, 1, 40, 3] = float("nan")
        out = launch(case, inputs, 2, 4)
        assert torch.equal(out[0, :2], clean[0, :2])
        # of a key all is lost, of a value one dimension
        assert out[0, 2:].isnan().all() if tensor is inputs.keys else out[0, 2:, 3].isnan().all()
        tensor[0, 1, 40, 3] = kept


def test_a_score_of_minus_infinity_has_no_weight() -> None:
    case = AttentionCase(1, 2, 1, 64, 100, rotary=0)
    inputs = case.make()
    inputs.q[..., 0] = 1.0
    inputs.keys[0, 0, 16:32, 0] = float("-inf")  # a whole tile
    out = launch(case, inputs, 1, 4)
    weights = (inputs.q.double() @ torch.cat((inputs.keys[0, 0, :99], inputs.k[0])).double().t() / 8).softmax(-1)
    want = weights @ torch.cat((inputs.values[0, 0, :99], inputs.v[0])).double()
    assert float((out - want).abs().max()) <= 2e-3 and bool(out.isfinite().all())
