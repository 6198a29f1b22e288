"""Text out of a model, token by token and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from nybble.models.cache import RingCache
from nybble.models.decode import (
    Decoder,
    Results,
    Sampling,
    decoder_for,
    device_of,
    keep,
    now,
    slots_for,
    why_not_static,
    without_attention_plans,
)
from nybble.models.ranks import ranks_of
from nybble.models.streaming import StreamingCache
from nybble.runtime.errors import UnsupportedError, wrong_type, wrong_value

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
    """The new tokens of :func:`generate`, each as soon as it is known.

    Attributes:
        timing: what they took so far. Only the time spent here counts, not what the caller does between two tokens;
            with a graph the device works on the next token meanwhile.
        stopped_by: ``"eos"``, ``"length"`` or ``"closed"`` once the tokens have ended, ``""`` before.
        how: ``"graph"``, ``"static"`` or ``"dynamic"``: how tokens are decoded. why: what ruled a graph out.
    """

    def __init__(
        self, prompt: Tensor, max_new_tokens: int, source: _Dynamic | _Static, eos: frozenset[int], how: str, why: str
    ) -> None:
        self.timing = Timing(prompt_tokens=prompt.shape[1])
        self.stopped_by, self.how, self.why = "", how, why
        self._source: _Dynamic | _Static | None = source
        self._device, self._eos = prompt.device, eos
        self._left, self._first = max_new_tokens, True

    def __next__(self) -> int:
        if self.stopped_by:
            raise StopIteration
        if self._left == 0:
            self._stop("length")
            raise StopIteration
        assert self._source is not None
        timing = self.timing
        started = now(self._device) if self._first else time.perf_counter()
        token, best = self._source.next(more=self._left > 1)
        seconds = time.perf_counter() - started
        if not math.isfinite(best):
            raise FloatingPointError(
                f"generate: the largest logit is {best}. The activations have overflowed or the checkpoint "
                "holds bad values; if the dtype is float16, load with dtype=torch.bfloat16."
            )
        if self._first:
            timing.prompt_seconds, self._first = seconds, False
        else:
            timing.decode_tokens, timing.decode_seconds = timing.decode_tokens + 1, timing.decode_seconds + seconds
        self.how, self.why = self._source.how, self.why or self._source.why  # a graph comes with the second token
        self._left -= 1
        if token in self._eos:
            self._stop("eos")
        return token

    def close(self) -> None:
        """End the text here."""
        if not self.stopped_by:
            self._stop("closed")

    def _stop(self, reason: str) -> None:
        self.stopped_by = reason
        if isinstance(self._source, _Static):
            self._source.release()
        self._source = None


class _Dynamic:
    """A growing cache, one call of the model a token."""

    how, why = "dynamic", ""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, sampling: Sampling, draws: Tensor) -> None:
        self._model, self._sampling, self._draws, self._ranks = model, sampling, draws, ranks_of(model)
        self._cache = DynamicCache(config=model.config)
        self._next_input, self._index = prompt, 0

    def next(self, *, more: bool) -> tuple[int, float]:
        with torch.inference_mode(), without_attention_plans():
            logits = self._model(
                input_ids=self._next_input, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            token, best = self._sampling.pick(logits, self._draws[self._index])
            if self._ranks is not None:
                token = self._ranks.follow(token)
            self._index, self._next_input = self._index + 1, token[:, None]
            return int(token), float(best)  # waits for the device


class _Static:
    """A decoder: called step by step, or replayed one step ahead of what is asked for."""

    why = ""

    def __init__(self, decoder: Decoder, prompt: Tensor, draws: Tensor, *, graph: bool) -> None:
        self._decoder, self._prompt, self._draws, self._graph = decoder, prompt, draws, graph
        self._results = Results(decoder)
        self._given = 0

    @property
    def how(self) -> str:
        return "static" if self._decoder.graph is None else "graph"

    def next(self, *, more: bool) -> tuple[int, float]:
        decoder, results = self._decoder, self._results
        if self._given == 0:
            decoder.prefill(self._prompt, self._draws)
            results.fetch()
            result = results.get(0)
        else:
            if results.queued <= self._given:
                self._queue()
            if more and self._graph:
                self._queue()
            result = results.get(self._given)
        self._given += 1
        return result

    def release(self) -> None:
        """Leave the decoder to the next request; a step that was queued ahead is forgotten by its prefill."""
        keep(self._decoder)

    def _queue(self) -> None:
        decoder = self._decoder
        if self._graph and decoder.graph is None:
            try:
                decoder.capture()
            except Exception as error:  # whatever a model does that a graph can't hold
                self._graph, self.why = False, f"no graph: {type(error).__name__}: {str(error).splitlines()[0]}"
        decoder.step()
        self._results.fetch()


CACHES = ("auto", "graph", "static", "dynamic")


def generate(
    model: PreTrainedModel,
    input_ids: Ids,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos: int | Collection[int] | None = None,
    cache: str = "auto",
    sinks: int = 4,
    window: int | None = None,
) -> TokenStream:
    """Continue one prompt.

    On CUDA the steps after the prompt are replays of one CUDA graph over a key-value cache of static shapes, and tokens
    are picked on the device; the graph is kept with the model for the next request of the same length and sampling.
    Of a model that processes share, all of them call this with the same arguments and take as many tokens, which are
    those of the first.

    Args:
        model: a causal language model, in eval mode.
        input_ids: the prompt, ``[tokens]`` or ``[1, tokens]``, at least one.
        max_new_tokens: stop after as many.
        temperature: 0 takes the likeliest token every time; above 0 samples from ``softmax(logits / temperature)``.
        top_k: sample among the ``top_k`` likeliest only.
        top_p: sample among the likeliest whose probabilities reach ``top_p``.
        seed: of the sampling; the draws are made on the CPU, so one seed gives the same draws on every device.
        eos: token or tokens that end the text; the one met is returned as the last.
        cache: ``"graph"`` (CUDA only), ``"static"`` (the same without the graph), ``"dynamic"`` (grows with the text),
            or ``"auto"``: a graph on CUDA where the model allows it, else dynamic, or static with a ``window``.
        sinks, window: with a ``window``, attend to the first ``sinks`` and the ``window`` most recent tokens only: the
            text may be of any length, in constant memory (:class:`~nybble.models.streaming.StreamingCache`).

    Returns:
        An iterator over token ids with ``timing``, ``stopped_by``, ``how`` and ``why``.

    Raises:
        TypeError, ValueError: an argument; or without a window the text would pass the positions that the model has.
        UnsupportedError: the model can't decode in the way asked for.
        FloatingPointError: while iterating, when the logits are not finite.
    """
    op = "generate"
    prompt = ids_of(op, input_ids)[None].to(device_of(model))
    for name, value, low in (("max_new_tokens", max_new_tokens, 0), ("top_k", top_k, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise wrong_type(op, name, "an int", type(value).__name__)
        if value is not None and value < low:
            raise wrong_value(op, name, f"at least {low}", value)
    if not 0.0 <= temperature < math.inf:
        raise wrong_value(op, "temperature", "0 (greedy) or a positive number", temperature)
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise wrong_value(op, "top_p", "above 0 and at most 1", top_p)
    if cache not in CACHES:
        raise wrong_value(op, "cache", f"one of {list(CACHES)}", repr(cache))
    positions = getattr(model.config, "max_position_embeddings", None)
    if window is None and positions is not None and prompt.shape[1] + max_new_tokens > positions:
        raise wrong_value(
            op,
            "max_new_tokens",
            f"at most {max(0, positions - prompt.shape[1])} after a prompt of {prompt.shape[1]} tokens",
            max_new_tokens,
            f"The model has {positions} positions.",
        )
    cuda, why = prompt.device.type == "cuda", why_not_static(model)
    if cache == "graph" and not cuda:
        raise UnsupportedError(f"{op}: cache='graph' needs a CUDA device; the model is on {prompt.device}.")
    if why and cache in ("graph", "static"):
        raise UnsupportedError(f"{op}: cache={cache!r} can't be used: {why}.")
    if window is not None and cache == "dynamic":
        raise wrong_value(op, "cache", "anything but 'dynamic' with a window", repr(cache))
    if cache == "auto":
        cache = "graph" if cuda and not why else "static" if window is not None else "dynamic"
    ends = frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)
    sampling = Sampling(float(temperature), top_k, top_p) if temperature else Sampling()
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    draws = torch.rand(max(1, max_new_tokens), 1, generator=generator)
    source: _Dynamic | _Static
    if cache == "dynamic":
        source = _Dynamic(model, prompt, sampling, draws.to(prompt.device))
    else:
        capacity = slots_for(max(1, max_new_tokens), None)
        if window is None:
            slots = slots_for(prompt.shape[1] + max_new_tokens, positions)
            layers = model.config.num_hidden_layers
            key, make = (slots,), partial(RingCache, layers, slots)
        else:
            key, make = (sinks, window), partial(StreamingCache, model, sinks=sinks, window=window)
        decoder = decoder_for(model, make, key, batch=1, capacity=capacity, sampling=sampling)
        source = _Static(decoder, prompt, draws, graph=cache == "graph")
    return TokenStream(prompt, max_new_tokens, source, ends, cache, why)


def stream_text(tokenizer: Any, tokens: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """Token ids as pieces of text, none of which ends inside a character.

    Args:
        tokenizer: one of transformers with a fast backend, or a :class:`tokenizers.Tokenizer`.
        tokens: ids, such as :func:`generate` gives.
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


def ids_of(op: str, ids: Ids) -> Tensor:
    """int64 ``[tokens]``."""
    tensor: Tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise wrong_type(op, "ids", "int64 or int32", tensor.dtype)
    if not (tensor.dim() == 1 or (tensor.dim() == 2 and tensor.shape[0] == 1)):
        raise wrong_value(op, "ids", "shape [tokens] or [1, tokens]", list(tensor.shape), "One text at a time.")
    if tensor.numel() == 0:
        raise wrong_value(op, "ids", "at least one token", 0)
    return tensor.reshape(-1).long()
