"""What every test gets: the GPU marker, seeds, no network, and a kernel cache of its own where it asks for one.

Imports nothing heavy, so collecting a test that needs no torch stays instant.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

GPU_TESTS = Path(__file__).parent / "gpu"

# Before transformers is imported by anything: a test that would reach for a hub must fail, here as on any machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail, rather than skip, the gpu tests where there is no CUDA device"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything in tests/gpu, before ``-m`` selects, and refuses the marker elsewhere.

    ``make test-gpu`` runs that folder only, so a GPU test outside of it would never run.
    """
    for item in items:
        in_folder = item.path.is_relative_to(GPU_TESTS)
        if in_folder:
            item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            raise pytest.UsageError(f"{item.nodeid}: a test marked gpu belongs in tests/gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        reason = "no CUDA device"
        if item.config.getoption("--require-gpu"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers for a test whether it runs alone or with the others."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions, whatever this machine was tuned to. Only where the operations are imported: most tests need none."""
    if "nybble.runtime.tuned" in sys.modules:
        keep_choices_in(Path(__file__).parent / "a folder that is not there", monkeypatch)


def keep_choices_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.runtime import tuned

    monkeypatch.setattr(tuned, "path", lambda hardware: folder / "tuned" / f"{hardware.slug}.json")
    monkeypatch.setattr(tuned, "_READ", {})


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of this test's own measured choices, empty at first, though the machine may keep none."""
    keep_choices_in(tmp_path, monkeypatch)
    monkeypatch.setattr("nybble.runtime.settings.USE_CACHE", True)
    return tmp_path / "tuned"


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty kernel cache of this test's own. Tests that only need kernels do without it and share the user's."""
    from nybble.runtime import build

    monkeypatch.setattr("nybble.runtime.settings.CACHE_DIR", tmp_path)
    monkeypatch.setattr("nybble.runtime.settings.USE_CACHE", True)
    build._disk.cache_clear()
    yield tmp_path
    build._disk.cache_clear()
