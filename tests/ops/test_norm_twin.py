"""The norm family's Triton twin: in Triton's interpreter against PyTorch in float64, and compiled without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nybble.ops import norm as package
from nybble.ops.norm import cost
from nybble.ops.norm.cases import DTYPES, EPS, FUNCTIONS, NormCase

TWIN = "nybble.ops.norm.twin"


def _forget() -> None:
    sys.modules.pop(TWIN, None)
    vars(package).pop("twin", None)


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """The twin as Triton's interpreter runs it; a later import, in another mode, starts afresh."""
    pytest.importorskip("triton", reason="the twin needs Triton, which is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _forget()
        yield
        _forget()


def twin() -> Any:
    return importlib.import_module(TWIN)


class TiledCase(NormCase):
    """A case that runs with a tile of the test's choice, not the cost model's."""

    config: dict[str, int]

    def bind(self, inputs: dict[str, Tensor], variant: str = "auto") -> Callable[[], Any]:
        tensors = list(inputs.values())
        rows = tensors[: self.form.addends + self.form.after]
        after = rows.pop() if self.form.after else None
        pairs = [(inputs[weight], inputs.get(bias)) for weight, bias in self.pairs]
        form = {"rms": self.form.rms, "store_sum": self.form.store_sum}
        return lambda: twin().norm(rows, pairs, after, EPS, **form, config=self.config)


def check(case: NormCase, **options: Any) -> tuple[Tensor, ...]:
    return check_case(case, variant="triton", **options)


def check_with(config: dict[str, int], case: NormCase, **options: Any) -> tuple[Tensor, ...]:
    """With constants that the cost model would not choose for so small a case."""
    chosen = TiledCase(**vars(case))
    object.__setattr__(chosen, "config", config)
    return check_case(chosen, **options)


def tile(hidden: int, rows: int, dtype: torch.dtype) -> dict[str, int]:
    return cost.tile(NormCase("rmsnorm", rows, hidden, dtype).spec())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 8), (2, 2561), (5, 4096), (0, 64)])
def test_matches_float64(function: str, rows: int, hidden: int, dtype: torch.dtype) -> None:
    check(NormCase(function, rows, hidden, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["layernorm_residual", "add_rmsnorm"])
def test_a_row_too_wide_for_registers(function: str, dtype: torch.dtype) -> None:
    assert tile(65536, 1, dtype)["BLOCK"] < 65536
    check(NormCase(function, 1, 65536, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_large_mean_keeps_its_digits(function: str, dtype: torch.dtype) -> None:
    """E[x^2] - E[x]^2 in fp32 is wrong by a factor here; in one pass and in several."""
    case = NormCase(function, 4, 4096, dtype, mean=1e4)
    check(case)
    check_with({"BLOCK": 1024, "WARPS": 4, "ROWS": 1}, case)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("hidden", [33, 57])
def test_padding_stays_out_of_the_statistics(hidden: int, block: int) -> None:
    """The first mean is off by a tenth of the deviation here: lanes beyond the row, if counted, would show."""
    case = NormCase("layernorm", 8, hidden, torch.float32, mean=1e6, deviation=0.25)
    check_with({"BLOCK": block, "WARPS": 1, "ROWS": 2}, case)


def test_no_rows_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of no programs is an error on a GPU."""
    monkeypatch.setattr(twin(), "_norm_kernel", None)
    check(NormCase("add_dual_layernorm", 0, 64, torch.float16))


@settings(max_examples=25, deadline=None)
@given(
    function=st.sampled_from(FUNCTIONS),
    rows=st.integers(0, 9),
    hidden=st.integers(1, 700),
    block=st.sampled_from([16, 64, 1024]),
    together=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**20),
    deviation=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_any_shape_and_tile(
    function: str, rows: int, hidden: int, block: int, together: int, seed: int, deviation: float
) -> None:
    case = NormCase(function, rows, hidden, torch.float32, deviation=deviation)
    check_with({"BLOCK": block, "WARPS": 1, "ROWS": together}, case, seed=seed)


@pytest.mark.parametrize("block", [16, 64])
def test_bias_may_be_missing(block: int) -> None:
    config = {"BLOCK": block, "WARPS": 1, "ROWS": 1}
    x, zeros, weights = torch.randn(3, 40), torch.zeros(40), [torch.randn(40), torch.randn(40)]
    form = {"rms": False, "store_sum": False, "config": config}
    without = twin().norm([x], [(w, None) for w in weights], None, EPS, **form)
    given_zeros = twin().norm([x], [(w, zeros) for w in weights], None, EPS, **form)
    assert len(without) == len(given_zeros) == 2
    for got, want in zip(without, given_zeros, strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, for the NaN
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("rms", [False, True])
def test_nan_and_inf_stay_in_their_row(rms: bool, block: int) -> None:
    """Four rows in one program."""
    x, pairs = torch.randn(4, 40), [(torch.ones(40), None)]
    form = {"rms": rms, "store_sum": False, "config": {"BLOCK": block, "WARPS": 1, "ROWS": 4}}
    (clean,) = twin().norm([x], pairs, None, EPS, **form)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    (got,) = twin().norm([x], pairs, None, EPS, **form)
    assert torch.equal(got[[0, 3]], clean[[0, 3]])
    assert got[1].isnan().all()
    assert got[2].isnan().any() if rms else got[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_is_rounded_once_to_nearest_even(dtype: torch.dtype) -> None:
    """All of them ties: an even neighbour above, below, and one that carries into the exponent."""
    half = torch.finfo(dtype).eps / 2
    x = torch.tensor([1.0, 1.0 + 2 * half, 2.0 - 2 * half, -1.0 - 2 * half], dtype=dtype)
    residual = torch.tensor([half, half, half, -half], dtype=dtype)
    config = tile(4, 1, dtype)
    ones = torch.ones(4, dtype=dtype)
    _, h = twin().norm([x, residual], [(ones, None)], None, EPS, rms=True, store_sum=True, config=config)
    assert h.tolist() == [1.0, 1.0 + 4 * half, 2.0, -1.0 - 4 * half]


def test_inputs_are_left_alone_and_eps_is_used() -> None:
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    before, ones = x.clone(), torch.ones(24, dtype=torch.bfloat16)
    config = tile(24, 3, torch.bfloat16)
    (y,) = twin().norm([x], [(ones, None)], None, 3.0, rms=True, store_sum=False, config=config)
    assert torch.equal(x, before)
    wide = x.double()
    torch.testing.assert_close(
        y.double(), wide / (wide.square().mean(-1, keepdim=True) + 3.0).sqrt(), rtol=4e-3, atol=0
    )


@given(hidden=st.integers(1, 1 << 20), rows=st.integers(1, 1 << 24), dtype=st.sampled_from(DTYPES))
def test_tiles_are_what_triton_takes(hidden: int, rows: int, dtype: torch.dtype) -> None:
    config = tile(hidden, rows, dtype)
    assert set(config) == {"BLOCK", "WARPS", "ROWS"}
    for name, limit in (("BLOCK", 1 << 20), ("WARPS", 16), ("ROWS", 1 << 20)):
        assert 1 <= config[name] <= limit
        assert config[name].bit_count() == 1, f"{name} is no power of two: {config}"
    if config["BLOCK"] < hidden:
        assert hidden > 16384
    else:
        assert config["BLOCK"] // 2 < hidden
    assert config["BLOCK"] * config["ROWS"] <= 32 * 32 * config["WARPS"], "more than 32 values a thread"
    assert config["ROWS"] == 1 or rows // config["ROWS"] >= 512, "rows put together before the GPU is full"


COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
import torch
from nybble.ops.norm import twin
from nybble.ops.norm.cost import FORMS, Spec, tile

kernel = twin._norm_kernel
for function, hidden, rows, dtype in json.loads(sys.argv[1]):
    form = FORMS[function]
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    config = tile(Spec(function, kind, hidden, True, 16, rows, "triton"))
    warps = config.pop("WARPS")
    constants = {**form._asdict(), "bias": not form.rms, "hidden": hidden}
    constants = {name.upper(): value for name, value in constants.items()} | config
    dual = form.norms == 2
    absent = {"x1": form.addends < 2, "x2": form.addends < 3, "after": not form.after, "b1": form.rms,
              "w2": not dual, "b2": not dual, "y2": not dual, "total": not form.store_sum}
    constants |= {name: None for name, unused in absent.items() if unused}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        scalar = {"rows": "i32", "eps": "fp32"}.get(name)
        signature[name] = "constexpr" if name in constants else scalar or "*" + dtype
        if signature[name][0] == "*":
            aligned[(i,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    ptx = Path(tempfile.mkdtemp()) / "norm.ptx"
    ptx.write_text(built.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(json.dumps([
        int(re.search(r"Used (\\d+) registers", log)[1]),
        sum(map(int, re.findall(r"(\\d+) bytes spill", log))),
        max(int(n) for n in re.findall(r"ld\\.global\\S*\\.v(\\d)\\.b32", built.asm["ptx"]) or ["1"]),
    ]))
"""

COMPILED = [
    ("layernorm", 4096, 4096, "fp16"),
    ("rmsnorm", 16384, 64, "fp32"),
    ("layernorm_residual", 16384, 4096, "fp16"),
    ("add_layernorm", 2560, 8, "fp16"),
    ("add_rmsnorm", 65536, 64, "fp16"),
    ("add_dual_layernorm", 2560, 4096, "bf16"),
    ("add_dual_layernorm", 16384, 64, "fp32"),
    ("add_dual_layernorm", 65536, 64, "fp32"),
]


def test_compiles_for_hopper_without_spills(tmp_path: Path) -> None:
    """In an interpreter of its own, because here the twin is interpreted; nothing of it needs a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", COMPILE, json.dumps(COMPILED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for case, line in zip(COMPILED, done.stdout.splitlines(), strict=True):
        registers, spilled, words = json.loads(line)
        assert 0 < registers <= 128, case
        assert spilled == 0, f"{case}: {spilled} bytes spilled"
        assert words == 4, f"{case}: rows are not read in 16-byte accesses"
