"""One of the processes of test_parallel.py: ``parallel_worker.py JOB RESULTS``."""

from __future__ import annotations

import io
import json
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nybble
from nybble.cli import app
from nybble.models import load as loading
from nybble.models.ranks import Ranks, join

PROMPT = [3, 5, 7, 11, 2]


def texts(model: Any) -> dict[str, list[int]]:
    """Tokens of every way to decode."""
    found = {"unfused": list(nybble.generate(model, PROMPT, max_new_tokens=8))}
    nybble.fuse(model)
    found["fused"] = list(nybble.generate(model, PROMPT, max_new_tokens=8))
    found["static"] = list(nybble.generate(model, PROMPT, max_new_tokens=8, cache="static"))
    return found


def case(folder: str, mesh: Any) -> dict[str, Any]:
    model = nybble.load(folder, device="cpu", dtype=torch.float32, mesh=mesh)
    found: dict[str, Any] = {"layers": {}, "tokens": texts(model)}
    for name, module in model.named_modules():
        if hasattr(module, "in_features"):
            found["layers"][name] = (module.in_features, module.out_features, getattr(module, "group_size", 0))
    divided = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    parameters = [p for module in divided for p in module.parameters(recurse=False)]
    found["bytes"] = sum(p.numel() * p.element_size() for p in parameters)
    found["sums"], total = 0, Ranks.sum

    def counted(self: Ranks, x: torch.Tensor) -> torch.Tensor:
        found["sums"] += 1
        return total(self, x)

    Ranks.sum = counted
    with torch.no_grad():
        found["logits"] = model(torch.tensor([PROMPT, PROMPT[::-1]])).logits
    Ranks.sum = total
    # Each process draws numbers of its own, and ends the text where the first one does.
    for cache in ("dynamic", "static"):
        stream = nybble.generate(
            model, PROMPT, max_new_tokens=12, temperature=2.0, cache=cache, eos=list(range(0, 96, 6))
        )
        found[f"drawn {cache}"] = list(stream)
    return found


def failures(folders: dict[str, str], ranks: Any, mesh: Any) -> dict[str, str]:
    """What each process is told where one of them fails, or all do."""

    def of(work: Any) -> str:
        started = time.monotonic()
        try:
            work()
        except Exception as error:
            assert time.monotonic() - started < 20
            return f"{type(error).__name__}: {error}"
        return ""

    fill = loading._fill

    def broken(*arguments: Any) -> None:
        if ranks.rank == 1:
            raise OSError("the disk is gone")
        fill(*arguments)

    loading._fill = broken
    found = {"one": of(lambda: nybble.load(folders["any"], device="cpu", mesh=mesh))}
    loading._fill = fill
    found["heads"] = of(lambda: nybble.load(folders["heads"], device="cpu", mesh=mesh))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, to = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = join(torch.device("cpu"))
    found: dict[str, Any] = {name: case(folder, ranks.mesh) for name, folder in job["cases"].items()}
    found["failures"] = failures(job["failures"], ranks, ranks.mesh)
    rank, ranks = ranks.rank, None
    out, err, code = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            app(["generate", "--max-tokens", "4000", "--device", "cpu"], prog_name="nybble")
        except SystemExit as end:  # all have taken leave
            code = end.code
    found["refused"] = (code, out.getvalue(), err.getvalue())
    torch.save(found, to / f"{rank}.pt")
