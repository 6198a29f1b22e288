"""The one place that reads the environment. Everything is read once, at import.

=====================  =======================================================================================
``NYBBLE_CACHE_DIR``   where compiled kernels are kept; default ``$XDG_CACHE_HOME/nybble`` or ``~/.cache/nybble``
``NYBBLE_NO_CACHE``    ``1``: compile in memory, read and write nothing on disk
``WORLD_SIZE``,        what ``torchrun`` sets: how many processes share a model, and which of them this one is;
``RANK``               they count where ``MASTER_ADDR`` says, too, how to reach the first
=====================  =======================================================================================
"""

from __future__ import annotations

import os
from pathlib import Path


def _cache_dir() -> Path:
    named = os.environ.get("NYBBLE_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "nybble"


CACHE_DIR: Path = _cache_dir()
USE_CACHE: bool = os.environ.get("NYBBLE_NO_CACHE", "") in ("", "0")


def _process() -> tuple[int, int]:
    named = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if "MASTER_ADDR" not in os.environ or not all(text.isdecimal() for text in named):
        return 0, 1
    return int(named[0]), max(1, int(named[1]))


PROCESS, PROCESSES = _process()
