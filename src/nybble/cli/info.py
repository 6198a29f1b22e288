"""``nybble info``: versions, the GPU, what each operation can run here, the kernel cache."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Any

import typer

from nybble.cli.console import print_json, stdout

PACKAGES = ("cuda-core", "cuda-bindings", "triton", "transformers", "safetensors", "tokenizers")


def info(json: bool = typer.Option(False, "--json", help="Print one JSON object and nothing else.")) -> None:
    """Versions, the GPU, what each operation can run here, and the kernel cache."""
    facts = gather()
    if json:
        print_json(facts)
        return
    from rich.table import Table

    out = stdout()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in facts["versions"].items():
        table.add_row(name, version or "none")
    for gpu in facts["gpus"]:
        memory = f"{gpu['memory_gib']:.0f} GiB, {gpu['sms']} SMs, compute {gpu['capability']}"
        table.add_row(f"GPU {gpu['index']}", f"{gpu['name']}: {memory}")
    if not facts["gpus"]:
        table.add_row("GPU", "none: every operation runs its reference on the CPU")
    for op, lines in facts["operations"].items():
        for function, line in lines.items():
            table.add_row(op if function == next(iter(lines)) else "", f"{function}: {line}")
    cache = facts["cache"]
    used = f"{cache['entries']} kernels, {cache['bytes'] / 2**20:.1f} MiB" if cache["used"] else "not used"
    table.add_row("cache", f"{cache['folder']} ({used})")
    out.print(table)


def gather() -> dict[str, Any]:
    """Everything ``nybble info`` shows, as one JSON-ready dictionary."""
    return {"versions": _versions(), "gpus": _gpus(), "operations": _operations(), "cache": _cache()}


def _versions() -> dict[str, str | None]:
    import torch

    import nybble

    found: dict[str, str | None] = {
        "nybble": nybble.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "driver": None,
        "NVRTC": _nvrtc(),
    }
    if torch.cuda.is_available():
        from nybble.bench.report import driver_version

        found["driver"] = driver_version()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _nvrtc() -> str | None:
    """The version of the compiler that builds the kernels, ``None`` where it can't be loaded."""
    try:
        from cuda.bindings import nvrtc

        error, major, minor = nvrtc.nvrtcVersion()
        return f"{major}.{minor}" if int(error) == 0 else None
    except Exception:  # a missing package or a missing library: either way there is no compiler here
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": card.name,
                "capability": f"{card.major}.{card.minor}",
                "sms": card.multi_processor_count,
                "memory_gib": card.total_memory / 2**30,
                "l2_mib": card.L2_cache_size / 2**20,
            }
        )
    return found


def _operations() -> dict[str, dict[str, str]]:
    """For each operation and function, what can run its first case on this machine, and what is refused."""
    from nybble.ops import OPERATIONS
    from nybble.runtime.errors import UnsupportedError
    from nybble.runtime.hardware import current

    card = current()
    found: dict[str, dict[str, str]] = {}
    for op in OPERATIONS:
        lines = found[op] = {}
        module = importlib.import_module(f"nybble.ops.{op}.cases")
        for case in (*module.BENCH, *module.SMALL):
            if case.function in lines:
                continue
            if card is None:
                lines[case.function] = "cpu: reference"
                continue
            try:
                choice = case.choice(card)
            except UnsupportedError as error:
                lines[case.function] = str(error)
                continue
            able = dict.fromkeys(c.variant for c in choice.candidates if not c.refused)
            refused = {c.variant: c.reason for c in choice.candidates if c.refused and c.variant not in able}
            lines[case.function] = ", ".join([*able, *(f"not {name} ({why})" for name, why in refused.items())])
    return found


def _cache() -> dict[str, Any]:
    from nybble.runtime import settings

    entries = size = 0
    try:
        for path in settings.CACHE_DIR.rglob("*"):
            if path.is_file():
                entries, size = entries + 1, size + path.stat().st_size
    except OSError:
        pass  # a cache that can't be read counts as empty; the runtime warns when it needs it
    return {"folder": str(settings.CACHE_DIR), "used": settings.USE_CACHE, "entries": entries, "bytes": size}
