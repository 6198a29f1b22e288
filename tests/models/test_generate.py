from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import nybble
from nybble.models.generate import generate, stream_text
from nybble.models.perplexity import perplexity

MakeModel = Callable[..., PreTrainedModel]
KINDS = pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen2", "qwen3", "gpt2"])


def prompt_of(ids: torch.Tensor) -> list[int]:
    return ids[0].tolist()


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The slow way: no cache, the whole text every time."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


# ------------------------------------------------------------------------------------------------------------- generate


@KINDS
@pytest.mark.parametrize("fused", [False, True])
def test_greedy_takes_the_likeliest_every_time(
    make_model: MakeModel, ids: torch.Tensor, kind: str, fused: bool
) -> None:
    model, prompt = make_model(kind), prompt_of(ids)
    expected = greedy(model, prompt, 8)
    if fused:
        nybble.fuse(model)
    for form in (prompt, torch.tensor(prompt), torch.tensor([prompt], dtype=torch.int32)):
        assert list(generate(model, form, max_new_tokens=8)) == expected


def test_timing_and_the_end_by_length(make_model: MakeModel, ids: torch.Tensor) -> None:
    stream = generate(make_model("gpt_neox"), prompt_of(ids), max_new_tokens=5)
    assert (stream.timing.prompt_tokens, stream.timing.decode_tokens, stream.stopped_by) == (11, 0, "")
    next(stream)
    assert stream.timing.prompt_seconds > 0 and stream.timing.decode_tokens == 0 == stream.timing.decode_seconds
    assert stream.timing.tpot_ms == stream.timing.decode_rate == 0.0
    rest = list(stream)
    timing = stream.timing
    assert len(rest) == timing.decode_tokens == 4 and stream.stopped_by == "length"
    assert timing.tpot_ms == pytest.approx(1e3 * timing.decode_seconds / 4)
    assert timing.decode_rate == pytest.approx(4 / timing.decode_seconds)
    assert timing.prompt_rate == pytest.approx(11 / timing.prompt_seconds)
    assert list(stream) == []


def test_the_callers_own_time_does_not_count(
    make_model: MakeModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    model = make_model("gpt_neox")
    model.register_forward_pre_hook(lambda *_: clock.__setitem__(0, clock[0] + 2.0))
    stream = generate(model, prompt_of(ids), max_new_tokens=4)
    for _ in stream:
        clock[0] += 100.0
    assert (stream.timing.prompt_seconds, stream.timing.decode_seconds) == (2.0, 6.0)


def test_a_step_runs_without_cudnns_attention_and_leaves_the_switch_as_it_was(
    make_model: MakeModel, ids: torch.Tensor
) -> None:
    """cuDNN plans anew for every length of the cache: tens of milliseconds a token."""
    model, seen = make_model("gpt_neox"), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    for wanted in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(wanted)
        try:
            for _ in generate(model, prompt_of(ids), max_new_tokens=2):
                assert torch.backends.cuda.cudnn_sdp_enabled() is wanted
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
    assert seen == [False] * 4


def test_eos_ends_the_text_and_is_given(make_model: MakeModel, ids: torch.Tensor) -> None:
    model, prompt = make_model("gpt_neox"), prompt_of(ids)
    expected = greedy(model, prompt, 8)
    end = expected[3]
    upto = expected[: expected.index(end) + 1]
    for eos in (end, [95, end], {end}):
        stream = generate(model, prompt, max_new_tokens=8, eos=eos)
        assert list(stream) == upto and stream.stopped_by == "eos"


def test_no_new_tokens(make_model: MakeModel, ids: torch.Tensor) -> None:
    stream = generate(make_model("gpt_neox"), prompt_of(ids), max_new_tokens=0)
    assert list(stream) == [] and stream.stopped_by == "length"


def test_a_seed_repeats_and_another_differs(make_model: MakeModel, ids: torch.Tensor) -> None:
    model, prompt = make_model("gpt_neox"), prompt_of(ids)

    def sample(seed: int | None, **how: float) -> list[int]:
        arguments = {"temperature": 2.0, **how}
        return list(generate(model, prompt, max_new_tokens=12, seed=seed, **arguments))  # type: ignore[arg-type]

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) == 4
    assert sample(None) != sample(None)
    assert sample(1, temperature=1e-4) == greedy(model, prompt, 12)
    assert sample(1, top_k=1) == greedy(model, prompt, 12)
    assert sample(1, top_p=1e-6) == greedy(model, prompt, 12)


def test_samples_follow_the_distribution(make_model: MakeModel, ids: torch.Tensor) -> None:
    model, prompt = make_model("gpt_neox", num_hidden_layers=1), prompt_of(ids)
    logits = model(torch.tensor([prompt])).logits[0, -1].double()
    chances = (logits / 1.5).softmax(-1)
    top = chances.topk(5)
    counts = torch.zeros_like(chances)
    draws = 200
    for seed in range(draws):
        counts[next(generate(model, prompt, max_new_tokens=1, temperature=1.5, top_k=5, seed=seed))] += 1
    assert set(counts.nonzero().flatten().tolist()) <= set(top.indices.tolist())
    expected = top.values / top.values.sum()
    spread = 4 * (expected * (1 - expected) / draws).sqrt()  # four standard deviations
    assert ((counts[top.indices] / draws - expected).abs() <= spread).all()


def test_logits_that_are_not_finite_stop_the_text(make_model: MakeModel, ids: torch.Tensor) -> None:
    for value in (math.nan, math.inf):
        model = make_model("gpt_neox")
        model.get_submodule("gpt_neox.final_layer_norm").bias[0] = value  # type: ignore[index, operator]
        for temperature in (0.0, 1.0):
            with pytest.raises(FloatingPointError, match=r"the largest logit is (nan|inf)"):
                next(generate(model, prompt_of(ids), max_new_tokens=2, temperature=temperature))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected at least 0, got -1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens: expected an int, got float"),
        (
            {"max_new_tokens": 54},
            ValueError,
            "at most 53 after a prompt of 11 tokens, got 54. The model has 64 positions",
        ),
        ({"max_new_tokens": 1, "temperature": -1.0}, ValueError, "temperature: expected 0"),
        ({"max_new_tokens": 1, "temperature": math.nan}, ValueError, "temperature: expected 0"),
        ({"max_new_tokens": 1, "top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"max_new_tokens": 1, "top_p": 0.0}, ValueError, "top_p: expected above 0"),
        ({"max_new_tokens": 1, "input_ids": []}, ValueError, "ids: expected at least one token, got 0"),
        ({"max_new_tokens": 1, "input_ids": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "One text at a time"),
        (
            {"max_new_tokens": 1, "input_ids": torch.zeros(3)},
            TypeError,
            "ids: expected int64 or int32, got torch.float32",
        ),
    ],
)
def test_wrong_arguments(
    make_model: MakeModel, ids: torch.Tensor, arguments: dict, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"generate: .*{text}"):
        generate(make_model("gpt_neox"), **{"input_ids": prompt_of(ids), **arguments})


def test_every_position_can_be_used(make_model: MakeModel, ids: torch.Tensor) -> None:
    assert len(list(generate(make_model("gpt2"), prompt_of(ids), max_new_tokens=53))) == 53


# ------------------------------------------------------------------------------------------------------------ streaming


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE that knows hardly a word, so that other characters take several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["hello world"] * 3, trainer)
    return made


def test_text_comes_in_whole_characters(tokenizer: Tokenizer) -> None:
    text = "héllo wörld: 5 € 🎉!"
    ids = tokenizer.encode(text).ids
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert 10 < len(pieces) < len(ids)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    assert list(stream_text(wrapped, ids, tokenizer.encode("hello").ids)) == pieces


def test_special_tokens_are_left_out(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<end>")
    assert "".join(stream_text(tokenizer, [*tokenizer.encode("hello").ids, end])) == "hello"
    assert list(stream_text(tokenizer, [end])) == []


def test_a_character_cut_off_at_the_end_shows(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🎉").ids[:-1]
    assert "".join(stream_text(tokenizer, ids)) == "a\ufffd"


def test_each_piece_comes_before_the_next_token_is_asked_for(tokenizer: Tokenizer) -> None:
    asked: list[int] = []

    def tokens():
        for token in tokenizer.encode("abc").ids:
            asked.append(token)
            yield token

    stream = stream_text(tokenizer, tokens())
    assert next(stream) == "a" and len(asked) == 1


# ----------------------------------------------------------------------------------------------------------- perplexity


def brute_force(model: PreTrainedModel, stream: list[int], window: int, stride: int) -> tuple[float, int]:
    """Every token on its own, by the window that first reaches it."""
    nll, scored = 0.0, 0
    for target in range(1, len(stream)):
        begin = next(b for b in range(0, len(stream), stride) if b + window >= target)
        logits = model(torch.tensor([stream[begin:target]])).logits[0, -1]
        nll -= float(logits.double().log_softmax(-1)[stream[target]])
        scored += 1
    return nll, scored


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(2, 8, 4), (9, 8, 4), (10, 8, 8), (8, 8, 3), (33, 8, 3), (40, 16, 16), (41, 16, 1), (17, 64, 32), (12, 1, 1)],
)
def test_every_token_is_scored_once(make_model: MakeModel, length: int, window: int, stride: int) -> None:
    model = make_model("gpt_neox", num_hidden_layers=1)
    stream = torch.randint(96, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    nll, scored = brute_force(model, stream, window, stride)
    seen: list[tuple[int, int]] = []
    result = perplexity(model, stream, window=window, stride=stride, progress=lambda *a: seen.append(a))
    assert result.tokens == scored == length - 1
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.ppl == pytest.approx(math.exp(nll / scored), rel=1e-5)
    assert seen[-1] == (length - 1, length - 1) and seen == sorted(set(seen))


@KINDS
def test_fused_and_unfused_perplexity_agree(make_model: MakeModel, kind: str) -> None:
    model = make_model(kind)
    stream = torch.randint(96, (150,), generator=torch.Generator().manual_seed(5))
    plain = perplexity(model, stream)
    report = nybble.fuse(model)
    fused = perplexity(model, stream)
    assert fused.tokens == plain.tokens == 149
    assert fused.ppl == pytest.approx(plain.ppl, rel=1e-5)
    assert sum(report.calls().values()) > 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ids": [1]}, "ids: expected at least 2 tokens, got 1"),
        ({"window": 65}, "window: expected 1 to 64, the positions of the model, got 65"),
        ({"window": 0}, "window: expected 1 to 64"),
        ({"window": 8, "stride": 9}, "stride: expected 1 to window = 8, got 9"),
        ({"stride": 0}, "stride: expected 1 to window = 64, got 0"),
    ],
)
def test_wrong_perplexity_arguments(make_model: MakeModel, arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"perplexity: {text}"):
        perplexity(make_model("gpt2"), **{"ids": [1, 2, 3], **arguments})
