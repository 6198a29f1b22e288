"""``nybble pack``: a model's folder becomes that of a quantised one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from nybble.cli.console import dtype_of, print_json, stderr, stdout
from nybble.cli.model import JSON, assets


class Format(StrEnum):
    """What can be written."""

    flatquant = "flatquant"


class Transform(StrEnum):
    """What is done to activations before they are rounded."""

    hadamard = "hadamard"
    none = "none"


SOURCE = typer.Argument(..., metavar="MODEL", help="Folder of the model; demo: the demo model.")
DESTINATION = typer.Argument(..., metavar="DESTINATION", help="A folder that does not exist yet.")
TO = typer.Option(Format.flatquant, "--to", help="flatquant: int4 weights and int4 activations.")
TRANSFORM = typer.Option(Transform.hadamard, help="hadamard: orthogonal, spreads outliers; none: to compare.")


def pack(
    model: Path = SOURCE,
    destination: Path = DESTINATION,
    to: Format = TO,
    transform: Transform = TRANSFORM,
    clip_ratio: float = typer.Option(1.0, min=0.01, max=1.0, help="Of the activations' largest magnitude."),
    dtype: str = typer.Option("float16", help="Of what is not quantised: float16, bfloat16, float32."),
    json: bool = JSON,
) -> None:
    """Write a model with int4 weights and activations, which every other command then takes."""
    import torch
    from rich.progress import Progress

    from nybble.models import flatquant
    from nybble.models.load import load
    from nybble.runtime.errors import wrong_value

    if destination.exists():
        raise wrong_value("pack", "destination", "a path where there is nothing yet", destination)
    folder = assets() if str(model) == "demo" and not model.exists() else model
    kind, console = dtype_of(dtype) or torch.float16, stderr()
    loaded = load(folder, device="cpu", dtype=torch.float32)
    with Progress(console=console, transient=True, disable=json or not console.is_terminal) as bar:
        task = bar.add_task("Rounding", total=None)
        tensors, quantization = flatquant.convert(
            loaded,
            transform=transform.value,
            clip_ratio=clip_ratio,
            dtype=kind,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    flatquant.write(folder, destination, tensors, quantization, kind)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    facts = {"folder": str(destination), "format": to.value, "modules": len(quantization["modules"]), "bytes": size}
    if json:
        print_json(facts)
        return
    stdout().print(f"{facts['modules']} layers, {size / 1e6:.1f} MB: {destination}", markup=False, soft_wrap=True)
