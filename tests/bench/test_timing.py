"""What keeps inputs cold, and how samples become three numbers. Nothing here measures a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

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


class FakeCuda:
    """Enough of ``torch.cuda`` to drive the CUDA path on a CPU: a graph runs again what was captured, events tick."""

    def __init__(self) -> None:
        self.capturing: list | None = None
        self.ticks = self.slow = 0
        self.replays: list[object] = []
        outer = self

        class CUDAGraph:
            def __init__(self) -> None:
                self.calls = 0

            def replay(self) -> None:
                outer.replays.append(self)
                outer.ticks += 10 if len(outer.replays) > outer.slow else 1000

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0

            def record(self) -> None:
                self.at = outer.ticks

            def elapsed_time(self, end) -> float:
                return float(end.at - self.at)

        class Graph:
            def __init__(self, graph, capture_error_mode: str) -> None:
                outer.capturing = []

            def __enter__(self) -> None: ...

            def __exit__(self, *error) -> None:
                outer.capturing = None

        self.CUDAGraph, self.Event, self.graph = CUDAGraph, Event, Graph

    def install(self, monkeypatch) -> None:
        class Stream:
            def wait_stream(self, other) -> None: ...

        for name, value in {
            "CUDAGraph": self.CUDAGraph,
            "Event": self.Event,
            "graph": self.graph,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *size, device=None, dtype=None: ones(8))


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def on_cuda(calls, *, rounds=3) -> list[Any]:
    turns = timing.Rotation(copies=4, calls=8, flush=True)
    return timing._time_cuda(calls, turns, device=torch.device("cpu"), l2_bytes=0, rounds=rounds)


def test_a_graph_calls_on_each_copy_in_turn_and_never_on_the_original(cuda):
    original, seen = torch.zeros(2), []

    def call(x: torch.Tensor) -> None:
        if cuda.capturing is not None:
            seen.append(x.data_ptr())

    (measured,) = on_cuda([timing.Call(call, (original,))])
    assert len(seen) == 8
    assert seen[:4] == seen[4:]
    assert len({*seen, original.data_ptr()}) == 5
    assert measured.how == "graph"
    assert measured.us == 10 * 1e3 / 8  # ten milliseconds by the event's clock, for eight calls
    assert measured.host_us > 0


def test_providers_are_replayed_in_turn(cuda):
    first, second = on_cuda([timing.Call(torch.neg, (torch.ones(1),)), timing.Call(torch.abs, (torch.ones(1),))])
    assert first.how == second.how == "graph"
    one, other = dict.fromkeys(cuda.replays)
    assert cuda.replays == [one, other, other, one] * 2 + [one, other]


def test_the_first_rounds_only_warm_up(cuda):
    cuda.slow = 2
    (measured,) = on_cuda([timing.Call(torch.neg, (torch.ones(1),))])
    assert measured.us_p10 == measured.us == measured.us_p90 == 10 * 1e3 / 8


def test_a_call_that_cannot_be_captured_is_timed_with_events(cuda):
    def call(x: torch.Tensor) -> None:
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        cuda.ticks += 1

    (measured,) = on_cuda([timing.Call(call, (torch.ones(1),))])
    assert measured.how == "events"
    assert measured.us == 1e3
    assert measured.why == "RuntimeError: operation not permitted when stream is capturing"
    assert cuda.replays == []


def test_a_call_that_fails_has_its_reason_and_stops_no_other(cuda):
    def call(x: torch.Tensor) -> None:
        raise RuntimeError("no kernel image")

    failed, right = on_cuda([timing.Call(call, (torch.ones(1),)), timing.Call(torch.neg, (torch.ones(1),))])
    assert failed == "RuntimeError: no kernel image"
    assert right.how == "graph"
