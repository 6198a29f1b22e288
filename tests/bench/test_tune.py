"""Tuning without a GPU: what is measured, kept, resumed and said. The times are made up; the results are real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nybble.bench import tune
from nybble.bench.timing import Call, Timing
from nybble.cli import app
from nybble.ops.w4a16 import cost, op
from nybble.ops.w4a16.cases import W4A16Case
from nybble.runtime import tuned
from nybble.runtime.choice import Candidate
from nybble.runtime.hardware import H200

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("choices")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """Candidates in the order they were timed; the last is the fastest."""
    seen: list[Candidate] = []

    def time_calls(calls: list[Call], **_: Any) -> list[Timing | str]:
        seen.extend(call.function.args[2] for call in calls)
        return [Timing(float(100 - i), 0.0, 0.0, None, "graph") for i in range(len(calls))]

    monkeypatch.setattr(tune, "time_calls", time_calls)
    return seen


def run(*cases: W4A16Case, **options: Any) -> list[tune.Result]:
    return list(tune.tune(cases, device=CPU, hardware=H200, **options))


def test_the_fastest_is_kept_and_preferred(timed: list[Candidate]) -> None:
    case = W4A16Case(64, 256, 512)
    (result,) = run(case)
    assert timed == cost.contenders(case.spec(), H200)
    assert len([c for c in timed if c.variant == "gemm"]) > 3
    assert result.picked is not None
    assert (result.picked.variant, result.picked.config) == (timed[-1].variant, timed[-1].config)
    tuned._READ.clear()
    chosen = case.choice(H200).pick
    assert (chosen.variant, chosen.config, chosen.us) == (timed[-1].variant, timed[-1].config, 101.0 - len(timed))
    assert chosen.reason == "measured here by `nybble tune`"
    assert case.choice(H200, "wgmma").pick.variant == "wgmma"  # a variant asked for by name is that
    for other in (W4A16Case(64, 256, 1024), W4A16Case(32, 256, 512), W4A16Case(64, 256, 512, 64)):
        assert other.choice(H200).pick == cost.choose(other.spec(), H200).pick


def test_what_is_known_is_not_measured_again(timed: list[Candidate]) -> None:
    case = W4A16Case(64, 256, 512)
    run(case)
    count = len(timed)
    (result,) = run(case)
    assert (len(timed), result.tried) == (count, [])
    assert result.picked is not None
    assert result.picked.config == timed[-1].config
    run(case, again=True)
    assert len(timed) == 2 * count


def test_an_interruption_loses_one_request(timed: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [W4A16Case(m, 256, 512) for m in (1, 2, 4)]
    steps = tune.tune(cases, device=CPU, hardware=H200)
    next(steps), next(steps)
    steps.close()
    tuned._READ.clear()
    assert set(tuned.read(H200)) == {cost.key(case.spec()) for case in cases[:2]}


def test_a_wrong_kernel_is_never_picked(timed: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    case = W4A16Case(4, 256, 512)
    real = W4A16Case.run

    def broken(self: W4A16Case, inputs: Any, variant: str = "auto") -> tuple[torch.Tensor, ...]:
        assert op._forced is not None
        candidate = op._forced[1]
        if candidate.variant == "gemm":
            raise RuntimeError("an illegal instruction")
        (y,) = real(self, inputs, variant)
        return (y + 1,) if candidate.variant == "wgmma" else (y,)

    monkeypatch.setattr(W4A16Case, "run", broken)
    (result,) = run(case)
    assert {candidate.variant for candidate in timed} == {"mma", "stream"}
    why = {one.candidate.variant: one.why for one in result.tried if one.us is None}
    assert why["gemm"] == "RuntimeError: an illegal instruction"
    assert "expected" in why["wgmma"]
    monkeypatch.setattr(W4A16Case, "run", lambda *_: (torch.zeros(1),))
    (result,) = run(case, again=True)
    assert result.picked is None
    assert tuned.lookup(H200, cost.key(case.spec())) is not None  # of the first run


def test_a_composition_is_forced_but_not_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = W4A16Case(4, 256, 512, norm="rmsnorm").spec()
    composed = Candidate("composed")
    with op.forced(spec, composed, {}):
        assert op.choose(spec, H200).pick is composed
        assert op.choose(spec.inner, H200).pick.variant != "composed"
    assert op.choose(spec, H200).pick is not composed


def test_the_key_tells_requests_apart() -> None:
    plain = W4A16Case(16, 256, 512).spec()
    others = [
        plain._replace(m=32), plain._replace(n=512), plain._replace(k=256), plain._replace(group_size=64),
        plain._replace(dtype=torch.bfloat16), plain._replace(scale_dtype=torch.float32), plain._replace(zeros=True),
        plain._replace(perm=True), plain._replace(norm="rmsnorm"), plain._replace(activation="gelu"),
        plain._replace(residual=True), plain._replace(splits=(64, 128)),
    ]  # fmt: skip
    assert len({cost.key(spec) for spec in (plain, *others)}) == len(others) + 1
    assert cost.key(plain._replace(bias=True)) == cost.key(plain)
    assert cost.key(plain) == "w4a16 m=16 n=256 k=512 group_size=128 dtype=float16 scales=float16"


def test_crossovers(timed: list[Candidate]) -> None:
    def result(m: int, variant: str | None) -> tune.Result:
        picked = None if variant is None else Candidate(variant, (), 1.0)
        return tune.Result(W4A16Case(m, 64, 64), picked, Candidate("mma"), [])

    some = [result(m, v) for m, v in ((4, "wgmma"), (1, "stream"), (2, "wgmma"), (8, None), (16, "gemm"))]
    assert tune.crossovers(some) == [(1, "stream"), (2, "wgmma"), (16, "gemm")]


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has an H200, and multiplies on its CPU."""
    real = tune.measure
    monkeypatch.setattr("nybble.cli.tune.device_of", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr("nybble.runtime.hardware.current", lambda index=None: H200)
    monkeypatch.setattr(tune, "measure", lambda case, **options: real(case, **(options | {"device": CPU})))


def test_the_command(timed: list[Candidate], with_a_gpu: None) -> None:
    arguments = ["tune", "--n", "128", "--k", "256", "--max-m", "4"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    assert "from 1 rows on" in said.output
    text = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    ((shape,), file) = text["shapes"], Path(text["file"])
    assert [row["m"] for row in shape["rows"]] == [1, 2, 4]
    assert shape["crossovers"][0][0] == 1
    assert len(json.loads(file.read_text())["choices"]) == 3
    assert CliRunner().invoke(app, ["tune", "--forget"]).exit_code == 0
    assert not file.exists()


def test_a_models_shapes_each_once(timed: list[Candidate], with_a_gpu: None) -> None:
    said = CliRunner().invoke(app, ["tune", "--model", "src/nybble/assets/demo", "--max-m", "1", "--json"])
    shapes = json.loads(said.output)["shapes"]
    assert len({(shape["n"], shape["k"]) for shape in shapes}) == len(shapes) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a shape by both --n and --k, or a folder by --model"),
        (["--n", "64"], "name a shape by both --n and --k, or a folder by --model"),
        (["--n", "64", "--k", "64", "--model", "x"], "name a shape by both --n and --k, or a folder by --model"),
        (["--n", "60", "--k", "64"], "n: expected a positive multiple of 8, got 60"),
        (["--n", "64", "--k", "64", "--group-size", "48"], "group_size: expected -1 or one of"),
    ],
)
def test_usage_errors(with_a_gpu: None, arguments: list[str], message: str) -> None:
    said = CliRunner().invoke(app, ["tune", *arguments])
    assert said.exit_code == 2
    assert message in said.output


def test_without_a_gpu_it_says_so() -> None:
    said = CliRunner().invoke(app, ["tune", "--n", "64", "--k", "64", "--device", "cpu"])
    assert said.exit_code == 1
    assert "tuning measures on the GPU that it is for" in said.output


def test_without_a_cache_it_says_so(with_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.runtime.settings.USE_CACHE", False)
    said = CliRunner().invoke(app, ["tune", "--n", "64", "--k", "64"])
    assert said.exit_code == 1
    assert "NYBBLE_NO_CACHE" in said.output
