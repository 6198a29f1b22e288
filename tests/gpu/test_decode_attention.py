"""Attention of one new token on a GPU against float64: shapes, forms, chains of overlapping kernels, a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import check_case, within

import nybble
from nybble.ops.decode_attention import cost, op
from nybble.ops.decode_attention.cases import BENCH, EPS, AttentionCase
from nybble.runtime.choice import Candidate
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import current

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
TOGETHER: dict[str, Any] = {"rotary": 20, "together": True}
CASES = [
    *(AttentionCase(slots=slots, seen=seen) for slots, seen in ((16, 0), (16, 15), (640, 511), (8192, 5000))),
    *(AttentionCase(batch, dtype=dtype) for batch in (1, 3, 8, 64) for dtype in (HALF, BRAIN)),
    *(AttentionCase(batch, 32, 32, 80, 640, dtype, **TOGETHER) for batch in (1, 8) for dtype in (HALF, BRAIN)),
    *(AttentionCase(2, 2 * group, 2, 64, 300, rotary=0) for group in range(1, 17)),
    *(AttentionCase(2, 6, 2, d, 100, BRAIN) for d in range(8, 264, 8)),
    *(AttentionCase(1, 16, 8, norm=True, angles=a) for a in (None, FLOAT)),
    *(AttentionCase(slots=1024, sinks=4, seen=seen, norm=n) for seen in (20, 1023, 9000) for n in (False, True)),
    AttentionCase(2, 32, 32, 80, 300, BRAIN, sinks=20, seen=500, **TOGETHER),
    AttentionCase(size=40.0),
    AttentionCase(slots=131072, seen=100_000),
]  # fmt: skip


@pytest.mark.parametrize("variant", ["cuda", "stream"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case)[:110])
def test_matches_float64(case: AttentionCase, variant: str) -> None:
    inputs = case.make("cuda")
    before = inputs.keys.clone(), inputs.values.clone()
    key, bound = case.new_key(inputs), case.rounding(inputs)
    (first,) = check_case(case, "cuda", variant=variant, inputs=inputs)
    assert ((inputs.keys[:, :, case.slot].double() - key).abs() <= bound).all()
    assert torch.equal(inputs.values[:, :, case.slot], inputs.v)
    for now, then in zip((inputs.keys, inputs.values), before, strict=True):
        now[:, :, case.slot] = then[:, :, case.slot]
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))
    for _ in range(3):
        assert torch.equal(case.run(inputs, variant)[0], first)


FORMED = [
    AttentionCase(2, slots=700, seen=600),
    AttentionCase(1, 5, 5, 80, 333, **TOGETHER),
    AttentionCase(1, 32, 2),
    AttentionCase(1, 8, 1, 256, 20000, seen=19000),
    AttentionCase(40, 16, 4, 64, 90, BRAIN),
]


def run_form(case: AttentionCase, chosen: Candidate) -> None:
    launch = op.launch_of(case.spec(), chosen, 0)
    x = case.make("cuda")
    out = torch.full((case.batch, case.heads, case.d), float("nan"), device="cuda", dtype=case.dtype)
    angles, norms, sinks = x.angles or (None,) * 2, x.norms or (None,) * 2, x.sinks or (None,) * 4
    given = op.arguments(*x[:7], *angles, *norms, *sinks, out, case.d**-0.5, EPS)
    pointers = [0 if t is None else t.data_ptr() for t in given[:16]]
    first = None
    for _ in range(10):
        launch.run(case.batch * case.kv_heads, case.slots, *pointers, *given[16:])
        within(case, x, (out,))
        first = out.clone() if first is None else first
        assert torch.equal(out, first)
        out.fill_(float("nan"))


@pytest.mark.parametrize("warps", cost.WARPS)
@pytest.mark.parametrize("splits", cost.SPLITS)
@pytest.mark.parametrize("case", FORMED, ids=lambda case: str(case)[:80])
def test_every_form(case: AttentionCase, splits: int, warps: int) -> None:
    shared = cost.shared_bytes(case.spec(), splits, warps)
    run_form(case, Candidate("cuda", (("SPLITS", splits), ("WARPS", warps), ("SHARED", shared))))


@pytest.mark.parametrize("form", cost.STREAMS, ids=str)
@pytest.mark.parametrize("case", FORMED, ids=lambda case: str(case)[:80])
def test_every_form_of_stream(case: AttentionCase, form: tuple[int, int, int]) -> None:
    warps, depth, each = form
    shared, card = cost.stream_bytes(case.spec(), warps, depth), current()
    assert card is not None
    if each * (shared + 1024) > card.shared_bytes + 1024:
        pytest.skip(f"{shared} bytes of shared memory a block")
    config = (("WARPS", warps), ("DEPTH", depth), ("EACH", each), ("SHARED", shared))
    run_form(case, Candidate("stream", config))


@pytest.mark.parametrize("seen", [0, 15, 16, 700, 5000, 9999, 123456])
def test_a_stream_of_any_count_of_slots(seen: int) -> None:
    """One launch for all counts: its grid is of the slots, its shares of those in use."""
    check_case(AttentionCase(2, slots=10000, seen=seen), "cuda", variant="stream")


@pytest.mark.parametrize("variant", ["cuda", "stream"])
@pytest.mark.parametrize("shape", [(1, 8, 2, 128), (4, 4, 4, 80)], ids=str)
def test_a_text_in_a_graph(shape: tuple[int, int, int, int], variant: str) -> None:
    """Token after token, each from the result of the one before, so that every kernel reads what the last one wrote;
    from a graph of one step, eagerly, and with a pause after every kernel: the same bits."""
    batch, heads, kv_heads, d = shape
    draw = torch.Generator("cuda").manual_seed(3)
    weight = torch.ones(heads * d, device="cuda", dtype=HALF)
    start = torch.randn(batch, heads, d, generator=draw, device="cuda").half()
    angles = (torch.ones(1, d, device="cuda", dtype=HALF), torch.zeros(1, d, device="cuda", dtype=HALF))

    class Text:
        def __init__(self) -> None:
            self.x, self.kept = start.clone(), torch.zeros(200, batch, heads, d, device="cuda", dtype=HALF)
            self.keys, self.values = (torch.zeros(2, batch, kv_heads, 96, d, device="cuda", dtype=HALF) for _ in "kv")
            self.seen = torch.zeros(1, dtype=torch.int64, device="cuda")

        def step(self, pause: bool = False) -> None:
            slot = self.seen % 96
            x = self.x
            for layer in range(2):  # a kernel that overlaps writes what the attention takes, and takes what it gives
                x = nybble.rmsnorm(x.view(batch, -1), weight, 1e-6).view(batch, heads, d)
                k = x[:, :kv_heads] * 0.5
                x = nybble.rmsnorm(x.reshape(batch, -1), weight, 1e-6).view(batch, heads, d)
                x = nybble.decode_attention(
                    x, k, x[:, :kv_heads], self.keys[layer], self.values[layer], slot, self.seen, angles=angles,
                    settled=True, variant=variant,
                )  # fmt: skip
                if pause:
                    torch.cuda.synchronize()
            self.x.copy_(x + 0.25 * start.roll(1, -1))
            self.kept.index_copy_(0, self.seen, self.x[None])
            self.seen += 1

    want, eager, captured = Text(), Text(), Text()
    for _ in range(150):
        want.step(pause=True)
        eager.step()
    captured.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(149):
        graph.replay()
    torch.cuda.synchronize()
    assert bool(want.kept[:150].isfinite().all()) and float(want.kept[:150].std()) > 0.01
    assert torch.equal(eager.kept, want.kept)
    assert torch.equal(captured.kept, want.kept)


@pytest.mark.parametrize("variant", ["cuda", "stream"])
def test_a_cache_that_was_just_written_is_waited_for(variant: str) -> None:
    """Without ``settled`` the launch overlaps nothing."""
    case = AttentionCase(settled=False)
    for seed in range(20):
        inputs, fresh = case.make("cuda", seed), case.make("cuda", seed)
        (want,) = case.run(fresh, variant)
        held = inputs._replace(keys=torch.zeros_like(inputs.keys), values=torch.zeros_like(inputs.values))
        torch.cuda._sleep(100_000)
        held.keys.copy_(inputs.keys)
        held.values.copy_(inputs.values)
        assert torch.equal(case.run(held, variant)[0], want)


def test_strides_and_what_the_kernel_refuses() -> None:
    case = AttentionCase(2, 8, 2, 64, 100)
    x = case.make("cuda")
    (want,) = case.run(x)
    apart = x._replace(q=x.q.transpose(1, 2).contiguous().transpose(1, 2), k=torch.stack((x.k, x.k), -1)[..., 0])
    assert torch.equal(case.run(apart)[0], want)
    for odd in (AttentionCase(1, 4, 2, 64, 50, FLOAT), AttentionCase(1, 4, 2, 20, 50), AttentionCase(1, 34, 2, 64, 50)):
        check_case(odd, "cuda")
        with pytest.raises(UnsupportedError):
            odd.run(odd.make("cuda"), "cuda")


def test_opcheck() -> None:
    case = AttentionCase(2, 4, 2, 16, 12)
    x = case.make("cuda")
    given = (*x[:7], *(x.angles or ()), *[None] * 6, 0.25, 1e-6, False, "auto")
    torch.library.opcheck(torch.ops.nybble.decode_attention.default, given)


@pytest.mark.parametrize("case", BENCH, ids=lambda case: str(case.shape()))
def test_what_is_measured_is_right(case: AttentionCase) -> None:
    check_case(case, "cuda")
