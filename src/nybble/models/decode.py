"""Decoding one token after the other without the host: a cache of static shapes, and on CUDA one graph a step.

A step reads its token, its position and the slots in use from tensors, runs the model, picks the next token, writes it
where the next step reads it and into a list of results. So the same step can be replayed from a CUDA graph; the host
queues replays and looks at results when somebody wants them. Without a GPU the step is called as it is.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nybble.models.cache import RingCache
from nybble.models.decoder import PLAN
from nybble.models.ranks import ranks_of
from nybble.runtime.errors import wrong_value

SLOTS = 128
"""Lengths of caches are multiples of this, so that similar requests share a graph."""

KEPT = 2
"""Decoders kept for each model, with their caches and graphs."""

PIECE = 2048
"""Tokens of a prompt in one pass, where the cache evicts."""


class Sampling(NamedTuple):
    """How the next token is picked, by tensor operations alone.

    Attributes:
        temperature: 0 for the likeliest. top_k, top_p: ``None`` for all tokens.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def pick(self, logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens.

        Args:
            logits: ``[batch, vocabulary]``.
            draws: float32 ``[batch]``, uniform in [0, 1).

        Returns:
            int64 ``[batch]`` tokens, and float32 ``[batch]`` the largest logits, which are finite or show what is not.
        """
        best, token = _largest(logits)
        if not self.temperature:
            return token, best.float()
        logits = logits.float() / self.temperature
        order = None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, order = logits.topk(self.top_k, -1)
        elif self.top_p is not None and self.top_p < 1.0:
            logits, order = logits.sort(-1, descending=True)
        chances = logits.softmax(-1)
        upto = chances.cumsum(-1)
        if order is not None and self.top_p is not None and self.top_p < 1.0:
            chances = chances.masked_fill(upto - chances >= self.top_p, 0.0)
            upto = chances.cumsum(-1)
        # the first whose sum passes the draw, so never one whose chance is 0
        place = torch.searchsorted(upto, draws[:, None] * upto[:, -1:], right=True).clamp_(max=upto.shape[-1] - 1)
        return (place if order is None else order.gather(-1, place))[:, 0], best.float()


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row and where it is, the first of several.

    In parts: PyTorch gives a row to one block, 30 us for the 128256 of Llama-3.
    """
    parts = math.gcd(logits.shape[-1], 256)
    best, within = logits.unflatten(-1, (parts, -1)).max(-1)
    best, part = best.max(-1)
    return best, part * (logits.shape[-1] // parts) + within.gather(-1, part[:, None])[:, 0]


class Decoder:
    """A model, a cache and a step.

    Args:
        model: a causal language model in eval mode.
        cache: of static shapes, on the model's device from the first pass on.
        batch: texts at once, all of one length.
        capacity: the most tokens that one run makes.
        sampling: how tokens are picked.

    Attributes:
        tokens, best: int64 and float32 ``[capacity, batch]``: what was picked, and the largest logit each time.
        logits: ``[batch, vocabulary]`` of the last pass.
        graph: the captured step, ``None`` where steps are called.
        key: what :func:`keep` keeps it under.
        ranks: the processes that share the model, if any do.
    """

    def __init__(
        self, model: PreTrainedModel, cache: RingCache, *, batch: int = 1, capacity: int, sampling: Sampling
    ) -> None:
        self._model = weakref.ref(model)  # a decoder is kept for its model, and must not keep it alive
        self.cache, self.batch, self.capacity, self.sampling = cache, batch, capacity, sampling
        device = device_of(model)
        self.device = device
        with torch.inference_mode():
            self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self.index = torch.zeros(1, dtype=torch.int64, device=device)
            self.tokens = torch.zeros(capacity, batch, dtype=torch.int64, device=device)
            self.best = torch.zeros(capacity, batch, dtype=torch.float32, device=device)
            self.draws = torch.zeros(capacity, batch, dtype=torch.float32, device=device)
            self._zero = torch.zeros((), dtype=model.dtype, device=device)
            self._least = torch.full_like(self._zero, torch.finfo(model.dtype).min)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.key: tuple[Any, ...] = ()
        self.ranks = ranks_of(model)

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "a decoder outlived its model"
        return model

    def prefill(self, ids: Tensor, draws: Tensor | None = None) -> None:
        """The pass over the prompt; picks the first token. Everything before is forgotten.

        Args:
            ids: int64 ``[batch, tokens]``.
            draws: float32 ``[capacity or fewer, batch]``, for sampling.
        """
        piece = PIECE if self.cache.ring.inv_freq is not None else ids.shape[1]
        with torch.inference_mode(), without_attention_plans():
            self.cache.reset()
            if draws is not None:
                self.draws[: draws.shape[0]].copy_(draws)
            self.index.zero_()
            *before, last = ids.split(piece, 1)
            for part in before:
                self._logits(input_ids=part, past_key_values=self.cache)
            logits = self._logits(input_ids=last, past_key_values=self.cache)
            self.cache.settle()
            self._pick(logits)

    def step(self) -> None:
        """One more token."""
        with torch.inference_mode():
            if not self.cache.can_step():  # a text shorter than the sinks
                with without_attention_plans():
                    self._pick(self._logits(input_ids=self.token, past_key_values=self.cache))
                self.cache.settle()
                return
            if self.graph is not None:
                self.graph.replay()
            else:
                with without_attention_plans():
                    self._step()
            self.cache.advance()

    def feed(self, token: Tensor) -> None:
        """Let the next step read another token than the one that was picked: int64 ``[batch]``."""
        with torch.inference_mode():
            self.token.copy_(token.view(-1, 1))

    def capture(self) -> None:
        """Let the step be replayed from a CUDA graph; after :meth:`prefill`, once.

        Raises:
            RuntimeError: something in the model waits for the host.
        """
        if self.graph is not None or not self.cache.can_step():
            return
        kept = [t.clone() for t in self._state()]
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device), torch.inference_mode(), without_attention_plans():
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    for _ in range(3):  # compiles kernels, fills caches of plans; the same slot is written again
                        self._step()
                        self._restore(kept)
                torch.cuda.current_stream().wait_stream(side)
                torch.cuda.synchronize(self.device)
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    self._step()
            finally:
                torch.cuda.synchronize(self.device)
                self.cache.ring.stepping = False
                self._restore(kept)
        self.graph = graph

    def _state(self) -> tuple[Tensor, ...]:
        ring, logits = self.cache.ring, () if self.logits is None else (self.logits,)
        return self.token, self.index, self.tokens, self.best, ring.seen, ring.base, *logits

    def _restore(self, kept: list[Tensor]) -> None:
        for tensor, value in zip(self._state(), kept, strict=True):
            tensor.copy_(value)

    def _step(self) -> None:
        """What a graph holds: tensor operations, no look at a value."""
        positions, used = self.cache.begin_step()
        # Of a mask that is added; one of booleans would be made into that in every layer.
        mask = torch.where(used, self._zero, self._least)
        logits = self._logits(
            input_ids=self.token,
            position_ids=positions.expand(self.batch, 1),
            attention_mask=mask.expand(self.batch, 1, 1, -1),
            past_key_values=self.cache,
        )
        self._pick(logits)
        self.cache.end_step()

    def _logits(self, **arguments: Any) -> Tensor:
        return self.model(**arguments, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _pick(self, logits: Tensor) -> None:
        if self.logits is None:
            self.logits = logits.clone()
        else:
            self.logits.copy_(logits)
        draws = self.draws[self.index][0] if self.sampling.temperature else self.draws[0]  # greedy looks at none
        token, best = self.sampling.pick(logits, draws)
        if self.ranks is not None:  # drawn from numbers of its own, a process may end where another goes on
            token = self.ranks.follow(token)
        self.token.copy_(token[:, None])
        self.tokens.index_copy_(0, self.index, token[None])
        self.best.index_copy_(0, self.index, best[None])
        self.index += 1


class Results:
    """The results of a decoder on the host, fetched without holding up the device."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._queued = 0
        self._events: list[torch.cuda.Event] = []
        cuda = decoder.device.type == "cuda"
        shape = (decoder.capacity, decoder.batch)
        self._tokens = torch.zeros(shape, dtype=torch.int64, pin_memory=cuda)
        self._best = torch.zeros(shape, pin_memory=cuda)

    def fetch(self) -> None:
        """Queue the copy of the result that was queued last."""
        i, decoder = self._queued, self._decoder
        self._tokens[i].copy_(decoder.tokens[i], non_blocking=True)
        self._best[i].copy_(decoder.best[i], non_blocking=True)
        if decoder.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(decoder.device))
            self._events.append(event)
        self._queued += 1

    @property
    def queued(self) -> int:
        return self._queued

    def get(self, i: int) -> tuple[int, float]:
        """Wait for a result: the token and the largest logit of the first text."""
        if self._events:
            self._events[i].synchronize()
        return int(self._tokens[i, 0]), float(self._best[i, 0])


_KEPT: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Decoder]] = weakref.WeakKeyDictionary()


def decoder_for(
    model: PreTrainedModel,
    cache_of: Any,
    key: tuple[Any, ...],
    *,
    batch: int,
    capacity: int,
    sampling: Sampling,
) -> Decoder:
    """A decoder kept from the same request on the model as it is now, or a new one; its user's until :func:`keep`.

    Args:
        cache_of: makes the cache.
        key: what the cache depends on.
    """
    weight: Any = model.get_input_embeddings().weight  # type: ignore[union-attr]
    plans = tuple(id(module.__dict__[PLAN]) for module in model.modules() if PLAN in module.__dict__)
    whole = (*key, batch, capacity, sampling, plans, weight.dtype, weight.device, weight.data_ptr())
    found = _KEPT.setdefault(model, {}).pop(whole, None)
    if found is None:
        found = Decoder(model, cache_of(), batch=batch, capacity=capacity, sampling=sampling)
        found.key = whole
    return found


def keep(decoder: Decoder) -> None:
    """Keep a decoder that is done for the next request like its own; the oldest of more than a few goes."""
    kept = _KEPT.setdefault(decoder.model, {})
    kept.pop(decoder.key, None)
    while len(kept) >= KEPT:
        del kept[next(iter(kept))]
    kept[decoder.key] = decoder


def release_decoders(model: nn.Module) -> int:
    """Free the caches and graphs kept for a model; returns how many there were."""
    return len(_KEPT.pop(model, {}))


def why_not_static(model: PreTrainedModel) -> str:
    """Why a model can't decode from a cache of static shapes; ``""`` when it can."""
    config: Any = model.config
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention is {config._attn_implementation}"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "layers have sliding windows"
    if getattr(model, "hf_device_map", None) and len(set(model.hf_device_map.values())) > 1:  # type: ignore[union-attr]
        return "the model is spread over devices"
    return ""


def slots_for(tokens: int, positions: int | None) -> int:
    """The length of a cache for so many tokens."""
    rounded = -(-tokens // SLOTS) * SLOTS
    if positions is not None and tokens > positions:
        raise wrong_value("cache", "tokens", f"at most {positions}, the positions of the model", tokens)
    return rounded


def device_of(model: PreTrainedModel) -> torch.device:
    """Where tokens go."""
    return model.get_input_embeddings().weight.device  # type: ignore[union-attr, return-value]


def now(device: torch.device) -> float:
    """The host's clock once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def without_attention_plans() -> Iterator[None]:
    """Without cuDNN's attention: it builds a plan for every new length of the cache, which is every token.

    On an H200 a decode step of the demo model took 53 ms with it and 2.9 ms without.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
