"""``nybble generate``: text from a model, as it comes, and how fast it came."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nybble.cli.console import device_of, print_json, stderr
from nybble.cli.model import DEVICE, DTYPE, JSON, MODEL, NAMED, assets, described, load_model
from nybble.cli.processes import join, leave

if TYPE_CHECKING:
    from collections.abc import Callable

    from nybble.models.generate import Timing, TokenStream
    from nybble.models.patch import Report

PROMPT = "def read_lines(path):"


def generate(
    model: Path = MODEL,
    named: Path | None = NAMED,
    prompt: str = typer.Option(PROMPT, help="The text to continue."),
    max_tokens: int = typer.Option(100, min=0, help="Stop after as many new tokens."),
    sample: bool = typer.Option(False, "--sample/--greedy", help="Draw tokens, or take the likeliest every time."),
    temperature: float = typer.Option(0.8, min=0.0, help="--sample: below 1 prefers likely tokens."),
    top_k: int = typer.Option(50, min=0, help="--sample: among the K likeliest; 0 for all."),
    top_p: float = typer.Option(0.95, min=0.0, max=1.0, help="--sample: among the likeliest that reach P together."),
    seed: int = typer.Option(0, help="--sample: the same seed draws the same tokens."),
    device: str = DEVICE,
    dtype: str = DTYPE,
    fuse: bool = typer.Option(True, help="Run the fused operations, or the model as transformers has it."),
    cache: str = typer.Option("auto", help="graph, static or dynamic; auto: a CUDA graph where it can be used."),
    window: int = typer.Option(None, min=1, help="Attend to the WINDOW recent tokens only: a text without end."),
    sinks: int = typer.Option(4, min=0, help="--window: and to the first SINKS."),
    stream: bool = typer.Option(True, help="Print text as it comes, or all at the end."),
    json: bool = JSON,
) -> None:
    """Continue a prompt. The text goes to stdout, the speed to stderr."""
    folder = model or named or assets()
    ranks = join(device_of(device))
    loaded, tokenizer = load_model(folder, device, dtype, hidden=json, ranks=ranks)
    from nybble.models.generate import generate as continue_prompt
    from nybble.models.generate import stream_text

    report = _fused(loaded) if fuse else None
    ids = tokenizer(prompt)["input_ids"] or [i for i in [tokenizer.bos_token_id] if i is not None]

    def begin() -> TokenStream:
        return continue_prompt(
            loaded,
            ids,
            max_new_tokens=max_tokens,
            temperature=temperature if sample else 0.0,
            top_k=top_k or None if sample else None,
            top_p=top_p if sample else None,
            seed=seed,
            eos=_ends(loaded, tokenizer),
            cache=cache,
            sinks=sinks,
            window=window,
        )

    def start() -> TokenStream:
        return begin() if ranks is None else ranks.agreed(begin)

    before = _warm_up(start, loaded, report)
    tokens = start()
    new: list[int] = []
    pieces: list[str] = []
    live = stream and not json
    if live:
        _write(prompt)
    for piece in stream_text(tokenizer, _kept(tokens, new), ids):
        pieces.append(piece)
        if live:
            _write(piece)
    text = "".join(pieces)
    if json:
        print_json(
            {
                "model": str(folder),
                **described(loaded),
                "processes": 1 if ranks is None else ranks.size,
                "fused": fuse,
                "sample": sample,
                "seed": seed if sample else None,
                "prompt": prompt,
                "text": text,
                "tokens": new,
                "stopped_by": tokens.stopped_by,
                "cache": tokens.how,
                "no_graph_because": tokens.why,
                **_speed(tokens.timing),
                **_fusion(report, before),
            }
        )
        leave(loaded)
        return
    _write("\n" if live else f"{prompt}{text}\n")
    _summary(tokens, _calls(report, before), described(loaded), 1 if ranks is None else ranks.size)
    leave(loaded)


def _warm_up(start: Callable[[], TokenStream], loaded: Any, report: Report | None) -> dict[str, int]:
    """Compile the kernels of the prompt and of a decode step and capture its graph, so that the speed shown is not that
    of the compiler.

    Returns:
        The fused calls this made, to be left out of the count.
    """
    if loaded.device.type == "cuda":
        console = stderr()
        with console.status("Compiling kernels (kept on disk)"):
            tokens = start()
            for _ in islice(tokens, 3):
                pass
            tokens.close()
    return report.calls() if report is not None else {}


def _calls(report: Report | None, before: dict[str, int]) -> dict[str, int]:
    calls = report.calls() if report is not None else {}
    return {name: count - before.get(name, 0) for name, count in calls.items() if count > before.get(name, 0)}


def _fused(loaded: Any) -> Report:
    from nybble.models.patch import fuse

    return fuse(loaded)


def _ends(loaded: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those of the generation config, or else the tokenizer's."""
    named = getattr(loaded.generation_config, "eos_token_id", None)
    named = tokenizer.eos_token_id if named is None else named
    return [] if named is None else [named] if isinstance(named, int) else list(named)


def _kept(tokens: Any, into: list[int]) -> Any:
    for token in tokens:
        into.append(token)
        yield token


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _speed(timing: Timing) -> dict[str, Any]:
    return {
        "prompt_tokens": timing.prompt_tokens,
        "prompt_seconds": timing.prompt_seconds,
        "prompt_tokens_per_s": timing.prompt_rate,
        "decode_tokens": timing.decode_tokens,
        "decode_seconds": timing.decode_seconds,
        "decode_tokens_per_s": timing.decode_rate,
        "tpot_ms": timing.tpot_ms,
    }


def _fusion(report: Report | None, before: dict[str, int]) -> dict[str, Any]:
    if report is None:
        return {"replaced": [], "refused": [], "kernel_calls": {}}
    return {
        "replaced": [list(entry) for entry in report.replaced],
        "refused": [list(entry) for entry in report.refused],
        "kernel_calls": _calls(report, before),
    }


def _summary(tokens: TokenStream, calls: dict[str, int], where: dict[str, str], processes: int) -> None:
    from rich.table import Table

    timing = tokens.timing
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("prompt", f"{timing.prompt_tokens} tokens, {timing.prompt_rate:.1f} tokens/s")
    if timing.decode_tokens:
        speed = f"{timing.decode_rate:.1f} tokens/s, {timing.tpot_ms:.2f} ms a token (TPOT)"
        table.add_row("decode", f"{timing.decode_tokens} tokens, {speed}")
    counted = ", ".join(f"{name} {count}" for name, count in sorted(calls.items()))
    table.add_row("fused calls", f"{sum(calls.values())} ({counted})" if calls else "none")
    how = "CUDA graph" if tokens.how == "graph" else f"{tokens.how} cache"
    on = [where["device"], where["dtype"], f"{how}{f' ({tokens.why})' if tokens.why else ''}"]
    table.add_row("on", ", ".join([*on, *([f"{processes} processes"] if processes > 1 else [])]))
    console = stderr()
    console.print()
    console.print(table)
