"""Text out of a model, token by token and timed, and the perplexity of a text under it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nybble.runtime.errors import wrong_type, wrong_value

Ids = Tensor | Sequence[int]


@dataclass
class Timing:
    """What a generation took. The first new token comes out of the prompt's pass, the others of one pass each.

    Attributes:
        prompt_tokens, prompt_seconds: the pass over the prompt, to the first new token on the host.
        decode_tokens, decode_seconds: the new tokens after the first.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, the first one left out."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tpot_ms(self) -> float:
        """Milliseconds per output token after the first."""
        return 1e3 * self.decode_seconds / self.decode_tokens if self.decode_tokens else 0.0


class TokenStream(Iterator[int]):
    """The new tokens of :func:`generate_tokens`, each as soon as it is known.

    Attributes:
        timing: what they took so far. Only the model's time counts, not what the caller does between two tokens.
        stopped_by: ``"eos"`` or ``"length"`` once the tokens have ended, ``""`` before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Tensor,
        max_new_tokens: int,
        pick: Callable[[Tensor], int],
        eos: frozenset[int],
    ) -> None:
        self.timing = Timing(prompt_tokens=prompt.shape[1])
        self.stopped_by = ""
        self._model, self._pick, self._eos = model, pick, eos
        self._left, self._first = max_new_tokens, True
        self._cache = DynamicCache(config=model.config)
        self._next_input = prompt

    def __next__(self) -> int:
        if self.stopped_by:
            raise StopIteration
        if self._left == 0:
            self._stop("length")
            raise StopIteration
        timing = self.timing
        started = _now(self._next_input.device)
        with torch.inference_mode(), _no_attention_plans():
            logits = self._model(
                input_ids=self._next_input, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            token = self._pick(logits)  # waits for the device: the token is on the host
            seconds = time.perf_counter() - started
            self._next_input = torch.tensor([[token]], device=self._next_input.device)
        if self._first:
            timing.prompt_seconds, self._first = seconds, False
        else:
            timing.decode_tokens, timing.decode_seconds = timing.decode_tokens + 1, timing.decode_seconds + seconds
        self._left -= 1
        if token in self._eos:
            self._stop("eos")
        return token

    def _stop(self, reason: str) -> None:
        self.stopped_by = reason
        del self._cache


@contextmanager
def _no_attention_plans() -> Iterator[None]:
    """Without cuDNN's attention: it builds a plan for every new length of the cache, which is every token.

    On an H200 a decode step of the demo model took 53 ms with it and 2.9 ms without.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def generate_tokens(
    model: PreTrainedModel,
    input_ids: Ids,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos: int | Collection[int] | None = None,
) -> TokenStream:
    """Continue one prompt, with a growing key-value cache.

    Args:
        model: a causal language model, in eval mode.
        input_ids: the prompt, ``[tokens]`` or ``[1, tokens]``, at least one.
        max_new_tokens: stop after as many.
        temperature: 0 takes the likeliest token every time; above 0 samples from ``softmax(logits / temperature)``.
        top_k: sample among the ``top_k`` likeliest only.
        top_p: sample among the likeliest whose probabilities reach ``top_p``.
        seed: of the sampling; the draws are made on the CPU, so one seed gives the same draws on every device.
        eos: token or tokens that end the text; the one met is returned as the last.

    Returns:
        An iterator over token ids with ``timing`` and ``stopped_by``.

    Raises:
        TypeError, ValueError: an argument; or the text would pass the positions that the model has.
        FloatingPointError: while iterating, when the logits are not finite.
    """
    op = "generate_tokens"
    prompt = _ids(op, input_ids)[None].to(_device(model))
    for name, value, low in (("max_new_tokens", max_new_tokens, 0), ("top_k", top_k, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise wrong_type(op, name, "an int", type(value).__name__)
        if value is not None and value < low:
            raise wrong_value(op, name, f"at least {low}", value)
    if not 0.0 <= temperature < math.inf:
        raise wrong_value(op, "temperature", "0 (greedy) or a positive number", temperature)
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise wrong_value(op, "top_p", "above 0 and at most 1", top_p)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and prompt.shape[1] + max_new_tokens > positions:
        raise wrong_value(
            op,
            "max_new_tokens",
            f"at most {max(0, positions - prompt.shape[1])} after a prompt of {prompt.shape[1]} tokens",
            max_new_tokens,
            f"The model has {positions} positions.",
        )
    ends = frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)
    pick = _sampler(prompt, temperature, top_k, top_p, seed) if temperature else _greedy
    return TokenStream(model, prompt, max_new_tokens, pick, ends)


def _greedy(logits: Tensor) -> int:
    best, index = logits[0].max(-1)
    _check_finite(best)
    return int(index)


def _sampler(
    prompt: Tensor, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> Callable[[Tensor], int]:
    warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    chain = LogitsProcessorList(warpers)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def pick(logits: Tensor) -> int:
        _check_finite(logits.max())
        warped = chain(prompt, logits.float())  # type: ignore[arg-type]
        return int(torch.multinomial(warped.softmax(-1)[0].cpu(), 1, generator=generator))

    return pick


def _check_finite(best: Tensor) -> None:
    if not math.isfinite(float(best)):
        raise FloatingPointError(
            f"generate_tokens: the largest logit is {float(best)}. The activations have overflowed or the checkpoint "
            "holds bad values; if the dtype is float16, load with dtype=torch.bfloat16."
        )


def stream_text(tokenizer: Any, tokens: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """Token ids as pieces of text, none of which ends inside a character.

    Args:
        tokenizer: one of transformers with a fast backend, or a :class:`tokenizers.Tokenizer`.
        tokens: ids, such as :func:`generate_tokens` gives.
        prompt: the ids before them; some tokenizers decode the first token by what it follows.

    Yields:
        Text, as soon as it is whole. Special tokens are left out. A character cut off by the end of the tokens
        comes last, as U+FFFD.
    """
    from tokenizers.decoders import DecodeStream

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        piece = stream.step(backend, token)
        if piece is not None:
            pending.clear()
            yield piece
    # Special tokens decode to nothing, so what is left is they, or the first bytes of a character.
    rest = backend.decode(pending, skip_special_tokens=True) if pending else ""
    if rest:
        yield rest


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        nll: sum of the tokens' negative log-likelihoods, in nats.
        tokens: how many were scored: all but the first.
        seconds: time in the model.
    """

    nll: float
    tokens: int
    seconds: float

    @property
    def ppl(self) -> float:
        """``exp(nll / tokens)``."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def perplexity(
    model: PreTrainedModel,
    ids: Ids,
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of a token stream, by a window that slides over it.

    Each token but the first is scored exactly once, with at least ``window - stride`` tokens before it where the
    stream has them.

    Args:
        model: a causal language model, in eval mode.
        ids: ``[tokens]`` or ``[1, tokens]``, at least two.
        window: tokens the model sees at once; default what its positions allow, at most 2048.
        stride: how far the window moves, 1 to ``window``; default half of it.
        progress: called with (tokens scored, tokens to score) after every window.

    Returns:
        The sum of negative log-likelihoods, the number of tokens, the perplexity and the time.

    Raises:
        TypeError, ValueError: an argument.

    Numerics: log-softmax in float32, the sum in float64.
    """
    op = "perplexity"
    stream = _ids(op, ids)
    if len(stream) < 2:
        raise wrong_value(op, "ids", "at least 2 tokens", len(stream), "The first token has nothing to predict it.")
    positions = getattr(model.config, "max_position_embeddings", None) or 2048
    width = min(positions, 2048) if window is None else window
    if not 1 <= width <= positions:
        raise wrong_value(op, "window", f"1 to {positions}, the positions of the model", width)
    step = max(1, width // 2) if stride is None else stride
    if not 1 <= step <= width:
        raise wrong_value(op, "stride", f"1 to window = {width}", step)

    stream = stream.to(_device(model))
    total, done, nll = len(stream) - 1, 0, 0.0
    started = _now(stream.device)
    with torch.inference_mode():
        for begin in range(0, total, step):
            end = min(begin + width, total)  # predicts tokens begin + 1 .. end
            fresh = end - done
            logits = model(input_ids=stream[None, begin:end], use_cache=False, logits_to_keep=fresh).logits[0]
            targets = stream[done + 1 : end + 1]
            # reduced in float64: thousands of float32 terms would lose digits
            losses = functional.cross_entropy(logits.float(), targets, reduction="none")
            nll += float(losses.double().sum())
            done = end
            if progress:
                progress(done, total)
            if done == total:
                break
    return Perplexity(nll, total, time.perf_counter() - started)


def _ids(op: str, ids: Ids) -> Tensor:
    """int64 ``[tokens]``."""
    tensor: Tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise wrong_type(op, "ids", "int64 or int32", tensor.dtype)
    if not (tensor.dim() == 1 or (tensor.dim() == 2 and tensor.shape[0] == 1)):
        raise wrong_value(op, "ids", "shape [tokens] or [1, tokens]", list(tensor.shape), "One text at a time.")
    if tensor.numel() == 0:
        raise wrong_value(op, "ids", "at least one token", 0)
    return tensor.reshape(-1).long()


def _device(model: PreTrainedModel) -> torch.device:
    return model.get_input_embeddings().weight.device  # type: ignore[union-attr, return-value]


def _now(device: torch.device) -> float:
    """The host's clock once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
