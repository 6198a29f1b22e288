"""What commands do where ``torchrun`` started several processes: all of them compute, and the first one talks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from nybble.cli.console import EXIT_BAD_INPUT, be_quiet, fail
from nybble.runtime import settings

if TYPE_CHECKING:
    from nybble.models.ranks import Ranks


def join(device: Any) -> Ranks | None:
    """The processes that share the command's model, ``None`` where this is the only one. All but the first are quiet
    from now on.

    Raises:
        ValueError, UnsupportedError: as :func:`nybble.models.ranks.join`.
    """
    if settings.PROCESSES == 1:
        return None
    from nybble.models import ranks

    if settings.PROCESS:
        be_quiet(settings.PROCESS)
    return ranks.join(device)


def leave(model: Any = None) -> None:
    """The end of a command that joined; graphs go before what is captured in them."""
    if settings.PROCESSES > 1:
        from nybble.models import ranks
        from nybble.models.decode import release_decoders

        if model is not None:
            release_decoders(model)
        ranks.leave()


def alone(command: str) -> None:
    """Refuse to be one of several processes."""
    if settings.PROCESSES > 1:
        if settings.PROCESS:
            raise typer.Exit(EXIT_BAD_INPUT)
        raise fail(f"{command} runs in one process; torchrun is for generate and bench decode")
