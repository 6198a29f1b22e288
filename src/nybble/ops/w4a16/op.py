"""The 4-bit linear: public function, checks and registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.formats.tiles import PackedWeight, packed_groups, tiles
from nybble.ops.register import register
from nybble.ops.w4a16 import cost
from nybble.ops.w4a16.reference import linear
from nybble.runtime import hardware
from nybble.runtime.build import compile_kernel
from nybble.runtime.errors import wrong_type, wrong_value
from nybble.runtime.plan import Plan
from nybble.runtime.source import PACKAGE, Source

FUNCTION = "w4a16_linear"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL = PACKAGE / "ops" / "w4a16" / "mma.cu"

_PLANS: dict[tuple[Any, ...], tuple[Plan, int] | None] = {}


def check(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
) -> None:
    """Refuse what no variant computes; the same on every device and under tracing.

    Raises:
        TypeError: a dtype. ValueError: a shape, device or value.
    """
    k, n, device = in_features, out_features, x.device
    if x.dtype not in DTYPES:
        raise wrong_type(FUNCTION, "x", "float16, bfloat16 or float32", x.dtype)
    if x.dim() == 0 or x.shape[-1] != k:
        raise wrong_value(FUNCTION, "x", f"shape [..., in_features] = [..., {k}]", list(x.shape))
    if k < 8 or n < 8 or k % 8 or n % 8 or group_size < 1:
        raise wrong_value(FUNCTION, "weight", "K and N positive multiples of 8", f"K = {k}, N = {n}")
    n_tiles, groups = tiles(n), packed_groups(k, group_size)
    if qweight.dtype != torch.int32:
        raise wrong_type(FUNCTION, "weight.qweight", torch.int32, qweight.dtype)
    if qweight.shape != (n_tiles, tiles(k), 512) or not qweight.is_contiguous():
        raise wrong_value(
            FUNCTION, "weight.qweight", f"contiguous [{n_tiles}, {tiles(k)}, 512]", list(qweight.shape), _PACK
        )
    if scales.dtype not in DTYPES:
        raise wrong_type(FUNCTION, "weight.scales", "float16, bfloat16 or float32", scales.dtype)
    if scales.shape != (n_tiles, groups, 64) or not scales.is_contiguous():
        raise wrong_value(FUNCTION, "weight.scales", f"contiguous [{n_tiles}, {groups}, 64]", list(scales.shape), _PACK)
    if qzeros is not None:
        if qzeros.dtype != torch.uint8:
            raise wrong_type(FUNCTION, "weight.qzeros", torch.uint8, qzeros.dtype)
        if qzeros.shape != (n_tiles, groups, 32) or not qzeros.is_contiguous():
            raise wrong_value(
                FUNCTION, "weight.qzeros", f"contiguous [{n_tiles}, {groups}, 32]", list(qzeros.shape), _PACK
            )
    if perm is not None:
        if perm.dtype != torch.int32:
            raise wrong_type(FUNCTION, "weight.perm", torch.int32, perm.dtype)
        if perm.shape != (k,) or not perm.is_contiguous():
            raise wrong_value(FUNCTION, "weight.perm", f"contiguous [{k}]", list(perm.shape), _PACK)
    if bias is not None:
        if bias.dtype != x.dtype:
            raise wrong_type(FUNCTION, "bias", f"{x.dtype}, the dtype of x", bias.dtype)
        if bias.shape != (n,):
            raise wrong_value(FUNCTION, "bias", f"shape [out_features] = [{n}]", list(bias.shape))
    for name, tensor in (
        ("weight.qweight", qweight), ("weight.scales", scales), ("weight.qzeros", qzeros),
        ("weight.perm", perm), ("bias", bias),
    ):  # fmt: skip
        if tensor is not None and tensor.device != device:
            raise wrong_value(FUNCTION, name, f"device {device}, that of x", tensor.device)


_PACK = "Pack with PackedWeight.from_quantized."


def _cpu(x: Tensor, *arguments: Any) -> Tensor:
    *weight, variant = arguments
    check(x, *weight)
    if variant not in ("auto", "reference"):
        cost.choose(_spec(x, *weight, variant=variant), None)  # raises: unknown, or refused with its reason
    return linear(x, *weight)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    *weight, _ = arguments
    check(x, *weight)
    return x.new_empty((*x.shape[:-1], weight[6]))


def _spec(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    *,
    variant: str,
) -> cost.Spec:
    rows = x.numel() // in_features
    return cost.Spec(
        1 << max(0, rows - 1).bit_length(),
        out_features,
        in_features,
        group_size,
        x.dtype,
        scales.dtype,
        qzeros is not None,
        perm is not None,
        bias is not None,
        variant,
    )


def _cuda(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    variant: str,
) -> Tensor:
    weight = (qweight, scales, qzeros, perm, bias, in_features, out_features, group_size)
    check(x, *weight)
    device, rows = x.get_device(), x.numel() // in_features
    spec = _spec(x, *weight, variant=variant)
    key = (spec, device)
    try:
        plan = _PLANS[key]
    except KeyError:
        plan = _PLANS[key] = _make(spec, device)
    if plan is None:
        return linear(x, *weight)
    if not x.is_contiguous() or x.data_ptr() & 15:
        x = x.clone(memory_format=torch.contiguous_format)
    y = x.new_empty((*x.shape[:-1], out_features))
    if rows:
        kernel, tile_m = plan
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        kernel.launch(
            (-(-rows // tile_m), tiles(out_features), 1),
            x.data_ptr(),
            qweight.data_ptr(),
            scales.data_ptr(),
            0 if qzeros is None else qzeros.data_ptr(),
            0 if perm is None else perm.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
        )
    return y


def source(spec: cost.Spec, config: tuple[tuple[str, Any], ...]) -> Source:
    """The specialisation of ``mma.cu`` for a request and the constants of a candidate."""
    constants = (
        ("X", spec.dtype),
        ("S", spec.scale_dtype),
        ("N", spec.n),
        ("K", spec.k),
        ("GROUP", spec.group_size),
        ("ZEROS", spec.zeros),
        ("PERM", spec.perm),
        ("BIAS", spec.bias),
        *config,
    )
    return Source(KERNEL, constants)


def _make(spec: cost.Spec, device: int) -> tuple[Plan, int] | None:
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    chosen = cost.choose(spec, card).pick
    if chosen.variant == "reference":
        return None
    binary = compile_kernel(source(spec, chosen.config), card.arch)
    config = dict(chosen.config)
    return Plan(binary, device=device, threads=128 * config["SLICES"]), config["TILE_M"]


_w4a16 = register(
    "w4a16(Tensor x, Tensor qweight, Tensor scales, Tensor? qzeros, Tensor? perm, Tensor? bias, "
    "int in_features, int out_features, int group_size, str variant) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)


def w4a16_linear(x: Tensor, weight: PackedWeight, *, bias: Tensor | None = None, variant: str = "auto") -> Tensor:
    """4-bit linear layer: ``y = x @ W (+ bias)``.

    ``W[k, n] = scales[g, n] * (q[k, n] - zeros[g, n])`` with ``g = k // group_size``, or ``g_idx[k]`` with act-order.

    Args:
        x: ``[..., K]``, float16 or bfloat16 (float32 runs the reference). Any leading shape, zero rows included.
        weight: a packed ``[K, N]`` weight on the device of ``x``; K and N multiples of 8, any group size.
        bias: ``[N]``, the dtype of ``x``.
        variant: ``"auto"`` (the cost model's pick), ``"mma"`` or ``"reference"``.

    Returns:
        ``[..., N]``, contiguous, the dtype of ``x``.

    Raises:
        TypeError: a dtype. ValueError: a shape, device or value. UnsupportedError: the variant can't run here.

    Numerics: the weight is never rounded: ``q - zero`` is exact, products and sums are fp32, the scale multiplies the
        fp32 sum of a group, and the result is rounded once. Deterministic. NaN and Inf in a row of ``x`` reach that
        row of ``y`` only.
    """
    if not isinstance(weight, PackedWeight):
        raise wrong_type(FUNCTION, "weight", "a nybble.PackedWeight", type(weight).__name__, _PACK)
    return _w4a16(x, *weight.tensors, bias, weight.in_features, weight.out_features, weight.group_size, variant)
