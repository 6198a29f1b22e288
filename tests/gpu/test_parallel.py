"""Models that GPUs share: a step with the sums of all in one CUDA graph. Needs two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nybble

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


def run(*arguments: str, processes: int = 2) -> dict[str, Any]:
    """What ``python -m nybble ... --json`` says, of so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    source = str(Path(nybble.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, *launcher, "-m", "nybble", *arguments, "--json"],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("how", [(), ("--sample", "--seed", "5")], ids=["greedy", "drawn"])
def test_a_graph_gives_the_tokens_of_its_step(how: tuple[str, ...]) -> None:
    both = [run("generate", "--max-tokens", "100", "--cache", cache, *how) for cache in ("graph", "static")]
    assert [found["cache"] for found in both] == ["graph", "static"] and both[0]["no_graph_because"] == ""
    assert both[0]["tokens"] == both[1]["tokens"] and both[0]["processes"] == 2


def test_two_gpus_give_the_tokens_of_one() -> None:
    alone = run("generate", "--max-tokens", "60", "--dtype", "float32", processes=1)
    found = run("generate", "--max-tokens", "60", "--dtype", "float32")
    assert found["tokens"] == alone["tokens"] and found["cache"] == "graph"
    half = run("generate", "--max-tokens", "60", "--dtype", "float16")
    one = run("generate", "--max-tokens", "60", "--dtype", "float16", processes=1)
    assert half["tokens"][:10] == one["tokens"][:10]  # equal until a tie falls otherwise


def test_the_bench_of_one_and_two(tmp_path: Path) -> None:
    arguments = ("--shape", "llama3-8b", "--layers", "2", "--batch", "1", "--context", "64", "--tokens", "16")
    found = run("bench", "decode", *arguments, "--prompts", "128", "--save", "--results", str(tmp_path))
    assert found["wrong"] == [] and [row["processes"] for row in found["rows"]] == [1] * 4 + [2] * 4
    one, two = (next(r for r in found["rows"] if r["processes"] == n)["token_bytes"] for n in (1, 2))
    assert 0.5 <= two / one < 0.6
    assert len(next(tmp_path.rglob("decode.jsonl")).read_text().splitlines()) == 8
