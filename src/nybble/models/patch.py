"""Swap Nybble's fused operations into a Hugging Face model, say what was done, and undo it.

Only instances change: another model of the same class in the same process keeps its own forward and its own modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from nybble.models import neox, norms
from nybble.runtime.errors import wrong_type

SWAPPED = (LlamaModel, Qwen2Model, Qwen3Model, GPT2Model)
"""Base models whose norm modules are replaced one by one, the additions between them left alone."""

_KNOWN = ", ".join(cls.__name__ for cls in (GPTNeoXModel, *SWAPPED))

Entries = list[tuple[str, str]]


class Report:
    """What :func:`fuse` did to a model.

    Attributes:
        replaced: (module name, what runs there now).
        refused: (module name, why it stays as it was). The name is ``""`` for the model as a whole.
        already_fused: the model had been fused before; ``replaced`` is empty, and ``undo`` takes that fusion back.
    """

    replaced: Entries
    refused: Entries
    already_fused: bool

    def __init__(
        self,
        model: nn.Module,
        replaced: Entries,
        refused: Entries,
        counter: Counter[str],
        *,
        already_fused: bool = False,
    ) -> None:
        self.replaced, self.refused, self.already_fused = replaced, refused, already_fused
        self._model, self._counter = model, counter

    def calls(self) -> dict[str, int]:
        """How often each of Nybble's functions has run in this model since it was fused, by name.

        Calls inside a graph that ``torch.compile`` made are not seen.
        """
        return dict(self._counter)

    def undo(self) -> None:
        """Put the model back exactly: the original classes and forwards, no attribute left over. Again is harmless."""
        for module in self._model.modules():
            if neox.is_patched(module):
                del module.__dict__["forward"]
            module.__class__ = norms.ORIGINAL.get(type(module), type(module))
            module.__dict__.pop(norms.COUNTER, None)

    def __str__(self) -> str:
        parts = []
        for title, entries in (("replaced", self.replaced), ("not replaced", self.refused)):
            if entries:
                rows = _grouped(entries)
                width = max(len(name) for name, _ in rows)
                parts.append("\n".join([f"{title}:", *(f"  {name:<{width}}  {what}" for name, what in rows)]))
        parts = parts or ["nothing to replace"]
        if self._counter:
            parts.append("calls: " + ", ".join(f"{name} {n}" for name, n in sorted(self._counter.items())))
        return "\n".join(parts)

    def __repr__(self) -> str:
        return f"Report(replaced={len(self.replaced)}, refused={len(self.refused)}, calls={self.calls()})"


def fuse(model: nn.Module) -> Report:
    """Replace the norms of a Hugging Face model, and where possible the residual additions, by fused operations.

    GPT-NeoX: the residual additions are carried across the layers into ``add_dual_layernorm`` (parallel residual) or
    ``add_layernorm``. Llama, Qwen2, Qwen3 and GPT-2: the norms alone. A call that the fused path can't serve (training,
    gradients, ``output_hidden_states``, ``output_attentions``, hooks on a layer, autocast) takes the original one.

    Args:
        model: a Hugging Face model, or a module that holds one. It is changed in place; its parameters are not.

    Returns:
        What was replaced, and what was refused and why. A model of an unknown kind comes back unchanged, with the
        refusal in the report; so does one that is fused already.

    Raises:
        TypeError: ``model`` is not a torch module.

    Numerics: sums are normalised before they are rounded; float32 logits agree with the original's to 1e-4.
    """
    if not isinstance(model, nn.Module):
        raise wrong_type("fuse", "model", "a torch.nn.Module", type(model).__name__)
    earlier = next((m.__dict__[norms.COUNTER] for m in model.modules() if norms.COUNTER in m.__dict__), None)
    if earlier is not None:
        return Report(model, [], [("", "already fused; nothing changed")], earlier, already_fused=True)
    counter: Counter[str] = Counter()
    replaced: Entries = []
    refused: Entries = []
    for name, module in list(model.named_modules()):
        if isinstance(module, GPTNeoXModel):
            reason = _not_exactly(module, GPTNeoXModel) or neox.refusal(module)
            if reason is None:
                replaced += _under(name, neox.patch(module, counter))
            else:
                refused.append((name, reason))
        elif isinstance(module, SWAPPED):
            reason = _not_exactly(module, *SWAPPED)
            if reason is None:
                done, kept = _swap_norms(module, counter)
                replaced += _under(name, done)
                refused += _under(name, kept)
            else:
                refused.append((name, reason))
    if not replaced and not refused:
        refused.append(("", f"{type(model).__name__} holds no model that fuse knows ({_KNOWN})"))
    return Report(model, replaced, refused, counter)


def _not_exactly(module: nn.Module, *classes: type[nn.Module]) -> str | None:
    if type(module) in classes:
        return None
    return f"{type(module).__name__} is a subclass of a known model; its forward may differ"


def _swap_norms(model: nn.Module, counter: Counter[str]) -> tuple[Entries, Entries]:
    replaced: Entries = []
    refused: Entries = []
    for name, module in model.named_modules():
        if type(module) in norms.FUSED:
            reason = norms.refusal(module)
            if reason is None:
                replaced.append((name, norms.swap(module, counter)))
            else:
                refused.append((name, reason))
    layers = next((n for n, m in model.named_children() if isinstance(m, nn.ModuleList)), "")
    reason = f"residual additions stay separate: fused across layers for GPT-NeoX, not yet for {type(model).__name__}"
    refused.append((layers, reason))
    return replaced, refused


def _under(prefix: str, entries: Entries) -> Entries:
    return [(".".join(part for part in (prefix, name) if part), what) for name, what in entries]


def _grouped(entries: Iterable[tuple[str, str]]) -> Entries:
    """One row for all entries that differ in the layer's number alone."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, what in entries:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups.setdefault((pattern, what), []).append(name)
    rows = []
    for (pattern, what), names in groups.items():
        numbers = [part for name in names for part in name.split(".") if part.isdigit()]
        label = names[0] if len(names) == 1 else pattern.replace("*", f"{numbers[0]}..{numbers[-1]}", 1)
        rows.append((label or "the model", what))
    return rows
