"""Choices that were measured on this machine by ``nybble tune``, preferred to predictions.

One JSON file a kind of GPU, in the cache folder, of one version of the kernels. A file that is damaged, of another
version or of another GPU is left alone and ignored, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import nybble
from nybble.runtime import settings
from nybble.runtime.choice import Candidate
from nybble.runtime.files import write_whole
from nybble.runtime.hardware import Hardware
from nybble.runtime.source import DEVICE, PACKAGE

FORMAT = 1


def path(hardware: Hardware) -> Path:
    """The file of a kind of GPU."""
    return settings.CACHE_DIR / "tuned" / f"{hardware.slug}.json"


@cache
def version() -> str:
    """Nybble's version and a digest of its kernels: a choice is of the code that was measured."""
    digest = hashlib.sha256()
    for file in sorted((*PACKAGE.glob("ops/*/*.cu"), *DEVICE.glob("*.cuh"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return f"{nybble.__version__}+{digest.hexdigest()[:12]}"


_READ: dict[Path, dict[str, Candidate]] = {}
"""Each file is read once a process, or after it was written by it."""


def lookup(hardware: Hardware, key: str) -> Candidate | None:
    """What was measured to be the fastest for a request, or ``None``."""
    return read(hardware).get(key)


def read(hardware: Hardware) -> dict[str, Candidate]:
    """All of a GPU's choices by request; empty, with a warning, where the file can't be used."""
    file = path(hardware)
    if file not in _READ:
        _READ[file] = _parse(file, hardware) if settings.USE_CACHE else {}
    return _READ[file]


def write(hardware: Hardware, choices: dict[str, Candidate]) -> Path:
    """Add choices to a GPU's file; what it has of the same requests is replaced.

    Raises:
        OSError: the folder can't be written. The file is then as it was.
    """
    file = path(hardware)
    with warnings.catch_warnings():  # what can't be used is replaced; what another process added is kept
        warnings.simplefilter("ignore")
        kept = _parse(file, hardware) | choices
    text = {
        "format": FORMAT,
        "gpu": hardware.name,
        "nybble": version(),
        "choices": {
            key: {"variant": one.variant, "config": dict(one.config), "us": one.us} for key, one in kept.items()
        },
    }
    write_whole(file, json.dumps(text, indent=1).encode())
    _READ[file] = kept
    return file


def forget(hardware: Hardware) -> bool:
    """Delete a GPU's file; whether there was one."""
    file = path(hardware)
    there = file.exists()
    file.unlink(missing_ok=True)
    _READ.pop(file, None)
    return there


def _parse(file: Path, hardware: Hardware) -> dict[str, Candidate]:
    try:
        text = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _ignored(file, f"can't be read ({error})")
    try:
        if text["format"] != FORMAT or text["nybble"] != version():
            return _ignored(file, f"is of other kernels ({text['nybble']}, these are {version()})")
        if text["gpu"] != hardware.name:
            return _ignored(file, f"is of another GPU ({text['gpu']})")
        return {key: _candidate(one) for key, one in text["choices"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return _ignored(file, f"is damaged ({type(error).__name__}: {error})")


def _candidate(one: dict[str, Any]) -> Candidate:
    variant, us = one["variant"], float(one["us"])
    config = tuple((str(name), value) for name, value in one["config"].items())
    if not isinstance(variant, str) or not all(type(value) is int for _, value in config):
        raise ValueError(f"a choice that is none: {one}")
    return Candidate(variant, config, us, "measured here by `nybble tune`")


def _ignored(file: Path, why: str) -> dict[str, Candidate]:
    warnings.warn(
        f"nybble: {file} {why}; predictions are used instead. `nybble tune` measures again.",
        RuntimeWarning,
        stacklevel=3,
    )
    return {}
