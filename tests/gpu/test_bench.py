"""What measures on a GPU, run on one: that it finds right what is right, and that a choice it keeps is taken. No test
here looks at how long anything took."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks import check_case

from nybble.bench import roofline, single, tune
from nybble.ops.w4a16 import cost, op
from nybble.ops.w4a16.cases import W4A16Case
from nybble.runtime import tuned
from nybble.runtime.hardware import current

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def plans(choices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No choices but those of the test, and no plan made before. Compiled kernels stay where they are."""
    monkeypatch.setattr(op, "_PLANS", {})


@pytest.mark.parametrize(
    "case",
    [
        W4A16Case(1, 512, 1024),
        W4A16Case(40, 520, 1032, 64, torch.bfloat16, symmetric=False, act_order=True, bias=True),
        W4A16Case(300, 512, 1024, activation="silu_mul"),
        W4A16Case(4, 512, 1024, norm="rmsnorm", residual=True),
    ],
    ids=str,
)
def test_every_candidate_is_right_and_the_kept_one_is_taken(case: W4A16Case) -> None:
    card = current()
    assert card is not None
    (result,) = tune.tune([case], device=CUDA, hardware=card, rounds=2)
    assert {one.candidate for one in result.tried if one.us is None} == set(), [one.why for one in result.tried]
    assert result.picked is not None
    tuned._READ.clear()
    assert not op._PLANS  # forcing a candidate left nothing behind
    check_case(case, "cuda")
    built = [ready if isinstance(ready, str) else ready.variant for ready in op._PLANS.values()]
    assert built[0] == result.picked.variant
    assert op.choose(case.spec(), card).pick.config == result.picked.config


def test_a_choice_for_other_rows_changes_nothing() -> None:
    card = current()
    assert card is not None
    list(tune.tune([W4A16Case(64, 512, 1024)], device=CUDA, hardware=card, rounds=2))
    other = W4A16Case(8, 512, 1024)
    assert op.choose(other.spec(), card).pick == cost.choose(other.spec(), card).pick


def test_one_product_by_itself() -> None:
    card, peaks = current(), roofline.peaks(0)
    found = single.measure(W4A16Case(33, 520, 1032), device=CUDA, hardware=card, peaks=peaks, rounds=2)
    assert (found.wrong, found.finite, len(found.first)) == ("", True, 10)
    assert [point.m for point in found.sweep] == list(single.SWEEP)
    assert all(point.us is not None and not point.impossible for point in (found.point, *found.sweep))
    assert {point.kernel for point in found.sweep} <= {"mma", "stream", "digits", "wgmma", "gemm"}


def test_peaks_are_what_the_data_sheet_says() -> None:
    card, peaks = current(), roofline.peaks(0)
    assert card is not None
    if card.slug == "h200":  # 4.8 TB/s; 989 TFLOP/s at 1.83 GHz, and the clock goes up to 1.98
        assert 4.5 < peaks.read_tbps < 5.1
        assert 950 < peaks.half_tflops < 1100
    else:
        assert peaks.read_tbps >= 0.0
        assert peaks.half_tflops >= 0.0
