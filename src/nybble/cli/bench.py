"""``nybble bench``: list the cases, run them beside the peers, draw the rows, explain a choice."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nybble.cli.console import (
    EXIT_FAILED,
    device_of,
    dtype_of,
    fail,
    new_app,
    print_json,
    stderr,
    stdout,
)
from nybble.cli.processes import join, leave

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nybble.bench.accuracy import Accuracy
    from nybble.bench.run import Measurement
    from nybble.models.ranks import Ranks
    from nybble.ops.case import Case
    from nybble.runtime.choice import Choice
    from nybble.runtime.hardware import Hardware


app = new_app("Measure the operations beside their peers, and explain which kernel runs.")


class Check(StrEnum):
    """What a run looks at."""

    accuracy = "accuracy"
    performance = "performance"
    all = "all"


JSON = typer.Option(False, "--json", help="Print one JSON object and nothing else.")
DEVICE = typer.Option("auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")
FILTER = typer.Option("", help="Only cases with all these words: a function, a dtype, m=1; commas between them.")
OPS = typer.Argument(None, metavar="[OP]...", help="Operations; all when left out.")
OPS_OR_SHAPE = typer.Argument(
    None, metavar="[OP]... | w4a16 M [N [K]]", help="Operations, all when left out; or one product: N and K are 1024."
)
OPS_WITH_ROWS = typer.Argument(
    None, metavar="[OP]...", help="Operations, or decode for whole models; when left out, all that have rows."
)
RESULTS = typer.Option("results", help="Where rows are kept.")
PLOT_TO = typer.Option(None, "--plot-to", help="The same into this .svg or .png; needs a single OP.")
CHECK = typer.Option(
    None, "--check", help="accuracy: results beside float64, nothing timed; performance: the tables; all: both."
)
MODEL = typer.Option(None, "--model", help="A folder or .gguf file.")
PICTURES = typer.Option(
    None, "--to", help="The folder the pictures go to, each as <op>.svg; docs/ops and, for decode, docs when left out."
)


def cases_module(op: str) -> Any:
    """``nybble.ops.<op>.cases``, or a usage error that lists the operations."""
    from nybble.ops import OPERATIONS

    if op not in OPERATIONS:
        raise typer.BadParameter(f"no operation {op!r}; there are {', '.join(OPERATIONS)}", param_hint="OP")
    return importlib.import_module(f"nybble.ops.{op}.cases")


def select(ops: list[str], *, gpu: bool, words: str, detailed: bool = False) -> dict[str, list[Case]]:
    """The cases to run by operation: those for a GPU or for a CPU, the further ones if asked, that hold every word."""
    from nybble.bench.run import label
    from nybble.ops import OPERATIONS

    wanted = [word.strip() for word in words.split(",") if word.strip()]
    chosen: dict[str, list[Case]] = {}
    for op in dict.fromkeys(ops) if ops else OPERATIONS:
        module = cases_module(op)
        some = module.BENCH if gpu else module.SMALL
        if detailed and gpu:
            some = list(dict.fromkeys((*some, *getattr(module, "DETAILED", ()))))
        chosen[op] = [case for case in some if set(wanted) <= {op, *label(case).split()}]
    if wanted and not any(chosen.values()):
        raise typer.BadParameter(f"no case matches {words!r}; `nybble bench list` shows them", param_hint="--filter")
    return chosen


@app.command("list")
def list_cases(
    ops: list[str] = OPS,
    filter: str = FILTER,
    small: bool = typer.Option(False, "--small", help="The small cases a CPU runs, on a GPU machine too."),
    json: bool = JSON,
) -> None:
    """The operations and the cases a run would measure here."""
    from nybble.bench.run import label
    from nybble.ops import OPERATIONS
    from nybble.runtime.hardware import current

    chosen = select(ops or [], gpu=current() is not None and not small, words=filter)
    if json:
        print_json({"operations": {op: [_described(case) for case in some] for op, some in chosen.items()}})
        return
    out = stdout()
    for op, some in chosen.items():
        out.print(f"[bold]{op}[/bold]  {OPERATIONS[op]}")
        for case in some:
            out.print(f"  {label(case)}", soft_wrap=True)


def _described(case: Case) -> dict[str, Any]:
    from nybble.bench.run import dtype_name, options

    return {
        "function": case.function,
        "shape": case.shape(),
        "dtype": dtype_name(case),
        "options": options(case),
        "bytes": case.bytes,
        "flops": case.flops,
    }


@app.command("run")
def run(
    ops: list[str] = OPS_OR_SHAPE,
    filter: str = FILTER,
    quick: bool = typer.Option(False, "--quick", help="Fewer rounds: a first look, not numbers to publish."),
    peers: bool = typer.Option(True, help="Measure the other libraries in the same run."),
    small: bool = typer.Option(False, "--small", help="The small cases a CPU runs, on a GPU too."),
    save: bool = typer.Option(False, help="Append the rows to RESULTS/<gpu>/<op>.jsonl."),
    results: Path = RESULTS,
    plot: bool = typer.Option(False, "--plot", help="Draw the rows just measured: <op>.svg in this folder."),
    plot_to: Path | None = PLOT_TO,
    commit: str = typer.Option("", help="The commit to stamp rows with, where git can't tell."),
    target_ms: float | None = typer.Option(
        None, "--target-ms", min=0.0, help="Then time calls one by one, and say whether their P99 is within this."
    ),
    runs: int | None = typer.Option(
        None, "--runs", min=1000, help="Calls timed one by one; 1000, on a CPU with --quick 100."
    ),
    group_size: int | None = typer.Option(None, "--group-size", help="Of one product: 16, 32, 64, 128, 256 or -1."),
    check: Check | None = CHECK,
    detailed: bool = typer.Option(False, "--detailed", help="The operation's further cases too, and memory they take."),
    bits: int | None = typer.Option(None, "--bits", help="Of one product's weight: 4 or 8; 4 when left out."),
    device: str = DEVICE,
    json: bool = JSON,
) -> None:
    """Check every provider on every case, time those that are right, and print the tables.

    On a GPU: device time by CUDA-graph replay with inputs cold in the L2 cache, the median over rounds, providers
    interleaved. On a CPU: wall time of the small cases. A wrong result is reported and never timed; the exit code is
    then 1.

    With --target-ms or --runs each case's table is followed by the latency of single calls of Nybble's pick:
    percentiles, and whether P99 meets the target. A target that is missed leaves the exit code as it is.

    `nybble bench run w4a16 32 1024 1024` is a program of its own: one product of 32 x 1024 by 1024 x 1024, which
    kernel took it, whether it is right, its first values, time, TFLOP/s and GB/s, and the same for 1 to 512 rows.
    """
    from nybble.bench import accuracy, latency, report

    where = device_of(device)
    numbers = [int(word) for word in ops or [] if word.lstrip("-").isdigit()]
    if numbers or group_size is not None or bits is not None:
        others = {"--filter": filter, "--small": small, "--save": save, "--plot": plot, "--plot-to": plot_to}
        others |= {"--target-ms": target_ms is not None, "--runs": runs}
        for option, given in others.items():
            if given:
                raise typer.BadParameter("not for one product (M N K)", param_hint=option)
        names = [word for word in ops or [] if not word.lstrip("-").isdigit()]
        _run_single(names, numbers, group_size, bits, where, quick=quick, json=json)
        return
    alone = target_ms is not None or runs is not None
    accurate = check in (Check.accuracy, Check.all)
    if check is Check.accuracy:
        given = {"--save": save, "--plot": plot, "--plot-to": plot_to, "--target-ms": alone, "--runs": runs}
        for option, value in given.items():
            if value:
                raise typer.BadParameter("nothing is timed with --check accuracy", param_hint=option)
    if runs is None:
        runs = latency.QUICK_RUNS if quick and where.type == "cpu" else latency.RUNS
    hardware, ceilings = _ceilings(where)
    chosen = select(ops or [], gpu=hardware is not None and not small, words=filter, detailed=detailed)
    pictures = _pictures([op for op, some in chosen.items() if some], plot_to) if plot or plot_to else {}
    at = report.stamp(hardware, commit=commit or None)
    err, out = stderr(), stdout()
    if not json:
        out.print(f"{at.gpu}  torch {at.torch}  commit {at.commit}", soft_wrap=True)
        if ceilings is not None:
            out.print(_ceilings_line(hardware, ceilings), soft_wrap=True)
    notes: dict[str, int] = {}
    measured: list[Measurement] = []
    saved: list[str] = []
    drawn: list[str] = []
    failed: list[str] = []
    latencies: list[latency.Latency] = []
    slug = hardware.slug if hardware is not None else "cpu"
    checked: list[Accuracy] = []
    for op, some in chosen.items():
        rows = []
        for case in some if accurate or detailed else ():
            found = accuracy.measure(case, where, hardware) if accurate else []
            checked += found
            if not json:
                text = [*accuracy.lines(found), *([accuracy.memory_line(case)] if detailed else [])]
                for line in text:
                    out.print(line, markup=False, highlight=False, soft_wrap=True)
        if check is Check.accuracy:
            continue
        for measurements in _measure(some, where, hardware, peers=peers, quick=quick, notes=notes, hidden=json):
            measured += measurements
            rows += [report.row(m, at) for m in measurements if m.timing is not None]
            if not json and measurements:
                out.print(report.table(measurements), "")
            if alone and any(m.picked and m.timing is not None for m in measurements):
                latencies.append(latency.measure(measurements[0].case, device=where, runs=runs, target_ms=target_ms))
                if not json:
                    text = "\n".join(latency.lines(latencies[-1]))
                    out.print(text, "", sep="\n", markup=False, highlight=False, soft_wrap=True)
        if save and rows:
            path = results / slug / f"{op}.jsonl"
            damaged = report.append(path, rows)
            saved.append(str(path))
            if damaged:
                err.print(f"{path}: {damaged} damaged lines, kept as they are", style="yellow", soft_wrap=True)
        if op in pictures:
            _draw_measured(op, rows, pictures[op], drawn, failed)
    wrong = [
        *report.wrong_lines(measured),
        *(f"{one.variant}: {one.case}: WRONG: {one.wrong}" for one in checked if one.wrong),
    ]
    if json:
        print_json(
            {
                **at._asdict(),
                "ceilings": None if ceilings is None else ceilings._asdict(),
                "rows": [report.row(m, at) for m in measured if m.timing is not None],
                "wrong": wrong,
                "latency": [one._asdict() for one in latencies],
                "accuracy": [one._asdict() for one in checked],
                "notes": list(notes),
                "saved": saved,
                "plots": drawn,
                "not_drawn": failed,
            }
        )
    else:
        for text, count in notes.items():
            out.print(f"{text}{f'  ({count} cases)' if count > 1 else ''}", style="dim", markup=False, soft_wrap=True)
        for path in saved:
            err.print(f"saved {path}", markup=False, soft_wrap=True)
        for path in drawn:
            err.print(f"drew {path}", markup=False, soft_wrap=True)
        for text in (*wrong, *failed):
            err.print(text, style="red", markup=False, soft_wrap=True)
    if wrong or failed:
        raise typer.Exit(EXIT_FAILED)


def _run_single(
    names: list[str],
    numbers: list[int],
    group_size: int | None,
    bits: int | None,
    where: Any,
    *,
    quick: bool,
    json: bool,
) -> None:
    """One product, checked, timed, and timed for other rows."""
    from nybble.bench import roofline, single
    from nybble.runtime.hardware import current

    if names != ["w4a16"]:
        raise typer.BadParameter(f"M N K are of w4a16, not of {', '.join(names) or 'nothing'}", param_hint="OP")
    if len(numbers) > 3:
        raise typer.BadParameter(f"M N K are three numbers, got {len(numbers)}", param_hint="M N K")
    m, n, k = (*numbers, *single.DEFAULTS[len(numbers) :])
    shape = {"m": m, "n": n, "k": k} | ({} if group_size is None else {"group_size": group_size})
    module = cases_module("w4a16")
    case = module.parse(shape, module.BENCH[0].dtype, bits=4 if bits is None else bits)
    card = current(where.index) if where.type == "cuda" else None
    peaks = roofline.peaks(where.index or 0) if card is not None else None
    found = single.measure(case, device=where, hardware=card, peaks=peaks, rounds=8 if quick else 30)
    impossible = [f"M {point.m}: {point.impossible}" for point in (found.point, *found.sweep) if point.impossible]
    gpu, capability = (card.name, ".".join(map(str, card.capability))) if card is not None else ("cpu", "")
    if json:
        print_json({
            "gpu": gpu, "capability": capability, **found._asdict(), "point": found.point._asdict(),
            "sweep": [point._asdict() for point in found.sweep], "impossible": impossible,
        })  # fmt: skip
    else:
        text = "\n".join(single.lines(found, gpu, capability))
        stdout().print(text, markup=False, highlight=False, soft_wrap=True)
        for line in dict.fromkeys(impossible):
            stderr().print(line, style="yellow", markup=False, soft_wrap=True)
        if found.wrong:
            stderr().print(f"{found.case}: {found.wrong}", style="red", markup=False, soft_wrap=True)
    if found.wrong:
        raise typer.Exit(EXIT_FAILED)


def _pictures(ops: list[str], to: Path | None) -> dict[str, Path]:
    """Where the picture of each operation goes; what rules one out is said before anything is measured."""
    from nybble.bench import plot

    if to is not None and len(ops) != 1:
        raise typer.BadParameter(
            f"one picture shows one operation, not {', '.join(ops) or 'none'}; name one OP, or use --plot",
            param_hint="--plot-to",
        )
    pictures = {op: to or Path(f"{op}.svg") for op in ops}
    for path in pictures.values():
        plot.check(path)
    return pictures


def _draw_measured(op: str, rows: list[dict[str, Any]], path: Path, drawn: list[str], failed: list[str]) -> None:
    """A picture that can't be written is a line among the failures: the measurement before it is not lost."""
    from nybble.bench import plot

    try:
        plot.draw(op, rows, path)
        drawn.append(str(path))
    except (OSError, ValueError) as error:
        failed.append(f"{path}: not drawn: {error}")


def _ceilings(where: Any) -> tuple[Hardware | None, Any]:
    """The device as hardware and what it can do today; nothing of either on a CPU."""
    if where.type != "cuda":
        return None, None
    from nybble.bench import roofline
    from nybble.runtime.hardware import current

    card = current(where.index)
    assert card is not None, "a CUDA device that is not there"
    measured = roofline.measure(where)
    return roofline.with_ceilings(card, measured), measured


def _ceilings_line(hardware: Hardware | None, measured: Any) -> str:
    from nybble.runtime.hardware import KNOWN

    line = f"today: read {measured.read_tbps:.2f} TB/s, fp16 {measured.half_tflops:.0f} TFLOP/s"
    known = KNOWN.get(hardware.slug) if hardware is not None else None
    if known is None:
        return f"{line} (floors use these)"
    return f"{line}; floors use {known.read_tbps:.2f} TB/s and {known.half_tflops:.0f} TFLOP/s of this card"


def _measure(
    cases: list[Case],
    where: Any,
    hardware: Hardware | None,
    *,
    peers: bool,
    quick: bool,
    notes: dict[str, int],
    hidden: bool,
) -> Any:
    """The measurements of each case, as they come, with a progress bar on stderr."""
    from rich.progress import track

    from nybble.bench.run import bench_case

    def note(text: str) -> None:
        notes[text] = notes.get(text, 0) + 1

    console = stderr()
    description, disable = cases[0].op if cases else "", hidden or not console.is_terminal
    for case in track(cases, description=description, console=console, transient=True, disable=disable):
        rounds = 8 if quick else 30
        yield bench_case(case, device=where, hardware=hardware, peers=peers, rounds=rounds, note=note)


@app.command("decode")
def decode(
    model: Path | None = MODEL,
    shape: str = typer.Option("", "--shape", help="Random 4-bit weights: llama3-8b, pythia-2.8b or gpt2-xl."),
    layers: int | None = typer.Option(None, "--layers", min=1, help="--shape: fewer layers than it has."),
    bits: int = typer.Option(4, "--bits", help="--shape: 4, or 16 for ordinary linear layers."),
    batch: str = typer.Option("1,8,32", "--batch", help="Texts at once."),
    context: int = typer.Option(512, min=1, help="Tokens before the first timed one."),
    tokens: int = typer.Option(128, min=2, help="Timed tokens."),
    prompts: str = typer.Option("128,2048", "--prompts", help="Prompt lengths, for the time to the first token."),
    ablation: bool = typer.Option(False, "--ablation", help="Then leave out each fusion in turn."),
    save: bool = typer.Option(False, help="Append the rows to RESULTS/<gpu>/decode.jsonl."),
    results: Path = RESULTS,
    commit: str = typer.Option("", help="The commit to stamp rows with, where git can't tell."),
    dtype: str = typer.Option("auto", "--dtype", help="float16, bfloat16 or float32."),
    device: str = DEVICE,
    json: bool = JSON,
) -> None:
    """Time per token of a whole model: eager or from a CUDA graph, unfused or fused; by torchrun on one and on all.

    The four cells keep the graph's gain apart from the kernels'. Between the ends of two steps, the host waiting for
    none: P50, P99, and the fraction of the roof, which is reading each weight and the cache once. On a CPU the steps of
    the graph are called one by one.
    """
    import torch

    from nybble.bench import decode as bench
    from nybble.bench import report

    if (model is None) is (not shape):
        raise fail("decode: give --model or --shape")
    if model is not None and (layers is not None or bits != 4):
        raise fail("decode: --layers and --bits are of a --shape")
    where, kind = device_of(device), dtype_of(dtype)
    batches, lengths = _numbers(batch, "--batch"), _numbers(prompts, "--prompts")
    ranks = join(where)
    hardware, ceilings = _ceilings(where)

    def made(shared: Ranks | None) -> PreTrainedModel:
        if model is not None:
            from nybble.cli.model import load_model

            return load_model(model, device, dtype, hidden=json, ranks=shared)[0]
        chosen = kind or (torch.float16 if where.type == "cuda" else torch.float32)
        return bench.random_model(shape, device=where, dtype=chosen, layers=layers, bits=bits, ranks=shared)

    name = shape if model is None else model.name
    if bits != 4:
        name += f"-{bits}bit"

    def measured(shared: Ranks | None) -> tuple[int, torch.dtype, list[bench.Result]]:
        loaded = made(shared)
        config: Any = loaded.config
        longest, positions = max(context + tokens + bench.WARM_UP + 2, *lengths), config.max_position_embeddings
        if longest > positions:
            raise fail(f"decode: {longest} tokens, but {name} has {positions} positions; try --context or --prompts")
        found = bench.measure(
            loaded,
            batches=batches,
            context=context,
            steps=tokens,
            prompts=lengths,
            read_tbps=ceilings.read_tbps if ceilings is not None else 0.0,
            ablation=ablation,
        )
        return config.num_hidden_layers, loaded.dtype, list(found)

    if ranks is None:
        depth, of, found = measured(None)
    else:
        # The first by itself, to compare with, while the others wait; then all.
        before = ranks.agreed(lambda: [] if ranks.rank else measured(None)[2])
        depth, of, found = ranks.agreed(lambda: measured(ranks))
        found = before + found
    at = report.stamp(hardware, commit=commit or None)
    out, err = stdout(), stderr()
    if not json:
        out.print(f"{name}, {depth} layers, {of} on {at.gpu}, {context} tokens before")
    rows, wrong = [], []
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    firsts = [f"TTFT {length}" for length in lengths]
    for column in ("", "batch", "processes", "TPOT P50 ms", "P99", "tokens/s", "of roof", *firsts, "peak GB"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for result in found:
        if result.wrong:
            wrong.append(f"{bench.name_of(result)}, batch {result.batch}: {result.wrong}")
            continue
        rows.append(bench.row(result, name, depth, of, at))
        table.add_row(
            bench.name_of(result),
            str(result.batch),
            str(result.processes),
            f"{result.tpot_ms_p50:.3f}",
            f"{result.tpot_ms_p99:.3f}",
            f"{result.tokens_per_s:.0f}",
            f"{100 * result.of_roof:.0f} %" if result.of_roof else "-",
            *(f"{result.ttft_ms[n]:.1f}" if n in result.ttft_ms else "" for n in lengths),
            f"{result.peak_bytes / 1e9:.2f}" if result.peak_bytes else "-",
        )
    path = results / (hardware.slug if hardware is not None else "cpu") / "decode.jsonl"
    if ranks is not None:
        leave()
    if save and rows and (ranks is None or ranks.rank == 0):
        report.append(path, rows)
        if not json:
            err.print(f"saved {path}", markup=False, soft_wrap=True)
    if json:
        print_json({**at._asdict(), "model": name, "rows": rows, "wrong": wrong, "saved": [str(path)] if save else []})
    else:
        out.print(table)
        for line in wrong:
            err.print(line, style="red", markup=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(EXIT_FAILED)


def _numbers(text: str, option: str) -> list[int]:
    """Positive numbers with commas between."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise typer.BadParameter(f"{text!r}: expected numbers above 0, with commas", param_hint=option)
    return numbers


@app.command("plot")
def plot_saved(
    ops: list[str] = OPS_WITH_ROWS,
    results: Path = RESULTS,
    gpu: str = typer.Option("h200", help="Whose rows: a folder of RESULTS."),
    dtype: str = typer.Option(
        "float16", "--dtype", help="float16, bfloat16 or float32; auto: float16 if there is any."
    ),
    to: Path | None = PICTURES,
    json: bool = JSON,
) -> None:
    """Draw the saved rows: time against size, and the fraction of the roof, of every provider.

    One picture an operation, of the shape measured at the most sizes, and one of all whole models, time per token
    against batch; the newest row of each case counts. The same rows give the same file.
    """
    from nybble.bench import plot, report
    from nybble.ops import OPERATIONS

    for op in ops or []:
        if op != plot.MODELS:
            cases_module(op)
    folder = results / gpu
    files = {op: folder / f"{op}.jsonl" for op in dict.fromkeys(ops or (*OPERATIONS, plot.MODELS))}
    if not ops:
        files = {op: file for op, file in files.items() if file.exists()}
    if not files:
        raise fail(f"{folder}: no rows of {', '.join((*OPERATIONS, plot.MODELS))}")
    wanted = dtype_of(dtype)
    name = None if wanted is None else str(wanted).removeprefix("torch.")
    err, drawn = stderr(), []
    for op, file in files.items():
        rows, damaged = report.read_lines(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
        if damaged:
            err.print(f"{file}: {damaged} damaged lines, left out", style="yellow", soft_wrap=True)
        path = (to or Path("docs") / ("" if op == plot.MODELS else "ops")) / f"{op}.svg"
        shown = plot.draw(op, rows, path, dtype=name)
        drawn.append({"op": op, "path": str(path), "dtype": shown.dtype, "rest": shown.rest, "rows": len(shown.rows)})
        if not json:
            err.print(f"drew {path}: {len(shown.rows)} of {len(rows)} rows", markup=False, soft_wrap=True)
    if json:
        print_json({"plots": drawn})


@app.command("explain")
def explain(
    op: str = typer.Argument(..., help="The operation."),
    m: int | None = typer.Option(
        None, "--m", min=0, help="w4a16, ln_qkv, q4_0, w4a4: rows (tokens); flatquant: rows of the left transform."
    ),
    n: int | None = typer.Option(
        None, "--n", min=1, help="w4a16, ln_qkv, q4_0, w4a4: output features; flatquant: rows of the right transform."
    ),
    k: int | None = typer.Option(None, "--k", min=1, help="w4a16, ln_qkv, q4_0, w4a4: input features."),
    group_size: int | None = typer.Option(
        None, "--group-size", help="w4a16, ln_qkv: 16, 32, 64, 128, 256, or -1 for K."
    ),
    bits: int | None = typer.Option(None, "--bits", help="w4a16: 4 or 8 bits a weight; 4 when left out."),
    rows: int | None = typer.Option(None, "--rows", min=0, help="norm: rows (tokens)."),
    hidden: int | None = typer.Option(None, "--hidden", min=1, help="norm: hidden size."),
    tokens: int | None = typer.Option(None, "--tokens", min=0, help="flatquant: tokens."),
    batch: int | None = typer.Option(None, "--batch", min=0, help="decode_attention: texts."),
    heads: int | None = typer.Option(None, "--heads", min=1, help="decode_attention: query heads."),
    kv_heads: int | None = typer.Option(None, "--kv-heads", min=1, help="decode_attention: heads of keys and values."),
    d: int | None = typer.Option(None, "--d", min=1, help="decode_attention: width of a head."),
    slots: int | None = typer.Option(None, "--slots", min=1, help="decode_attention: tokens that the cache holds."),
    function: str = typer.Option("", "--function", help="Which function of the operation, such as add_rmsnorm."),
    dtype: str = typer.Option("float16", "--dtype", help="float16, bfloat16 or float32."),
    hardware: str = typer.Option("", "--hardware", help="h200, a100 or current; without a GPU here, h200."),
    json: bool = JSON,
) -> None:
    """Which kernel would run, and why: every candidate with its prediction or the reason it is refused.

    Needs no GPU: the choice is a function of the request and the hardware.
    """
    given = {
        "m": m, "n": n, "k": k, "group_size": group_size, "rows": rows, "hidden": hidden, "tokens": tokens,
        "batch": batch, "heads": heads, "kv_heads": kv_heads, "d": d, "slots": slots,
    }  # fmt: skip
    case = _case(op, {name: value for name, value in given.items() if value is not None}, dtype, function, bits)
    card = _hardware(hardware)
    choice = case.choice(card)
    floor = case.floor_us(card)
    if json:
        print_json(_explained(case, card, choice, floor))
        return
    from rich.table import Table

    from nybble.bench.run import label

    out = stdout()
    out.print(f"{label(case)} on {card.name}: floor {floor:.2f} us", markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "variant", "predicted us", "of floor", "constants", "why"):
        table.add_column(name, justify="right" if name in ("predicted us", "of floor") else "left")
    for candidate in choice.candidates:
        us = candidate.us
        table.add_row(
            "*" if candidate is choice.pick else "",
            candidate.variant,
            "refused" if candidate.refused else "not measured" if us is None else f"{us:.2f}",
            f"{100 * floor / us:.0f} %" if us and not candidate.refused else "-",
            " ".join(f"{name}={value}" for name, value in candidate.config),
            candidate.reason,
            style="dim" if candidate.refused else None,
        )
    out.print(table)


def _case(op: str, shape: dict[str, int], dtype: str, function: str, bits: int | None) -> Case:
    """The case with these dimensions; what is left out is the operation's default."""
    module = cases_module(op)
    functions = dict.fromkeys(case.function for case in (*module.BENCH, *module.SMALL))
    if function and function not in functions:
        raise typer.BadParameter(f"{op} has no {function!r}; it has {', '.join(functions)}", param_hint="--function")
    known = module.BENCH[0].shape()
    for name in shape:
        if name not in known:
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{op} has no such dimension; it has {', '.join(known)}", param_hint=option)
    options: dict[str, Any] = {"function": function} if function and len(functions) > 1 else {}
    if bits is not None:
        if op != "w4a16":
            raise typer.BadParameter("of w4a16 only", param_hint="--bits")
        options["bits"] = bits
    return module.parse(shape, dtype_of(dtype) or module.BENCH[0].dtype, **options)


def _hardware(name: str) -> Hardware:
    from nybble.runtime.hardware import H200, KNOWN, current

    if name in KNOWN:
        return KNOWN[name]
    if name not in ("", "current"):
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(KNOWN)}, current", param_hint="--hardware")
    card = current()
    if card is None and name == "current":
        raise fail(f"no CUDA device here; name a card with --hardware ({', '.join(KNOWN)})", code=EXIT_FAILED)
    return card or H200


def _explained(case: Case, card: Hardware, choice: Choice, floor: float) -> dict[str, Any]:
    return {
        "op": case.op,
        **_described(case),
        "hardware": card.name,
        "floor_us": floor,
        "pick": choice.pick.variant,
        "candidates": [
            {
                "variant": candidate.variant,
                "constants": dict(candidate.config),
                "us": candidate.us,
                "refused": candidate.refused,
                "reason": candidate.reason,
                "picked": candidate is choice.pick,
            }
            for candidate in choice.candidates
        ],
    }
