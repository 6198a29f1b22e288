"""What one of several processes holds of a tensor, and how it is cut out."""

from __future__ import annotations

from itertools import pairwise

import torch

Ranges = tuple[tuple[int, int], ...]
"""Pieces of a dimension, each from its first element to behind its last, that are put behind each other."""

Cut = Ranges | torch.Tensor | None
"""Of one dimension: pieces, or int64 indices of its elements in their new order, or ``None`` for all of it."""


def cut(tensor: torch.Tensor, dim: int, what: Cut) -> torch.Tensor:
    """The tensor with one dimension cut; contiguous, and not a view of what it was cut from."""
    if what is None:
        return tensor
    if isinstance(what, torch.Tensor):
        return tensor.index_select(dim, what.to(tensor.device))
    return torch.cat([tensor.narrow(dim, begin, end - begin) for begin, end in what], dim)


def length(what: Cut, whole: int) -> int:
    """Elements that are left of ``whole``."""
    if what is None:
        return whole
    return what.numel() if isinstance(what, torch.Tensor) else sum(end - begin for begin, end in what)


def indices(what: Ranges) -> torch.Tensor:
    """int64: the elements of pieces, one by one."""
    return torch.cat([torch.arange(begin, end) for begin, end in what])


def divided(what: Ranges, by: int) -> Ranges | None:
    """The pieces of a dimension of words that hold ``by`` elements each; ``None`` where a word would be cut."""
    if any(bound % by for piece in what for bound in piece):
        return None
    return tuple((begin // by, end // by) for begin, end in what)


def shares(whole: int, parts: int) -> list[tuple[int, int]]:
    """Equal consecutive pieces of a dimension that ``parts`` divides."""
    return list(pairwise(range(0, whole + 1, whole // parts)))
