"""Decoding from a cache of static shapes, without the graph: the same steps that a GPU replays."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import nybble
from nybble.models import decode
from nybble.models.cache import RingCache
from nybble.models.decode import Decoder, Sampling
from nybble.runtime.errors import UnsupportedError

MakeModel = Callable[..., PreTrainedModel]
KINDS = pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen2", "qwen3", "gpt2"])


def tokens(model: PreTrainedModel, ids: torch.Tensor, count: int = 20, **how: Any) -> list[int]:
    return list(nybble.generate(model, ids[:1], max_new_tokens=count, **how))


@KINDS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True], ids=["fp32", "w4"])
def test_static_and_dynamic_caches_give_the_same_tokens(
    make_model: MakeModel, make_packed: MakeModel, ids: torch.Tensor, kind: str, attention: str, packed: bool
) -> None:
    model = (make_packed if packed else make_model)(kind, attn_implementation=attention)

    def both(cache: str) -> list[int]:  # greedy text of random weights says the same again and again
        return tokens(model, ids, cache=cache) + tokens(model, ids, cache=cache, temperature=2.0, seed=5)

    expected = both("dynamic")
    assert len(set(expected)) > 8
    assert both("static") == expected
    nybble.fuse(model)
    assert both("static") == expected
    assert both("dynamic") == expected


@KINDS
def test_logits_of_steps_are_those_of_the_whole_text(make_model: MakeModel, ids: torch.Tensor, kind: str) -> None:
    model = make_model(kind)
    decoder = Decoder(model, RingCache(model.config.num_hidden_layers, 64), batch=2, capacity=12, sampling=Sampling())
    decoder.prefill(ids)
    for _ in range(11):
        decoder.step()
    made = decoder.tokens.t()
    logits = model(torch.cat((ids, made), 1)).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(decoder.best.t(), logits.max(-1).values, rtol=0, atol=1e-4)
    torch.testing.assert_close(made, logits.argmax(-1))
    assert decoder.cache.tokens == ids.shape[1] + 11


@KINDS
@pytest.mark.parametrize("packed", [False, True], ids=["fp32", "w4"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_fused_step_attends_in_one_kernel(
    make_model: MakeModel, make_packed: MakeModel, ids: torch.Tensor, kind: str, packed: bool, batch: int
) -> None:
    """The logits with and without it."""
    model = (make_packed if packed else make_model)(kind)
    layers, logits, counted = model.config.num_hidden_layers, [], []
    for without in (("attention",), ()):
        report = nybble.fuse(model, without=without)
        decoder = Decoder(model, RingCache(layers, 64), batch=batch, capacity=12, sampling=Sampling())
        decoder.prefill(ids[:batch])
        for i in range(6):
            decoder.feed(ids[:batch, i])
            decoder.step()
            assert decoder.logits is not None
            logits.append(decoder.logits.clone())
        counted.append(report.calls().get("decode_attention", 0))
        report.undo()
    joint = kind in ("gpt_neox", "gpt2") and not packed  # one projection of queries, keys and values, in 16 bits
    assert counted == [0, 0 if joint else 6 * layers]
    torch.testing.assert_close(torch.stack(logits[6:]), torch.stack(logits[:6]), rtol=0, atol=1e-4)


@KINDS
def test_a_layer_of_a_fused_step_is_five_or_six_operations(
    make_packed: MakeModel, ids: torch.Tensor, kind: str
) -> None:
    views = ("view", "slice", "select", "split", "unbind", "transpose", "squeeze", "expand", "alias", "empty")
    ran: list[list[str]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not any(view in str(function) for view in views):
                ran[-1].append(str(function))
            return function(*args, **(kwargs or {}))

    for layers in (2, 3):
        model = make_packed(kind, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": layers})
        nybble.fuse(model)
        decoder = Decoder(model, RingCache(layers, 64), batch=2, capacity=8, sampling=Sampling())
        decoder.prefill(ids)
        ran.append([])
        with torch.inference_mode(), Watch():
            decoder._step()
    extra = Counter(ran[1]) - Counter(ran[0])
    norms = {"nybble.add_dual_layernorm.default": 1} if kind == "gpt_neox" else {}  # both, and both additions
    assert extra == {"nybble.w4a16.default": 4, "nybble.decode_attention.default": 1, **norms}


@pytest.mark.parametrize("vocabulary", [96, 256, 257, 50304])
def test_the_likeliest_token_is_the_first_of_the_largest(vocabulary: int) -> None:
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many are equal
    logits[1, 5], logits[2, 1:] = float("nan"), float("-inf")
    token, best = Sampling().pick(logits, torch.zeros(3))
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(best, logits.amax(-1), equal_nan=True)


def test_what_a_kernel_cant_serve_takes_the_usual_path(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    expected = tokens(model, ids, cache="static")
    report = nybble.fuse(model)
    model(ids, past_key_values=RingCache(2, 32), use_cache=True)  # not a step
    model(ids[:, :1], past_key_values=RingCache(2, 32), use_cache=True)
    assert "decode_attention" not in report.calls()
    sliding = make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    report = nybble.fuse(sliding)
    decoder = Decoder(sliding, RingCache(2, 64), capacity=8, sampling=Sampling())
    decoder.prefill(ids[:1])
    decoder.step()
    assert "decode_attention" not in report.calls()
    assert tokens(model, ids, cache="static") == expected


def test_a_decoder_forgets_the_text_before(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    expected = tokens(model, ids[1:], cache="dynamic")
    tokens(model, ids, cache="static")
    assert tokens(model, ids[1:], cache="static") == expected


def test_a_step_reads_no_value_of_a_tensor(make_packed: MakeModel, ids: torch.Tensor) -> None:
    """What waits for the device can't be captured: on meta tensors it fails, as it does in a graph."""
    model = make_packed("llama")
    nybble.fuse(model)
    decoder = Decoder(
        model, RingCache(2, 64), batch=1, capacity=8, sampling=Sampling(temperature=0.7, top_k=5, top_p=0.9)
    )
    decoder.prefill(ids[:1])
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.inference_mode(), Watch():
        decoder._step()
    assert any("index_copy_" in name for name in seen)
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "aten.item", "is_nonzero", "equal.default")
    assert [name for name in seen if any(wait in name for wait in waits)] == []


# ------------------------------------------------------------------------------------------------------------- sampling


def test_picks_follow_the_chances() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    draws = (torch.arange(20_000) + 0.5) / 20_000
    for sampling in (Sampling(1.3), Sampling(1.3, top_k=7), Sampling(0.8, top_p=0.6), Sampling(0.8, 20, 0.9)):
        chances = (logits.double() / sampling.temperature).softmax(-1)
        order = chances.argsort(descending=True)
        allowed = torch.ones(50, dtype=torch.bool)
        if sampling.top_k:
            allowed[order[sampling.top_k :]] = False
        if sampling.top_p:
            kept = chances * allowed / (chances * allowed).sum()
            before = kept[order].cumsum(-1) - kept[order]
            allowed[order[before >= sampling.top_p]] = False
        expected = chances * allowed / (chances * allowed).sum()
        token, best = sampling.pick(logits.expand(len(draws), -1), draws)
        counts = torch.bincount(token, minlength=50) / len(draws)
        torch.testing.assert_close(counts.double(), expected, rtol=0, atol=2e-4)
        assert torch.all(best == logits.max())


def test_a_draw_at_either_end_is_a_token_that_is_allowed() -> None:
    logits = torch.tensor([[3.0, -torch.inf, 1.0, -torch.inf]]).repeat(2, 1)
    token, _ = Sampling(1.0).pick(logits, torch.tensor([0.0, 1.0 - 2**-24]))
    assert token.tolist() == [0, 2]


def test_static_sampling_is_the_dynamic_one(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    for how in ({}, {"top_k": 9}, {"top_p": 0.7}):
        texts = [tokens(model, ids, cache=cache, temperature=1.5, seed=3, **how) for cache in ("static", "dynamic")]
        assert texts[0] == texts[1] != tokens(model, ids)


# --------------------------------------------------------------------------------------------- what is kept, refused


def test_a_decoder_is_kept_for_a_request_like_its_own(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")

    def kept() -> list[Decoder]:
        return list(decode._KEPT.get(model, {}).values())

    tokens(model, ids, cache="static")
    (first,) = kept()
    tokens(model, ids, 12, cache="static")  # the same slots, the same capacity
    assert kept() == [first]
    nybble.fuse(model)
    tokens(model, ids, cache="static")
    assert len(kept()) == 2 and kept()[0] is first
    tokens(model, ids, cache="static", temperature=1.0)
    assert len(kept()) == decode.KEPT and first not in kept()
    assert decode.release_decoders(model) == 2 and kept() == []


def test_two_texts_at_once_do_not_share_a_decoder(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    expected = [tokens(model, ids[i:], cache="dynamic") for i in range(2)]
    streams = [nybble.generate(model, ids[i : i + 1], max_new_tokens=20, cache="static") for i in range(2)]
    assert [list(pair) for pair in zip(*zip(*streams, strict=True), strict=True)] == expected


def test_kept_decoders_do_not_keep_a_model(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    tokens(model, ids, cache="static")
    before = len(decode._KEPT)
    del model
    gc.collect()
    assert len(decode._KEPT) == before - 1


def test_what_is_used_is_said(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    for cache, how in (("auto", "dynamic"), ("static", "static"), ("dynamic", "dynamic")):
        stream = nybble.generate(model, ids[:1], max_new_tokens=2, cache=cache)
        list(stream)
        assert (stream.how, stream.why) == (how, "")
    assert nybble.generate(model, ids[:1], max_new_tokens=2, window=8).how == "static"
    sliding = make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    stream = nybble.generate(sliding, ids[:1], max_new_tokens=2)
    assert (stream.how, stream.why) == ("dynamic", "layers have sliding windows")


def test_what_cant_be_used_is_refused(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    with pytest.raises(UnsupportedError, match="generate: cache='graph' needs a CUDA device; the model is on cpu"):
        nybble.generate(model, ids[:1], max_new_tokens=2, cache="graph")
    with pytest.raises(ValueError, match=r"generate: cache: expected one of \['auto'"):
        nybble.generate(model, ids[:1], max_new_tokens=2, cache="paged")
    with pytest.raises(ValueError, match="anything but 'dynamic' with a window"):
        nybble.generate(model, ids[:1], max_new_tokens=2, cache="dynamic", window=8)
    sliding = make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(UnsupportedError, match="cache='static' can't be used: layers have sliding windows"):
        nybble.generate(sliding, ids[:1], max_new_tokens=2, cache="static")


def test_a_full_cache_refuses_another_token(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match="cache: tokens: expected at most 8, the slots of this cache, got 11"):
        model(ids, past_key_values=RingCache(2, 8), use_cache=True)
