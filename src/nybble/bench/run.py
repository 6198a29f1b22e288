"""One case through every provider: make the inputs, check each result against the truth, time those that are right."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nybble.bench.peers import build_calls
from nybble.bench.timing import Call, Timing, one_line, time_calls
from nybble.ops.case import Case, Tensors, relative_error
from nybble.runtime.errors import UnsupportedError
from nybble.runtime.hardware import Hardware

PEER_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Relative error a peer may have: far above its rounding, far below what a wrong zero point or scale does."""


@dataclass(frozen=True)
class Measurement:
    """What became of one provider on one case.

    Attributes:
        case: the request.
        provider, variant: who, and which of its kernels.
        picked: Nybble's own choice here.
        rel_err: ``|got - truth| / |truth|``; ``nan`` if it never ran.
        floor_us: the time below which nothing runs; ``None`` on a CPU.
        timing: ``None`` when the result was wrong or the timing failed.
        wrong: why it was not timed, ``""`` when it was.
        config: of Nybble's kernel, the constants that the choice set, its tile among them.
    """

    case: Case
    provider: str
    variant: str
    picked: bool
    rel_err: float
    floor_us: float | None
    timing: Timing | None
    wrong: str = ""
    config: tuple[tuple[str, Any], ...] = ()


def label(case: Case) -> str:
    """The case in one line: ``add_layernorm rows=1 hidden=2560 float16``."""
    numbers = " ".join(f"{name}={value}" for name, value in case.shape().items())
    more = "".join(f" {name}={value}" for name, value in options(case).items())
    return f"{case.function} {numbers} {dtype_name(case)}{more}"


def dtype_name(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def options(case: Case) -> dict[str, Any]:
    """What a case asks for beyond its shape and dtype, where it is not the default: ``{"act_order": True}``."""
    fields = getattr(type(case), "__dataclass_fields__", {})
    named = {"function", "dtype", *case.shape()}
    changed = {
        name: getattr(case, name)
        for name, field in fields.items()
        if name not in named and getattr(case, name) != field.default
    }
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in changed.items()
    }


def variants(case: Case, hardware: Hardware | None) -> tuple[list[str], str]:
    """The variants of Nybble's own to time, and the one it would pick.

    The reference is left out where a kernel can run: it is the oracle, not a contender.
    """
    choice = case.choice(hardware)
    able = list(dict.fromkeys(c.variant for c in choice.candidates if not c.refused))
    return [name for name in able if name != "reference"] or able, choice.pick.variant


def as_tuple(result: Any) -> Tensors:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def fault(case: Case, inputs: Any, got: Tensors, truth: Tensors, *, own: bool) -> str:
    """Why a result is wrong, or ``""``.

    Nybble's own must be within the case's tolerance at every element; a peer, whose arithmetic is its own business,
    within :data:`PEER_ERROR` of the truth as a whole.
    """
    shapes = [list(tensor.shape) for tensor in got], [list(tensor.shape) for tensor in truth]
    if shapes[0] != shapes[1]:
        return f"outputs of shape {shapes[0]}, expected {shapes[1]}"
    if not own:
        error, limit = relative_error(got, truth), case.peer_error or PEER_ERROR[case.dtype]
        return "" if error <= limit else f"relative error {error:.3g}, at most {limit:g} is right"
    for number, (g, t, allowed) in enumerate(zip(got, truth, case.tolerance(inputs, truth), strict=True)):
        excess = (g.double() - t.double()).abs() - allowed.double()
        bad = ~(excess <= 0)  # so that NaN is bad
        if bool(bad.any()):
            where = tuple(int(i) for i in bad.nonzero()[0])
            return f"output {number} at {where}: {float(g[where]):.6g}, expected {float(t[where]):.6g}"
    return ""


def bench_case(
    case: Case,
    *,
    device: torch.device,
    hardware: Hardware | None = None,
    peers: bool = True,
    rounds: int = 30,
    note: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Check and time every provider on one case.

    Args:
        case: the request.
        device: where to run it.
        hardware: that device, ``None`` for a CPU.
        peers: whether to run the other libraries too.
        rounds: samples a provider.
        note: gets one line for each provider that could not run.

    Returns:
        Nybble's variants first, then the peers. A wrong result is among them, untimed.
    """
    floor_us = case.floor_us(hardware) if hardware is not None else None
    with torch.inference_mode():
        inputs = case.make(device, seed=0)
        truth = case.truth(inputs)
        checked: list[Measurement | tuple[Measurement, Call]] = []
        configs = _configs(case, hardware)
        for provider, variant, picked, call in _providers(case, inputs, hardware, peers, note):
            try:
                got = case.readable(as_tuple(call.function(*call.arguments)))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                wrong = fault(case, inputs, got, truth, own=provider == "nybble")
                error = math.nan if wrong.startswith("outputs of shape") else relative_error(got, truth)
            except Exception as failure:
                wrong, error = one_line(failure), math.nan
            config = configs.get(variant, ()) if provider == "nybble" else ()
            measurement = Measurement(case, provider, variant, picked, error, floor_us, None, wrong, config)
            checked.append(measurement if wrong else (measurement, call))
            got = None
        del truth
        right = [entry for entry in checked if isinstance(entry, tuple)]
        timings = time_calls(
            [call for _, call in right],
            device=device,
            bytes_per_call=case.bytes,
            floor_us=floor_us or 0.0,
            l2_bytes=hardware.l2_bytes if hardware is not None else 0,
            rounds=rounds,
        )
    for (measurement, _), timing in zip(right, timings, strict=True):
        if isinstance(timing, Timing) and timing.how == "events":
            who = f"{measurement.provider}/{measurement.variant}"
            note(f"{who}: timed with the host's gaps in it, as no graph could capture it: {timing.why}")
    results = iter(timings)
    done = [entry if isinstance(entry, Measurement) else _timed(entry[0], next(results)) for entry in checked]
    del inputs, checked, right
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return done


def _configs(case: Case, hardware: Hardware | None) -> dict[str, tuple[tuple[str, Any], ...]]:
    """The constants of each variant's kernel: of several forms those of the fastest, which is what runs."""
    try:
        found = case.choice(hardware).candidates
    except UnsupportedError:
        return {}
    configs: dict[str, tuple[tuple[str, Any], ...]] = {}
    for candidate in sorted(found, key=lambda candidate: math.inf if candidate.us is None else candidate.us):
        configs.setdefault(candidate.variant, candidate.config)
    return configs


def _timed(measurement: Measurement, timing: Timing | str) -> Measurement:
    given = measurement.__dict__
    if isinstance(timing, str):
        return Measurement(**{**given, "wrong": f"not timed: {timing}"})
    return Measurement(**{**given, "timing": timing})


def _providers(
    case: Case, inputs: Any, hardware: Hardware | None, peers: bool, note: Callable[[str], None]
) -> Iterator[tuple[str, str, bool, Call]]:
    try:
        names, pick = variants(case, hardware)
    except UnsupportedError as error:
        note(f"nybble: {label(case)}: {error}")
        names, pick = [], ""
    for name in names:
        yield (
            "nybble",
            name,
            name == pick,
            Call(partial(case.run, variant=name), (inputs,), partial(case.bind, variant=name)),
        )
    if peers:
        for peer, call in build_calls(case, inputs, note):
            yield peer.name, peer.variant, False, call
