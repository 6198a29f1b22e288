"""Attention of one new token on a CPU: the reference against float64 and transformers, the operator, the choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import check_case, within

import nybble
from nybble.bench.peers import Inapplicable
from nybble.bench.peers import decode_attention as peers
from nybble.ops.case import relative_error
from nybble.ops.decode_attention import cost, op
from nybble.ops.decode_attention.cases import BENCH, GATE, SMALL, AttentionCase, parse
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import A100, H200

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
TOGETHER: dict[str, Any] = {"rotary": 20, "together": True}
CASES = [
    AttentionCase(1, 8, 2, 64, 100),
    AttentionCase(2, 8, 2, 64, 100, BRAIN, seen=50),
    AttentionCase(3, 4, 4, 80, 40, FLOAT, angles=FLOAT, **TOGETHER),
    AttentionCase(1, 4, 4, 80, 40, **TOGETHER),
    AttentionCase(1, 12, 1, 48, 30, FLOAT, rotary=0, seen=0),
    AttentionCase(2, 4, 2, 32, 50, FLOAT, norm=True, angles=FLOAT),
    AttentionCase(1, 4, 2, 32, 50, HALF, seen=1000, norm=True, sinks=4),
    AttentionCase(1, 4, 2, 32, 50, FLOAT, size=40.0),
    AttentionCase(1, 6, 2, 7, 20, FLOAT, rotary=6),  # a width that only the reference takes
    AttentionCase(0, 6, 2, 8, 20, FLOAT),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case)[:100])
def test_matches_float64(case: AttentionCase) -> None:
    inputs = case.make()
    before = inputs.keys.clone(), inputs.values.clone()
    key, bound = case.new_key(inputs), case.rounding(inputs)
    check_case(case, inputs=inputs)
    assert ((inputs.keys[:, :, case.slot].double() - key).abs() <= bound).all()
    assert torch.equal(inputs.values[:, :, case.slot], inputs.v)
    others = [j for j in range(case.slots) if j != case.slot]
    for now, then in zip((inputs.keys, inputs.values), before, strict=True):
        assert torch.equal(now[:, :, others].nan_to_num(7.0), then[:, :, others].nan_to_num(7.0))


@pytest.mark.parametrize("changed", [{"size": 1.01}, {"used": 1}, {"slot": 1}], ids=str)
def test_the_tolerance_sees_a_small_mistake(changed: dict[str, Any]) -> None:
    """Scores off by a hundredth, a slot that is left out, the token in its neighbour's slot."""
    case = AttentionCase(1, 8, 2, 64, 60, FLOAT, seen=40)
    inputs = case.make()
    wrong = inputs._replace(keys=inputs.keys.clone(), values=inputs.values.clone())
    if "size" in changed:
        wrong = wrong._replace(q=wrong.q * changed["size"])
    elif "used" in changed:
        wrong = wrong._replace(seen=wrong.seen - 1, slot=wrong.slot - 1)
    else:
        wrong = wrong._replace(slot=wrong.slot - 1)
    with pytest.raises(AssertionError, match="elements off"):
        within(case, inputs, case.run(wrong))


def test_agrees_with_hugging_face_attention() -> None:
    """A layer of Qwen3 with its norms, in float32: its own cache, its own rotation, one token after eleven."""
    from transformers import DynamicCache, Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    torch.manual_seed(1)
    config = Qwen3Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=1,
        attn_implementation="eager",
    )  # fmt: skip
    attention, rotary = Qwen3Attention(config, 0).eval(), Qwen3RotaryEmbedding(config)
    torch.nn.init.uniform_(attention.q_norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(attention.k_norm.weight, 0.5, 1.5)
    x, cache = torch.randn(2, 12, 64), DynamicCache(config=config)
    with torch.inference_mode():
        for start, end in ((0, 11), (11, 12)):
            positions = torch.arange(start, end)[None]
            mask = torch.full((end - start, end), float("-inf")).triu(1 + start)[None, None]
            angles = rotary(x, positions)
            keys = None if start == 0 else cache.layers[0].keys.clone()
            values = None if start == 0 else cache.layers[0].values.clone()
            want = attention(x[:, start:end], angles, mask, past_key_values=cache)[0]
        assert keys is not None and values is not None
        slots = [torch.cat((t, torch.full((2, 2, 5, 16), float("nan"))), 2) for t in (keys, values)]
        q, k, v = (f(x[:, 11]).view(2, -1, 16) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        got = nybble.decode_attention(
            q, k, v, slots[0], slots[1], torch.tensor([11]), torch.tensor([11]),
            angles=(angles[0][0], angles[1][0]), norms=(attention.q_norm.weight, attention.k_norm.weight),
            eps=config.rms_norm_eps,
        )  # fmt: skip
        got = attention.o_proj(got.view(2, 1, -1))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slots[0][:, :, :12], cache.layers[0].keys, rtol=1e-5, atol=1e-5)
    assert torch.equal(slots[1][:, :, :12], cache.layers[0].values)


def good() -> dict[str, Any]:
    case = AttentionCase(2, 4, 2, 16, 12, FLOAT, norm=True, sinks=2, seen=20)
    return case.make()._asdict()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {"q": a["q"].int()}, TypeError, "q: expected float16, bfloat16 or float32, got torch.int32"),
        (lambda a: {"q": a["q"][0]}, ValueError, r"q: expected shape \[batch, query heads, head_dim\], got \[4, 16\]"),
        (lambda a: {"q": a["q"][:, :3]}, ValueError, "q: expected a multiple of 2 query heads, .* got 3"),
        (lambda a: {"k": a["k"].half()}, TypeError, r"k: expected torch.float32, got torch.float16. Convert it"),
        (lambda a: {"v": a["v"][:, :1]}, ValueError, r"v: expected shape \[2, 2, 16\], got \[2, 1, 16\]"),
        (lambda a: {"keys": a["keys"][0]}, ValueError, r"keys: expected shape \[batch, kv heads, slots, head_dim\]"),
        (lambda a: {"values": a["values"][:, :, 1:]}, ValueError, r"values: expected shape \[2, 2, 12, 16\]"),
        (
            lambda a: {"keys": a["keys"].transpose(1, 2).contiguous().transpose(1, 2)},
            ValueError, "keys: expected a contiguous cache, got strides .* It is written in place",
        ),
        (lambda a: {"slot": a["slot"].int()}, TypeError, "slot: expected torch.int64, got torch.int32"),
        (lambda a: {"seen": a["seen"][0]}, ValueError, r"seen: expected shape \[1\], got \[\]"),
        (lambda a: {"seen": a["seen"].to("meta")}, ValueError, "seen: expected device cpu, that of q, got meta"),
        (lambda a: {"angles": (a["angles"][0][:, :3],) * 2}, ValueError, r"cos: expected shape \[1 or 2, rotary\]"),
        (lambda a: {"angles": (a["angles"][0], a["angles"][1][:1])}, ValueError, r"sin: expected shape \[2, 16\]"),
        (lambda a: {"angles": (a["angles"][0].double(),) * 2}, TypeError, "cos: expected torch.float32, the"),
        (lambda a: {"norms": (a["norms"][0], a["norms"][1][1:])}, ValueError, r"k_norm: expected shape \[16\]"),
        (lambda a: {"angles": None}, ValueError, "sinks: expected four tensors, .* got sinks without"),
        (
            lambda a: {"sinks": a["sinks"]._replace(cos=a["sinks"].cos[:1])},
            ValueError, r"sinks.cos: expected shape \[2, 16\], got \[1, 16\]",
        ),
        (lambda a: {"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        (lambda a: {"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
        (
            lambda a: {"variant": "flash"},
            ValueError, r"variant: expected 'auto' or one of \['cuda', 'stream', 'reference'\]",
        ),
        (lambda a: {"variant": "cuda"}, UnsupportedError, "no variant can run this here .cuda: no CUDA device"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: Any, error: type[Exception], message: str) -> None:
    given = good()
    nybble.decode_attention(**given)
    with pytest.raises(error, match=f"decode_attention: {message}"):
        nybble.decode_attention(**{**given, **change(given)})


def flat(case: AttentionCase) -> tuple[Any, ...]:
    inputs = case.make()
    parts = (inputs.angles or (None,) * 2, inputs.norms or (None,) * 2, inputs.sinks or (None,) * 4)
    return (*inputs[:7], *(t for part in parts for t in part), case.d**-0.5, 1e-6, False, "auto")


@pytest.mark.parametrize(
    "case", [AttentionCase(2, 4, 2, 16, 12, FLOAT), AttentionCase(1, 4, 2, 16, 12, FLOAT, sinks=2)]
)
def test_opcheck(case: AttentionCase) -> None:
    torch.library.opcheck(torch.ops.nybble.decode_attention.default, flat(case))


def test_compiles_whole_and_writes_the_cache() -> None:
    case = AttentionCase(2, 4, 2, 16, 12, FLOAT, seen=5)
    inputs, again = case.make(), case.make()

    def step(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        given = inputs._replace(q=q, keys=keys, values=values)
        return case.bind(given)() * 2

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs.q, inputs.keys, inputs.values)
    assert torch.equal(got, case.run(again)[0] * 2)
    assert torch.equal(inputs.keys[:, :, :6], again.keys[:, :, :6])


def test_backward_says_inference_only() -> None:
    given = good()
    given["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="nybble::decode_attention has no backward"):
        nybble.decode_attention(**given).sum().backward()


# --------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("case", BENCH, ids=lambda case: str(case.shape()))
def test_every_measured_case_has_a_form_that_fits(case: AttentionCase) -> None:
    spec, picked = case.spec(), case.choice(H200).pick
    cluster, stream, _ = cost.candidates(spec, H200)
    assert picked in (cluster, stream) and picked.us == min(cluster.us or 0.0, stream.us or 0.0)
    for candidate in (cluster, stream):
        assert candidate.us is not None and candidate.us > case.floor_us(H200)
    config = dict(cluster.config)
    assert config["SHARED"] == cost.shared_bytes(spec, config["SPLITS"], config["WARPS"]) <= H200.shared_bytes
    config = dict(stream.config)
    assert config["SHARED"] == cost.stream_bytes(spec, config["WARPS"], config["DEPTH"]) <= H200.shared_bytes
    assert (config["SHARED"] + 1024) * config["EACH"] <= H200.shared_bytes + 1024  # blocks that wait for each other


@pytest.mark.parametrize("case", GATE, ids=lambda case: str(case)[:90])
def test_whatever_the_kernels_take_has_a_form_of_each(case: AttentionCase) -> None:
    assert [c.variant for c in cost.candidates(case.spec(), H200) if not c.refused] == ["cuda", "stream", "reference"]


def test_few_heads_share_their_keys_and_many_do_not() -> None:
    def splits(case: AttentionCase) -> int:
        return dict(case.choice(H200, "cuda").pick.config)["SPLITS"]

    assert splits(AttentionCase()) == 8
    assert splits(AttentionCase(64)) == 1
    assert splits(AttentionCase(slots=16)) == 1


def test_short_caches_are_a_clusters_and_long_ones_everybodys() -> None:
    def variant(case: AttentionCase) -> str:
        return case.choice(H200).pick.variant

    assert [variant(AttentionCase(slots=slots)) for slots in (16, 128, 640, 2048)] == ["cuda"] * 4
    assert [variant(AttentionCase(slots=slots)) for slots in (32768, 131072)] == ["stream"] * 2


def test_a_stream_has_no_more_blocks_than_run_at_once() -> None:
    assert cost.stream_blocks(8, 32768, 8, 1, 132) == 128  # 16 a head
    assert cost.stream_blocks(9, 32768, 8, 1, 132) == 126
    assert cost.stream_blocks(50, 32768, 8, 1, 132) == 132  # 100 would be too few
    assert cost.stream_blocks(256, 32768, 4, 2, 132) == 256
    assert cost.stream_blocks(512, 32768, 4, 2, 132) == 264
    assert cost.stream_blocks(8, 100, 8, 1, 132) == 7  # seven tiles a head, a tile a warp
    assert cost.stream_blocks(1, 1, 8, 1, 132) == 1


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (AttentionCase(dtype=FLOAT), "its tensor cores take float16 and bfloat16, not float32"),
        (AttentionCase(d=100), "multiples of 8 wide, up to 256, not 100"),
        (AttentionCase(d=264), "multiples of 8 wide, up to 256, not 264"),
        (AttentionCase(heads=34, kv_heads=2), "17 query heads of 128 a kv head are more sums"),
        (AttentionCase(heads=18, kv_heads=2, d=256), "9 query heads of 256 a kv head are more sums"),
        (AttentionCase(sinks=65), "at most 64 sinks, not 65"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_the_kernel_refuses_the_reference_runs(case: AttentionCase, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        case.choice(H200, "cuda")
    assert case.choice(H200).pick.variant == "reference"
    group = case.heads // case.kv_heads
    assert op.can_run(case.dtype, case.d, group, case.sinks, torch.device("cpu"))


def test_before_hopper_the_reference_runs() -> None:
    assert AttentionCase().choice(A100).pick.variant == "reference"
    unaligned = AttentionCase().spec()._replace(aligned=False)
    assert "16-byte aligned" in cost.candidates(unaligned, H200)[0].reason


# ---------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize(
    "case", [*SMALL, replace(SMALL[0], rotary=0), AttentionCase(2, 4, 4, 80, 40, FLOAT, **TOGETHER)]
)
def test_peers_compute_the_same(case: AttentionCase) -> None:
    inputs = case.make()
    truth = case.truth(inputs)
    for peer in peers.PEERS:
        call = peer.build(case, inputs)
        assert relative_error((call.function(*call.arguments),), truth) < 1e-5


def test_peers_say_what_they_lack() -> None:
    case = AttentionCase(1, 4, 2, 16, 40, FLOAT, sinks=2)
    for peer in peers.PEERS:
        with pytest.raises(Inapplicable):
            peer.build(case, case.make())
    used = AttentionCase(1, 4, 2, 16, 40, FLOAT, seen=5)
    assert relative_error((peers.attend(*peers._alone(used, used.make()).arguments),), used.truth(used.make())) < 1e-5
    with pytest.raises(Inapplicable):
        peers._step(used, used.make())


def test_parse_names_what_is_wrong() -> None:
    assert parse({"slots": 2048}, HALF) == AttentionCase(slots=2048)
    with pytest.raises(ValueError, match=r"heads: expected a multiple of kv_heads = 8, got 30"):
        parse({"heads": 30}, HALF)
    with pytest.raises(ValueError, match=r"d: expected a positive number, got 0"):
        parse({"d": 0}, HALF)
