"""Compiling and the disk cache, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nybble.runtime import build, source
from nybble.runtime.errors import CompileError

GOOD = """
static_assert(N > 0, "N must be positive");
extern "C" __global__ void scale_kernel(T* x) { x[threadIdx.x] = from_float<T>(to_float(x[threadIdx.x]) * N); }
"""


def kernel(folder: Path, text: str = GOOD, **constants: source.Constant) -> source.Source:
    path = folder / "scale.cu"
    path.write_text(text)
    source._read.cache_clear()
    return source.Source(path, tuple({"T": torch.float16, "N": 3, **constants}.items()))


def entries(cache: Path) -> list[Path]:
    return [path for path in (cache / "kernels" / "entries").rglob("*") if path.is_file()]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of what NVRTC really compiled."""
    done: list[str] = []
    real = build._compile

    def counting(wanted: source.Source, text: str, options: object) -> build.Binary:
        done.append(wanted.label)
        return real(wanted, text, options)

    monkeypatch.setattr(build, "_compile", counting)
    return done


def test_a_kernel_compiles_once_and_is_found_on_disk(kernel_cache: Path, tmp_path: Path, compiled: list[str]) -> None:
    wanted = kernel(tmp_path)
    first = build.compile_kernel(wanted, "sm_90a")
    again = build.compile_kernel(wanted, "sm_90a")
    assert first == again
    assert first.entry == "scale_kernel"
    assert first.cubin.startswith(b"\x7fELF")
    assert first.resources.registers > 0
    assert first.resources.spill_bytes == 0
    assert compiled == ["scale(T=half_t, N=3)"]
    assert len(entries(kernel_cache)) == 1


def test_everything_that_went_in_is_in_the_key(
    kernel_cache: Path, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build.compile_kernel(kernel(tmp_path), "sm_90a")
    build.compile_kernel(kernel(tmp_path, N=4), "sm_90a")
    build.compile_kernel(kernel(tmp_path, T=torch.bfloat16), "sm_90a")
    build.compile_kernel(kernel(tmp_path), "sm_80")
    build.compile_kernel(kernel(tmp_path, GOOD + "// changed\n"), "sm_90a")
    monkeypatch.setattr(source, "header_digest", lambda: b"other headers")
    build.compile_kernel(kernel(tmp_path), "sm_90a")
    assert len(compiled) == 6
    build.compile_kernel(kernel(tmp_path), "sm_90a")
    assert len(compiled) == 6


def test_an_error_names_the_real_file_and_line(kernel_cache: Path, tmp_path: Path) -> None:
    broken = kernel(tmp_path, GOOD.replace("x[threadIdx.x] =", "y[threadIdx.x] ="))
    with pytest.raises(CompileError, match=r'scale\.cu\(3\): error: identifier "y" is undefined'):
        build.compile_kernel(broken, "sm_90a")
    with pytest.raises(
        CompileError, match=r"scale\.cu\(2\): error: static assertion failed with \"N must be positive\""
    ):
        build.compile_kernel(kernel(tmp_path, N=0), "sm_90a")
    assert not entries(kernel_cache)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_entry_costs_a_warning_and_a_compile(
    kernel_cache: Path, tmp_path: Path, compiled: list[str], damage: str
) -> None:
    wanted = kernel(tmp_path)
    good = build.compile_kernel(wanted, "sm_90a")
    (entry,) = entries(kernel_cache)
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match="holds a damaged entry; compiling instead"):
        assert build.compile_kernel(wanted, "sm_90a") == good
    assert len(compiled) == 2
    assert build.compile_kernel(wanted, "sm_90a") == good  # mended
    assert len(compiled) == 2


def test_a_cache_that_is_no_folder_costs_a_warning(kernel_cache: Path, tmp_path: Path) -> None:
    (kernel_cache / "kernels").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="can't be used"):
        assert build.compile_kernel(kernel(tmp_path), "sm_90a").cubin


def test_a_cache_that_cannot_be_written_costs_a_warning(
    kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = build._disk()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(disk), "__setitem__", full)
    with pytest.warns(RuntimeWarning, match="can't be written .*No space left on device"):
        assert build.compile_kernel(kernel(tmp_path), "sm_90a").cubin


def test_two_processes_compile_at_once(tmp_path: Path) -> None:
    """Both get the kernel, and the entry they leave is whole."""
    wanted = kernel(tmp_path)
    program = (
        "import sys; from pathlib import Path; import torch\n"
        "from nybble.runtime.build import compile_kernel; from nybble.runtime.source import Source\n"
        "made = compile_kernel(Source(Path(sys.argv[1]), (('T', torch.float16), ('N', 3))), 'sm_90a')\n"
        "print(made.resources.registers)"
    )
    here = str(source.PACKAGE.parent)
    environment = {**os.environ, "NYBBLE_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": here}
    command = [sys.executable, "-W", "error", "-c", program, str(wanted.path)]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0] == said[1]
    assert len(entries(tmp_path / "cache")) == 1
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert again.stdout == said[0]


def test_no_cache_writes_nothing(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.runtime.settings.USE_CACHE", False)
    build.compile_kernel(kernel(tmp_path), "sm_90a")
    assert not entries(kernel_cache)
