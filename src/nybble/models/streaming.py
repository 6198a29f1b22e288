"""Text without end in constant memory: the first few tokens and the recent ones, as StreamingLLM keeps them.

Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2024.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nybble.models.cache import RingCache
from nybble.runtime.errors import UnsupportedError, wrong_type, wrong_value

SINKS, WINDOW = 4, 1020
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose frequencies do not depend on the length."""


class StreamingCache(RingCache):
    """A cache of ``sinks`` first and ``window`` recent tokens, for a model with rotary embeddings.

    For ``model.generate(..., past_key_values=StreamingCache(model))`` and for :func:`nybble.generate`. Until a token is
    evicted, results are those of an ordinary cache. A prompt is attended to as it is given: of one that comes in one
    piece nothing is evicted before its end, so give long ones in pieces.

    Args:
        model: GPT-NeoX, Llama, Qwen2 or Qwen3.
        sinks: first tokens that are kept for ever, 0 or more.
        window: recent tokens, the newest included, at least 1.

    Raises:
        TypeError, ValueError: an argument. UnsupportedError: the model has no rotary embedding, one that changes with
            the length, or layers with windows of their own.

    Numerics: recent keys are rotated once, sinks in float32 from their un-rotated values at every step.
    """

    def __init__(self, model: nn.Module, *, sinks: int = SINKS, window: int = WINDOW) -> None:
        op = "StreamingCache"
        for name, value, low in (("sinks", sinks, 0), ("window", window, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise wrong_type(op, name, "an int", type(value).__name__)
            if value < low:
                raise wrong_value(op, name, f"at least {low}", value)
        base: Any = getattr(model, "base_model", model)
        rotary: Any = getattr(base, "rotary_emb", None)
        config: Any = base.config
        positions = config.max_position_embeddings
        if sinks + window > positions:
            expected = f"at most {positions} with the sinks, the positions of the model"
            raise wrong_value(op, "window", expected, sinks + window)
        if rotary is None:
            raise UnsupportedError(f"{op}: {type(base).__name__} has no rotary embedding; its positions can't shift.")
        kind = getattr(rotary, "rope_type", "default")
        if kind not in STATIC_ROPE:
            raise UnsupportedError(f"{op}: its rotary embedding ({kind}) changes with the length of the text.")
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise UnsupportedError(f"{op}: layers of {type(base).__name__} have sliding windows of their own.")
        super().__init__(config.num_hidden_layers, sinks + window, sinks=sinks, inv_freq=rotary.inv_freq)
        self.sinks, self.window = sinks, window
