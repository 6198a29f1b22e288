"""A key-value cache of static shapes: sink tokens that stay, and a ring of the recent ones.

Slot ``j < sinks`` holds token ``j``; token ``t >= sinks`` is in slot ``sinks + (t - sinks) % window``. Until the ring
is full that is slot ``t``, so that without an eviction this is an ordinary cache of ``sinks + window`` tokens.

**Positions** (StreamingLLM: a token's position is its place in the cache). Attention sees differences of positions
only, so recent keys stay as they were rotated, and the query keeps counting; what changes are the sinks, which must
follow at the head of the window: with ``evicted`` tokens gone, sink ``j`` belongs at position ``j + evicted``. They are
kept un-rotated in float32, and rotated anew for every step. Rotating stored half-precision keys by one position a step
would add an error a step.

**Counting without end.** A position of millions has no exact angle in float32. So :meth:`RingCache.rebase` turns all
recent keys back at once, and the count starts again; a key lives shorter than that interval, so it is turned once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from nybble.runtime.errors import UnsupportedError, wrong_value

REBASE_AT = 1 << 15
"""Positions up to which angles are exact enough: float32 of 2^15 radians is off by 2e-3 at most."""


class Ring:
    """What the layers of one cache share.

    Attributes:
        sinks, window: tokens. length: both together, the slots.
        inv_freq: float32 ``[rotary / 2]`` of the model's rotary embedding; ``None`` where nothing is ever evicted.
        stepping: one token is decoded from the tensors below, and nothing is asked of the host.
        seen, base: int64 ``[1]``: the tokens so far, and how far positions lag behind them.
        slot: int64 ``[1]``: where the token of this step goes.
        sink_angles: cosines and sines, float32 ``[sinks, rotary]`` each, of the sinks at this step.
    """

    def __init__(self, sinks: int, window: int, inv_freq: Tensor | None) -> None:
        self.sinks, self.window, self.length = sinks, window, sinks + window
        self.inv_freq = inv_freq
        self.stepping = False
        self.based = 0
        self.seen = self.base = self.slot = self.slots = torch.zeros(1, dtype=torch.int64)
        self.sink_angles: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> None:
        """Make the tensors of a step, once."""
        if self.slots.numel() != self.length or self.slots.device != device:
            self.seen, self.base = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
            self.slots = torch.arange(self.length, device=device)
            self.inv_freq = None if self.inv_freq is None else self.inv_freq.to(device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 ``[positions, rotary]``."""
        assert self.inv_freq is not None
        half = positions[:, None].float() * self.inv_freq
        both = torch.cat((half, half), -1)
        return both.cos(), both.sin()


class RingLayer(CacheLayerMixin):
    """The keys and values of one layer: ``[batch, heads, slots, head_dim]``, allocated at the first update."""

    is_compileable = False
    is_sliding = False

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self.ring = ring
        self.tokens = 0
        self.sunk: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate; transformers passes the values or not, by version."""
        values = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, width = key_states.shape
        self.batch_size = batch
        self.keys = key_states.new_zeros(batch, heads, self.ring.length, width)
        self.values = values.new_zeros(*values.shape[:2], self.ring.length, values.shape[-1])
        if self.ring.inv_freq is not None:
            sunk = (batch, heads, self.ring.sinks, 2 * self.ring.inv_freq.numel())
            both = torch.zeros(2, *sunk, device=key_states.device)
            self.sunk = both[0], both[1]  # un-rotated, and the same turned by a quarter
        self.ring.to(key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens; returns all that the new tokens attend to.

        With several tokens none of them is evicted for another: all attend to the whole cache and to those before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        ring, keys, values = self.ring, self.keys, self.values
        assert keys is not None and values is not None
        if ring.stepping:
            keys.index_copy_(2, ring.slot, key_states)
            values.index_copy_(2, ring.slot, value_states)
            if ring.sink_angles is not None:
                self._turn_sinks(*ring.sink_angles)
            return keys, values
        before, count = self.tokens, key_states.shape[-2]
        after = before + count
        if ring.inv_freq is None and after > ring.length:
            remedy = "Make a longer one, or a streaming one."
            raise wrong_value("cache", "tokens", f"at most {ring.length}, the slots of this cache", after, remedy)
        held = min(before, ring.length)
        gone = max(0, after - ring.length) if count == 1 else before - held
        if ring.sinks and before >= ring.sinks and gone:
            self._turn_sinks(*ring.angles(torch.arange(ring.sinks, device=keys.device) + gone))
        if count == 1:
            self._store(key_states, value_states, before)
            self.tokens = after
            used = min(after, ring.length)
            return keys[:, :, :used], values[:, :, :used]
        every = key_states, value_states
        if held:
            every = torch.cat((keys[:, :, :held], key_states), 2), torch.cat((values[:, :, :held], value_states), 2)
        self._store(key_states, value_states, before)
        self.tokens = after
        return every

    def _store(self, key_states: Tensor, value_states: Tensor, before: int) -> None:
        """Write tokens ``before ...`` into their slots, of those that would share one the last."""
        ring, count = self.ring, key_states.shape[-2]
        assert self.keys is not None and self.values is not None
        first = max(0, min(ring.sinks, before + count) - before)  # how many of them are sinks
        if first:
            self.keys[:, :, before : before + first] = key_states[:, :, :first]
            self.values[:, :, before : before + first] = value_states[:, :, :first]
            if self.sunk is not None:
                rotary = self.sunk[0].shape[-1]
                cos, sin = ring.angles(torch.arange(before, before + first, device=key_states.device))
                keys = key_states[:, :, :first, :rotary].float()
                still = keys * cos - _quarter(keys) * sin
                self.sunk[0][:, :, before : before + first] = still
                self.sunk[1][:, :, before : before + first] = _quarter(still)
        begin = max(first, count - ring.window)
        if begin < count:
            tokens = torch.arange(before + begin, before + count, device=key_states.device)
            slots = ring.sinks + (tokens - ring.sinks) % ring.window
            self.keys.index_copy_(2, slots, key_states[:, :, begin:])
            self.values.index_copy_(2, slots, value_states[:, :, begin:])

    def _turn_sinks(self, cos: Tensor, sin: Tensor) -> None:
        """Write the sinks, rotated by these angles."""
        assert self.sunk is not None and self.keys is not None
        still, turned = self.sunk
        self.keys[:, :, : self.ring.sinks, : still.shape[-1]] = torch.addcmul(still * cos, turned, sin)

    def turn_back(self, positions: int) -> None:
        """Rotate every recent key back by so many positions."""
        ring = self.ring
        assert ring.inv_freq is not None and self.keys is not None
        rotary = 2 * ring.inv_freq.numel()
        cos, sin = ring.angles(torch.tensor([positions], device=self.keys.device))
        recent = self.keys[:, :, ring.sinks :, :rotary].float()
        self.keys[:, :, ring.sinks :, :rotary] = (recent * cos - _quarter(recent) * sin).to(self.keys.dtype)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys that an update of ``query_length`` tokens gives, position of the first)."""
        if isinstance(query_length, Tensor):  # earlier releases give the positions
            query_length = query_length.shape[0]
        length = self.ring.length
        if query_length == 1:
            size = min(self.tokens + 1, length)
            return size, self.tokens + 1 - size
        held = min(self.tokens, length)
        return held + query_length, self.tokens - held

    def get_seq_length(self, *_: Any) -> int:
        """Tokens so far, the evicted ones included."""
        return self.tokens

    def get_max_length(self) -> int:
        """Slots, or -1 where tokens are evicted, so that there is no last one."""
        return self.ring.length if self.ring.inv_freq is None else -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget every token; the tensors stay where they are."""
        self.tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: the rows of the batch change places."""
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            order = beam_idx.to(self.device)
            self.keys, self.values = self.keys[order], self.values[order]
            if self.sunk is not None:
                self.sunk = self.sunk[0][order], self.sunk[1][order]

    def crop(self, *_: Any) -> None:
        raise UnsupportedError("cache: crop: tokens of a ring are overwritten, so that none can be taken back.")


class RingCache(Cache):
    """The cache of a model: a :class:`RingLayer` for each layer.

    Args:
        layers: how many the model has.
        length: slots; without ``inv_freq`` that is how many tokens fit.
        sinks: of these, slots for the first tokens.
        inv_freq: float32, of the model's rotary embedding: tokens are evicted where it is given.
    """

    def __init__(self, layers: int, length: int, *, sinks: int = 0, inv_freq: Tensor | None = None) -> None:
        self.ring = Ring(sinks, length - sinks, None if inv_freq is None else inv_freq.detach().float().clone())
        self.rings = [RingLayer(self.ring) for _ in range(layers)]
        super().__init__(layers=list(self.rings))

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self.rings[0].tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and sinks."""
        made = [t for layer in self.rings for t in (layer.keys, layer.values, *(layer.sunk or ()))]
        return sum(t.numel() * t.element_size() for t in made if t is not None)

    def reset(self) -> None:
        """Forget every token; the tensors stay where they are, so a captured graph stays good."""
        super().reset()
        self._settle(0, 0)

    def settle(self) -> None:
        """Bring the tensors that a step reads to what the host knows."""
        self._settle(self.tokens, self.ring.based)

    def _settle(self, seen: int, based: int) -> None:
        ring = self.ring
        ring.based = based
        ring.seen.fill_(seen)
        ring.base.fill_(based)

    def can_step(self) -> bool:
        """Whether a step may run from tensors alone: the sinks are there."""
        return self.tokens >= self.ring.sinks and (self.ring.inv_freq is not None or self.tokens < self.ring.length)

    def begin_step(self) -> tuple[Tensor, Tensor]:
        """What depends on the count of tokens, by tensor operations alone.

        Returns:
            ``position_ids`` int64 ``[1, 1]`` and the slots that hold a token, bool ``[1, 1, 1, slots]``.
        """
        ring = self.ring
        seen, ring.stepping = ring.seen, True
        if ring.inv_freq is None:
            ring.slot, ring.sink_angles = seen, None
        else:
            ring.slot = ring.sinks + (seen - ring.sinks) % ring.window
            if ring.sinks:
                evicted = (seen - (ring.length - 1)).clamp(min=0)
                ring.sink_angles = ring.angles(ring.slots[: ring.sinks] + (evicted - ring.base))
        return (seen - ring.base)[None], (ring.slots <= seen).view(1, 1, 1, -1)

    def end_step(self) -> None:
        """The token of this step is in the cache."""
        self.ring.seen += 1
        self.ring.stepping = False

    def advance(self) -> None:
        """The host's side of a step that ran: one more token."""
        for layer in self.rings:
            layer.tokens += 1
        if self.ring.inv_freq is not None and self.tokens - self.ring.based >= max(REBASE_AT, 2 * self.ring.length):
            self.rebase()

    def rebase(self) -> None:
        """Let positions start again behind the sinks."""
        ring = self.ring
        evicted = max(0, self.tokens - ring.length)
        for layer in self.rings:
            layer.turn_back(evicted - ring.based)
        self._settle(self.tokens, evicted)


def _quarter(x: Tensor) -> Tensor:
    """``(-second half, first half)``: rotated by a quarter turn."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
