"""One launch of every kind of specialisation, small, and checked: the program that compute-sanitizer watches.

compute-sanitizer --tool memcheck  --error-exitcode 1 python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py --every-lane w4a16 q4_0

Operations named on the command line are the only ones that run; ``forms`` is every form of w4a16's gemm.cu. With
``--every-lane`` kernels are built so that racecheck can follow their barriers (device/arrive.cuh).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checks import check_case

from nybble.ops.case import Case
from nybble.ops.decode_attention.cases import AttentionCase
from nybble.ops.flatquant.cases import FlatQuantCase
from nybble.ops.norm.cases import FUNCTIONS, NormCase
from nybble.ops.q4_0.cases import Q4Case
from nybble.ops.w4a4.cases import W4A4Case
from nybble.ops.w4a16 import cost, op
from nybble.ops.w4a16.cases import W4A16Case
from nybble.runtime import build
from nybble.runtime.choice import Candidate
from nybble.runtime.hardware import current

FEW = ("stream", "wgmma")  # the second on Hopper
TRANSFORMS = ("few", "mma", "turned", "wgmma")  # all but mma on Hopper
CASES: tuple[tuple[Case, str], ...] = (
    *((NormCase(f, 3, hidden, torch.float16), "cuda") for f in FUNCTIONS for hidden in (72, 2561, 8192)),
    *((NormCase(f, 2, 65536, torch.float32), "cuda") for f in ("add_dual_layernorm", "rmsnorm")),
    *((NormCase(f, 2, 524288, torch.float16), "cuda") for f in ("add_layernorm", "rmsnorm")),
    *((NormCase(f, 1030, 128, torch.float16), "cuda") for f in FUNCTIONS),
    *((NormCase(f, 3000, hidden, torch.float16), "cuda") for f in FUNCTIONS for hidden in (2560, 2561)),
    *((NormCase(f, 3, hidden, torch.float16), "triton") for f in FUNCTIONS for hidden in (72, 2561, 20000)),
    *((W4A16Case(m, 136, 520, 64), "mma") for m in (1, 9, 17, 33, 70)),
    *((W4A16Case(m, 72, 200, 16, torch.bfloat16, False, True, True), "mma") for m in (1, 9, 17, 33, 70)),
    *((W4A16Case(m, 136, 520, 64), v) for m in (1, 3, 8, 16, 33, 64) for v in FEW),
    *((W4A16Case(m, 72, 200, 16, torch.bfloat16, False, True, True), v) for m in (1, 9, 33, 64) for v in FEW),
    *((W4A16Case(m, 128, 512, 64, bias=True, norm="layernorm"), v) for m in (1, 16) for v in FEW),
    *((W4A16Case(3, 384, 256, 64, activation="silu_mul", residual=True), v) for v in FEW),
    *((W4A16Case(1, 136, 520, 64, norm=norm), "digits") for norm in ("", "layernorm")),
    (W4A16Case(1, 72, 200, 32, torch.bfloat16, False, True, True), "digits"),
    (W4A16Case(1, 136, 1032, act_order=True, norm="rmsnorm"), "digits"),
    (W4A16Case(1, 384, 256, 64, activation="silu_mul", residual=True), "digits"),
    *((W4A16Case(1, n, 512), "digits") for n in (12288, 50000)),  # several tiles a worker
    *((W4A16Case(m, 136, 520, 64), "gemm") for m in (1, 33, 64, 200)),
    *((W4A16Case(m, 72, 200, 16, torch.bfloat16, False, True, True), "gemm") for m in (33, 200)),
    (W4A16Case(70, 384, 256, 64, activation="silu_mul", residual=True), "gemm"),
    *((W4A16Case(m, 12288, 512), "wgmma") for m in (1, 16, 32, 64)),  # several tiles a worker
    *((W4A16Case(m, 12288, 1024), "gemm") for m in (32, 64, 256)),
    *((W4A16Case(m, 264, 520, 64, bits=8), v) for m in (1, 16, 61) for v in ("wgmma", "gemm")),
    *(
        (Q4Case(m, n, k), v)
        for m in (1, 9, 33, 70, 200)
        for n, k in ((72, 224), (264, 1056))
        for v in ("fused", "separate")
    ),
    *((Q4Case(m, 12288, 1024), "fused") for m in (1, 16, 64)),
    *((Q4Case(3, 136, 512, d, torch.float16), "fused") for d in (torch.bfloat16, torch.float32)),
    *((FlatQuantCase(tokens, m, n), v) for tokens in (1, 300) for m, n in ((64, 64), (86, 128)) for v in TRANSFORMS),
    *((FlatQuantCase(tokens, m, n), "auto") for tokens in (1, 300) for m, n in ((22, 40), (7, 24))),
    *((FlatQuantCase(300, 64, 80, dtype, packed=False), "auto") for dtype in (torch.bfloat16, torch.float32)),
    *((FlatQuantCase(3, 256, n, packed=False, clips=2), "auto") for n in (256, 9)),
    *((W4A4Case(m, 72, 272, bias=True), "gemm") for m in (1, 16, 33, 128, 300)),
    *((W4A4Case(m, 12288, 512), "gemm") for m in (1, 64, 1024)),  # several tiles a worker
    *((AttentionCase(batch, 8, 2, 128, slots, seen=slots - 5), "cuda") for batch in (1, 40) for slots in (70, 700)),
    *((AttentionCase(1, 4, 4, 80, slots, rotary=20, together=True), "cuda") for slots in (1, 100)),
    *((AttentionCase(2, 6, 2, d, 100, torch.bfloat16, norm=True), "cuda") for d in (8, 72, 120, 200, 256)),
    (AttentionCase(1, 24, 2, 64, 100, sinks=4, seen=200), "cuda"),
    *((AttentionCase(batch, 8, 2, 128, slots, seen=slots - 5), "stream") for batch in (1, 40) for slots in (70, 1500)),
    *((AttentionCase(2, 6, 2, d, 400, torch.bfloat16, norm=True), "stream") for d in (8, 72, 80, 200, 256)),
    (AttentionCase(1, 24, 2, 64, 400, sinks=4, seen=600), "stream"),
)


def check_on_cpu(case: NormCase, variant: str) -> None:
    """The truth from a CPU: in large float64 reductions of PyTorch's own racecheck reports hazards."""
    inputs = case.make("cuda")
    results = case.run(inputs, variant)
    on_cpu = {name: tensor.cpu() for name, tensor in inputs.items()}
    truth = case.truth(on_cpu)
    for got, want, bound in zip(results, truth, case.tolerance(on_cpu, truth), strict=True):
        assert ((got.cpu().double() - want).abs() <= bound).all(), f"{case} {variant}"


def check_forms() -> int:
    """Each form of gemm.cu, with more tiles and parts of tiles than blocks, some of them ragged."""
    card, count = current(), 0
    for m, bits in ((13, 4), (61, 8), (200, 4)):
        case = W4A16Case(m, 12296, 296, bits=bits)
        inputs = case.make("cuda")
        found = cost.gemm_shapes(case.spec(), card) if card else "no GPU"
        for us, config in () if isinstance(found, str) else found:
            with op.forced(case.spec(), Candidate("gemm", tuple(config.items()), us), {}):
                check_case(case, "cuda", inputs=inputs)
            count += 1
    return count


def main() -> None:
    names = set(sys.argv[1:])
    if "--every-lane" in names:
        build.DEFINES.append("EVERY_LANE_ARRIVES")
    chosen = names - {"--every-lane"} or {"forms", *(case.op for case, _ in CASES)}
    cases = [(case, variant) for case, variant in CASES if case.op in chosen]
    for case, variant in cases:
        if isinstance(case, NormCase):
            check_on_cpu(case, variant)
        else:
            check_case(case, "cuda", variant=variant)
    count = len(cases) + (check_forms() if "forms" in chosen else 0)
    torch.cuda.synchronize()
    print(f"{count} cases right")


if __name__ == "__main__":
    main()
