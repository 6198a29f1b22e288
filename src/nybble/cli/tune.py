"""``nybble tune``: measure which kernel is the fastest on this GPU, and keep the choices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nybble.cli.console import EXIT_FAILED, device_of, dtype_of, fail, print_json, stderr, stdout

if TYPE_CHECKING:
    from nybble.bench.tune import Result
    from nybble.ops.w4a16.cases import W4A16Case


MODEL = typer.Option(None, "--model", help="A folder: all shapes of its quantised layers.")


def tune(
    n: int | None = typer.Option(None, "--n", min=8, help="Output features; with --k, instead of --model."),
    k: int | None = typer.Option(None, "--k", min=8, help="Input features."),
    model: Path | None = MODEL,
    group_size: int = typer.Option(128, "--group-size", help="16, 32, 64, 128, 256, or -1 for K."),
    bits: int = typer.Option(4, "--bits", help="Of a weight: 4 or 8."),
    asymmetric: bool = typer.Option(False, "--asymmetric", help="With zero points."),
    act_order: bool = typer.Option(False, "--act-order", help="With a permutation of the input features."),
    max_m: int = typer.Option(4096, "--max-m", min=1, help="Powers of two from 1 to here are measured."),
    dtype: str = typer.Option("float16", "--dtype", help="Of the activations: float16 or bfloat16."),
    again: bool = typer.Option(False, "--again", help="Measure what is in the file already, too."),
    forget: bool = typer.Option(False, "--forget", help="Delete this GPU's file, and measure nothing."),
    device: str = typer.Option("auto", help="cuda, cuda:1; auto takes a GPU if there is one."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else."),
) -> None:
    """Measure which kernel is the fastest for each number of rows on this GPU, and keep that for `auto`.

    Every kernel, in several tiles, is checked against float64 and timed. Each choice is saved as soon as it is known,
    so an interrupted run goes on where it was. The file is of this GPU and of these kernels: a new version of Nybble
    ignores it, with a warning, until it is tuned again.
    """
    from nybble.bench.tune import ROWS, crossovers
    from nybble.bench.tune import tune as measure
    from nybble.runtime import settings, tuned
    from nybble.runtime.hardware import current

    where = device_of(device)
    card = current(where.index) if where.type == "cuda" else None
    if card is None:
        raise fail("no CUDA device here: tuning measures on the GPU that it is for", "nybble tune", EXIT_FAILED)
    if forget:
        there = tuned.forget(card)
        stderr().print(f"{tuned.path(card)}: {'deleted' if there else 'there was none'}", markup=False, soft_wrap=True)
        return
    if not settings.USE_CACHE:
        raise fail("NYBBLE_NO_CACHE is set, so no choice could be kept", "nybble tune", EXIT_FAILED)
    if (model is None) == (n is None or k is None):
        raise typer.BadParameter("name a shape by both --n and --k, or a folder by --model", param_hint="--model")
    kind = dtype_of(dtype)
    shapes = _of_model(model) if model is not None else [_of_shape(n, k, group_size, bits, asymmetric, act_order)]
    rows = [m for m in ROWS if m <= max_m]
    cases = [replace(case, m=m, dtype=kind, scale_dtype=case.scale_dtype or kind) for case in shapes for m in rows]
    results: list[Result] = []
    for result in _tracked(measure(cases, device=where, hardware=card, again=again), len(cases), hidden=json):
        results.append(result)
    found = [(case, [r for r in results if replace(r.case, m=0) == replace(case, m=0)]) for case in cases[:: len(rows)]]
    if json:
        print_json({
            "gpu": card.name, "file": str(tuned.path(card)),
            "shapes": [
                {**replace(case, m=0).shape(), "crossovers": crossovers(some), "rows": [_row(one) for one in some]}
                for case, some in found
            ],
        })  # fmt: skip
        return
    for case, some in found:
        _print(case, some, crossovers(some))
    stderr().print(f"saved {tuned.path(card)}", markup=False, soft_wrap=True)


def _of_shape(n: int | None, k: int | None, group_size: int, bits: int, asymmetric: bool, act_order: bool) -> W4A16Case:
    import torch

    from nybble.ops.w4a16.cases import parse

    assert n is not None and k is not None, "looked at before"
    shape = {"m": 1, "n": n, "k": k, "group_size": group_size}
    return parse(shape, torch.float16, symmetric=not asymmetric, act_order=act_order, bits=bits)


def _of_model(folder: Path) -> list[W4A16Case]:
    """The shapes of a model's quantised layers, each once. The model is loaded on the CPU, and dropped."""
    import torch

    from nybble.models.layers import W4A16Linear
    from nybble.models.load import load
    from nybble.ops.w4a16.cases import W4A16Case

    found = {}
    for layer in load(folder, device="cpu", dtype=torch.float32).modules():
        if isinstance(layer, W4A16Linear):
            w = layer.packed()
            size = -1 if w.group_size >= w.in_features else w.group_size
            case = W4A16Case(
                1, w.out_features, w.in_features, size, symmetric=w.qzeros is None, act_order=w.perm is not None,
                scale_dtype=w.scales.dtype, bits=w.bits,
            )  # fmt: skip
            found[case] = None
    if not found:
        raise fail(f"{folder}: a model without quantised layers", "nybble tune")
    return list(found)


def _tracked(results: Any, count: int, *, hidden: bool) -> Any:
    """The results as they come, with a progress bar on stderr."""
    from rich.progress import track

    console = stderr()
    disable = hidden or not console.is_terminal
    return track(results, description="tuning", total=count, console=console, transient=True, disable=disable)


def _row(result: Result) -> dict[str, Any]:
    picked = result.picked
    return {
        "m": result.case.m,
        "variant": None if picked is None else picked.variant,
        "config": None if picked is None else dict(picked.config),
        "us": None if picked is None else picked.us,
        "predicted": result.predicted.variant,
        "measured": [{"variant": t.candidate.variant, "us": t.us, "why": t.why} for t in result.tried],
    }


def _print(case: W4A16Case, results: list[Result], crossovers: list[tuple[int, str]]) -> None:
    from rich.table import Table

    from nybble.bench.run import label

    table = Table(box=None, pad_edge=False)
    for name, justify in (("M", "right"), ("fastest", "left"), ("us", "right"), ("predicted", "left"), ("us", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for one in results:
        untuned = _us(one)
        table.add_row(
            str(one.case.m),
            "none ran right" if one.picked is None else one.picked.variant,
            "" if one.picked is None else f"{one.picked.us:.2f}",
            one.predicted.variant,
            "kept" if not one.tried else "" if untuned is None else f"{untuned:.2f}",
        )
    out = stdout()
    out.print(label(replace(case, m=1)).replace("m=1 ", ""), markup=False, soft_wrap=True)
    out.print(table)
    out.print(", ".join(f"{variant} from {m} rows on" for m, variant in crossovers), "", sep="\n", markup=False)


def _us(result: Result) -> float | None:
    """How long what would have run untuned takes."""
    untuned = result.predicted
    same = (
        t.us for t in result.tried if (t.candidate.variant, t.candidate.config) == (untuned.variant, untuned.config)
    )
    return next(same, None)
