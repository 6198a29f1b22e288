"""``nybble ppl``: the perplexity of a text: 16-bit, unfused and fused side by side, or as an endless stream."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nybble.cli.console import fail, print_json, stderr, stdout
from nybble.cli.model import DEVICE, DTYPE, JSON, MODEL, NAMED, assets, described, load_model
from nybble.cli.processes import alone

if TYPE_CHECKING:
    from nybble.models.perplexity import Divergence, Perplexity

TEXT = typer.Option(None, help="A UTF-8 text file; the demo's held-out text when left out.")
REFERENCE = typer.Option(None, "--reference", help="Another folder to compare with: the fp16 model.")
WARM_UP = 64
"""Tokens of a pass before the measurement, so that nothing in it pays for first-use set-up."""
STREAMED = 2048
"""Tokens of a streaming comparison, where no number is given: recomputing windows takes long."""


def ppl(
    model: Path = MODEL,
    named: Path | None = NAMED,
    text: Path = TEXT,
    window: int = typer.Option(None, min=1, help="Tokens seen at once; default what the model has positions for."),
    stride: int = typer.Option(None, min=1, help="How far the window moves; default half of it."),
    tokens: int = typer.Option(None, min=2, help="Only the first TOKENS of the text."),
    reference: Path | None = REFERENCE,
    plain: bool = typer.Option(True, help="Compare with the same weights in 16-bit linear layers."),
    streaming: bool = typer.Option(False, "--streaming", help="Instead: a long text from what kinds of caches keep."),
    sinks: int = typer.Option(4, min=0, help="--streaming: first tokens that are kept."),
    device: str = DEVICE,
    dtype: str = DTYPE,
    json: bool = JSON,
) -> None:
    """How well a model predicts a text: as 16-bit layers, as transformers runs it, and with the fused operations."""
    alone("ppl")
    folder, file = model or named or assets(), text or assets() / "heldout.txt"
    words = _read(file)
    loaded, tokenizer = load_model(folder, device, dtype, hidden=json)
    ids = tokenizer(words, verbose=False)["input_ids"]
    if streaming:
        if stride is not None or reference is not None:
            raise fail("--streaming takes no --stride and no --reference")
        _streaming(loaded, ids[: tokens or STREAMED], sinks, window, folder, file, json=json)
        return
    ids = ids[:tokens]
    from nybble.models.layers import W4A16Linear
    from nybble.models.patch import fuse
    from nybble.models.perplexity import dequantised

    passes: dict[str, Any] = {}
    if reference is not None:
        passes["reference"] = load_model(reference, device, dtype, hidden=json)[0]
    if plain and any(isinstance(module, W4A16Linear) for module in loaded.modules()):
        passes["dequantised"] = dequantised(loaded)
    report = fuse(loaded)
    passes |= {"unfused": (loaded, report.paused), "fused": (loaded, nullcontext)}
    runs = {name: _pass(*(made if isinstance(made, tuple) else (made, nullcontext))) for name, made in passes.items()}
    for run in runs.values():
        _warm_up(run, loaded, ids)
    before = report.calls()
    found = _compare(runs, loaded, ids, window, stride, hidden=json)
    calls = {name: count - before.get(name, 0) for name, count in report.calls().items()}
    (unfused, _), (fused, _) = found["unfused"], found["fused"]
    delta = fused.ppl - unfused.ppl
    if json:
        print_json(
            {
                "model": str(folder),
                "text": str(file),
                **described(loaded),
                "tokens": unfused.tokens,
                **{name: _facts(*both) for name, both in found.items()},
                "delta": delta,
                "relative_delta": delta / unfused.ppl,
                "replaced": len(report.replaced),
                "refused": [list(entry) for entry in report.refused],
                "kernel_calls": calls,
            }
        )
        return
    from rich.markup import escape
    from rich.table import Table

    where = described(loaded)
    title = (
        f"{escape(folder.name)} on {escape(file.name)}: {unfused.tokens} tokens, {where['device']}, {where['dtype']}"
    )
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    table.add_column("")
    for name in ("perplexity", "nats a token", "KL a token", "same token", "tokens/s", "fused calls"):
        table.add_column(name, justify="right")
    for name, both in found.items():
        table.add_row(name, *_cells(*both), str(sum(calls.values())) if name == "fused" else "0")
    out = stdout()
    out.print(table)
    out.print(f"delta {delta:+.2e}, relative {delta / unfused.ppl:+.1e}; KL from {next(iter(found))}")
    if not report.replaced:
        reasons = "; ".join(f"{name or 'model'}: {why}" for name, why in report.refused)
        out.print(f"nothing was fused: {reasons}", markup=False, soft_wrap=True)


def _pass(model: Any, around: Any) -> Any:
    """Logits of the last tokens of a window, as :func:`nybble.models.perplexity.compare` asks for them."""

    def run(ids: Any, keep: int) -> Any:
        with around():
            return model(input_ids=ids[None], use_cache=False, logits_to_keep=keep).logits[0]

    return run


def _warm_up(run: Any, loaded: Any, ids: list[int]) -> None:
    import torch

    if len(ids) > 1:  # fewer are refused, with the reason, by the measurement
        with torch.inference_mode():
            run(torch.tensor(ids[:WARM_UP], device=loaded.device), 1)


def _streaming(
    loaded: Any, ids: list[int], sinks: int, window: int | None, folder: Path, file: Path, *, json: bool
) -> None:
    from rich.progress import Progress
    from rich.table import Table

    from nybble.models.patch import fuse
    from nybble.models.perplexity import streaming

    positions = loaded.config.max_position_embeddings
    recent = max(1, min(positions, 1024) // 4 - sinks) if window is None else window
    fuse(loaded)
    console = stderr()
    with Progress(console=console, transient=True, disable=json or not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def progress(kind: str, done: int, total: int) -> None:
            if kind not in tasks:
                tasks[kind] = bar.add_task(kind, total=total)
            bar.update(tasks[kind], completed=done)

        found = streaming(loaded, ids, sinks=sinks, window=recent, progress=progress)
    if json:
        facts = {kind: _speed(measured) for kind, measured in found.items()}
        where = {"model": str(folder), "text": str(file), **described(loaded)}
        print_json(
            {**where, "tokens": len(ids) - 1, "sinks": sinks, "window": recent, "positions": positions, "kinds": facts}
        )
        return
    where = described(loaded)
    title = f"{folder.name} on {file.name}: {len(ids) - 1} tokens, {positions} positions, {where['device']}"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    table.add_column("what is kept")
    for name in ("tokens kept", "perplexity", "nats a token", "tokens/s"):
        table.add_column(name, justify="right")
    for kind, measured in found.items():
        kept = "all" if kind == "dense" else str(sinks + recent)
        facts = _speed(measured)
        speed = f"{facts['tokens_per_s']:.0f}"
        table.add_row(kind, kept, f"{measured.ppl:.4f}", f"{facts['nll_per_token']:.5f}", speed)
    stdout().print(table)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise fail(f"{file}: not UTF-8 text") from None
    except IsADirectoryError:
        raise fail(f"{file}: a folder, not a text file") from None


def _compare(
    runs: dict[str, Any], loaded: Any, ids: list[int], window: int | None, stride: int | None, *, hidden: bool
) -> dict[str, tuple[Perplexity, Divergence]]:
    from rich.progress import Progress

    from nybble.models.perplexity import compare

    console = stderr()
    with Progress(console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task(", ".join(runs), total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return compare(runs, loaded, ids, window=window, stride=stride, progress=progress)


def _speed(measured: Perplexity) -> dict[str, float]:
    return {
        "ppl": measured.ppl,
        "nll_per_token": measured.nll / measured.tokens,
        "tokens_per_s": measured.tokens / measured.seconds,
        "seconds": measured.seconds,
    }


def _facts(measured: Perplexity, apart: Divergence) -> dict[str, float]:
    away = {"kl_per_token": apart.mean, "kl_largest": apart.largest, "same_token": apart.agree}
    return {**_speed(measured), **away}


def _cells(measured: Perplexity, apart: Divergence) -> tuple[str, ...]:
    facts = _speed(measured)
    kl, same = f"{apart.mean:.1e}", f"{100 * apart.agree:.2f} %"
    return f"{facts['ppl']:.5f}", f"{facts['nll_per_token']:.5f}", kl, same, f"{facts['tokens_per_s']:.0f}"
