"""The CUDA kernels themselves on a CPU: every index, fragment, barrier and cluster of them, against float64."""

from __future__ import annotations

import emulate
import pytest
import torch
from checks import within
from torch import Tensor

from nybble.formats.gguf_q4_0 import quantize_q8_1, unpack_q8_1
from nybble.ops.norm import cost as norm_cost
from nybble.ops.norm import op as norm_op
from nybble.ops.norm.cases import FUNCTIONS, NormCase
from nybble.ops.q4_0 import cost as q4_0_cost
from nybble.ops.q4_0 import op as q4_0_op
from nybble.ops.q4_0 import reference as q4_0_reference
from nybble.ops.q4_0.cases import KINDS, Q4Case, activations
from nybble.ops.w4a16 import cost
from nybble.ops.w4a16 import op as linear_op
from nybble.ops.w4a16.cases import EPS, W4A16Case
from nybble.ops.w4a16.cost import digits_shape, gemm_shapes, stream_shape, wgmma_shape
from nybble.runtime import workspace
from nybble.runtime.choice import Candidate
from nybble.runtime.hardware import H200

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ is needed to compile the kernels for a CPU")

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "case",
    [
        *(NormCase(function, 3, 320, HALF) for function in FUNCTIONS),
        NormCase("layernorm", 130, 72, HALF, mean=100.0),  # 8 threads a row, a last row that is missing in its warp
        NormCase("rmsnorm", 65, 40, FLOAT),
        NormCase("add_dual_layernorm", 2, 20000, BRAIN),  # a cluster of 4
        NormCase("rmsnorm", 2, 2561, FLOAT),  # one element an access
        NormCase("layernorm", 1, 65544, HALF, mean=1e3),  # too wide for registers
    ],
    ids=lambda case: f"{case.function}-{case.rows}x{case.hidden}",
)
def test_norm(case: NormCase) -> None:
    spec, form, inputs = case.spec(), case.form, case.make()
    # EARLY only changes when weights are asked for, by an instruction that a CPU does not have.
    config = {**norm_cost.shape(spec, H200), "EARLY": False}
    tensors: list[Tensor | None] = list(inputs.values())
    rows, vectors = tensors[: form.addends + form.after], tensors[form.addends + form.after :]
    after = rows.pop() if form.after else None
    vectors = [vectors[0], None] if form.rms else vectors
    outputs = [torch.full_like(next(iter(inputs.values())), float("nan")) for _ in range(form.norms + form.store_sum)]
    results: list[Tensor | None] = [*outputs]
    if form.norms == 1:
        results.insert(1, None)
    if not form.store_sum:
        results.append(None)
    together, cluster = int(config["ROWS"]), int(config["CLUSTER"])
    emulate.launch(
        norm_op.source(spec, tuple(config.items())),
        "q" * 11 + "nd",
        (-(-case.rows // together) * cluster, 1, 1),
        int(config["THREADS"]) * together,
        *rows,
        *[None] * (3 - len(rows)),
        after,
        *vectors,
        *[None] * (4 - len(vectors)),
        *results,
        case.rows,
        EPS,
        cluster=cluster,
    )
    within(case, inputs, tuple(outputs))


def test_mma() -> None:
    case = W4A16Case(33, 72, 200, 16, BRAIN, symmetric=False, act_order=True, bias=True)
    pick, inputs = case.choice(H200, "mma").pick, case.make()
    config, weight = dict(pick.config), inputs.weight
    y = torch.full((case.m, case.n), float("nan"), dtype=case.dtype)
    grid = (-(-case.m // config["TILE_M"]), weight.qweight.shape[0], 1)
    emulate.launch(
        linear_op.source(case.spec(), pick), "q" * 7 + "n", grid, 128 * config["SLICES"],
        inputs.x, *weight.tensors, inputs.bias, y, case.m,
    )  # fmt: skip
    within(case, inputs, (y,))


# What both kernels for few rows are tested on, and with how many workers.
FEW: list[tuple[W4A16Case, int]] = [
    (W4A16Case(1, 128, 1024), 2),
    (W4A16Case(1, 72, 200, 32), 2),  # a chunk that is not full, a strip past the end
    (W4A16Case(3, 136, 328, 16, symmetric=False, act_order=True, bias=True), 3),
    (W4A16Case(5, 128, 320, 64, bias=True, norm="layernorm"), 2),
    (W4A16Case(9, 64, 192, 64, norm="layernorm"), 1),  # blocks of the cluster with nothing to do
    (W4A16Case(1, 128, 256, bias=True, activation="gelu", residual=True), 2),
    (W4A16Case(7, 128, 256, dtype=BRAIN, bias=True, activation="gelu_tanh", residual=True), 2),
    (W4A16Case(3, 384, 256, 64, symmetric=False, bias=True, activation="silu_mul", residual=True), 5),
    (W4A16Case(1, 128, 256, symmetric=False, scale_dtype=FLOAT), 4),
]
# With constants other than the cost model's.
STREAMED: list[tuple[W4A16Case, int, dict[str, int]]] = [
    *((case, workers, {}) for case, workers in FEW),
    (W4A16Case(1, 72, 200, 32), 2, {"SLICES": 2, "AHEAD": 2}),
    (W4A16Case(8, 200, 712, 64, BRAIN, symmetric=False, bias=True), 3, {"CLUSTER": 2}),
    (W4A16Case(13, 512, 1024), 1, {"CLUSTER": 4}),
    (W4A16Case(16, 136, 456, 64, BRAIN, act_order=True, scale_dtype=HALF), 1, {}),
    (W4A16Case(61, 256, 512, 32), 1, {"WARPS_N": 4}),
    (W4A16Case(40, 128, 256, 128), 1, {"TILE_M": 32, "WARPS_N": 2, "BUFFERS": 1}),  # two tiles of rows
    (W4A16Case(2, 128, 840, 128, act_order=True, norm="rmsnorm"), 3, {"CLUSTER": 8, "SLICES": 2}),
    (W4A16Case(16, 512, 256, 64, norm="rmsnorm", activation="silu_mul"), 2, {"WARPS_N": 4}),
]
COPIED: list[tuple[W4A16Case, int, dict[str, int]]] = [
    *((case, workers, {}) for case, workers in FEW),
    (W4A16Case(8, 200, 712, 64, BRAIN, symmetric=False, bias=True), 1, {"TEAMS": 2, "SLICES": 2}),
    (W4A16Case(13, 320, 1024, 256), 1, {"SLICES": 3, "AHEAD": 2, "BUFFERS": 1}),
    (W4A16Case(16, 136, 456, 64, BRAIN, act_order=True, scale_dtype=HALF), 2, {"CLUSTER": 4}),
    (W4A16Case(61, 256, 512, 32), 1, {"CLUSTER": 8, "SUM_ROWS": 16}),
    (W4A16Case(40, 128, 256, -1), 1, {"TILE_M": 32, "SUM_ROWS": 16, "BUFFERS": 1}),  # two tiles of rows
    (W4A16Case(2, 128, 840, 128, act_order=True, norm="rmsnorm"), 3, {"CLUSTER": 4}),
    (W4A16Case(12, 128, 840, 32, act_order=True, norm="layernorm"), 1, {}),
    (W4A16Case(16, 512, 256, 64, norm="rmsnorm", activation="silu_mul"), 2, {"TEAMS": 2, "SLICES": 2}),
    (W4A16Case(5, 64, 448, 16, symmetric=False, norm="rmsnorm"), 1, {"SLICES": 2}),  # half a unit at the end
]


def few(
    variant: str,
    case: W4A16Case,
    workers: int,
    changed: dict[str, int],
    splits: tuple[int, ...] = (),
    mean: float = 0.0,
) -> None:
    """Run a kernel for few rows on a case with some workers, and some constants other than the cost model's."""
    spec, inputs = case.spec()._replace(splits=splits), case.make()
    inputs.x.add_(mean)
    shapes = {"wgmma": wgmma_shape, "stream": stream_shape, "digits": digits_shape}
    chosen = shapes[variant](spec, H200)
    assert isinstance(chosen, dict)
    config = chosen | {"SHARED": 227 << 10} | changed
    weight, norm, tile, cluster = inputs.weight, inputs.norm, config.get("TILE_M", case.m), config["CLUSTER"]
    if variant != "stream":
        features, threads = 64 * config["TEAMS"], 128 * config["TEAMS"] * config["SLICES"] + 32
    else:
        features, threads = 16 * config["WARPS_N"] * config["STRIPS"], 32 * config["WARPS_N"] * config["SLICES"]
    out = case.n // 2 if case.activation == "silu_mul" else case.n
    y = torch.full((case.m, out), float("nan"), dtype=case.dtype)
    grid = (min(workers, -(-case.n // features)) * cluster, -(-case.m // tile), 1)
    x = inputs.x
    if config.get("GATHERED"):
        x = torch.full_like(inputs.x, float("nan"))
        emulate.launch(
            linear_op.gather_source(spec), "qqqn", (-(-x.numel() // (8 * linear_op.GATHER_THREADS)), 1, 1),
            linear_op.GATHER_THREADS, inputs.x, weight.perm, x, case.m,
        )  # fmt: skip
    emulate.launch(
        linear_op.source(spec, Candidate(variant, tuple(config.items()))), "q" * 10 + "nd", grid, threads,
        x, *weight.tensors, inputs.bias, inputs.residual,
        norm and norm.weight, norm and norm.bias, y, case.m, EPS,
        shared_bytes=config["SHARED"], cluster=cluster,
    )  # fmt: skip
    within(case, inputs, (joined(y, case, splits),))


def joined(y: Tensor, case: W4A16Case, splits: tuple[int, ...]) -> Tensor:
    """Planes that lie behind each other, side by side."""
    if not splits:
        return y
    ends, flat = zip((0, *splits), (*splits, case.n), strict=True), y.view(-1)
    return torch.cat([flat[case.m * a : case.m * b].view(case.m, b - a) for a, b in ends], 1)


@pytest.mark.parametrize(("case", "workers", "changed"), STREAMED, ids=lambda value: str(value)[:80])
def test_stream(case: W4A16Case, workers: int, changed: dict[str, int]) -> None:
    few("stream", case, workers, changed)


# One row by integers.
DIGITS: list[tuple[W4A16Case, int, dict[str, int]]] = [
    (W4A16Case(1, 128, 1024), 2, {}),
    (W4A16Case(1, 72, 200, 32), 2, {}),  # a chunk that is not full, a strip past the end
    (W4A16Case(1, 136, 328, 32, symmetric=False, act_order=True, bias=True), 3, {}),
    (W4A16Case(1, 128, 320, 64, bias=True, norm="layernorm"), 2, {"PER": 2}),
    (W4A16Case(1, 64, 192, 64, norm="layernorm"), 1, {}),  # blocks of the cluster with nothing to do
    (W4A16Case(1, 128, 256, bias=True, activation="gelu", residual=True), 2, {}),
    (W4A16Case(1, 192, 256, dtype=BRAIN, bias=True, activation="gelu_tanh", residual=True), 1, {"BUFFERS": 1}),
    (W4A16Case(1, 384, 256, 64, symmetric=False, bias=True, activation="silu_mul", residual=True), 3, {}),
    (W4A16Case(1, 128, 256, symmetric=False, scale_dtype=FLOAT), 4, {}),
    (W4A16Case(1, 320, 1096, 128, BRAIN, symmetric=False, bias=True), 1, {"TEAMS": 2, "PER": 2, "AHEAD": 2}),
    (W4A16Case(1, 320, 1096, 256), 1, {"SLICES": 3, "AHEAD": 2, "BUFFERS": 1}),
    (W4A16Case(1, 128, 840, -1, norm="rmsnorm"), 1, {"CLUSTER": 4, "PER": 2, "AHEAD": 2}),
    (W4A16Case(1, 128, 4104, act_order=True, norm="layernorm"), 2, {}),  # three pieces a thread
    (W4A16Case(1, 128, 9224, 32), 2, {"PER": 2, "SLICES": 1, "AHEAD": 3}),
    (
        W4A16Case(1, 256, 1096, 64, symmetric=False, act_order=True, norm="rmsnorm", activation="silu_mul"),
        1,
        {"TEAMS": 4},
    ),
]


@pytest.mark.parametrize(("case", "workers", "changed"), DIGITS, ids=str)
def test_digits(case: W4A16Case, workers: int, changed: dict[str, int]) -> None:
    few("digits", case, workers, changed)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("mean", [0.5, 4.0, 300.0])
def test_digits_of_a_row_far_from_zero(mean: float, norm: str) -> None:
    """Where the mean is most of the squares, a variance is not what is left of them."""
    few("digits", W4A16Case(1, 64, 1024, norm=norm), 1, {}, mean=mean)


@pytest.mark.parametrize(("case", "workers", "changed"), COPIED, ids=lambda value: str(value)[:80])
def test_wgmma(case: W4A16Case, workers: int, changed: dict[str, int]) -> None:
    few("wgmma", case, workers, changed)


# For many rows: a form (TILE_M, TEAMS, SLICES, CLUSTER, WAYS), stages ahead, and how many clusters.
MANY: list[tuple[W4A16Case, cost.Form, int, int]] = [
    (W4A16Case(64, 128, 512), (64, 2, 1, 1, 1, 0), 4, 1),
    (W4A16Case(61, 200, 712, 64, BRAIN, symmetric=False, bias=True), (64, 1, 1, 1, 1, 0), 2, 2),
    (W4A16Case(130, 72, 200, 32, symmetric=False, act_order=True), (64, 1, 1, 1, 1, 0), 2, 2),
    (W4A16Case(130, 256, 448, 16, symmetric=False), (64, 3, 1, 1, 1, 0), 2, 1),
    (W4A16Case(33, 256, 256, -1, residual=True), (64, 3, 1, 1, 1, 0), 2, 2),
    (W4A16Case(150, 320, 384, 256, bias=True, activation="gelu", residual=True), (128, 2, 1, 1, 1, 0), 3, 4),
    (
        W4A16Case(70, 384, 256, 64, symmetric=False, bias=True, activation="silu_mul", residual=True),
        (128, 2, 1, 1, 1, 0), 2, 2,
    ),
    (W4A16Case(20, 512, 256, activation="silu_mul"), (16, 4, 1, 1, 1, 0), 2, 1),
    (W4A16Case(100, 128, 256, scale_dtype=FLOAT), (32, 1, 1, 1, 1, 0), 2, 1),
    (W4A16Case(70, 328, 640, 64, BRAIN, bias=True), (128, 1, 1, 2, 1, 0), 3, 2),  # the last tile alone
    (W4A16Case(40, 512, 384, activation="silu_mul", residual=True), (64, 2, 1, 2, 1, 0), 2, 1),
    (W4A16Case(33, 384, 512), (64, 1, 1, 4, 1, 0), 4, 1),
    (W4A16Case(64, 192, 1024), (64, 3, 1, 2, 2, 0), 3, 1),
    (W4A16Case(50, 136, 712, 64, BRAIN, symmetric=False, bias=True), (64, 1, 2, 2, 2, 0), 2, 2),
    (W4A16Case(70, 200, 840, 256, residual=True), (32, 1, 3, 1, 1, 0), 2, 2),
    (W4A16Case(16, 512, 1024, 32, symmetric=False, activation="silu_mul"), (16, 2, 2, 2, 2, 0), 2, 1),
    (W4A16Case(60, 128, 1024, activation="gelu"), (64, 1, 1, 4, 4, 0), 2, 1),
    (W4A16Case(20, 384, 640), (16, 1, 2, 2, 1, 0), 2, 1),  # tile after tile, each block with its own slices' sums
    # Shared by units: tiles end within a worker's share, or in three of them; whole tiles follow.
    (W4A16Case(64, 448, 1024), (64, 2, 1, 1, 1, 1), 3, 3),
    (W4A16Case(61, 520, 712, symmetric=False, bias=True, residual=True), (64, 2, 1, 2, 1, 1), 2, 2),
    (W4A16Case(40, 1032, 384, 64, BRAIN, bias=True, activation="gelu"), (32, 3, 1, 1, 1, 1), 2, 5),
    (W4A16Case(40, 64, 1096), (64, 1, 1, 2, 1, 1), 2, 7),
    (W4A16Case(20, 512, 640, 32, activation="silu_mul"), (16, 2, 1, 1, 1, 1), 2, 3),
    (W4A16Case(130, 384, 256), (128, 1, 1, 1, 1, 1), 2, 5),
    # One stage a tile, and several tiles: the ring, of the size that is chosen, must hold the next tile's as well.
    (W4A16Case(40, 320, 128), (64, 1, 1, 1, 1, 0), 0, 1),
    (W4A16Case(20, 384, 256), (32, 1, 2, 1, 1, 0), 0, 1),
    (W4A16Case(150, 320, 128), (128, 1, 1, 2, 1, 0), 0, 1),
    (W4A16Case(40, 320, 128), (64, 1, 1, 1, 1, 1), 0, 2),
]  # fmt: skip


def many(case: W4A16Case, form: cost.Form, ahead: int, clusters: int, splits: tuple[int, ...] = ()) -> None:
    """Run the kernel for many rows in a form of its own."""
    spec, inputs = case.spec()._replace(splits=splits), case.make()
    found = gemm_shapes(spec, H200, (form,))
    assert not isinstance(found, str), found
    config, weight = found[0][1] | {"SHARED": 227 << 10}, inputs.weight
    config["AHEAD"] = ahead or config["AHEAD"]
    y = torch.full((case.m, case.n_out), float("nan"), dtype=case.dtype)
    x = inputs.x if weight.perm is None else inputs.x[:, weight.perm.long()]
    tile, teams, slices, cluster, ways, _ = form
    left = torch.full((workspace.FLAG_BYTES + clusters * cluster * 64 * teams * tile * 4,), 255, dtype=torch.uint8)
    left[: workspace.FLAG_BYTES] = 0
    emulate.launch(
        linear_op.source(spec, Candidate("gemm", tuple(config.items()))), "tqqqqqqqn",
        (clusters * cluster, 1, 1), 128 * teams * slices + 128, (x, tile // (cluster // ways)),
        weight.qweight, weight.scales, weight.qzeros, inputs.bias, inputs.residual, y, left, case.m,
        shared_bytes=config["SHARED"], cluster=cluster,
    )  # fmt: skip
    within(case, inputs, (joined(y, case, splits),))
    assert not left[: workspace.FLAG_BYTES].any(), "flags are lowered again"


# The same with the scale multiplied into the weight.
FOLDED: list[tuple[W4A16Case, cost.Form, int, int]] = [
    (W4A16Case(300, 128, 512), (256, 2, 1, 1, 1, 0), 2, 1),
    (W4A16Case(260, 200, 712, 64, BRAIN, symmetric=False, bias=True), (256, 1, 1, 2, 1, 0), 2, 2),
    (W4A16Case(256, 128, 456, 16, symmetric=False, activation="gelu"), (256, 1, 1, 1, 1, 0), 2, 1),
    (W4A16Case(300, 256, 512), (256, 2, 1, 1, 1, 1), 2, 3),
    (W4A16Case(1300, 200, 256), (256, 1, 1, 1, 1, 0), 2, 3),  # a band of four tiles of rows, and one of two
    (W4A16Case(260, 520, 968, 64, BRAIN, bias=True), (256, 2, 1, 2, 1, 1), 2, 3),
    (W4A16Case(200, 256, 384, 256, activation="silu_mul", residual=True), (256, 2, 1, 1, 1, 0), 3, 1),
    (W4A16Case(270, 72, 1024, -1, scale_dtype=FLOAT), (256, 1, 1, 1, 1, 0), 2, 1),
    # 128 rows by 192 features.
    (W4A16Case(200, 400, 192, 64, symmetric=False, bias=True), (128, 3, 1, 1, 1, 0), 2, 2),  # half a unit at the end
    (W4A16Case(140, 640, 512, 256, BRAIN), (128, 3, 1, 2, 1, 0), 2, 1),
    (W4A16Case(150, 200, 328, 32, scale_dtype=FLOAT, act_order=True), (128, 3, 1, 1, 1, 0), 0, 1),
    (W4A16Case(300, 520, 968, residual=True, activation="gelu"), (128, 3, 1, 1, 1, 1), 2, 5),
    (W4A16Case(130, 200, 712, 16, BRAIN, symmetric=False, act_order=True), (128, 3, 1, 2, 1, 1), 2, 3),
    (W4A16Case(200, 200, 712, 64, symmetric=False), (128, 3, 1, 2, 2, 0), 2, 1),
    (W4A16Case(300, 400, 456, 32, BRAIN, bias=True, residual=True), (128, 3, 1, 2, 2, 0), 0, 2),
]


@pytest.mark.parametrize(("case", "form", "ahead", "clusters"), FOLDED, ids=lambda value: str(value)[:80])
def test_gemm_with_rounded_weights(case: W4A16Case, form: cost.Form, ahead: int, clusters: int) -> None:
    many(case, form, ahead, clusters)


@pytest.mark.parametrize(("case", "form", "ahead", "clusters"), MANY, ids=lambda value: str(value)[:80])
def test_gemm(case: W4A16Case, form: cost.Form, ahead: int, clusters: int) -> None:
    many(case, form, ahead, clusters)


# Weights of 8 bits in both kernels: halves of units, groups of every part of one, zero points up to 255, act-order,
# tiles of K and N that are not full, what goes around.
BYTES_FEW: list[tuple[W4A16Case, int, dict[str, int]]] = [
    (W4A16Case(1, 128, 1024, bits=8), 2, {}),
    (W4A16Case(1, 72, 200, 32, BRAIN, symmetric=False, bits=8), 2, {}),
    (W4A16Case(3, 136, 328, 16, symmetric=False, act_order=True, bias=True, bits=8), 3, {}),
    (W4A16Case(8, 200, 712, 64, BRAIN, symmetric=False, bias=True, bits=8), 1, {"TEAMS": 2, "SLICES": 2, "AHEAD": 2}),
    (W4A16Case(16, 136, 456, 128, BRAIN, act_order=True, scale_dtype=HALF, bits=8), 2, {"CLUSTER": 4}),
    (W4A16Case(61, 256, 512, 32, symmetric=False, bits=8), 1, {"CLUSTER": 8, "SUM_ROWS": 16, "AHEAD": 2}),
    (W4A16Case(5, 256, 448, -1, norm="layernorm", activation="silu_mul", residual=True, bits=8), 2, {}),
]
BYTES_MANY: list[tuple[W4A16Case, cost.Form, int, int]] = [
    (W4A16Case(64, 128, 512, bits=8), (64, 2, 1, 1, 1, 0), 3, 1),
    (W4A16Case(61, 200, 712, 64, BRAIN, symmetric=False, bias=True, bits=8), (64, 1, 1, 1, 1, 0), 2, 2),
    (W4A16Case(130, 72, 200, 32, symmetric=False, act_order=True, bits=8), (64, 1, 1, 1, 1, 0), 2, 2),
    (W4A16Case(16, 512, 1024, 16, symmetric=False, activation="silu_mul", bits=8), (16, 2, 2, 2, 2, 0), 2, 1),
    (W4A16Case(33, 256, 256, -1, scale_dtype=FLOAT, residual=True, bits=8), (64, 3, 1, 1, 1, 0), 2, 2),
    (W4A16Case(150, 320, 384, 256, BRAIN, symmetric=False, bits=8), (128, 2, 1, 2, 1, 0), 2, 2),
    (W4A16Case(61, 520, 712, symmetric=False, bias=True, residual=True, bits=8), (64, 2, 1, 2, 1, 1), 2, 2),
    (W4A16Case(40, 1032, 384, 64, BRAIN, bias=True, activation="gelu", bits=8), (32, 3, 1, 1, 1, 1), 2, 5),
    (W4A16Case(300, 128, 512, bits=8), (256, 2, 1, 1, 1, 0), 2, 1),
    (W4A16Case(260, 200, 712, 64, BRAIN, symmetric=False, bias=True, bits=8), (256, 1, 1, 2, 1, 0), 2, 2),
    (W4A16Case(260, 256, 968, 16, symmetric=False, bits=8), (256, 2, 1, 1, 1, 1), 2, 3),
    (W4A16Case(150, 400, 456, 32, symmetric=False, act_order=True, bias=True, bits=8), (128, 3, 1, 1, 1, 0), 0, 1),
    (W4A16Case(200, 200, 328, 64, BRAIN, symmetric=False, bits=8), (128, 3, 1, 1, 1, 1), 2, 2),
    (W4A16Case(140, 400, 512, bits=8), (128, 3, 1, 2, 1, 0), 2, 1),
]  # fmt: skip


@pytest.mark.parametrize(("case", "workers", "changed"), BYTES_FEW, ids=lambda value: str(value)[:80])
def test_wgmma_with_8_bits(case: W4A16Case, workers: int, changed: dict[str, int]) -> None:
    few("wgmma", case, workers, changed)


@pytest.mark.parametrize(("case", "form", "ahead", "clusters"), BYTES_MANY, ids=lambda value: str(value)[:80])
def test_gemm_with_8_bits(case: W4A16Case, form: cost.Form, ahead: int, clusters: int) -> None:
    many(case, form, ahead, clusters)


@pytest.mark.parametrize("splits", [(64, 128), (96, 144)])
@pytest.mark.parametrize("variant", ["stream", "digits", "wgmma"])
def test_a_result_in_planes(variant: str, splits: tuple[int, ...]) -> None:
    few(variant, W4A16Case(1 if variant == "digits" else 3, 192, 256, bias=True, norm="layernorm"), 3, {}, splits)


@pytest.mark.parametrize("splits", [(64, 128), (96, 144)])
def test_a_result_of_many_rows_in_planes(splits: tuple[int, ...]) -> None:
    many(W4A16Case(20, 192, 256, bias=True), (32, 3, 1, 2, 2, 0), 2, 1, splits)


# --- llama.cpp's Q4_0 ---


@pytest.mark.parametrize("exact_sum", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT], ids=str)
def test_quantize(dtype: torch.dtype, kind: str, exact_sum: bool) -> None:
    x = activations(kind, 5, 224, dtype, "cpu", 3)
    x[1, 40], x[2, 70], x[3, 100:132] = float("nan"), float("-inf"), 0.0
    x[4, :96] = torch.arange(-47.5, 48.5).to(dtype)  # with amax 127: every value a half
    x[4, 0], x[4, 32], x[4, 64] = 127.0, -127.0, 127.0
    got = torch.full((5, 7, 36), 0x55, dtype=torch.uint8)
    source, threads = q4_0_op.quantize_source(dtype, exact_sum), q4_0_op.QUANTIZE_THREADS
    emulate.launch(source, "qqn", (-(-x.numel() // 16 // threads), 1, 1), threads, x, got, x.numel())
    ours, theirs = unpack_q8_1(got), quantize_q8_1(x, exact_sum=exact_sum)
    assert torch.equal(ours.q, theirs.q)
    assert torch.equal(ours.d, theirs.d) or torch.equal(ours.d.nan_to_num(1.5), theirs.d.nan_to_num(1.5))
    if exact_sum:  # added up in another order
        error = (ours.s.double() - theirs.s.double()).abs()
        assert (error <= 2.0**-10 * theirs.s.double().abs() + 2.0**-18 * x.double().abs().nan_to_num().sum())[
            :, 3:
        ].all()
    else:
        assert torch.equal(ours.s.nan_to_num(1.5), theirs.s.nan_to_num(1.5))


F = q4_0_cost.Form
FUSED, GIVEN = "gemm_q4_0_fp16", "gemm_q4_0_q8_1"
# A case, a form, how many clusters.
Q4_0: list[tuple[Q4Case, q4_0_cost.Form, int]] = [
    (Q4Case(1, 128, 1024, function=FUSED), F(8, 1, 1, 4, 2, 4, 8, 2), 2),
    (Q4Case(1, 128, 1024, function=GIVEN), F(8, 1, 1, 4, 2, 4, 8, 2), 1),
    (Q4Case(5, 72, 224, BRAIN, function=FUSED), F(8, 1, 1, 2, 2, 2, 8, 1), 2),  # half a unit, a strip past the end
    (Q4Case(5, 72, 224, function=GIVEN), F(8, 1, 1, 2, 2, 2, 8, 2), 2),
    (Q4Case(3, 128, 96, FLOAT, function=FUSED), F(8, 2, 1, 2, 8, 2, 8, 2), 1),  # blocks with nothing to do
    (Q4Case(9, 200, 736, FLOAT, HALF, "outliers", FUSED), F(16, 1, 1, 3, 2, 2, 16, 2), 2),
    (Q4Case(40, 136, 480, kind="zeros", function=FUSED), F(16, 1, 2, 3, 2, 3, 8, 2), 1),  # rows change in a worker
    (Q4Case(50, 200, 736, BRAIN, BRAIN, "uniform", FUSED), F(32, 2, 2, 2, 2, 2, 16, 2), 2),
    (Q4Case(33, 328, 416, function=GIVEN), F(32, 4, 2, 1, 2, 3, 16, 1), 1),
    (Q4Case(70, 136, 512, function=FUSED), F(32, 1, 2, 4, 4, 2, 32, 1), 1),
    (Q4Case(130, 136, 352, function=FUSED), F(64, 2, 1, 1, 2, 2, 16, 2), 1),
    (Q4Case(64, 128, 512, function=GIVEN), F(64, 1, 1, 2, 1, 2, 16, 2), 3),
    (Q4Case(20, 256, 256, function=FUSED), F(32, 1, 4, 2, 1, 1, 16, 1), 2),
]


def q4_0(case: Q4Case, form: q4_0_cost.Form, clusters: int) -> Tensor:
    """Run the kernel on a case in a form of its own, within the case's tolerance."""
    inputs, variant = case.make(), "fused" if case.function == FUSED else "separate"
    config = q4_0_cost.constants(form, case.k)
    y = torch.full((case.m, case.n), float("nan"), dtype=case.out_dtype)
    emulate.launch(
        q4_0_op.source(case.spec(), Candidate(variant, tuple(config.items()))), "qqqqn",
        (clusters * form.cluster, 1, 1),
        32 * (form.warps + 1), inputs.x, inputs.weight.qweight, inputs.weight.scales, y, case.m,
        shared_bytes=config["SHARED"], cluster=form.cluster,
    )  # fmt: skip
    within(case, inputs, (y,))
    return y


@pytest.mark.parametrize(("case", "form", "clusters"), Q4_0, ids=lambda value: str(value)[:90])
def test_q4_0(case: Q4Case, form: q4_0_cost.Form, clusters: int) -> None:
    q4_0(case, form, clusters)


def test_q4_0_quantising_inside_or_before_gives_the_same_bits() -> None:
    form = F(16, 1, 1, 2, 2, 2, 16, 2)
    a, b = (q4_0(Q4Case(11, 136, 736, kind="outliers", function=f), form, 2) for f in (FUSED, GIVEN))
    assert torch.equal(a, b)


def test_q4_0_extreme_values_stay_in_their_row() -> None:
    case = Q4Case(11, 72, 224, function=FUSED)
    form = F(16, 1, 1, 2, 2, 2, 16, 2)
    clean, inputs = q4_0(case, form, 1), case.make()
    inputs.x[1, 7], inputs.x[2, 9], inputs.x[3] = float("nan"), float("inf"), 0.0
    config = q4_0_cost.constants(form, case.k)
    y = torch.zeros(case.m, case.n)
    emulate.launch(
        q4_0_op.source(case.spec(), Candidate("fused", tuple(config.items()))), "qqqqn", (2, 1, 1),
        32 * (form.warps + 1), inputs.x, inputs.weight.qweight, inputs.weight.scales, y, case.m,
        shared_bytes=config["SHARED"], cluster=2,
    )  # fmt: skip
    assert torch.equal(y[[0, *range(4, 11)]], clean[[0, *range(4, 11)]])
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert (y[3] == 0).all()
    want = q4_0_reference.product(q4_0_reference.quantize(inputs.x), *inputs.weight.tensors[:2], case.k, case.n)
    assert torch.equal(y.isfinite(), want.isfinite())
