"""The linear layer of int4 activations and int4 weights: public function, checks and registration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.formats.channels import ChannelWeight
from nybble.ops.register import eager, register
from nybble.ops.w4a4 import cost
from nybble.ops.w4a4.reference import linear
from nybble.runtime import hardware
from nybble.runtime.build import compile_kernel
from nybble.runtime.choice import Candidate
from nybble.runtime.errors import wrong_type, wrong_value
from nybble.runtime.plan import MAP, Plan
from nybble.runtime.source import PACKAGE, Source

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL = PACKAGE / "ops" / "w4a4" / "gemm.cu"
PARAMETERS = f"{MAP}6q"
"""The map of x, pointers, rows: what ``gemm.cu`` takes."""
FUNCTION = "w4a4_linear"
_MAX_MAPS = 1024


class Ready(NamedTuple):
    """A plan and what its launches need besides.

    Attributes:
        plan: the kernel. tile_m: rows a block. across: clusters' tiles side by side along the output features.
        most: clusters at once. share: rows of x that a block fetches at a time.
        maps: where x was and its rows, and what the driver encoded for them.
    """

    plan: Plan
    tile_m: int
    across: int
    most: int
    share: int
    maps: dict[tuple[int, int], bytes]


_PLANS: dict[tuple[Any, ...], Ready | None] = {}
"""By request; ``None`` where the reference runs."""


def check(q_x: Tensor, scale_x: Tensor, weight: ChannelWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Refuse what no variant computes; the same on every device and under tracing. The weight has checked itself.

    Raises:
        TypeError: a dtype. ValueError: a shape or a device.
    """
    k, n = weight.in_features, weight.out_features
    if dtype not in DTYPES:
        raise wrong_type(FUNCTION, "dtype", "float16, bfloat16 or float32", dtype)
    if q_x.dtype != torch.int8:
        remedy = "flatquant_dynamic_quantize makes it, with pack_int32=False."
        raise wrong_type(FUNCTION, "q_x", "int8", q_x.dtype, remedy)
    if scale_x.dtype != torch.float32:
        raise wrong_type(FUNCTION, "scale_x", "float32", scale_x.dtype)
    if q_x.dim() == 0 or q_x.shape[-1] != k:
        raise wrong_value(FUNCTION, "q_x", f"shape [..., in_features] = [..., {k}]", list(q_x.shape))
    if scale_x.shape != q_x.shape[:-1]:
        expected = f"shape {list(q_x.shape[:-1])}, one for each row of q_x"
        raise wrong_value(FUNCTION, "scale_x", expected, list(scale_x.shape))
    if bias is not None and bias.dtype != dtype:
        raise wrong_type(FUNCTION, "bias", f"{dtype}, the dtype of the result", bias.dtype)
    if bias is not None and bias.shape != (n,):
        raise wrong_value(FUNCTION, "bias", f"shape [out_features] = [{n}]", list(bias.shape))
    names = ("scale_x", "weight.qweight", "weight.scales", "bias")
    for name, tensor in zip(names, (scale_x, *weight.tensors, bias), strict=True):
        if tensor is not None and tensor.device != q_x.device:
            raise wrong_value(FUNCTION, name, f"device {q_x.device}, that of q_x", tensor.device)


def source(spec: cost.Spec, candidate: Candidate) -> Source:
    """The specialisation of ``gemm.cu`` for a request and a candidate."""
    constants = (("X", spec.dtype), ("N", spec.n), ("K", spec.k), ("BIAS", spec.bias), *candidate.config)
    return Source(KERNEL, constants)


def _make(spec: cost.Spec, device: int) -> Ready | None:
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    chosen = cost.choose(spec, card).pick
    return None if chosen.variant != "gemm" else prepare(spec, chosen, device)


def prepare(spec: cost.Spec, candidate: Candidate, device: int) -> Ready:
    """A candidate of a request, built and loaded."""
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    config = dict(candidate.config)
    plan = Plan(
        compile_kernel(source(spec, candidate), card.arch),
        PARAMETERS,
        device=device,
        threads=128 * config["TEAMS"] * config["SLICES"] + 128,
        shared_bytes=config["SHARED"],
        cluster=config["CLUSTER"],
        overlap=True,
    )
    tile, wide = config["TILE_M"], config["CLUSTER"]
    across = -(-spec.n // (64 * config["TEAMS"] * wide))
    return Ready(plan, tile, across, plan.clusters_at_once(), tile // wide, {})


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous and 16-byte aligned, as the kernel reads it."""
    if tensor.is_contiguous() and tensor.data_ptr() & 15 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def launch(
    ready: Ready, q_x: Tensor, scale_x: Tensor, weight: ChannelWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """One launch of a plan on tensors that have been checked."""
    n, rows = weight.out_features, q_x.numel() // weight.in_features
    y = q_x.new_empty((*q_x.shape[:-1], n), dtype=dtype)
    if not rows:
        return y
    q_x, scale_x = _plain(q_x), scale_x.contiguous()
    plan, maps, place = ready.plan, ready.maps, (q_x.data_ptr(), rows)
    encoded = maps.get(place)
    if encoded is None:
        if len(maps) >= _MAX_MAPS:
            maps.clear()
        encoded = maps[place] = plan.tensor_map(q_x.view(torch.int16), rows, ready.share)
    added = 0 if bias is None else bias.data_ptr()
    plan.launch(
        (min(-(-rows // ready.tile_m) * ready.across, ready.most) * plan.cluster, 1, 1),
        encoded, weight.qweight.data_ptr(), weight.scales.data_ptr(), scale_x.data_ptr(), added, y.data_ptr(), rows,
        alone=weight.settle(),
    )  # fmt: skip
    return y


def cuda(
    q_x: Tensor, scale_x: Tensor, weight: ChannelWeight, bias: Tensor | None, dtype: torch.dtype, variant: str
) -> Tensor:
    """What runs on CUDA."""
    k, n, device = weight.in_features, weight.out_features, q_x.get_device()
    check(q_x, scale_x, weight, bias, dtype)
    rows = q_x.numel() // k
    key = (k, n, dtype, bias is None, (rows - 1).bit_length(), variant, device)
    if key not in _PLANS:
        spec = cost.Spec(1 << max(0, rows - 1).bit_length(), n, k, dtype, bias is not None, variant)
        _PLANS[key] = _make(spec, device)
    ready = _PLANS[key]
    if ready is None:
        return linear(q_x, scale_x, weight, bias, dtype)
    return launch(ready, q_x, scale_x, weight, None if bias is None else bias.contiguous(), dtype)


def cpu(
    q_x: Tensor, scale_x: Tensor, weight: ChannelWeight, bias: Tensor | None, dtype: torch.dtype, variant: str
) -> Tensor:
    """What runs on a CPU: the checks, then the reference."""
    check(q_x, scale_x, weight, bias, dtype)
    if variant not in ("auto", "reference"):
        spec = cost.Spec(1, weight.out_features, weight.in_features, dtype, bias is not None, variant)
        cost.choose(spec, None)  # raises: unknown, or refused with its reason
    return linear(q_x, scale_x, weight, bias, dtype)


def fake(
    q_x: Tensor, scale_x: Tensor, weight: ChannelWeight, bias: Tensor | None, dtype: torch.dtype, variant: str
) -> Tensor:
    """Shape and dtype for tracing."""
    check(q_x, scale_x, weight, bias, dtype)
    return q_x.new_empty((*q_x.shape[:-1], weight.out_features), dtype=dtype)


def _from_fields(run: Any) -> Any:
    def implementation(
        q_x: Tensor,
        scale_x: Tensor,
        qweight: Tensor,
        scale_w: Tensor,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        variant: str,
    ) -> Tensor:
        weight = ChannelWeight(qweight, scale_w, in_features, out_features)
        return run(q_x, scale_x, weight, bias, dtype, variant)

    return implementation


_w4a4 = register(
    "w4a4(Tensor q_x, Tensor scale_x, Tensor qweight, Tensor scale_w, Tensor? bias, int in_features, int out_features, "
    "ScalarType dtype, str variant) -> Tensor",
    cpu=_from_fields(cpu),
    cuda=_from_fields(cuda),
    fake=_from_fields(fake),
)


def w4a4_linear(
    q_x: Tensor,
    scale_x: Tensor,
    weight: ChannelWeight,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    variant: str = "auto",
) -> Tensor:
    """4-bit linear layer of quantised activations: ``y = (q_x @ q) * scale_x * scale_w (+ bias)``.

    Args:
        q_x: int8 ``[..., K]``: :func:`nybble.flatquant_dynamic_quantize` makes it. Values beyond int4 are right too.
        scale_x: float32 ``[...]``, one a row.
        weight: a packed ``[K, N]`` weight on the device of ``q_x``.
        bias: ``[N]``, of ``dtype``.
        dtype: of the result: float16, bfloat16 (float32 runs the reference).
        variant: ``"auto"``, ``"gemm"`` (Hopper, K a multiple of 16) or ``"reference"``.

    Returns:
        ``[..., N]``, contiguous.

    Raises:
        TypeError: a dtype. ValueError: a shape or device. UnsupportedError: the variant can't run here.

    Numerics: the sum over K is exact, in int32 (K up to 100000); it is scaled in float32, and the result rounded once.
        A row whose scale is NaN comes out as NaN, no other row does. Deterministic.
    """
    if not isinstance(weight, ChannelWeight):
        remedy = "Pack with ChannelWeight.from_values or from_float."
        raise wrong_type(FUNCTION, "weight", "a nybble.ChannelWeight", type(weight).__name__, remedy)
    if eager((q_x, scale_x, bias)):
        return cuda(q_x, scale_x, weight, bias, dtype, variant)
    return _w4a4(q_x, scale_x, *weight.tensors, bias, weight.in_features, weight.out_features, dtype, variant)
