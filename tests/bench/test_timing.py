"""What keeps inputs cold, and how samples become three numbers. Nothing here measures a time."""

from __future__ import annotations

import pytest
import torch

from nybble.bench import timing

L2 = 60 << 20


def test_the_copies_together_exceed_four_times_the_cache_and_256_mb():
    turns = timing.rotation(8_650_000, L2, 2.0)
    assert turns.copies * 8_650_000 >= max(4 * L2, 256 << 20)
    assert (turns.copies - 1) * 8_650_000 < max(4 * L2, 256 << 20)
    assert not turns.flush
    assert turns.calls % turns.copies == 0


def test_a_graph_of_a_fast_call_holds_many_calls_and_of_a_slow_one_few():
    assert timing.rotation(8_650_000, L2, 2.0).calls >= 200
    slow = timing.rotation(1 << 30, L2, 3000.0)
    assert slow.copies == 2
    assert slow.calls == 4


def test_inputs_too_small_to_fill_the_cache_have_a_copy_for_every_call_and_a_flush():
    turns = timing.rotation(15_000, L2, 0.004)
    assert turns == timing.Rotation(timing.MAX_COPIES, timing.MAX_COPIES, True)


@pytest.mark.parametrize("samples", [[5.0, 1.0, 3.0, 2.0, 4.0], [1.0] * 3, [9.0, 1.0]])
def test_percentiles_are_in_order(samples):
    median, low, high = timing.spread(samples)
    assert min(samples) <= low <= median <= high <= max(samples)


def test_the_spread_of_known_samples():
    assert timing.spread([float(value) for value in range(11)]) == (5.0, 1.0, 9.0)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)


def test_every_call_on_a_cpu_gets_every_round():
    seen = [0, 0]

    def count(index: int) -> None:
        seen[index] += 1

    calls = [timing.Call(count, (0,)), timing.Call(count, (1,))]
    timings = timing.time_calls(calls, device=torch.device("cpu"), rounds=4)
    assert all(isinstance(t, timing.Timing) and t.how == "wall" for t in timings)
    assert min(seen) >= 4


def test_one_line_of_an_error():
    assert timing.one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert timing.one_line(KeyError()) == "KeyError"


def test_nothing_to_time_is_nothing_timed():
    assert timing.time_calls([], device=torch.device("cpu")) == []
