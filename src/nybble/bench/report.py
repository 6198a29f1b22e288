"""Results as rows: what one says, where it came from, how it is kept, and the table a person reads."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

import nybble
from nybble.bench.run import Measurement, dtype_name, label, options
from nybble.runtime.files import write_whole
from nybble.runtime.hardware import Hardware

KEYS = (
    "op",
    "function",
    "shape",
    "dtype",
    "provider",
    "variant",
    "us",
    "us_p10",
    "us_p90",
    "host_us",
    "floor_us",
    "rel_err",
    "commit",
    "gpu",
    "driver",
    "torch",
    "when",
)
"""The keys of every row, in their order. A row of a case that asks for more than shape and dtype (act-order, zero
points, a bias) has the key ``options`` too, one of a call no graph could hold ``how`` (``"events"``), and one of a
kernel with constants that the choice set ``config``."""


class Stamp(NamedTuple):
    """Where a run's rows come from. ``gpu`` is ``"cpu"`` and ``driver`` ``None`` on a machine without one."""

    commit: str
    gpu: str
    driver: str | None
    torch: str
    when: str


def stamp(hardware: Hardware | None, *, commit: str | None = None) -> Stamp:
    """The stamp of a run that starts now; ``commit`` overrides what git says."""
    return Stamp(
        commit or commit_of(Path(nybble.__file__).parent),
        hardware.name if hardware is not None else "cpu",
        driver_version() if hardware is not None else None,
        torch.__version__,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def commit_of(folder: Path) -> str:
    """The short hash of the commit ``folder`` is at, ``+dirty`` when a file in it has changed; else ``"unknown"``."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # an installed copy inside somebody's repository is not that commit
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def driver_version() -> str:
    """The NVIDIA driver's version, or ``"unknown"``."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def row(measurement: Measurement, at: Stamp) -> dict[str, Any]:
    """One measurement as a row.

    Raises:
        ValueError: it was not timed; a wrong result has no row.
    """
    timing, case = measurement.timing, measurement.case
    if timing is None:
        raise ValueError(f"{measurement.provider}/{measurement.variant} has no timing: {measurement.wrong}")
    values = {
        "op": case.op,
        "function": case.function,
        "shape": case.shape(),
        "dtype": dtype_name(case),
        "provider": measurement.provider,
        "variant": measurement.variant,
        "us": _rounded(timing.us),
        "us_p10": _rounded(timing.us_p10),
        "us_p90": _rounded(timing.us_p90),
        "host_us": _rounded(timing.host_us),
        "floor_us": _rounded(measurement.floor_us),
        "rel_err": float(f"{measurement.rel_err:.3g}"),
        **at._asdict(),
    }
    ordered = {key: values[key] for key in KEYS}
    if options(case):
        ordered["options"] = options(case)
    if measurement.config:
        ordered["config"] = dict(measurement.config)
    if timing.how == "events":
        ordered["how"] = timing.how
    return ordered


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def append(path: Path, rows: Sequence[dict[str, Any]]) -> int:
    """Add rows to a results file, whole or not at all.

    Returns:
        How many lines of the old file are not JSON objects. They are kept as they are.
    """
    old = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    if old and not old.endswith("\n"):
        old += "\n"
    damaged = read_lines(old.splitlines())[1]
    new = "".join(json.dumps(one) + "\n" for one in rows)
    write_whole(path, (old + new).encode("utf-8", errors="surrogateescape"))
    return damaged


def read_lines(lines: Iterable[str]) -> tuple[list[dict[str, Any]], int]:
    """The rows among some lines, and how many lines are damaged. Empty lines count as neither."""
    rows, damaged = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            rows.append(value)
        else:
            damaged += 1
    return rows, damaged


def best_peer(measurements: Iterable[Measurement]) -> Measurement | None:
    """The fastest of the other libraries among the measurements of one case."""
    timed = [m for m in measurements if m.provider != "nybble" and m.timing is not None]
    return min(timed, key=lambda m: m.timing.us if m.timing else math.inf, default=None)


def table(measurements: Sequence[Measurement]) -> Table:
    """One case: time, fraction of the floor, ratio to the best peer, error, host time; ``*`` marks Nybble's pick."""
    floor = measurements[0].floor_us
    title = label(measurements[0].case) + (f"   (floor {floor:.2f} us)" if floor else "")
    shown = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    shown.add_column("provider", min_width=24)
    for name in ("us", "p10 - p90", "of floor", "best peer", "rel err", "host us"):
        shown.add_column(name, justify="right", no_wrap=True, min_width=8)
    peer = best_peer(measurements)
    for m in measurements:
        shown.add_row(*_cells(m, peer))
    return shown


def wrong_lines(measurements: Iterable[Measurement]) -> list[str]:
    """One line for each result that was not timed."""
    return [f"{m.provider}/{m.variant}: {label(m.case)}: WRONG: {m.wrong}" for m in measurements if m.wrong]


def _cells(m: Measurement, peer: Measurement | None) -> list[str]:
    name = f"{m.provider}/{m.variant}" + (" *" if m.picked else "")
    t = m.timing
    if t is None:
        return [name, "wrong", "-", "-", "-", f"{m.rel_err:.1e}", "-"]
    return [
        name,
        f"{t.us:.2f}" + (" (eager)" if t.how == "events" else ""),
        f"{t.us_p10:.2f} - {t.us_p90:.2f}",
        f"{100 * m.floor_us / t.us:.0f} %" if m.floor_us else "-",
        f"{peer.timing.us / t.us:.2f}x" if peer is not None and peer.timing is not None else "-",
        f"{m.rel_err:.1e}",
        f"{t.host_us:.1f}" if t.host_us is not None else "-",
    ]
