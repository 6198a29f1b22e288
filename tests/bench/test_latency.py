"""Percentiles, what a report says of a result that is wrong, and that every run is one call."""

from __future__ import annotations

import pytest
import torch

from nybble.bench import latency
from nybble.ops.norm.cases import NormCase

CASE = NormCase("rmsnorm", 2, 64, torch.float32)


def test_percentiles_are_samples():
    ordered = [float(n) for n in range(1, 1001)]
    assert [latency.percentile(ordered, p) for p in latency.PERCENTILES] == [500, 900, 950, 990]
    assert [latency.percentile([1.0, 2.0], p) for p in (0, 50, 51, 100)] == [1, 1, 2, 2]
    assert latency.percentile([3.0], 99) == 3


def test_every_run_is_one_call(monkeypatch):
    calls = []
    bind = NormCase.bind

    def counted(self, inputs, variant="auto"):
        call = bind(self, inputs, variant)
        return lambda: (calls.append(variant), call())[1]

    monkeypatch.setattr(NormCase, "bind", counted)
    measured = latency.measure(CASE, device=torch.device("cpu"), runs=50)
    assert calls == ["auto"] * (1 + latency.WARM_UP + 50)  # the first is the one that is checked
    assert measured.runs == 50
    assert measured.std >= 0


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_a_wrong_result_is_seen(monkeypatch, factor):
    run = NormCase.run
    monkeypatch.setattr(NormCase, "run", lambda self, inputs, variant="auto": (run(self, inputs)[0] * factor,))
    measured = latency.measure(CASE, device=torch.device("cpu"), runs=5, target_ms=1e9)
    assert measured.finite == (factor == 2.0)
    assert not measured.rel_err < 0.9
    said = "\n".join(latency.lines(measured))
    assert ("NOT all finite" in said) == (factor != 2.0)
