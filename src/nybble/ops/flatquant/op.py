"""FlatQuant's dynamic quantisation to int4, its inverse, and how a width is cut in two: checks and registration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.ops.flatquant import cost
from nybble.ops.flatquant.reference import flatquant, unpack
from nybble.ops.register import register
from nybble.runtime import hardware
from nybble.runtime.build import compile_kernel
from nybble.runtime.choice import Candidate
from nybble.runtime.errors import wrong_type, wrong_value
from nybble.runtime.plan import Plan
from nybble.runtime.source import PACKAGE, Source

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FOLDER = PACKAGE / "ops" / "flatquant"
PARAMETERS = "7q4d"
"""Pointers, the number of tokens, the distance of rows, four clip ratios: what every variant takes."""
FUNCTION = "flatquant_dynamic_quantize"
LARGEST = 256
"""Of M and of N."""
MOST_CLIPS = 4


def check(x: Tensor, left: Tensor, right: Tensor, clip_ratios: Sequence[float], packed: bool, offset: bool) -> None:
    """Refuse what no variant computes; the same on every device and under tracing.

    Raises:
        TypeError: a dtype. ValueError: a shape, a stride, a device or a value.
    """
    if x.dtype not in DTYPES:
        raise wrong_type(FUNCTION, "input_tensor", "float16, bfloat16 or float32", x.dtype)
    if x.dim() != 2:
        raise wrong_value(FUNCTION, "input_tensor", "shape [batch_tokens, features]", list(x.shape))
    for name, trans in (("left_trans", left), ("right_trans", right)):
        if trans.dtype != x.dtype:
            remedy = f"Convert it with .to({x.dtype})."
            raise wrong_type(FUNCTION, name, f"{x.dtype}, the dtype of input_tensor", trans.dtype, remedy)
        if trans.dim() != 2 or trans.shape[0] != trans.shape[1] or not 1 <= trans.shape[0] <= LARGEST:
            raise wrong_value(FUNCTION, name, f"a square matrix of 1 to {LARGEST} rows", list(trans.shape))
        if not trans.is_contiguous():
            got = f"strides {list(trans.stride())}"
            raise wrong_value(FUNCTION, name, "a contiguous matrix", got, "Make it so with .contiguous().")
        if trans.device != x.device:
            raise wrong_value(FUNCTION, name, f"device {x.device}, that of input_tensor", trans.device)
    m, n, features = left.shape[0], right.shape[0], x.shape[1]
    if m * n != features:
        remedy = "get_decompose_dim(features) gives sizes that fit."
        expected = f"features = M * N = {m} * {n} = {m * n}, from left_trans and right_trans"
        raise wrong_value(FUNCTION, "input_tensor", expected, features, remedy)
    if packed and features % 8:
        remedy = "Use pack_int32=False."
        raise wrong_value(FUNCTION, "pack_int32", "False where features are no multiple of 8", features, remedy)
    if offset and not packed:
        raise wrong_value(FUNCTION, "offset_binary", "False without pack_int32", True)
    if not 1 <= len(clip_ratios) <= MOST_CLIPS:
        raise wrong_value(FUNCTION, "clip_ratio", f"a number or 1 to {MOST_CLIPS} of them", len(clip_ratios))
    for clip in clip_ratios:
        if not 0.0 < clip <= 1.0:
            raise wrong_value(FUNCTION, "clip_ratio", "a number in (0, 1]", clip)


def spec_of(
    x: Tensor, m: int, n: int, clip_ratios: Sequence[float], packed: bool, offset: bool, variant: str
) -> cost.Spec:
    """The request, with the number of tokens rounded up to a power of two."""
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * size % 16 == 0 if x.device.type == "cuda" else True
    tokens = 1 << max(0, x.shape[0] - 1).bit_length()
    clamp = min(clip_ratios) < 1.0
    return cost.Spec(x.dtype, m, n, tokens, packed, offset, len(clip_ratios), clamp, aligned, variant)


def source(spec: cost.Spec, candidate: Candidate) -> Source:
    """The specialisation of the candidate's kernel file for a request."""
    constants = (
        ("X", spec.dtype),
        ("M", spec.m),
        ("N", spec.n),
        ("PACKED", spec.packed),
        ("OFFSET", spec.offset),
        ("CLIPS", spec.clips),
        ("CLAMP", spec.clamp),
        *candidate.config,
    )
    return Source(FOLDER / f"{candidate.variant}.cu", constants)


_PLANS: dict[tuple[Any, ...], tuple[Plan, int] | None] = {}
"""By request: what :func:`prepare` returns; ``None`` where the reference runs."""


def threads(spec: cost.Spec, candidate: Candidate) -> int:
    """Of a block."""
    config = dict(candidate.config)
    if candidate.variant == "few":
        return 32 * -(-spec.m // 16)
    rows = {"wgmma": spec.m, "turned": spec.n}
    warps = config["WARPS"] if candidate.variant == "mma" else 4 * -(-rows[candidate.variant] // 64)
    return 32 * warps * config["GROUPS"]


def cluster(spec: cost.Spec, candidate: Candidate) -> int:
    """Blocks of a token."""
    return spec.n // dict(candidate.config)["NW"] if candidate.variant == "few" else 1


def prepare(spec: cost.Spec, candidate: Candidate, device: int) -> tuple[Plan, int]:
    """A candidate of a request, built and loaded, and the most blocks (clusters) of a launch: as many as run at once,
    but where each has one token only.
    """
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    plan = Plan(
        compile_kernel(source(spec, candidate), card.arch),
        PARAMETERS,
        device=device,
        threads=threads(spec, candidate),
        shared_bytes=dict(candidate.config)["SHARED"],
        cluster=cluster(spec, candidate),
        overlap=card.capability >= (9, 0),
    )
    return plan, spec.tokens if candidate.variant == "few" else plan.clusters_at_once()


def _make(spec: cost.Spec, device: int) -> tuple[Plan, int] | None:
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    chosen = cost.choose(spec, card).pick
    return None if chosen.variant == "reference" else prepare(spec, chosen, device)


def _straight(x: Tensor) -> Tensor:
    """Rows of neighbouring elements, as the kernel reads them."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _results(x: Tensor, clips: int, packed: bool) -> tuple[Tensor, Tensor]:
    tokens, features = x.shape
    q = x.new_empty((clips, tokens, features // 8 if packed else features), dtype=torch.int32 if packed else torch.int8)
    return q, x.new_empty((clips, tokens), dtype=torch.float32)


def cuda(
    x: Tensor, left: Tensor, right: Tensor, clip_ratios: Sequence[float], packed: bool, offset: bool, variant: str
) -> tuple[Tensor, Tensor]:
    """What runs on CUDA: values ``[clips, T, F]`` or ``[clips, T, F / 8]`` and scales ``[clips, T]``."""
    device, shape = x.get_device(), x.shape
    m, n, tokens = (t.shape[0] if t.dim() else 0 for t in (left, right, x))
    stride = x.stride(0) if x.dim() == 2 else 0
    # Nobody writes more ratios than four, and each must be looked at.
    clips = (*clip_ratios, 1.0, 1.0, 1.0)[:MOST_CLIPS]
    bits = (x.data_ptr() | stride * x.element_size()) & 15
    key = (
        x.dtype, m, n, (tokens - 1).bit_length(), packed, offset, len(clip_ratios), min(clips) < 1.0, bits == 0,
        variant, device,
    )  # fmt: skip
    odd = left.dtype is not x.dtype or right.dtype is not x.dtype or len(shape) != 2 or shape[-1] != m * n
    odd |= left.get_device() != device or right.get_device() != device or not 1 <= len(clip_ratios) <= MOST_CLIPS
    odd |= left.shape != (m, m) or right.shape != (n, n) or not left.is_contiguous() or not right.is_contiguous()
    odd |= not all(0.0 < clip <= 1.0 for clip in clips) or (len(shape) == 2 and x.stride(1) != 1 and shape[1] != 1)
    odd |= (left.data_ptr() | right.data_ptr()) & 15 != 0
    if odd or key not in _PLANS:
        check(x, left, right, clip_ratios, packed, offset)
        if odd:
            left, right = (t if t.data_ptr() & 15 == 0 else t.clone() for t in (left, right))
            if (straight := _straight(x)) is not x:
                return cuda(straight, left, right, clip_ratios, packed, offset, variant)
        if key not in _PLANS:
            _PLANS[key] = _make(spec_of(x, m, n, clip_ratios, packed, offset, variant), device)
    entry = _PLANS[key]
    if entry is None:
        return flatquant(x, left, right, clip_ratios, packed, offset)
    plan, most = entry
    q, scales = _results(x, len(clip_ratios), packed)
    if tokens:
        plan.launch(
            (min(tokens, most) * plan.cluster, 1, 1),
            x.data_ptr(), left.data_ptr(), right.data_ptr(), q.data_ptr(), scales.data_ptr(), tokens, stride, *clips,
        )  # fmt: skip
    return q, scales


def cpu(
    x: Tensor, left: Tensor, right: Tensor, clip_ratios: Sequence[float], packed: bool, offset: bool, variant: str
) -> tuple[Tensor, Tensor]:
    """What runs on a CPU; arguments as :func:`cuda`."""
    check(x, left, right, clip_ratios, packed, offset)
    if variant not in ("auto", "reference"):
        spec = spec_of(x, left.shape[0], right.shape[0], clip_ratios, packed, offset, variant)
        cost.choose(spec, None)  # raises: unknown, or refused with its reason
    return flatquant(x, left, right, clip_ratios, packed, offset)


def fake(
    x: Tensor, left: Tensor, right: Tensor, clip_ratios: Sequence[float], packed: bool, offset: bool, variant: str
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes for tracing; arguments as :func:`cuda`."""
    check(x, left, right, clip_ratios, packed, offset)
    return _results(x, len(clip_ratios), packed)


_flatquant = register(
    "flatquant(Tensor x, Tensor left, Tensor right, float[] clip_ratios, bool packed, bool offset, str variant)"
    " -> (Tensor, Tensor)",
    cpu=cpu,
    cuda=cuda,
    fake=fake,
)


def flatquant_dynamic_quantize(
    input_tensor: Tensor,
    left_trans: Tensor,
    right_trans: Tensor,
    clip_ratio: float | Sequence[float] = 1.0,
    pack_int32: bool = False,
    use_cuda: bool = True,
    *,
    offset_binary: bool = False,
    variant: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each row, as a matrix X ``[M, N]``, transformed to ``Y = left_trans^T X right_trans`` and rounded to int4.

    ``scale = clip_ratio * max|Y| / 7`` (1 for a row of zeros) and ``q = clamp(round_half_even(Y / scale), -8, 7)``; in
    one launch that reads each row once.

    Args:
        input_tensor: ``[batch_tokens, features]``, float16, bfloat16 or float32; rows any distance apart, zero rows
            included.
        left_trans: ``[M, M]``. right_trans: ``[N, N]``; contiguous, the dtype of ``input_tensor``,
            ``M * N = features``, both at most 256 (:func:`get_decompose_dim`).
        clip_ratio: in (0, 1]; or up to four of them, which share the transform.
        pack_int32: eight values a word, element i in bits ``4 * (i % 8)``, two's complement; features a multiple of 8.
        use_cuda: ``False`` runs the reference in PyTorch, which is what runs on CPU tensors anyway.
        offset_binary: words of ``q + 8`` instead.
        variant: ``"auto"``, ``"mma"`` or ``"reference"``; on Hopper with 16 bits and M to 128 ``"wgmma"`` (N of 64, 80,
            128, 224), ``"turned"`` (N of 64, 128) and ``"few"`` (for few tokens) too.

    Returns:
        ``(quantized, scales)``: int8 ``[T, F]`` or int32 ``[T, F / 8]``, and float32 ``[T]``. For several clip ratios
        ``[clips, T, ...]`` and ``[clips, T]``.

    Raises:
        TypeError: a dtype. ValueError: a shape, stride, device or value. UnsupportedError: the variant can't run here.

    Numerics: both products have float32 accumulators. Between them the first one is rounded once to 16 bits: to
        bfloat16, or to float16 after multiplication by a power of two where it would not fit, so that nothing
        overflows; of float32 inputs it stays, and factors have 22 bits. A value may differ from exact arithmetic by one
        where ``Y / scale`` lies within that error of a tie: for orthogonal transforms of 64 rows 0.02 (float16),
        0.12 (bfloat16), 0.001 (float32) at most. Scales are at least ``2^-126``. A row whose Y has a NaN or an infinity
        gets the scale NaN and zeros; no other row notices. Deterministic.

    Source: FlatQuant (Sun et al. 2024).
    """
    single = isinstance(clip_ratio, int | float)
    clips = [float(clip_ratio)] if isinstance(clip_ratio, int | float) else [float(clip) for clip in clip_ratio]
    variant = variant if use_cuda else "reference"
    q, scales = _flatquant(input_tensor, left_trans, right_trans, clips, pack_int32, offset_binary, variant)
    return (q[0], scales[0]) if single else (q, scales)


def dequantize_int4(
    quantized: Tensor,
    scales: Tensor,
    packed_int32: bool = False,
    dtype: torch.dtype = torch.float16,
    *,
    offset_binary: bool = False,
) -> Tensor:
    """``q * scale``: what :func:`flatquant_dynamic_quantize` rounded, still transformed.

    Args:
        quantized: int8 ``[..., T, F]``, or int32 ``[..., T, F / 8]`` with ``packed_int32``.
        scales: float32 ``[..., T]``.
        dtype: of the result. offset_binary: words hold ``q + 8``.

    Returns:
        ``[..., T, F]``, rounded once to ``dtype``.

    Raises:
        TypeError: a dtype. ValueError: a shape or device.
    """
    function, wanted = "dequantize_int4", torch.int32 if packed_int32 else torch.int8
    if quantized.dtype != wanted:
        remedy = "packed_int32 says which it is."
        raise wrong_type(function, "quantized", wanted, quantized.dtype, remedy)
    if not scales.dtype.is_floating_point:
        raise wrong_type(function, "scales", "a floating-point dtype", scales.dtype)
    if not dtype.is_floating_point:
        raise wrong_type(function, "dtype", "a floating-point dtype", dtype)
    if quantized.dim() < 2 or scales.shape != quantized.shape[:-1]:
        expected = f"shape {list(quantized.shape[:-1])}, one for each row of quantized"
        raise wrong_value(function, "scales", expected, list(scales.shape))
    if scales.device != quantized.device:
        raise wrong_value(function, "scales", f"device {quantized.device}, that of quantized", scales.device)
    if offset_binary and not packed_int32:
        raise wrong_value(function, "offset_binary", "False without packed_int32", True)
    q = unpack(quantized, offset_binary) if packed_int32 else quantized
    return (q.float() * scales.float()[..., None]).to(dtype)


def get_decompose_dim(n: int) -> tuple[int, int]:
    """``(M, N)`` with ``M * N = n``: ``(a - b, a + b)`` for the smallest ``a`` with ``a^2 - n = b^2``.

    Args:
        n: features, positive: 4096 gives (64, 64), 11008 gives (86, 128).

    Raises:
        TypeError: not an integer.
        ValueError: n is not positive, or n % 4 == 2: such a number is no difference of two squares.
    """
    if not isinstance(n, int) or isinstance(n, bool):
        raise wrong_type("get_decompose_dim", "n", "an integer", type(n).__name__)
    if n < 1 or n % 4 == 2:
        remedy = "Pass transforms of sizes you choose: any M * N = n."
        raise wrong_value("get_decompose_dim", "n", "a positive number with n % 4 != 2", n, remedy)
    a = math.isqrt(n - 1) + 1
    while math.isqrt(a * a - n) ** 2 != a * a - n:
        a += 1
    b = math.isqrt(a * a - n)
    return a - b, a + b
