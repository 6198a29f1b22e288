"""The model families that load, and how the tensor names in their files differ from the names in the model."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from nybble.runtime.errors import CheckpointError

HEAD = "lm_head"
"""What every family here calls its head."""

_MASKS = (r"(^|\.)(attn|attention)\.(bias|masked_bias)$",)  # causal masks that old files stored
_ROTARY = (r"(^|\.)rotary_emb\.inv_freq$",)


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        model_type: ``model_type`` of ``config.json``.
        class_name: the causal language model's class in transformers.
        base: the prefix of everything but the head; files of the bare base model leave it out.
        embedding: the token embedding, which a head may be tied to.
        aliases: (prefix in the model, prefix that some files have instead).
        derived: patterns of tensors that older files carry though the model computes them itself.
    """

    model_type: str
    class_name: str
    base: str
    embedding: str
    aliases: tuple[tuple[str, str], ...] = ()
    derived: tuple[str, ...] = _ROTARY

    def candidates(self, name: str) -> tuple[str, ...]:
        """The names under which a file may hold what the model calls ``name``, the likeliest first."""
        names = [name]
        names += [theirs + name.removeprefix(ours) for ours, theirs in self.aliases if name.startswith(ours)]
        if name.startswith(self.base):
            names.append(name.removeprefix(self.base))
        return tuple(names)

    def name_in_file(self, name: str, present: Container[str]) -> str | None:
        """The first candidate that is ``present``."""
        return next((candidate for candidate in self.candidates(name) if candidate in present), None)

    def is_derived(self, name_in_file: str) -> bool:
        """Whether a tensor of the file is one that the model computes itself."""
        return any(re.search(pattern, name_in_file) for pattern in self.derived)


ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a
    for a in (
        Architecture(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            "gpt_neox.",
            "gpt_neox.embed_in.weight",
            ((HEAD, "embed_out"),),
            (*_ROTARY, *_MASKS),
        ),
        Architecture("llama", "LlamaForCausalLM", "model.", "model.embed_tokens.weight"),
        Architecture("qwen2", "Qwen2ForCausalLM", "model.", "model.embed_tokens.weight"),
        Architecture("qwen3", "Qwen3ForCausalLM", "model.", "model.embed_tokens.weight"),
        Architecture("gpt2", "GPT2LMHeadModel", "transformer.", "transformer.wte.weight", derived=_MASKS),
    )
}
"""``model_type`` -> the family."""


def architecture_of(config: dict[str, object], config_file: Path) -> Architecture:
    """The family of a ``config.json``.

    Raises:
        CheckpointError: it names none, or one that does not load; the text lists those that do.
    """
    model_type = config.get("model_type")
    known = ", ".join(ARCHITECTURES)
    if not isinstance(model_type, str):
        raise CheckpointError(config_file, "model_type", f"missing; expected one of {known}")
    if model_type not in ARCHITECTURES:
        raise CheckpointError(config_file, "model_type", f"{model_type!r} is not supported; supported are {known}")
    return ARCHITECTURES[model_type]
