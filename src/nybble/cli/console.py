"""What the commands share: the two consoles, JSON output, and errors as one line with an exit code."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from nybble.runtime import settings

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

# Typer's own copy of Click in some releases, Click itself in others: the base of its usage errors, by name.
_CLICK_EXCEPTION: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Group(TyperGroup):
    """A group whose commands end in one line on stderr and an exit code, never in a traceback for a user's mistake.

    2 for input that is wrong (an option, a missing file, a value or a checkpoint that is refused), 1 where this machine
    can't do it, 130 for Ctrl-C. ``--traceback`` shows where an error came from.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _one_line_errors(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _one_line_errors(ctx):
            return super().invoke(ctx)


@contextmanager
def _one_line_errors(ctx: Any) -> Iterator[None]:
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except _CLICK_EXCEPTION as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        where = getattr(error, "ctx", None) or ctx
        raise fail(error.format_message(), where.command_path, error.exit_code) from None
    except KeyboardInterrupt:
        raise fail("interrupted", code=EXIT_INTERRUPTED) from None
    except Exception as error:
        from nybble.runtime.errors import is_told

        code, told = _exit_code(error), is_told(error)
        if code is None or ctx.find_root().params.get("traceback"):
            raise
        end = typer.Exit(code) if told else fail(_text(error), code=code)
        if told is not None:
            from nybble.models.ranks import leave

            leave()  # together: whoever ends first has the others ended, before they have said why
        raise end from None


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error a user can understand, ``None`` for one that is a bug."""
    from nybble.runtime.errors import CheckpointError, CompileError, ElsewhereError, UnsupportedError

    if isinstance(error, (UnsupportedError, CompileError, ElsewhereError)):
        return EXIT_FAILED
    if isinstance(error, CheckpointError) or (isinstance(error, (ValueError, TypeError)) and _is_ours(error)):
        return EXIT_BAD_INPUT
    if isinstance(error, OSError):
        return EXIT_BAD_INPUT if isinstance(error, (FileNotFoundError, NotADirectoryError)) else EXIT_FAILED
    if isinstance(error, FloatingPointError) or type(error).__name__ == "OutOfMemoryError" or _is_lost(error):
        return EXIT_FAILED
    return None


def _is_lost(error: Exception) -> bool:
    """What a process group raises where another process has gone."""
    if not isinstance(error, RuntimeError) or settings.PROCESSES == 1:
        return False
    return type(error).__name__.startswith("Dist") or "gloo" in str(error) or "NCCL" in str(error)


def _is_ours(error: BaseException) -> bool:
    """Raised by a line of Nybble itself: one of its checks, and not a slip inside a library."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "nybble"


def _text(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: no such file or folder"
    if _is_lost(error):
        return f"another process has gone, or did not answer in time: {str(error).splitlines()[0]}"
    return " ".join(str(error).split()) or type(error).__name__


_process = 0


def be_quiet(process: int) -> None:
    """Print errors alone, and say of which process they are."""
    global _process
    _process, sys.stdout = process, Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - to the end


def fail(message: str, where: str = "nybble", code: int = EXIT_BAD_INPUT) -> typer.Exit:
    """Print the one line and give the exception that ends the command with ``code``."""
    typer.echo(f"{where}: {f'process {_process}: ' if _process else ''}{message}", err=True)
    return typer.Exit(code)


def new_app(text: str) -> typer.Typer:
    """An app that shows its help when it is given nothing, with the errors of :class:`Group`."""
    new = typer.Typer(cls=Group, help=text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @new.callback()
    def options(
        traceback: bool = typer.Option(False, "--traceback", help="Show where an error came from.", hidden=True),
    ) -> None: ...

    options.__doc__ = text
    return new


PIPE_COLUMNS = 140
"""How wide tables are where the output is no terminal: a file has no width, and 80 columns would fold them."""


def stdout() -> Console:
    """The console of what a command makes."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def stderr() -> Console:
    """The console of progress, summaries and warnings."""
    from rich.console import Console

    return Console(
        stderr=True, highlight=False, width=None if sys.stderr.isatty() else PIPE_COLUMNS, quiet=_process > 0
    )


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout. A number that is not finite becomes ``null``: JSON has none."""
    sys.stdout.write(json.dumps(_finite(value), indent=2) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value


def device_of(name: str) -> Any:
    """``auto`` or a device's name as a ``torch.device`` that is there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is not a device; try cpu, cuda or cuda:1", param_hint="--device") from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r}: only cpu and cuda devices are supported", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise fail(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices", code=EXIT_FAILED)
    return device


def dtype_of(name: str) -> Any:
    """``auto`` (``None``) or a dtype's name as a ``torch.dtype``."""
    import torch

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    if name == "auto":
        return None
    try:
        return dtypes[short.get(name, name)]
    except KeyError:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(dtypes)}", param_hint="--dtype") from None
