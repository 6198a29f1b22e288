"""How well a model predicts a text: by windows, beside other versions of it, and as an endless stream."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from nybble.models.decode import Decoder, Sampling, device_of, now, why_not_static, without_attention_plans
from nybble.models.generate import Ids, ids_of
from nybble.models.streaming import StreamingCache
from nybble.runtime.errors import wrong_value


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
    stream, width, step = _windowing("perplexity", model, ids, window, stride)
    stream = stream.to(device_of(model))
    total, nll = len(stream) - 1, 0.0
    started = now(stream.device)
    with torch.inference_mode():
        for begin, done, end in _windows(total, width, step):
            logits = _logits(model, stream[begin:end], end - done)
            targets = stream[done + 1 : end + 1]
            # reduced in float64: thousands of float32 terms would lose digits
            losses = functional.cross_entropy(logits.float(), targets, reduction="none")
            nll += float(losses.double().sum())
            if progress:
                progress(end, total)
    return Perplexity(nll, total, time.perf_counter() - started)


def _windowing(
    op: str, model: PreTrainedModel, ids: Ids, window: int | None, stride: int | None
) -> tuple[Tensor, int, int]:
    """The tokens, the window and the stride, checked."""
    stream = ids_of(op, ids)
    if len(stream) < 2:
        raise wrong_value(op, "ids", "at least 2 tokens", len(stream), "The first token has nothing to predict it.")
    positions = getattr(model.config, "max_position_embeddings", None) or 2048
    width = min(positions, 2048) if window is None else window
    if not 1 <= width <= positions:
        raise wrong_value(op, "window", f"1 to {positions}, the positions of the model", width)
    step = max(1, width // 2) if stride is None else stride
    if not 1 <= step <= width:
        raise wrong_value(op, "stride", f"1 to window = {width}", step)
    return stream, width, step


def _windows(total: int, width: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(first token, tokens scored before, end): the window predicts tokens ``done + 1`` to ``end``."""
    done = 0
    for begin in range(0, total, step):
        end = min(begin + width, total)
        yield begin, done, end
        done = end
        if done == total:
            return


def _logits(model: PreTrainedModel, ids: Tensor, keep: int) -> Tensor:
    """``[keep, vocabulary]`` of the last tokens."""
    return model(input_ids=ids[None], use_cache=False, logits_to_keep=keep).logits[0]


@dataclass(frozen=True)
class Divergence:
    """How far predictions are from those of another model.

    Attributes:
        mean, largest: over the tokens, the Kullback-Leibler divergence in nats from the other's distribution to this
            one's. agree: the part of the tokens whose likeliest successor is the same.
    """

    mean: float
    largest: float
    agree: float


def compare(
    passes: Mapping[str, Callable[[Tensor, int], Tensor]],
    model: PreTrainedModel,
    ids: Ids,
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[Perplexity, Divergence]]:
    """The perplexity of one text under several models, and how far each is from the first, token by token.

    Args:
        passes: name -> a function of int64 ``[tokens]`` and a number, the logits ``[number, vocabulary]`` of the last
            so many of the tokens.
        model: whose positions set the window. The rest as :func:`perplexity`.

    Returns:
        Name -> the perplexity, and the divergence from the first of ``passes``.

    Raises:
        TypeError, ValueError: an argument.
    """
    stream, width, step = _windowing("compare", model, ids, window, stride)
    stream = stream.to(device_of(model))
    total = len(stream) - 1
    nll, seconds = dict.fromkeys(passes, 0.0), dict.fromkeys(passes, 0.0)
    away, worst, same = dict.fromkeys(passes, 0.0), dict.fromkeys(passes, 0.0), dict.fromkeys(passes, 0)
    with torch.inference_mode():
        for begin, done, end in _windows(total, width, step):
            first: Tensor | None = None
            for name, run in passes.items():
                started = now(stream.device)
                logs = run(stream[begin:end], end - done).float().log_softmax(-1)
                seconds[name] += now(stream.device) - started
                first = logs if first is None else first
                nll[name] -= float(logs.gather(-1, stream[done + 1 : end + 1, None]).double().sum())
                # a term whose reference chance is 0 counts nothing, whatever is infinite beside it
                apart = functional.kl_div(logs, first, reduction="none", log_target=True).sum(-1).double()
                away[name] += float(apart.sum())
                worst[name] = max(worst[name], float(apart.max()))
                same[name] += int((logs.argmax(-1) == first.argmax(-1)).sum())
            if progress:
                progress(end, total)
    return {
        name: (
            Perplexity(nll[name], total, seconds[name]),
            Divergence(away[name] / total, worst[name], same[name] / total),
        )
        for name in passes
    }


def streaming(
    model: PreTrainedModel,
    ids: Ids,
    *,
    sinks: int,
    window: int,
    recompute: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Perplexity]:
    """The perplexity of one long text, each token predicted from what a kind of cache keeps.

    Args:
        model: GPT-NeoX, Llama, Qwen2 or Qwen3.
        ids: ``[tokens]`` or ``[1, tokens]``.
        sinks, window: of the cache; the other kinds keep ``sinks + window`` tokens too, but for ``dense``.
        recompute: measure the last kind, which takes ``sinks + window`` times the work.
        progress: called with (kind, tokens scored, tokens to score).

    Returns:
        ``dense``: all tokens before, whatever positions that takes. ``window``: the recent ones. ``sinks + window``:
        the first few and the recent ones. ``recomputed``: the recent ones as a text of their own, computed anew for
        every token.

    Raises:
        TypeError, ValueError, UnsupportedError: an argument; or the model can't stream.
    """
    stream = ids_of("streaming", ids).to(device_of(model))
    if len(stream) < 2:
        raise wrong_value("streaming", "ids", "at least 2 tokens", len(stream))
    length = sinks + window
    kinds: dict[str, Callable[[], Iterator[Tensor]]] = {
        "dense": lambda: _dense(model, stream[:-1]),
        "window": lambda: _stepped(model, stream[:-1], StreamingCache(model, sinks=0, window=length)),
        "sinks + window": lambda: _stepped(model, stream[:-1], StreamingCache(model, sinks=sinks, window=window)),
    }
    if recompute:
        kinds["recomputed"] = lambda: _recomputed(model, stream[:-1], length)
    out = {}
    for kind, run in kinds.items():
        done, nll, started = 0, 0.0, now(stream.device)
        with torch.inference_mode(), without_attention_plans():
            for logits in run():  # [some tokens, vocabulary]
                targets = stream[done + 1 : done + 1 + len(logits)]
                nll += float(functional.cross_entropy(logits.float(), targets, reduction="none").double().sum())
                done += len(logits)
                if progress:
                    progress(kind, done, len(stream) - 1)
        out[kind] = Perplexity(nll, len(stream) - 1, time.perf_counter() - started)
    return out


PIECE, TOGETHER = 256, 16
"""Tokens of a dense text in one pass, and windows recomputed in one."""


def _dense(model: PreTrainedModel, stream: Tensor) -> Iterator[Tensor]:
    cache = DynamicCache(config=model.config)
    for part in stream.split(PIECE):
        yield model(input_ids=part[None], past_key_values=cache, use_cache=True).logits[0]


def _stepped(model: PreTrainedModel, stream: Tensor, cache: StreamingCache) -> Iterator[Tensor]:
    decoder = Decoder(model, cache, capacity=1, sampling=Sampling())
    decoder.prefill(stream[None, :1])
    for i in range(len(stream)):
        if i:
            decoder.feed(stream[i : i + 1])
            decoder.index.zero_()  # nobody reads the picks
            if stream.is_cuda and decoder.graph is None and not why_not_static(model):
                decoder.capture()
            decoder.step()
        assert decoder.logits is not None
        yield decoder.logits


def _recomputed(model: PreTrainedModel, stream: Tensor, length: int) -> Iterator[Tensor]:
    yield model(input_ids=stream[None, :length], use_cache=False).logits[0]
    windows = stream.unfold(0, length, 1)[1:] if len(stream) > length else stream[:0, None]
    for some in windows.split(TOGETHER):
        if len(some):
            yield model(input_ids=some, use_cache=False, logits_to_keep=1).logits[:, -1]


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose 4-bit layers are ordinary linear layers of the model's dtype with the same weights."""
    import copy

    from torch import nn

    from nybble.models.layers import W4A16Linear
    from nybble.ops.w4a16.reference import dequantize

    def plain(layer: W4A16Linear, dtype: torch.dtype) -> nn.Linear:
        packed = layer.packed()
        rows = dequantize(
            packed.qweight, packed.scales, packed.qzeros, packed.in_features, packed.out_features, packed.group_size
        )
        if packed.perm is not None:
            rows = torch.empty_like(rows).index_copy_(0, packed.perm.long(), rows)
        made: Any = nn.Linear(packed.in_features, packed.out_features, bias=layer.bias is not None, device="meta")
        made.weight = nn.Parameter(rows.t().to(dtype).contiguous(), requires_grad=False)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return made.eval()

    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, W4A16Linear):
            memo[id(module)] = plain(module, model.dtype)
    return copy.deepcopy(model, memo)
