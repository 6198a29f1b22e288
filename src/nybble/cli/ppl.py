"""``nybble ppl``: the perplexity of a text, fused and unfused side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nybble.cli.console import fail, print_json, stderr, stdout
from nybble.cli.model import DEVICE, DTYPE, JSON, MODEL, NAMED, assets, described, load_model

if TYPE_CHECKING:
    from nybble.models.generate import Perplexity

TEXT = typer.Option(None, help="A UTF-8 text file; the demo's held-out text when left out.")
WARM_UP = 64
"""Tokens scored before each measurement, so that neither pays for first-use set-up."""


def ppl(
    model: Path = MODEL,
    named: Path | None = NAMED,
    text: Path = TEXT,
    window: int = typer.Option(None, min=1, help="Tokens seen at once; default what the model has positions for."),
    stride: int = typer.Option(None, min=1, help="How far the window moves; default half of it."),
    tokens: int = typer.Option(None, min=2, help="Only the first TOKENS of the text."),
    device: str = DEVICE,
    dtype: str = DTYPE,
    json: bool = JSON,
) -> None:
    """How well a model predicts a text, as transformers runs it and with the fused operations."""
    folder, file = model or named or assets(), text or assets() / "heldout.txt"
    words = _read(file)
    loaded, tokenizer = load_model(folder, device, dtype, hidden=json)
    ids = tokenizer(words, verbose=False)["input_ids"][:tokens]
    from nybble.models.generate import perplexity
    from nybble.models.patch import fuse

    perplexity(loaded, ids[:WARM_UP])
    unfused = _score(loaded, ids, window, stride, "unfused", hidden=json)
    report = fuse(loaded)
    perplexity(loaded, ids[:WARM_UP])
    before = report.calls()
    fused = _score(loaded, ids, window, stride, "fused", hidden=json)
    calls = {name: count - before.get(name, 0) for name, count in report.calls().items()}
    delta = fused.ppl - unfused.ppl
    if json:
        print_json(
            {
                "model": str(folder),
                "text": str(file),
                **described(loaded),
                "tokens": unfused.tokens,
                "unfused": _facts(unfused),
                "fused": _facts(fused),
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
    for name in ("perplexity", "nats a token", "tokens/s", "fused calls"):
        table.add_column(name, justify="right")
    table.add_row("unfused", *_cells(unfused), "0")
    table.add_row("fused", *_cells(fused), str(sum(calls.values())))
    out = stdout()
    out.print(table)
    out.print(f"delta {delta:+.2e}, relative {delta / unfused.ppl:+.1e}")
    if not report.replaced:
        reasons = "; ".join(f"{name or 'model'}: {why}" for name, why in report.refused)
        out.print(f"nothing was fused: {reasons}", markup=False, soft_wrap=True)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise fail(f"{file}: not UTF-8 text") from None
    except IsADirectoryError:
        raise fail(f"{file}: a folder, not a text file") from None


def _score(
    loaded: Any, ids: list[int], window: int | None, stride: int | None, name: str, *, hidden: bool
) -> Perplexity:
    from rich.progress import Progress

    from nybble.models.generate import perplexity

    console = stderr()
    with Progress(console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        return perplexity(
            loaded,
            ids,
            window=window,
            stride=stride,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _facts(measured: Perplexity) -> dict[str, float]:
    return {
        "ppl": measured.ppl,
        "nll_per_token": measured.nll / measured.tokens,
        "tokens_per_s": measured.tokens / measured.seconds,
        "seconds": measured.seconds,
    }


def _cells(measured: Perplexity) -> tuple[str, str, str]:
    facts = _facts(measured)
    return f"{facts['ppl']:.5f}", f"{facts['nll_per_token']:.5f}", f"{facts['tokens_per_s']:.0f}"
