"""The one place that reads the environment. Everything is read once, at import.

=====================  =======================================================================================
``NYBBLE_CACHE_DIR``   where compiled kernels are kept; default ``$XDG_CACHE_HOME/nybble`` or ``~/.cache/nybble``
``NYBBLE_NO_CACHE``    ``1``: compile in memory, read and write nothing on disk
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
