"""Decoding on a GPU: a CUDA graph gives what eager calls give, for true layer shapes too; streaming; what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nybble
from nybble.bench import decode as bench
from nybble.models import flatquant
from nybble.models.cache import RingCache
from nybble.models.decode import Decoder, Sampling, release_decoders
from nybble.models.streaming import StreamingCache

DEMO = Path(nybble.__file__).parent / "assets" / "demo"
PROMPT = list(range(1, 13))
SHAPES = pytest.mark.parametrize("shape", bench.SHAPES)
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
CUDA = torch.device("cuda")


@FUSED
@HALVES
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "seed": 3}], ids=["greedy", "drawn"]
)
def test_a_graph_gives_the_tokens_of_its_step(fused: bool, dtype: torch.dtype, how: dict[str, Any]) -> None:
    model = nybble.load(DEMO, device="cuda", dtype=dtype)
    if fused:
        nybble.fuse(model)
    stream = nybble.generate(model, PROMPT, max_new_tokens=100, cache="graph", **how)
    graph = list(stream)
    assert (stream.how, stream.why) == ("graph", "")
    release_decoders(model)
    assert list(nybble.generate(model, PROMPT, max_new_tokens=100, cache="static", **how)) == graph
    again = nybble.generate(model, PROMPT, max_new_tokens=100, **how)
    assert list(again) == graph and again.how == "graph"
    assert list(nybble.generate(model, PROMPT, max_new_tokens=100, **how)) == graph  # the kept graph


def logits_of(model: Any, ids: torch.Tensor, prompt: int, *, graph: bool) -> torch.Tensor:
    """``[batch, tokens, vocabulary]``, each step given its token."""
    cache = RingCache(model.config.num_hidden_layers, 128)
    decoder = Decoder(model, cache, batch=ids.shape[0], capacity=128, sampling=Sampling())
    decoder.prefill(ids[:, :prompt])
    if graph:
        decoder.capture()
    assert decoder.logits is not None
    out = [decoder.logits.clone()]
    for i in range(prompt, ids.shape[1]):
        decoder.feed(ids[:, i])
        decoder.step()
        out.append(decoder.logits.clone())
    return torch.stack(out, 1)


@SHAPES
@HALVES
@pytest.mark.parametrize("batch", [1, 8])
def test_four_layers_of_a_true_shape(shape: str, dtype: torch.dtype, batch: int) -> None:
    model = bench.random_model(shape, device=CUDA, dtype=dtype, layers=4)
    ids = torch.randint(1, 50000, (batch, 40), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        whole = model(ids).logits[:, 23:].float()
        scale = float(whole.std())
        plain = logits_of(model, ids, 24, graph=False)
        report = nybble.fuse(model)
        eager, graph = (logits_of(model, ids, 24, graph=graph) for graph in (False, True))
        fused = model(ids).logits[:, 23:].float()
    assert torch.equal(eager, graph)
    # Roundings of 16-bit activations over four layers; the deviation of the logits is their scale.
    bound = scale * (0.03 if dtype is torch.float16 else 0.2)
    for got in (plain, eager, fused):
        assert float((got.float() - whole).abs().max()) <= bound
    assert report.calls()["w4a16_linear"] > 0 and report.calls()["decode_attention"] > 0


def test_graphs_leave_each_other_s_sums_alone() -> None:
    """Products of so many rows leave sums in a workspace: each capture has its own, a call that of its stream."""
    model = bench.random_model("llama3-8b", device=CUDA, dtype=torch.float16, layers=2)
    nybble.fuse(model)
    draw = torch.Generator().manual_seed(2)
    texts = [torch.randint(1, 50000, (batch, 12), generator=draw).cuda() for batch in (96, 64, 96)]
    alone = [logits_of(model, ids, 4, graph=False) for ids in texts]
    decoders = []
    for ids in texts:
        decoder = Decoder(model, RingCache(2, 128), batch=ids.shape[0], capacity=128, sampling=Sampling())
        decoder.prefill(ids[:, :4])
        decoder.capture()
        decoders.append(decoder)
    streams = [torch.cuda.Stream() for _ in texts]
    torch.cuda.synchronize()
    for i in range(4, 12):
        for decoder, ids, stream in zip(decoders, texts, streams, strict=True):
            with torch.cuda.stream(stream):  # side by side
                decoder.feed(ids[:, i])
                decoder.step()
        eager = model(texts[0]).logits
        assert bool(eager.isfinite().all())
        torch.cuda.synchronize()
        for decoder, expected in zip(decoders, alone, strict=True):
            assert decoder.logits is not None and torch.equal(decoder.logits, expected[:, i - 3])


def test_int4_activations_in_a_graph(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    plain = bench.random_model(
        "llama3-8b", device=CUDA, dtype=torch.float16, layers=2, bits=16, vocab_size=500, **sizes
    )
    plain.save_pretrained(tmp_path / "plain")
    tensors, quantization = flatquant.convert(nybble.load(tmp_path / "plain", device="cpu"))
    flatquant.write(tmp_path / "plain", tmp_path / "int4", tensors, quantization, torch.float16)
    model = nybble.load(tmp_path / "int4", device="cuda")
    ids = torch.randint(1, 500, (4, 40), generator=torch.Generator().manual_seed(1)).cuda()
    apart = nybble.fuse(model, without=("qkv", "gate_up"))
    with torch.inference_mode():
        expected = logits_of(model, ids, 24, graph=False)
        apart.undo()
        report = nybble.fuse(model)
        eager, graph = (logits_of(model, ids, 24, graph=graph) for graph in (False, True))
    assert torch.equal(eager, expected) and torch.equal(graph, expected)
    assert report.calls()["w4a4_linear"] > 0


@pytest.mark.parametrize("without", [(name,) for name in (*bench.FUSIONS,)] + [tuple(bench.FUSIONS)], ids=str)
@SHAPES
def test_each_fusion_left_out(shape: str, without: tuple[str, ...]) -> None:
    model = bench.random_model(shape, device=CUDA, dtype=torch.float16, layers=2)
    ids = torch.randint(1, 50000, (1, 40), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        expected = logits_of(model, ids, 24, graph=False)
        nybble.fuse(model, without=without)
        got = logits_of(model, ids, 24, graph=True)
    assert float((got - expected).float().abs().max()) <= 0.03 * float(expected.float().std())


@SHAPES
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_a_step_is_five_or_six_kernels_a_layer(shape: str, batch: int) -> None:
    """Everything else of a step is there once. GPT-NeoX has both norms of a layer in a kernel of their own."""
    counts = []
    for layers in (2, 4):
        model = bench.random_model(shape, device=CUDA, dtype=torch.float16, layers=layers)
        nybble.fuse(model)
        decoder = Decoder(model, RingCache(layers, 128), batch=batch, capacity=128, sampling=Sampling())
        decoder.prefill(torch.randint(1, 50000, (batch, 40), generator=torch.Generator().manual_seed(1)).cuda())
        decoder.capture()
        decoder.step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            decoder.step()
            torch.cuda.synchronize()
        counts.append(sum(e.count for e in found.key_averages() if "_kernel" in e.key or "elementwise" in e.key))
        attention = [e for e in found.key_averages() if "decode_attention_kernel" in e.key]
        assert sum(e.count for e in attention) == layers
    few = 6 if shape == "pythia-2.8b" else 5
    assert counts[1] - counts[0] <= 2 * (few if batch == 1 else 7)  # with more rows a norm may be a kernel of its own


@FUSED
def test_streaming_in_a_graph_is_streaming_without_one(fused: bool) -> None:
    model = nybble.load(DEMO, device="cuda", dtype=torch.float16)
    if fused:
        nybble.fuse(model)
    how: dict[str, Any] = {"max_new_tokens": 400, "sinks": 4, "window": 60}
    stream = nybble.generate(model, PROMPT, **how)
    graph = list(stream)
    assert stream.how == "graph"
    release_decoders(model)
    assert list(nybble.generate(model, PROMPT, cache="static", **how)) == graph
    out = model.generate(  # type: ignore[operator]
        torch.tensor([PROMPT], device="cuda"), past_key_values=StreamingCache(model, sinks=4, window=60),
        max_new_tokens=400, do_sample=False, eos_token_id=None,
    )[0, len(PROMPT) :]  # fmt: skip
    assert sum(a == b for a, b in zip(out.tolist(), graph, strict=True)) >= 40  # equal until a tie falls otherwise


def test_streaming_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.models import cache

    monkeypatch.setattr(cache, "REBASE_AT", 500)
    model = nybble.load(DEMO, device="cuda", dtype=torch.float16)
    nybble.fuse(model)
    decoder = Decoder(model, StreamingCache(model, sinks=4, window=124), capacity=3000, sampling=Sampling())
    decoder.prefill(torch.tensor([PROMPT], device="cuda"))
    decoder.capture()
    for _ in range(600):
        decoder.step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for _ in range(2000):
        decoder.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held and decoder.cache.tokens == len(PROMPT) + 2600
    assert bool(decoder.best[:2601].isfinite().all())


def test_joined_weights_take_no_more_memory() -> None:
    model = bench.random_model("llama3-8b", device=CUDA, dtype=torch.float16, layers=4)
    ids = torch.arange(1, 33, device="cuda")[None]
    with torch.inference_mode():
        model(ids)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        report = nybble.fuse(model)
        model(ids)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before + (2 << 20)
        report.undo()
        assert torch.cuda.memory_allocated() <= before + (2 << 20)


def test_two_streams_of_tokens_at_once() -> None:
    model = nybble.load(DEMO, device="cuda", dtype=torch.float16)
    nybble.fuse(model)
    prompts = (PROMPT, PROMPT[::-1])
    alone = [list(nybble.generate(model, prompt, max_new_tokens=50)) for prompt in prompts]
    both = [nybble.generate(model, prompt, max_new_tokens=50) for prompt in prompts]
    assert [list(one) for one in zip(*zip(*both, strict=True), strict=True)] == alone


def test_compiled_static_generation_of_a_fused_model() -> None:
    model = nybble.load(DEMO, device="cuda", dtype=torch.float16)
    ids = torch.tensor([PROMPT], device="cuda")
    how: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **how)  # type: ignore[operator]
    nybble.fuse(model)
    got = model.generate(ids, cache_implementation="static", **how)  # type: ignore[operator]
    assert got.shape == expected.shape
    assert int((got == expected).sum()) >= ids.shape[1] + 10  # equal until a tie falls otherwise


def test_the_bench_measures_every_cell() -> None:
    model = bench.random_model("llama3-8b", device=CUDA, dtype=torch.float16, layers=2)
    found = list(
        bench.measure(model, batches=(1, 8), context=64, steps=16, prompts=(128,), read_tbps=4.0, ablation=True)
    )
    assert [r.wrong for r in found] == [""] * 15
    for r in found:
        assert 0 < r.tpot_ms_p50 <= r.tpot_ms_p99 and 0 < r.of_roof < 1.2 and r.peak_bytes > r.token_bytes
