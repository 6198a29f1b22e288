"""The 4-bit linear: public function, checks and registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.formats.tiles import PackedWeight
from nybble.ops.register import eager, register
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

# A plan, its rows a block, and a template of the output for each shape of x: one element, expanded. `empty_like` of
# that takes half the host time of `new_empty` with a shape, 0.6 us.
Ready = tuple[Plan, int, dict[tuple[int, ...], Tensor]]
_MAX_TEMPLATES = 1024

_PLANS: dict[tuple[Any, ...], Ready | None] = {}


def check(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    """Refuse what no variant computes; the same on every device and under tracing. The weight has checked itself.

    Raises:
        TypeError: a dtype. ValueError: a shape or a device.
    """
    k, n = weight.in_features, weight.out_features
    if x.dtype not in DTYPES:
        raise wrong_type(FUNCTION, "x", "float16, bfloat16 or float32", x.dtype)
    if x.dim() == 0 or x.shape[-1] != k:
        raise wrong_value(FUNCTION, "x", f"shape [..., in_features] = [..., {k}]", list(x.shape))
    if bias is not None:
        if bias.dtype != x.dtype:
            raise wrong_type(FUNCTION, "bias", f"{x.dtype}, the dtype of x", bias.dtype)
        if bias.shape != (n,):
            raise wrong_value(FUNCTION, "bias", f"shape [out_features] = [{n}]", list(bias.shape))
    names = ("weight.qweight", "weight.scales", "weight.qzeros", "weight.perm", "bias")
    for name, tensor in zip(names, (*weight.tensors, bias), strict=True):
        if tensor is not None and tensor.device != x.device:
            raise wrong_value(FUNCTION, name, f"device {x.device}, that of x", tensor.device)


def _reference(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return linear(x, *weight.tensors, bias, weight.in_features, weight.out_features, weight.group_size)


def _spec(x: Tensor, weight: PackedWeight, bias: Tensor | None, variant: str) -> cost.Spec:
    rows = x.numel() // weight.in_features
    return cost.Spec(
        1 << max(0, rows - 1).bit_length(),
        weight.out_features,
        weight.in_features,
        weight.group_size,
        x.dtype,
        weight.scales.dtype,
        weight.qzeros is not None,
        weight.perm is not None,
        bias is not None,
        variant,
    )


def _plain(tensor: Tensor) -> bool:
    """Contiguous and 16-byte aligned, as the kernels read it."""
    return tensor.is_contiguous() and tensor.data_ptr() & 15 == 0


def _launch(x: Tensor, weight: PackedWeight, bias: Tensor | None, variant: str) -> Tensor:
    """The warm path: one look at each tensor, one at the plans, the launch."""
    qweight, scales, qzeros, perm = weight.qweight, weight.scales, weight.qzeros, weight.perm
    device, shape, k, n = x.get_device(), x.shape, weight.in_features, weight.out_features
    rows = x.numel() // k
    key = (
        k, n, weight.group_size, x.dtype, scales.dtype, qzeros is None, perm is None, bias is None,
        (rows - 1).bit_length(), variant, device,
    )  # fmt: skip
    plan = _PLANS.get(key)
    if (
        plan is None
        or shape[-1] != k
        or qweight.get_device() != device
        or scales.get_device() != device
        or (bias is not None and (bias.dtype is not x.dtype or bias.shape != (n,) or not _plain(bias)))
    ):
        check(x, weight, bias)
        if key not in _PLANS:
            _PLANS[key] = _make(_spec(x, weight, bias, variant), device)
        plan = _PLANS[key]
        if plan is None:
            return _reference(x, weight, bias)
        bias = bias if bias is None or _plain(bias) else bias.clone(memory_format=torch.contiguous_format)
    if not _plain(x):
        x = x.clone(memory_format=torch.contiguous_format)
    kernel, tile_m, templates = plan
    template = templates.get(shape)
    if template is None:
        if len(templates) >= _MAX_TEMPLATES:
            templates.clear()
        template = templates[shape] = x.new_empty(1).expand((*shape[:-1], n))
    y = torch.empty_like(template, memory_format=torch.contiguous_format)
    if rows:
        kernel.launch(
            (-(-rows // tile_m), qweight.shape[0], 1),
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


def _make(spec: cost.Spec, device: int) -> Ready | None:
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    chosen = cost.choose(spec, card).pick
    if chosen.variant == "reference":
        return None
    binary = compile_kernel(source(spec, chosen.config), card.arch)
    config = dict(chosen.config)
    return Plan(binary, "8q", device=device, threads=128 * config["SLICES"]), config["TILE_M"], {}


# The operator takes the packed weight's fields one by one, as torch's schemas know no classes.


def _fields(arguments: tuple[Any, ...]) -> tuple[PackedWeight, Tensor | None, str]:
    qweight, scales, qzeros, perm, bias, in_features, out_features, group_size, variant = arguments
    return PackedWeight(qweight, scales, qzeros, perm, in_features, out_features, group_size), bias, variant


def _cpu(x: Tensor, *arguments: Any) -> Tensor:
    weight, bias, variant = _fields(arguments)
    check(x, weight, bias)
    if variant not in ("auto", "reference"):
        cost.choose(_spec(x, weight, bias, variant), None)  # raises: unknown, or refused with its reason
    return _reference(x, weight, bias)


def _cuda(x: Tensor, *arguments: Any) -> Tensor:
    return _launch(x, *_fields(arguments))


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    weight, bias, _ = _fields(arguments)
    check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.out_features))


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
        raise wrong_type(
            FUNCTION, "weight", "a nybble.PackedWeight", type(weight).__name__, "Pack with PackedWeight.from_quantized."
        )
    if eager((x, bias)):
        return _launch(x, weight, bias, variant)
    return _w4a16(x, *weight.tensors, bias, weight.in_features, weight.out_features, weight.group_size, variant)
