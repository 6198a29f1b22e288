"""Swap Nybble's fused operations into a Hugging Face model, say what was done, and undo it.

Only instances change: another model of the same class in the same process keeps its own forward and its own modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from nybble.models import decoder
from nybble.runtime.errors import wrong_type, wrong_value

_KNOWN = ", ".join(cls.__name__ for cls in decoder.FAMILIES)

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

        Calls inside a graph that ``torch.compile`` made are not seen; those of a CUDA graph count when it is captured.
        """
        return dict(self._counter)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, every call takes the model's original forward."""
        plans = [m.__dict__[decoder.PLAN] for m in self._model.modules() if decoder.PLAN in m.__dict__]
        for plan in plans:
            plan.paused = True
        try:
            yield
        finally:
            for plan in plans:
                plan.paused = False

    def undo(self) -> None:
        """Put the model back exactly: the original forwards, tensors of their own, no attribute left over.

        Again is harmless.
        """
        for module in self._model.modules():
            decoder.unpatch(module)

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


def fuse(model: nn.Module, *, without: Collection[str] = ()) -> Report:
    """Let a Hugging Face model run Nybble's fused operations: norms, residual additions, projections, activations.

    GPT-NeoX, Llama, Qwen2, Qwen3 and GPT-2. Each residual addition goes with the norm after it, in the same layer or
    the next (``add_rmsnorm``, ``add_layernorm``, ``add_dual_layernorm``). Query, key and value projections become one
    product, gate and up another; the layers' parameters become views of the joined ones, so that no memory is added.
    Where the projections are 4-bit, the norm before them, the activation and the residual addition after them are part
    of their launch. In a decode step from a cache of static shapes, rotation, append and attention are one launch
    (``decode_attention``). A call that the fused path can't serve (training, gradients, ``output_hidden_states``,
    ``output_attentions``, ``token_type_ids``, a hook on what is not called as a module any more, autocast) takes the
    original one.

    Args:
        model: a Hugging Face model, or a module that holds one. It is changed in place; its parameters keep their
            values.
        without: fusions to leave out, for comparison: ``"carry"`` (residual addition and norm in one kernel),
            ``"qkv"``, ``"gate_up"`` (projections as one), ``"prologue"`` (the norm inside a 4-bit product),
            ``"epilogue"`` (activation and residual inside it), ``"attention"`` (of a decode step, as one kernel).

    Returns:
        What was replaced, and what was refused and why. A model of an unknown kind comes back unchanged, with the
        refusal in the report; so does one that is fused already.

    Raises:
        TypeError: ``model`` is not a torch module. ValueError: ``without`` names something else.

    Numerics: sums are normalised before they are rounded; float32 logits agree with the original's to 1e-4.
    """
    if not isinstance(model, nn.Module):
        raise wrong_type("fuse", "model", "a torch.nn.Module", type(model).__name__)
    if isinstance(without, str) or not set(without) <= set(decoder.FUSIONS):
        raise wrong_value("fuse", "without", f"some of {list(decoder.FUSIONS)}", repr(without))
    earlier = next((m.__dict__[decoder.COUNTER] for m in model.modules() if decoder.COUNTER in m.__dict__), None)
    if earlier is not None:
        return Report(model, [], [("", "already fused; nothing changed")], earlier, already_fused=True)
    counter: Counter[str] = Counter()
    replaced: Entries = []
    refused: Entries = []
    for name, module in list(model.named_modules()):
        if isinstance(module, tuple(decoder.FAMILIES)):
            reason = decoder.refusal(module)
            if reason is None:
                done, kept = decoder.patch(module, counter, without)
                replaced += _under(name, done)
                refused += _under(name, kept)
            else:
                refused.append((name, reason))
    if not replaced and not refused:
        refused.append(("", f"{type(model).__name__} holds no model that fuse knows ({_KNOWN})"))
    return Report(model, replaced, refused, counter)


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
