"""What a launch promises: the current stream, any device, CUDA graphs and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nybble
from nybble.ops.case import Case
from nybble.ops.norm.cases import NormCase
from nybble.ops.w4a16.cases import W4A16Case

CASES: tuple[Case, ...] = (
    NormCase("add_layernorm", 16, 2560, torch.float16),
    NormCase("add_dual_layernorm", 16, 1024, torch.bfloat16),
    W4A16Case(1, 1024, 2048),
    W4A16Case(48, 1024, 2048, 64, symmetric=False),
)
BY_NAME = {"ids": lambda case: f"{case.op}-{case.function}"}


def copied(inputs: object) -> Callable[[object], None]:
    """Overwrites these inputs with others of the same shapes, in place."""

    def tensors(value: object) -> list[Tensor]:
        if isinstance(value, dict):
            return list(value.values())
        return [value.x]  # type: ignore[attr-defined]

    def fill(other: object) -> None:
        for target, source in zip(tensors(inputs), tensors(other), strict=True):
            target.copy_(source)

    return fill


@pytest.mark.parametrize("case", CASES, **BY_NAME)
def test_captures_into_a_cuda_graph(case: Case) -> None:
    inputs = case.make("cuda", 0)
    case.run(inputs)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.run(inputs)
    fill = copied(inputs)
    for seed in (1, 2):
        fill(case.make("cuda", seed))
        want = case.run(inputs)
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        for got, expected in zip(results, want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("case", CASES, **BY_NAME)
def test_runs_on_the_current_stream(case: Case) -> None:
    """A long wait on a side stream, then the input: only a launch on that stream sees it."""
    inputs, later = case.make("cuda", 0), case.make("cuda", 1)
    want = case.run(later)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        copied(inputs)(later)
        # Weights are not copied by `copied`: run with the later ones.
        results = case.run(later if isinstance(later, dict) else _with(later, inputs))
        results = case.run(inputs) if isinstance(inputs, dict) else results
    side.synchronize()
    for got, expected in zip(results, want, strict=True):
        assert torch.equal(got, expected)


def _with(weights: object, x: object) -> object:
    from dataclasses import replace

    return replace(weights, x=x.x)  # type: ignore[type-var,attr-defined]


@pytest.mark.parametrize("case", CASES, **BY_NAME)
def test_two_streams_at_once(case: Case) -> None:
    pairs = [(case.make("cuda", seed), torch.cuda.Stream()) for seed in (0, 1)]
    want = [case.run(inputs) for inputs, _ in pairs]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(50):
        for i, (inputs, stream) in enumerate(pairs):
            with torch.cuda.stream(stream):
                results[i].append(case.run(inputs))
    torch.cuda.synchronize()
    for i in (0, 1):
        for result in results[i]:
            for got, expected in zip(result, want[i], strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("case", CASES, **BY_NAME)
def test_second_device_while_the_first_is_current(case: Case) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    first, second = case.run(case.make("cuda:0", 3)), case.run(case.make("cuda:1", 3))
    assert torch.cuda.current_device() == 0
    for got, expected in zip(second, first, strict=True):
        assert got.device == torch.device("cuda:1")
        assert torch.equal(got.cpu(), expected.cpu())


@pytest.mark.parametrize("case", CASES, **BY_NAME)
def test_compiles_whole(case: Case) -> None:
    """torch.compile with its default backend, no graph break, changing rows."""
    inputs = case.make("cuda", 0)

    def step(inputs: object) -> tuple[Tensor, ...]:
        return tuple(2 * result for result in case.run(inputs))

    compiled = torch.compile(step, fullgraph=True)
    for got, expected in zip(compiled(inputs), step(inputs), strict=True):
        assert torch.equal(got, expected)


def test_compiles_whole_with_dynamic_rows() -> None:
    inputs = W4A16Case(1, 256, 512).make("cuda")
    weight = torch.ones(512, device="cuda", dtype=torch.float16)

    @torch.compile(fullgraph=True, dynamic=True)
    def step(x: Tensor) -> Tensor:
        normed, h = nybble.add_rmsnorm(x, x, weight)
        return nybble.w4a16_linear(normed, inputs.weight) + h.sum()

    for rows in (2, 5, 33):
        x = torch.randn(rows, 512, device="cuda", dtype=torch.float16) * 0.1
        normed, h = nybble.add_rmsnorm(x, x, weight)
        torch.testing.assert_close(step(x), nybble.w4a16_linear(normed, inputs.weight) + h.sum(), rtol=1e-2, atol=1e-2)
