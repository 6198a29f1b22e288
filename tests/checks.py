"""What every test of an operation does: poison, run, compare with the truth within the arithmetic's own tolerance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.ops.case import Case


def poison(device: torch.device | str, *byte_counts: int) -> None:
    """Leave NaNs in the memory that the allocator will hand out next for tensors of these sizes."""
    if torch.device(device).type != "cuda":
        return
    held = [torch.full((max(1, count // 4) + 64,), float("nan"), device=device) for count in byte_counts for _ in "12"]
    held += [torch.full((max(1, count // 4),), float("nan"), device=device) for count in byte_counts for _ in "12"]
    del held


def check_case(
    case: Case, device: torch.device | str = "cpu", *, variant: str = "auto", seed: int = 0, inputs: Any = None
) -> tuple[Tensor, ...]:
    """Run a case and hold every element of every output within its tolerance; returns the outputs."""
    inputs = case.make(device, seed) if inputs is None else inputs
    truth = case.truth(inputs)
    dtypes = case.result_dtypes(len(truth))
    poison(device, *(t.numel() * dtype.itemsize for t, dtype in zip(truth, dtypes, strict=True)))
    results = case.run(inputs, variant)
    for got, want in zip(results, truth, strict=True):
        assert got.is_contiguous()
        assert got.device == want.device
    within(case, inputs, results, truth)
    return results


def within(case: Case, inputs: Any, results: tuple[Tensor, ...], truth: tuple[Tensor, ...] | None = None) -> None:
    """Hold every element of every output within its tolerance."""
    truth = case.truth(inputs) if truth is None else truth
    results = case.readable(results)
    assert len(results) == len(truth)
    dtypes = case.result_dtypes(len(results))
    for got, want, bound, dtype in zip(results, truth, case.tolerance(inputs, truth), dtypes, strict=True):
        assert got.dtype == dtype
        assert got.shape == want.shape
        excess = (got.double() - want).abs() - bound
        bad = ~(excess <= 0)
        if bad.any():
            where = [int(i) for i in bad.nonzero()[0]]
            at = tuple(where)
            raise AssertionError(
                f"{case}: {int(bad.sum())} of {bad.numel()} elements off; first at {where}: "
                f"got {float(got[at])}, want {float(want[at])} within {float(bound[at]):.3g}"
            )
