"""How far a result is from float64, without timing anything: ``nybble bench run --check accuracy``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nybble.bench.run import as_tuple, fault, label, variants
from nybble.bench.timing import one_line
from nybble.ops.case import Case, relative_error
from nybble.runtime.hardware import Hardware


class Accuracy(NamedTuple):
    """One of Nybble's variants on one case.

    Attributes:
        case, variant: the request and who computed it.
        equal: the share of elements, by output, that are the truth rounded to the result's dtype.
        largest: the largest difference, by output. rel_err: ``|got - truth| / |truth|`` over all outputs.
        wrong: why it is not within the case's tolerance, ``""`` when it is.
    """

    case: str
    variant: str
    equal: tuple[float, ...]
    largest: tuple[float, ...]
    rel_err: float
    wrong: str


def measure(case: Case, device: torch.device, hardware: Hardware | None) -> list[Accuracy]:
    """Every variant that can run the case here."""
    found = []
    with torch.inference_mode():
        inputs = case.make(device, seed=0)
        truth = case.truth(inputs)
        for variant in variants(case, hardware)[0]:
            try:
                got = case.readable(as_tuple(case.run(inputs, variant)))
                wrong = fault(case, inputs, got, truth, own=True)
            except Exception as error:  # whatever a variant raises is its own line
                found.append(Accuracy(label(case), variant, (), (), float("nan"), one_line(error)))
                continue
            pairs = list(zip(got, truth, strict=True))
            same = tuple(float((g == t.to(g.dtype)).double().mean()) if t.numel() else 1.0 for g, t in pairs)
            apart = [(g.double() - t).abs() for g, t in pairs]
            largest = tuple(float(d.max()) if d.numel() else 0.0 for d in apart)
            found.append(Accuracy(label(case), variant, same, largest, relative_error(got, truth), wrong))
    return found


def lines(found: list[Accuracy]) -> list[str]:
    """For people: one line a variant."""
    text = []
    for one in found:
        equal = ", ".join(f"{100 * share:.3f} %" for share in one.equal)
        largest = ", ".join(f"{value:.3g}" for value in one.largest)
        state = f"WRONG: {one.wrong}" if one.wrong else "within tolerance"
        text.append(
            f"{one.case}  {one.variant}: {equal} equal, largest difference {largest}, "
            f"relative {one.rel_err:.1e}, {state}"
        )
    return text


def memory_line(case: Case) -> str:
    """The bytes of a case's result beside those of its input, where the case counts them."""
    held: dict[str, int] = getattr(case, "memory", dict)()
    if not held:
        return ""
    first = next(iter(held.values())) or 1
    return f"{label(case)}  " + ", ".join(
        f"{name} {size / 1e6:.3f} MB ({size / first:.3f})" for name, size in held.items()
    )
