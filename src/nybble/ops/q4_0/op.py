"""llama.cpp's Q4_0 with activations in Q8_1: public functions, checks and registration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.formats.gguf_q4_0 import BLOCK, Q8_1_BYTES
from nybble.formats.tiles import PackedWeight
from nybble.ops.q4_0 import cost, reference
from nybble.ops.register import eager, register
from nybble.ops.w4a16 import op as linear
from nybble.runtime import hardware
from nybble.runtime.build import compile_kernel
from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.errors import UnsupportedError, wrong_type, wrong_value
from nybble.runtime.plan import Plan
from nybble.runtime.source import PACKAGE, Source

FLOATS = cost.FLOATS
FOLDER = PACKAGE / "ops" / "q4_0"
QUANTIZE_THREADS = 256


class Ready(NamedTuple):
    """A way and what its launches need.

    Attributes:
        variant: the way. plan: of the product's kernel. quantize: of the kernel before it. tile_m: rows, features:
            output features of a job. most: clusters that run at once.
    """

    variant: str
    plan: Plan | None = None
    quantize: Plan | None = None
    tile_m: int = 0
    features: int = 0
    most: int = 0


_PLANS: dict[tuple[Any, ...], Ready] = {}
_QUANTIZE: dict[tuple[Any, ...], Plan | None] = {}


def check_weight(weight: PackedWeight, function: str) -> None:
    """Refuse a packed weight that is not Q4_0's: groups of 32, zero point 8, float16 scales, no act-order."""
    remedy = "Other weights are w4a16_linear's."
    if weight.group_size != BLOCK:
        raise wrong_value(function, "weight.group_size", f"{BLOCK}", weight.group_size, remedy)
    if weight.in_features % BLOCK:
        raise wrong_value(function, "weight.in_features", f"a multiple of {BLOCK}", weight.in_features)
    for name, tensor in (("qzeros", weight.qzeros), ("perm", weight.perm)):
        if tensor is not None:
            raise wrong_value(function, f"weight.{name}", "None", "a tensor", remedy)
    if weight.scales.dtype != torch.float16:
        raise wrong_type(function, "weight.scales", torch.float16, weight.scales.dtype, remedy)


def check(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype, function: str = "q4_0_linear") -> None:
    """Refuse what no variant computes; the same on every device and under tracing.

    Raises:
        TypeError: a dtype. ValueError: a shape, a device or a value.
    """
    check_weight(weight, function)
    k = weight.in_features
    if x.dtype == torch.uint8:
        if x.dim() < 2 or x.shape[-2:] != (k // BLOCK, Q8_1_BYTES):
            expected = f"blocks of Q8_1, [..., in_features / 32, 36] = [..., {k // BLOCK}, {Q8_1_BYTES}]"
            raise wrong_value(function, "x", expected, list(x.shape), "quantize_q8_1 makes them.")
    elif x.dtype not in FLOATS:
        expected = "float16, bfloat16, float32, or uint8 blocks of Q8_1"
        raise wrong_type(function, "x", expected, x.dtype)
    elif x.dim() == 0 or x.shape[-1] != k:
        raise wrong_value(function, "x", f"shape [..., in_features] = [..., {k}]", list(x.shape))
    if out_dtype not in FLOATS:
        raise wrong_type(function, "out_dtype", "torch.float32, torch.float16 or torch.bfloat16", out_dtype)
    for name, tensor in (("weight.qweight", weight.qweight), ("weight.scales", weight.scales)):
        if tensor.device != x.device:
            raise wrong_value(function, name, f"device {x.device}, that of x", tensor.device)


def check_quantize(x: Tensor) -> None:
    """Refuse what can't be quantised.

    Raises:
        TypeError: a dtype. ValueError: a shape.
    """
    if x.dtype not in FLOATS:
        raise wrong_type("quantize_q8_1", "x", "float16, bfloat16 or float32", x.dtype)
    if x.dim() == 0 or not x.shape[-1] or x.shape[-1] % BLOCK:
        expected = f"shape [..., K] with K a multiple of {BLOCK}"
        raise wrong_value("quantize_q8_1", "x", expected, list(x.shape))


def _blocks_shape(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // BLOCK, Q8_1_BYTES)


def _lead(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[:-2] if x.dtype == torch.uint8 else x.shape[:-1])


def _rows(x: Tensor, k: int) -> int:
    return x.numel() // (k // BLOCK * Q8_1_BYTES if x.dtype == torch.uint8 else k)


def spec_of(rows: int, weight: PackedWeight, dtype: torch.dtype, out_dtype: torch.dtype, variant: str) -> cost.Spec:
    """The request, its rows rounded up to a power of two."""
    m = 1 << max(0, rows - 1).bit_length()
    return cost.Spec(m, weight.out_features, weight.in_features, dtype, out_dtype, variant)


def source(spec: cost.Spec, candidate: Candidate) -> Source:
    """The specialisation of ``q4_0.cu`` for a request and the candidate's tile."""
    fused = candidate.variant == "fused"
    constants = (
        ("X", spec.dtype if fused else torch.float16),
        ("Y", spec.out_dtype),
        ("FUSED", fused),
        ("N", spec.n),
        ("K", spec.k),
    )
    return Source(FOLDER / "q4_0.cu", (*constants, *candidate.config))


def quantize_source(dtype: torch.dtype, exact_sum: bool = False) -> Source:
    """The specialisation of ``quantize.cu``."""
    constants = (("X", dtype), ("THREADS", QUANTIZE_THREADS), ("EXACT_SUM", exact_sum))
    return Source(FOLDER / "quantize.cu", constants)


def choose(spec: cost.Spec, card: hardware.Hardware | None) -> Choice:
    """The way for this request, with its reason."""
    return cost.choose(spec, card)


def make(spec: cost.Spec, device: int, chosen: Candidate) -> Ready:
    """Build and load what a candidate launches."""
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    if chosen.variant not in ("fused", "separate"):
        return Ready(chosen.variant)
    config = dict(chosen.config)
    form = cost.Form(**{name: config[name.upper()] for name in cost.Form._fields})
    why = cost.refused(form, spec.k, card)
    if why:
        raise UnsupportedError(f"q4_0_linear: {chosen.variant}: {why}")
    plan = Plan(
        compile_kernel(source(spec, chosen), card.arch),
        "5q",
        device=device,
        threads=32 * (form.warps + 1),
        shared_bytes=config["SHARED"],
        cluster=form.cluster,
        overlap=True,
    )
    separate = chosen.variant == "separate" and spec.dtype != torch.uint8
    quantizing = _quantize_plan(spec.dtype, False, device) if separate else None
    return Ready(chosen.variant, plan, quantizing, form.tile_m, form.features, plan.clusters_at_once())


def _quantize_plan(dtype: torch.dtype, exact_sum: bool, device: int) -> Plan | None:
    key = (dtype, exact_sum, device)
    if key not in _QUANTIZE:
        card = hardware.current(device)
        assert card is not None, "a CUDA tensor without a CUDA device"
        able = card.capability >= (8, 0)
        _QUANTIZE[key] = (
            Plan(
                compile_kernel(quantize_source(dtype, exact_sum), card.arch),
                "3q",
                device=device,
                threads=QUANTIZE_THREADS,
                overlap=card.capability >= (9, 0),
            )
            if able
            else None
        )
    return _QUANTIZE[key]


def _straight(x: Tensor) -> Tensor:
    """Contiguous and 16-byte aligned, as the kernels read it."""
    if x.is_contiguous() and x.data_ptr() & 15 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _quantize_into(plan: Plan, x: Tensor) -> Tensor:
    blocks = torch.empty(_blocks_shape(x), dtype=torch.uint8, device=x.device)
    if x.numel():
        threads = x.numel() // 16
        plan.launch((-(-threads // QUANTIZE_THREADS), 1, 1), x.data_ptr(), blocks.data_ptr(), x.numel())
    return blocks


def _launch(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype, variant: str, function: str) -> Tensor:
    """The warm path: one look at each tensor, one at the plans, the launches."""
    device, k, n = x.get_device(), weight.in_features, weight.out_features
    width = Q8_1_BYTES if x.dtype == torch.uint8 else k
    rows = _rows(x, k)
    key = (
        k, n, weight.group_size, weight.scales.dtype, weight.qzeros is None, weight.perm is None, x.dtype, out_dtype,
        (rows - 1).bit_length(), variant, device,
    )  # fmt: skip
    ready = _PLANS.get(key)
    odd = ready is None or x.dim() == 0 or x.shape[-1] != width or weight.qweight.get_device() != device
    if odd or width == Q8_1_BYTES or weight.scales.get_device() != device:
        check(x, weight, out_dtype, function)
    if ready is None:
        spec = spec_of(rows, weight, x.dtype, out_dtype, variant)
        ready = _PLANS[key] = make(spec, device, choose(spec, hardware.current(device)).pick)
    return execute(ready, x, weight, out_dtype)


def execute(ready: Ready, x: Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> Tensor:
    """Launch what :func:`make` made, on inputs that :func:`check` has seen."""
    n, rows = weight.out_features, _rows(x, weight.in_features)
    if ready.variant == "w4a16":
        return linear.product(x, weight, out_dtype if out_dtype is x.dtype else torch.float32).to(out_dtype)
    if ready.plan is None:
        return _reference(x, weight, out_dtype)
    y = torch.empty((*_lead(x), n), dtype=out_dtype, device=x.device)
    if not rows:
        return y
    x = _straight(x)
    if ready.quantize is not None:
        x = _quantize_into(ready.quantize, x)
    jobs = -(-rows // ready.tile_m) * -(-n // ready.features)
    ready.plan.launch(
        (min(jobs, ready.most) * ready.plan.cluster, 1, 1),
        x.data_ptr(), weight.qweight.data_ptr(), weight.scales.data_ptr(), y.data_ptr(), rows, alone=weight.settle(),
    )  # fmt: skip
    return y


def _reference(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> Tensor:
    blocks = x if x.dtype == torch.uint8 else reference.quantize(x)
    return reference.product(
        blocks, weight.qweight, weight.scales, weight.in_features, weight.out_features
    ).to(out_dtype)  # fmt: skip


def _cpu(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype, variant: str) -> Tensor:
    check(x, weight, out_dtype)
    if variant not in ("auto", "reference"):
        cost.choose(spec_of(_rows(x, weight.in_features), weight, x.dtype, out_dtype, variant), None)  # raises
    return _reference(x, weight, out_dtype)


def _cuda(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype, variant: str) -> Tensor:
    return _launch(x, weight, out_dtype, variant, "q4_0_linear")


def _fake(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype, variant: str) -> Tensor:
    check(x, weight, out_dtype)
    return x.new_empty((*_lead(x), weight.out_features), dtype=out_dtype)


def _from_fields(run: Any) -> Any:
    def implementation(
        x: Tensor, qweight: Tensor, scales: Tensor, in_features: int, out_features: int, dtype: Any, variant: str
    ) -> Tensor:
        weight = PackedWeight(qweight, scales, None, None, in_features, out_features, BLOCK)
        return run(x, weight, dtype, variant)

    return implementation


_q4_0 = register(
    "q4_0(Tensor x, Tensor qweight, Tensor scales, int in_features, int out_features, ScalarType dtype, str variant) "
    "-> Tensor",
    cpu=_from_fields(_cpu),
    cuda=_from_fields(_cuda),
    fake=_from_fields(_fake),
)


def _quantize_cpu(x: Tensor, exact_sum: bool) -> Tensor:
    check_quantize(x)
    return reference.quantize(x, exact_sum)


def _quantize_cuda(x: Tensor, exact_sum: bool) -> Tensor:
    check_quantize(x)
    plan = _quantize_plan(x.dtype, exact_sum, x.get_device())
    if plan is None:
        return reference.quantize(x, exact_sum)
    return _quantize_into(plan, _straight(x))


def _quantize_fake(x: Tensor, exact_sum: bool) -> Tensor:
    check_quantize(x)
    return x.new_empty(_blocks_shape(x), dtype=torch.uint8)


_quantize_q8_1 = register(
    "quantize_q8_1(Tensor x, bool exact_sum) -> Tensor",
    cpu=_quantize_cpu,
    cuda=_quantize_cuda,
    fake=_quantize_fake,
)


def quantize_q8_1(x: Tensor, *, exact_sum: bool = False) -> Tensor:
    """Activations to llama.cpp's Q8_1: of each 32, ``d = max |x| / 127`` and ``q = round(x * (1 / d))``.

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32; K a multiple of 32.
        exact_sum: ``s`` of a block is the sum of x, as in llama.cpp's CUDA code, instead of ``d * sum(q)``, as in its
            CPU code. Nothing here reads ``s``.

    Returns:
        uint8 ``[..., K / 32, 36]``: the blocks as llama.cpp has them, float16 ``d``, float16 ``s``, 32 int8.

    Raises:
        TypeError: the dtype. ValueError: the shape.

    Numerics: float32, halves away from zero, ``d`` rounded to float16 after q was made with it unrounded; bit for bit
        llama.cpp's reference. Blocks whose values are all below 2^-120 are zeros. A NaN or an infinity makes ``d`` so,
        and the product with it NaN or infinite; so does a value beyond 127 * 65504, which float16 has no ``d`` for.
    """
    return _quantize_q8_1(x, exact_sum)


def _run(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype, variant: str, function: str) -> Tensor:
    if not isinstance(weight, PackedWeight):
        remedy = "Pack with PackedWeight.from_quantized."
        raise wrong_type(function, "weight", "a nybble.PackedWeight", type(weight).__name__, remedy)
    if eager((x,)):
        return _launch(x, weight, out_dtype, variant, function)
    check(x, weight, out_dtype, function)
    k, n = weight.in_features, weight.out_features
    return _q4_0(x, weight.qweight, weight.scales, k, n, out_dtype, variant)


def gemm_q4_0_q8_1(q8_1: Tensor, weight: PackedWeight, *, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """The product of quantised activations and a Q4_0 weight: ``sum over blocks of d4 * d8 * dot(q4 - 8, q8)``.

    Args:
        q8_1: uint8 ``[..., K / 32, 36]``, from :func:`quantize_q8_1`.
        weight: a packed ``[K, N]`` weight of Q4_0: groups of 32, zero point 8, float16 scales.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``[..., N]``, contiguous.

    Raises:
        TypeError: a dtype. ValueError: a shape, device or value.

    Numerics: the dot is an exact integer; times ``d8`` it is rounded to float32, and so is every sum; the result is
        rounded once. Deterministic.
    """
    if isinstance(q8_1, Tensor) and q8_1.dtype != torch.uint8:
        remedy = "quantize_q8_1 makes them; gemm_q4_0_fp16 takes floats."
        raise wrong_type("gemm_q4_0_q8_1", "q8_1", "torch.uint8 blocks of Q8_1", q8_1.dtype, remedy)
    return _run(q8_1, weight, out_dtype, _same(q8_1, "separate"), "gemm_q4_0_q8_1")


def gemm_q4_0_fp16(x: Tensor, weight: PackedWeight, *, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """The same of activations that the kernel quantises itself: no Q8_1 in memory, the same bits.

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32.
        weight: a packed ``[K, N]`` weight of Q4_0.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``[..., N]``, contiguous.

    Raises:
        TypeError: a dtype. ValueError: a shape, device or value. UnsupportedError: the kernel can't run here.

    Numerics: those of :func:`quantize_q8_1`, then of :func:`gemm_q4_0_q8_1`.
    """
    if isinstance(x, Tensor) and x.dtype not in FLOATS:
        raise wrong_type("gemm_q4_0_fp16", "x", "float16, bfloat16 or float32", x.dtype)
    return _run(x, weight, out_dtype, _same(x, "fused"), "gemm_q4_0_fp16")


def _same(x: Tensor, variant: str) -> str:
    """On a CPU the reference computes what a kernel would."""
    return "reference" if x.device.type == "cpu" else variant


def q4_0_linear(
    x: Tensor, weight: PackedWeight, *, out_dtype: torch.dtype = torch.float32, variant: str = "auto"
) -> Tensor:
    """Activations times a Q4_0 weight, by the way that is predicted to be the fastest.

    Args:
        x: ``[..., K]``, float16, bfloat16 or float32; or blocks of Q8_1, uint8 ``[..., K / 32, 36]``.
        weight: a packed ``[K, N]`` weight of Q4_0: groups of 32, zero point 8, float16 scales.
        out_dtype: float32, float16 or bfloat16.
        variant: ``"auto"`` (the cost model's pick), ``"fused"`` (the kernel quantises x), ``"separate"`` (quantise,
            then multiply; what is quantised already is only multiplied), ``"w4a16"`` (:func:`nybble.w4a16_linear`,
            x not quantised; float16 and bfloat16),
            ``"reference"``.

    Returns:
        ``[..., N]``, contiguous.

    Raises:
        TypeError: a dtype. ValueError: a shape, device or value. UnsupportedError: the variant can't run here.

    Numerics: fused and separate give the same bits, about 0.5 % off in the 2-norm for normal activations, as x has 8
        bits; w4a16 is exact up to float32's sums, from 129 rows on up to a rounding of the weight to the dtype of x.
        docs/ops/q4_0.md has the numbers.
    """
    return _run(x, weight, out_dtype, variant, "q4_0_linear")
