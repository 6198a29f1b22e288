"""Compile a kernel with NVRTC, once: binaries are kept on disk under a digest of all that went into them.

No nvcc, no host compiler, no GPU: the target is a name such as ``sm_90a``. The cache is cuda.core's
``FileStreamProgramCache`` (each entry written beside and renamed, so two processes never see half of one); its key
covers the text with its constants, the options, the NVRTC version and ``source.header_digest``.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from nybble.runtime import settings, source
from nybble.runtime.errors import CompileError

MAX_CACHE_BYTES = 512 << 20
DEFINES: list[str] = []
"""Macros of every kernel, for tests/gpu/sanitize.py."""


class Resources(NamedTuple):
    """What ptxas reports of a kernel: registers a thread, bytes spilled, stack frame, static shared memory."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


class Binary(NamedTuple):
    """A compiled kernel: the cubin, its entry point and its resources."""

    cubin: bytes
    entry: str
    resources: Resources


def compile_kernel(kernel: source.Source, arch: str) -> Binary:
    """The kernel for ``arch``, from the cache or from NVRTC.

    Args:
        kernel: file and constants.
        arch: an NVRTC target such as ``"sm_90a"`` or ``"sm_80"``.

    Raises:
        CompileError: NVRTC refused it; the text is the compiler's, naming the real file and line.
    """
    from cuda.core.utils import make_program_cache_key

    options = _options(arch)
    text = kernel.text()
    key = make_program_cache_key(
        code=text, code_type="c++", options=options, target_type="cubin", extra_digest=source.header_digest()
    )
    stored = _read(key)
    if stored is not None:
        return Binary(stored[1], kernel.entry, stored[0])
    binary = _compile(kernel, text, options)
    _write(key, binary)
    return binary


def _options(arch: str) -> Any:
    return import_module("cuda.core").ProgramOptions(
        arch=arch,
        std="c++17",
        define_macro=DEFINES or None,
        lineinfo=True,
        include_path=list(source.include_paths()),
        ptxas_options=["-v"],
        device_as_default_execution_space=True,
    )


def _compile(kernel: source.Source, text: str, options: Any) -> Binary:
    log = io.StringIO()
    try:
        code = import_module("cuda.core").Program(text, "c++", options).compile("cubin", logs=log)
    except Exception as error:
        report = log.getvalue().strip() or str(error)
        raise CompileError(f"{kernel.label}: {options.arch}: NVRTC refused this kernel:\n{report}") from error
    return Binary(bytes(code.code), kernel.entry, _resources(log.getvalue()))


def _resources(log: str) -> Resources:
    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found.group(1)) if found else 0

    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes smem"),
    )


# The disk cache. An entry is a SHA-256, the resources as one line of JSON, and the cubin: a damaged entry is noticed
# before it reaches the driver. Whatever is wrong with the folder costs a warning and a compile, never the call.


@cache
def _disk() -> Any:
    if not settings.USE_CACHE:
        return None
    from cuda.core.utils import FileStreamProgramCache

    try:
        return FileStreamProgramCache(settings.CACHE_DIR / "kernels", max_size_bytes=MAX_CACHE_BYTES)
    except OSError as error:
        _warn(f"can't be used ({error})")
        return None


def _read(key: bytes) -> tuple[Resources, bytes] | None:
    disk = _disk()
    if disk is None:
        return None
    try:
        entry = disk.get(key)
    except OSError as error:
        _warn(f"can't be read ({error})")
        return None
    if entry is None:
        return None
    digest, payload = entry[:32], entry[32:]
    if hashlib.sha256(payload).digest() != digest:
        _warn("holds a damaged entry")
        return None
    line, _, cubin = payload.partition(b"\n")
    return Resources(*json.loads(line)), cubin


def _write(key: bytes, binary: Binary) -> None:
    disk = _disk()
    if disk is None:
        return
    payload = json.dumps(binary.resources).encode() + b"\n" + binary.cubin
    try:
        disk[key] = hashlib.sha256(payload).digest() + payload
    except OSError as error:
        _warn(f"can't be written ({error})")


def _warn(what: str) -> None:
    warnings.warn(
        f"nybble: the kernel cache {settings.CACHE_DIR} {what}; compiling instead. "
        "Set NYBBLE_CACHE_DIR to a writable folder, or delete this one.",
        RuntimeWarning,
        stacklevel=4,
    )
