"""Sinks and a window: against dense decoding, against a cache that keeps un-rotated keys, and without end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

import nybble
from nybble.models import cache as ring
from nybble.models.decode import Decoder, Sampling
from nybble.models.streaming import StreamingCache
from nybble.runtime.errors import UnsupportedError

MakeModel = Callable[..., PreTrainedModel]
KINDS = pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen2", "qwen3"])


def close(got: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def text(count: int) -> torch.Tensor:
    return torch.randint(1, 96, (1, count), generator=torch.Generator().manual_seed(8))


def steps(model: PreTrainedModel, ids: torch.Tensor, cache: Any, prompt: int = 1) -> torch.Tensor:
    """Logits after each token from ``prompt`` on, one call of the model a token."""
    out = [model(ids[:, :prompt], past_key_values=cache, use_cache=True).logits[:, -1]]
    for i in range(prompt, ids.shape[1]):
        out.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(out, 1)


def graph_steps(model: PreTrainedModel, ids: torch.Tensor, cache: StreamingCache, prompt: int) -> torch.Tensor:
    """The same by the steps that a graph holds, each given its token."""
    decoder = Decoder(model, cache, capacity=ids.shape[1], sampling=Sampling())
    decoder.prefill(ids[:, :prompt])
    assert decoder.logits is not None
    seen = [decoder.logits.clone()]
    for i in range(prompt, ids.shape[1]):
        decoder.feed(ids[:, i])
        decoder.step()
        seen.append(decoder.logits.clone())
    return torch.stack(seen, 1)


class Unrotated(Cache):
    """The oracle: keys turned back to position 0 and kept, sinks and window picked, all rotated to their places."""

    class Layer(DynamicLayer):
        def __init__(self, inv_freq: torch.Tensor, sinks: int, window: int) -> None:
            super().__init__()
            self.inv_freq, self.sinks, self.window, self.count = inv_freq, sinks, window, 0
            self.raw: list[tuple[torch.Tensor, torch.Tensor]] = []

        def turn(self, keys: torch.Tensor, position: int) -> torch.Tensor:
            angle = (position * self.inv_freq.double()).repeat(2)
            rotary = angle.numel()
            part, rest = keys[..., :rotary].double(), keys[..., rotary:]
            half = torch.cat((-part[..., rotary // 2 :], part[..., : rotary // 2]), -1)
            return torch.cat(((part * angle.cos() + half * angle.sin()).to(keys.dtype), rest), -1)

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            assert key_states.shape[2] == 1
            self.is_initialized = True
            self.raw.append((self.turn(key_states, -self.count), value_states))
            if len(self.raw) > self.sinks + self.window:
                del self.raw[self.sinks]
            query = self.count  # the query is where the model put it; its place in the cache is the last
            shift = query - (len(self.raw) - 1)
            self.count += 1
            keys = [self.turn(key, place + shift) for place, (key, _) in enumerate(self.raw)]
            return torch.cat(keys, 2), torch.cat([value for _, value in self.raw], 2)

        def get_seq_length(self) -> int:
            return self.count

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            size = min(self.count + 1, self.sinks + self.window)
            return size, self.count + 1 - size

    def __init__(self, model: Any, sinks: int, window: int) -> None:
        inv_freq = model.base_model.rotary_emb.inv_freq
        super().__init__(layers=[self.Layer(inv_freq, sinks, window) for _ in range(model.config.num_hidden_layers)])


@KINDS
@pytest.mark.parametrize("fused", [False, True])
def test_dense_while_nothing_is_evicted(make_model: MakeModel, kind: str, fused: bool) -> None:
    model, ids = make_model(kind), text(24)
    expected = model(ids).logits
    if fused:
        nybble.fuse(model)
    close(steps(model, ids, StreamingCache(model, sinks=4, window=20)), expected)
    close(steps(model, ids, StreamingCache(model, sinks=4, window=20), prompt=9), expected[:, 8:])
    close(graph_steps(model, ids, StreamingCache(model, sinks=4, window=20), 9), expected[:, 8:])
    close(graph_steps(model, ids, StreamingCache(model, sinks=4, window=20), 1), expected)  # sinks not there at first


@KINDS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (0, 16), (1, 1), (2, 7)])
def test_sinks_and_window_after_eviction(
    make_model: MakeModel, make_packed: MakeModel, kind: str, attention: str, sinks: int, window: int
) -> None:
    make = make_packed if kind == "gpt_neox" else make_model  # whose joint projection is fused in 4 bits only
    model, ids = make(kind, attn_implementation=attention), text(60)
    expected = steps(model, ids, Unrotated(model, sinks, window))
    assert (expected - model(ids).logits)[:, -1].abs().max() > 1e-2  # what was evicted matters
    close(steps(model, ids, StreamingCache(model, sinks=sinks, window=window)), expected)
    got = graph_steps(model, ids, StreamingCache(model, sinks=sinks, window=window), 1)
    close(got, expected)
    report = nybble.fuse(model)
    got = graph_steps(model, ids, StreamingCache(model, sinks=sinks, window=window), 1)
    close(got, expected)
    count = len(ids[0]) - max(1, sinks)  # from where the sinks are there
    assert report.calls()["decode_attention"] == count * model.config.num_hidden_layers


@KINDS
def test_one_layer_is_a_fresh_text_of_sinks_and_window(make_model: MakeModel, kind: str) -> None:
    """With one layer keys depend on nothing but their own token, so the kept tokens alone give the same."""
    model, ids, sinks, window = make_model(kind, num_hidden_layers=1), text(40), 3, 9
    got = steps(model, ids, StreamingCache(model, sinks=sinks, window=window))
    for end in (13, 20, 33, 40):
        kept = torch.cat((ids[:, :sinks], ids[:, end - window : end]), 1)
        close(got[:, end - 1], model(kept).logits[:, -1])


def test_a_prompt_in_pieces(make_model: MakeModel) -> None:
    """Within a piece nothing is evicted; with one layer the oracle is the text of what is kept and the piece."""
    model, ids = make_model("llama", num_hidden_layers=1), text(50)
    cache = StreamingCache(model, sinks=3, window=9)
    model(ids[:, :30], past_key_values=cache, use_cache=True)
    got = model(ids[:, 30:41], past_key_values=cache, use_cache=True).logits
    kept = torch.cat((ids[:, :3], ids[:, 21:30], ids[:, 30:41]), 1)
    close(got, model(kept).logits[:, 12:])
    after = model(ids[:, 41:42], past_key_values=cache, use_cache=True).logits
    close(after, model(torch.cat((ids[:, :3], ids[:, 33:42]), 1)).logits[:, -1:])


@pytest.mark.parametrize("fused", [False, True])
def test_2000_tokens_in_constant_memory(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr(ring, "REBASE_AT", 100)
    model, ids, sinks, window = make_model("llama"), text(2000), 4, 28
    expected = steps(model, ids, Unrotated(model, sinks, window))[:, -100:]
    if fused:
        nybble.fuse(model)
    cache = StreamingCache(model, sinks=sinks, window=window)
    decoder = Decoder(model, cache, capacity=2000, sampling=Sampling())
    decoder.prefill(ids[:, :10])
    size, places = cache.nbytes, [layer.keys.data_ptr() for layer in cache.layers]
    best = []
    for i in range(10, 2000):
        decoder.feed(ids[:, i])
        decoder.step()
        if i >= 1900:
            best.append(decoder.best[int(decoder.index) - 1])
        assert int(cache.ring.seen - cache.ring.base) <= 101  # positions stay small
    assert cache.nbytes == size == 2 * 2 * (sinks + window) * 2 * 16 * 4 + 2 * 2 * 2 * sinks * 16 * 4
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    close(torch.stack(best, 1), expected.max(-1).values, 2e-4)
    assert cache.tokens == 2000


def test_half_precision_does_not_drift(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turning stored keys every step would: here the error after 1500 tokens is that after 100."""
    monkeypatch.setattr(ring, "REBASE_AT", 100)
    model, ids = make_model("llama"), text(1500)
    exact = graph_steps(model, ids, StreamingCache(model, sinks=4, window=28), 1)
    model.bfloat16()
    error = (graph_steps(model, ids, StreamingCache(model, sinks=4, window=28), 1).float() - exact).abs().mean((0, 2))
    early, late = float(error[50:150].mean()), float(error[-100:].mean())
    assert 0 < late < 1.3 * early


@KINDS
def test_generate_of_transformers(make_model: MakeModel, ids: torch.Tensor, kind: str) -> None:
    model = make_model(kind)
    how: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    cache = StreamingCache(model, sinks=2, window=14)
    got = model.generate(ids[:1], past_key_values=cache, **how)[0, ids.shape[1] :]  # type: ignore[operator]
    mine = list(nybble.generate(model, ids[:1], max_new_tokens=40, sinks=2, window=14))
    assert got.tolist() == mine and cache.tokens == ids.shape[1] + 39
    nybble.fuse(model)
    cache = StreamingCache(model, sinks=2, window=14)
    assert torch.equal(model.generate(ids[:1], past_key_values=cache, **how)[0, ids.shape[1] :], got)  # type: ignore[operator]


def test_a_batch_and_beams(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for more in ({}, {"num_beams": 3}):
        expected = model.generate(ids, **how, **more)  # type: ignore[operator]
        cache = StreamingCache(model, sinks=4, window=28)
        assert torch.equal(model.generate(ids, past_key_values=cache, **how, **more), expected)  # type: ignore[operator]


def test_more_tokens_than_the_model_has_positions(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    stream = nybble.generate(model, ids[:1], max_new_tokens=100, window=24)
    assert len(list(stream)) == 100 and stream.how == "static"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"sinks": -1}, ValueError, "sinks: expected at least 0, got -1"),
        ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
        ({"window": 2.0}, TypeError, "window: expected an int, got float"),
        ({"window": 61}, ValueError, "window: expected at most 64 with the sinks, the positions of the model, got 65"),
    ],
)
def test_wrong_arguments(make_model: MakeModel, arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"StreamingCache: {words}"):
        StreamingCache(make_model("llama"), **{"sinks": 4, "window": 8, **arguments})


def test_models_whose_positions_cant_shift(make_model: MakeModel) -> None:
    with pytest.raises(UnsupportedError, match="GPT2Model has no rotary embedding"):
        StreamingCache(make_model("gpt2"), window=8)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedError, match=r"its rotary embedding \(dynamic\) changes with the length"):
        StreamingCache(make_model("llama", rope_parameters=rope), window=8)
    sliding = make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(UnsupportedError, match="sliding windows of their own"):
        StreamingCache(sliding, window=8)


def test_a_token_cant_be_taken_back(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    cache = StreamingCache(model, window=8)
    model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(UnsupportedError, match="none can be taken back"):
        cache.crop(-1)
