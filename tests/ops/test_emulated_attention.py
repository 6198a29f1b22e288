"""Attention kernels of one new token on a CPU: every index, fragment, barrier, cluster, flag; against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulate
import pytest
import torch
from checks import within

from nybble.ops.decode_attention import cost, op
from nybble.ops.decode_attention.cases import EPS, AttentionCase
from nybble.runtime.choice import Candidate
from nybble.runtime.workspace import FLAG_BYTES

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


# A case, blocks, warps, tiles on their way to a warp.
STREAMS: list[tuple[AttentionCase, int, int, int]] = [
    (AttentionCase(1, 4, 1, 128, 256), 2, 4, 2),  # two tiles a warp, two blocks that share a head
    (AttentionCase(1, 8, 2, 128, 700), 7, 4, 3),  # blocks that begin, end and lie inside a head
    (AttentionCase(1, 4, 1, 128, 80), 8, 8, 2),  # more blocks than tiles
    (AttentionCase(1, 4, 1, 64, 16 * 8 * 11), 11, 8, 2),  # a warp takes two blocks' sums
    (AttentionCase(1, 2, 1, 16, 16 * 4 * 37), 37, 4, 2),  # and nine of them, two at a time
    (AttentionCase(1, 2, 1, 8, 16 * 4 * 140, rotary=0), 140, 4, 2),  # more than a warp's lanes can watch
    (AttentionCase(5, 2, 1, 16, 112), 8, 4, 2),  # a head that begins where a block begins, the division being uneven
    (AttentionCase(3, 8, 2, 128, 200, BRAIN), 4, 4, 2),  # a block and a half a head, the last tile not full
    (AttentionCase(5, 3, 3, 80, 100, seen=60, **TOGETHER), 3, 4, 4),  # slots nobody has written, five heads a block
    (AttentionCase(9, 2, 2, 80, 33, seen=5, angles=FLOAT, **TOGETHER), 2, 4, 3),  # heads of one tile: fewer than warps
    (AttentionCase(1, 2, 2, 64, 64, rotary=0, seen=0), 4, 4, 2),  # no token before
    (AttentionCase(1, 2, 2, 96, 264, rotary=0, seen=215), 3, 4, 2),
    (AttentionCase(2, 12, 1, 72, 170, BRAIN, angles=FLOAT), 5, 4, 2),  # twelve heads: two products
    (AttentionCase(1, 16, 1, 128, 250, norm=True), 3, 4, 2),
    (AttentionCase(1, 8, 1, 256, 200, norm=True), 3, 4, 2),  # queries are read anew
    (AttentionCase(1, 2, 1, 256, 100, BRAIN), 2, 4, 3),
    (AttentionCase(2, 7, 1, 64, 100, seen=200), 3, 4, 2),  # a ring that has gone around; no even number of heads
    (AttentionCase(2, 4, 2, 128, 164, sinks=4, seen=300, norm=True), 6, 4, 2),
    (AttentionCase(2, 2, 2, 80, 96, sinks=20, seen=50, **TOGETHER), 3, 4, 2),  # sinks of two tiles
    (AttentionCase(1, 4, 2, 64, 200, sinks=64, seen=70), 5, 4, 3),
    (AttentionCase(1, 2, 1, 8, 148), 2, 4, 2),
    (AttentionCase(1, 6, 2, 24, 148), 3, 4, 2),
    (AttentionCase(1, 3, 1, 40, 148, BRAIN), 2, 4, 2),
    (AttentionCase(1, 2, 2, 104, 148), 4, 4, 2),
    (AttentionCase(1, 2, 2, 120, 148), 4, 4, 2),
    (AttentionCase(1, 2, 2, 200, 148, rotary=64), 3, 4, 2),
    (AttentionCase(1, 4, 1, 128, 256, size=40.0), 4, 4, 2),  # one key counts
]


def launch(case: AttentionCase, inputs: Any, splits: int, warps: int) -> torch.Tensor:
    shared = cost.shared_bytes(case.spec(), splits, warps)
    config = (("SPLITS", splits), ("WARPS", warps), ("SHARED", shared))
    return emulated(case, inputs, Candidate("cuda", config), case.batch * case.kv_heads * splits, cluster=splits)


def stream(case: AttentionCase, inputs: Any, blocks: int, warps: int, depth: int) -> torch.Tensor:
    shared = cost.stream_bytes(case.spec(), warps, depth)
    config = (("WARPS", warps), ("DEPTH", depth), ("EACH", 1), ("SHARED", shared))
    left = torch.full((FLAG_BYTES + blocks * cost.stream_left(case.spec()),), 255, dtype=torch.uint8)
    left[:FLAG_BYTES] = 0
    out = emulated(case, inputs, Candidate("stream", config), blocks, left, case.batch * case.kv_heads)
    assert not left[:FLAG_BYTES].any(), "flags are zero after a kernel as before it"
    return out


def emulated(case: AttentionCase, inputs: Any, chosen: Candidate, blocks: int, *more: Any, cluster: int = 1) -> Any:
    config = dict(chosen.config)
    out = torch.full((case.batch, case.heads, case.d), float("nan"), dtype=case.dtype)
    angles, norms, sinks = inputs.angles or (None,) * 2, inputs.norms or (None,) * 2, inputs.sinks or (None,) * 4
    emulate.launch(
        op.source(case.spec(), chosen), "q" * 16 + "n" * 9 + "dd" + ("qn" if more else ""), (blocks, 1, 1),
        32 * config["WARPS"], *op.arguments(*inputs[:7], *angles, *norms, *sinks, out, case.d**-0.5, EPS), *more,
        shared_bytes=config["SHARED"], cluster=cluster,
    )  # fmt: skip
    return out


def check(case: AttentionCase, run: Callable[[Any], torch.Tensor]) -> None:
    inputs = case.make()
    before = inputs.keys.clone(), inputs.values.clone()
    key, bound = case.new_key(inputs), case.rounding(inputs)
    out = run(inputs)
    within(case, inputs, (out,))
    assert torch.equal(run(inputs), out)
    assert ((inputs.keys[:, :, case.slot].double() - key).abs() <= bound).all()
    assert torch.equal(inputs.values[:, :, case.slot], inputs.v)
    others = [j for j in range(case.slots) if j != case.slot]
    for now, then in zip((inputs.keys, inputs.values), before, strict=True):
        assert torch.equal(now[:, :, others].nan_to_num(7.0), then[:, :, others].nan_to_num(7.0))


@pytest.mark.parametrize(("case", "splits", "warps"), CASES, ids=lambda value: str(value)[:90])
def test_attention(case: AttentionCase, splits: int, warps: int) -> None:
    check(case, lambda inputs: launch(case, inputs, splits, warps))


@pytest.mark.parametrize(("case", "blocks", "warps", "depth"), STREAMS, ids=lambda value: str(value)[:90])
def test_stream(case: AttentionCase, blocks: int, warps: int, depth: int) -> None:
    check(case, lambda inputs: stream(case, inputs, blocks, warps, depth))


FORMS: list[Callable[[AttentionCase, Any], torch.Tensor]] = [
    lambda case, inputs: launch(case, inputs, 2 if case.kv_heads > 1 else 1, 4),
    lambda case, inputs: stream(case, inputs, 3, 4, 2),
]


@pytest.mark.parametrize("form", FORMS, ids=("cluster", "stream"))
def test_a_nan_in_a_slot_in_use_is_seen_by_its_head_alone(form: Any) -> None:
    case = AttentionCase(1, 4, 2, 64, 100, rotary=0)
    inputs = case.make()
    clean = form(case, inputs)
    for tensor in (inputs.keys, inputs.values):
        kept = tensor[0, 1, 40, 3].clone()
        tensor[0, 1, 40, 3] = float("nan")
        out = form(case, inputs)
        assert torch.equal(out[0, :2], clean[0, :2])
        # of a key all is lost, of a value one dimension
        assert out[0, 2:].isnan().all() if tensor is inputs.keys else out[0, 2:, 3].isnan().all()
        tensor[0, 1, 40, 3] = kept


@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("form", FORMS, ids=("cluster", "stream"))
def test_a_score_of_minus_infinity_has_no_weight(form: Any, d: int) -> None:
    case = AttentionCase(1, 2, 1, d, 100, rotary=0)
    inputs = case.make()
    inputs.q[..., -1] = 1.0
    inputs.keys[0, 0, 16:32, -1] = float("-inf")  # a whole tile
    out = form(case, inputs)
    weights = (inputs.q.double() @ torch.cat((inputs.keys[0, 0, :99], inputs.k[0])).double().t() * d**-0.5).softmax(-1)
    want = weights @ torch.cat((inputs.values[0, 0, :99], inputs.v[0])).double()
    assert float((out - want).abs().max()) <= 2e-3 and bool(out.isfinite().all())
