"""The compile gate: every specialisation of every kernel builds, on a machine without a GPU, with the registers and
spills of the committed snapshot. ``make snapshot`` writes it anew; read its diff before you commit it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from nybble.ops import OPERATIONS
from nybble.runtime.build import compile_kernel
from nybble.runtime.hardware import A100, H200, Hardware
from nybble.runtime.source import Source

SNAPSHOT = Path(__file__).parent / "kernel_snapshot.json"
TARGETS = (H200, A100)


PARTS = 8
"""Tests that a gate is cut into, so that several workers share it."""


def sources(operation: str, card: Hardware) -> list[Source]:
    return importlib.import_module(f"nybble.ops.{operation}.cases").gate(card)


def gate(operation: str, card: Hardware, part: int = 0, parts: int = 1) -> dict[str, list[int]]:
    """``[registers, spill bytes, stack bytes, static shared bytes]`` by specialisation, of every ``parts``-th one."""
    mine = sources(operation, card)[part::parts]
    return {source.label: list(compile_kernel(source, card.arch).resources) for source in mine}


def nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("card", TARGETS, ids=lambda card: card.arch)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_build_without_spills_as_in_the_snapshot(operation: str, card: Hardware, part: int) -> None:
    built = gate(operation, card, part, PARTS)
    spilling = {label: resources for label, resources in built.items() if resources[1]}
    assert not spilling, "these specialisations spill registers to memory"
    committed = json.loads(SNAPSHOT.read_text())
    if committed["nvrtc"] != nvrtc_version():
        pytest.skip(f"built without spills; the snapshot is of NVRTC {committed['nvrtc']}, here is {nvrtc_version()}")
    kept = committed["kernels"][operation][card.arch]
    assert built == {label: kept.get(label) for label in built}, "run `make snapshot` and read its diff"


@pytest.mark.parametrize("card", TARGETS, ids=lambda card: card.arch)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_snapshot_is_of_the_kernels_there_are(operation: str, card: Hardware) -> None:
    labels = [source.label for source in sources(operation, card)]
    assert labels or card is not H200, "a gate that builds nothing proves nothing"
    assert set(labels) == set(json.loads(SNAPSHOT.read_text())["kernels"][operation][card.arch]), "run `make snapshot`"


def test_every_kernel_file_is_in_the_gate() -> None:
    cards = [importlib.import_module(f"nybble.ops.{operation}.cases").gate(H200) for operation in OPERATIONS]
    built = {source.path.resolve() for sources in cards for source in sources}
    package = Path(importlib.import_module("nybble").__file__ or "").parent
    assert built == {path.resolve() for path in package.glob("ops/*/*.cu")}
