"""One product by itself: what the report says, and what it warns of."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nybble.bench import single
from nybble.bench.roofline import Peaks
from nybble.bench.timing import Call, Timing
from nybble.cli import app
from nybble.ops.w4a16.cases import W4A16Case

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call takes 2 us; the rows that were timed."""
    rows: list[int] = []

    def time_calls(calls: list[Call], **_: Any) -> list[Timing]:
        rows.append(calls[0].arguments[0].x.shape[0])
        return [Timing(2.0, 2.0, 2.0, None, "wall")]

    monkeypatch.setattr(single, "time_calls", time_calls)
    return rows


def test_the_report_of_a_product(timed: list[int]) -> None:
    case = W4A16Case(32, 128, 256, 64)
    found = single.measure(case, device=CPU, hardware=None, peaks=None)
    assert sorted(timed) == sorted(single.SWEEP)  # 32 rows are timed once
    inputs = case.make()
    y, truth = case.run(inputs)[0], case.truth(inputs)[0]
    assert found.first == [(float(y[0, i]), float(truth[0, i])) for i in range(10)]
    assert found.mean == pytest.approx(float(y.double().mean()))
    assert (found.nonzero, found.finite, found.wrong) == (float((y != 0).sum()) / y.numel(), True, "")
    assert found.point.tflops == pytest.approx(2 * 32 * 128 * 256 / 2e-6 / 1e12)
    assert found.point.gbps == pytest.approx(case.bytes / 2e-6 / 1e9)
    text = "\n".join(single.lines(found, "cpu", ""))
    assert "M 32  N 128  K 256  group size 64" in text
    assert "kernel reference" in text
    assert "time 2.00 us" in text


def test_rows_narrower_than_what_is_shown(timed: list[int]) -> None:
    assert len(single.measure(W4A16Case(3, 8, 64), device=CPU, hardware=None, peaks=None).first) == 8


def test_no_rows_at_all(timed: list[int]) -> None:
    found = single.measure(W4A16Case(0, 64, 64), device=CPU, hardware=None, peaks=None)
    assert (found.first, found.nonzero, found.wrong) == ([], 0.0, "")


@pytest.mark.parametrize(
    ("tflops", "gbps", "expected"),
    [
        (989.0, 4700.0, ""),
        (1071.0, 4700.0, "1071 TFLOP/s is more than this GPU's 1070: the measurement is wrong"),
        (100.0, 5000.0, "5000 GB/s is more than this GPU's 4900: the measurement is wrong"),
        (2000.0, 5000.0, "2000 TFLOP/s is more than this GPU's 1070 and 5000 GB/s is more than this GPU's 4900: the"),
    ],
)
def test_more_than_the_hardware_can_do_is_said(tflops: float, gbps: float, expected: str) -> None:
    said = single.beyond(tflops, gbps, Peaks(4.9, 1070.0))
    assert said.startswith(expected) if expected else said == ""
    assert single.beyond(tflops, gbps, Peaks(0.0, 0.0)) == ""  # a driver that does not say


def test_a_wrong_result_is_an_exit_code(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(W4A16Case, "run", lambda self, inputs, variant="auto": (torch.zeros(self.m, self.n),))
    done = CliRunner().invoke(app, ["bench", "run", "w4a16", "2", "64", "64", "--device", "cpu"])
    assert done.exit_code == 1
    assert "non-zero 0.00 %" in done.output


def test_the_command_prints_one_json_object(timed: list[int]) -> None:
    arguments = ["bench", "run", "w4a16", "5", "64", "--group-size", "32", "--device", "cpu", "--json"]
    said = json.loads(CliRunner().invoke(app, arguments).output)
    assert (said["m"], said["n"], said["k"], said["group_size"]) == (5, 64, 1024, 32)
    assert [point["m"] for point in said["sweep"]] == list(single.SWEEP)
    assert said["impossible"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["norm", "5"], "M N K are of w4a16, not of norm"),
        (["5"], "M N K are of w4a16, not of nothing"),
        (["w4a16", "5", "6", "7", "8"], "three numbers, got 4"),
        (["w4a16", "5", "--save"], "not for one product"),
        (["w4a16", "5", "100"], "n: expected a positive multiple of 8, got 100"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "run", *arguments, "--device", "cpu"])
    assert done.exit_code == 2
    assert message in done.output
