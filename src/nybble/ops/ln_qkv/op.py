"""A norm, then the query, key and value projections: from a packed weight, or from GPTQ tensors as they lie on disk.

The kernel is the 4-bit linear's: the norm is its prologue, and it writes the three results one behind the other.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.formats import gptq, words
from nybble.formats.tiles import PackedWeight
from nybble.ops.register import register
from nybble.ops.w4a16 import op as linear
from nybble.runtime.errors import wrong_type, wrong_value

FUNCTION = "fused_ln_qkv_gptq"

_WORDS = linear.Words(
    FUNCTION, "input", ("qweight", "scales", "qzeros", "g_idx"), "kind", "ln_weight", "ln_bias", "eps"
)  # fmt: skip
_PACKED_WORDS = linear.WORDS._replace(function="ln_qkv")


class _Held(NamedTuple):
    """A weight packed from GPTQ tensors, as long as those live unchanged.

    Attributes:
        weight: the packed weight; it shares no memory with the tensors.
        state: where the tensors' data lay and which versions they had.
        references: weak ones to the tensors; the death of any of them drops the entry.
    """

    weight: PackedWeight
    state: tuple[int, ...]
    references: tuple[weakref.ref[Tensor], ...]


_Key = tuple[int, int, int, int, int, str]
_PACKED: dict[_Key, _Held] = {}


def _state(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None) -> tuple[int, ...]:
    """Changes with any of the tensors; an inference tensor has no version, and a change of its values goes unseen."""
    return (
        qweight.data_ptr(),
        0 if qweight.is_inference() else qweight._version,
        qzeros.data_ptr(),
        0 if qzeros.is_inference() else qzeros._version,
        scales.data_ptr(),
        0 if scales.is_inference() else scales._version,
        0 if g_idx is None else g_idx.data_ptr(),
        0 if g_idx is None or g_idx.is_inference() else g_idx._version,
    )


def packed(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, group_size: int, checkpoint_format: str
) -> PackedWeight:
    """The packed weight of GPTQ tensors, made at the first call with them."""
    key = (id(qweight), id(qzeros), id(scales), id(g_idx), group_size, checkpoint_format)
    held, state = _PACKED.get(key), _state(qweight, qzeros, scales, g_idx)
    if held is not None and held.state == state:
        return held.weight
    weight = PackedWeight.from_quantized(
        gptq.unpack_gptq(qweight, qzeros, scales, g_idx, group_size=group_size, checkpoint_format=checkpoint_format)
    )

    def drop(_: weakref.ref[Tensor], key: _Key = key, pop: Any = _PACKED.pop) -> None:
        pop(key, None)

    tensors = (qweight, qzeros, scales) if g_idx is None else (qweight, qzeros, scales, g_idx)
    _PACKED[key] = _Held(weight, state, tuple(weakref.ref(tensor, drop) for tensor in tensors))
    return weight


def release_packed(qweight: Tensor | None = None) -> int:
    """Free what :func:`nybble.fused_ln_qkv_gptq` remembers; the next call with those tensors packs them again.

    Args:
        qweight: the weight to forget; ``None`` for all of them.

    Returns:
        How many packed weights were dropped.
    """
    keys = [key for key, held in _PACKED.items() if qweight is None or held.references[0]() is qweight]
    return sum(_PACKED.pop(key, None) is not None for key in keys)


def splits(function: str, argument: str, n: int, hidden: int, kv_features: int | None) -> tuple[int, int]:
    """The output features at which keys and values begin.

    Raises:
        ValueError: the widths do not add up to ``n``, or are no multiples of 8.
    """
    if kv_features is None:
        if n != 3 * hidden:
            remedy = "For grouped queries give kv_features, the width of the keys and of the values."
            raise wrong_value(function, argument, f"3 * hidden = {3 * hidden} output features", n, remedy)
        return hidden, 2 * hidden
    if isinstance(kv_features, bool) or not isinstance(kv_features, int):
        raise wrong_type(function, "kv_features", "an int or None", type(kv_features).__name__)
    if kv_features <= 0 or kv_features % 8 or n - 2 * kv_features <= 0:
        expected = f"a positive multiple of 8 below half of the {n} output features"
        raise wrong_value(function, "kv_features", expected, kv_features)
    return n - 2 * kv_features, n - kv_features


def _check_weight(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, group_size: int, checkpoint_format: str
) -> int:
    """Refuse what is no GPTQ weight.

    Returns:
        The features that share a scale.
    """
    origin = words.Origin(FUNCTION)
    if checkpoint_format not in gptq.FORMATS:
        raise origin.refuse("checkpoint_format", f"one of {gptq.FORMATS}", repr(checkpoint_format))
    words.check_words("qweight", qweight, origin)
    k, n = words.NIBBLES * qweight.shape[0], qweight.shape[1]
    words.check_packable(k, n, origin)
    group_size = words.features_per_group(group_size, k, origin)
    forms = gptq.gptq_forms(k, n, group_size)
    if qzeros.shape == (forms["scales"].shape[0], group_size // 8) != forms["qzeros"].shape:
        remedy = "[G, group_size/8] is a mistake of some descriptions: zero points are packed along N."
        expected = f"shape {forms['qzeros'].axes} = {list(forms['qzeros'].shape)}"
        raise wrong_value(FUNCTION, "qzeros", expected, list(qzeros.shape), remedy)
    words.check_tensor("qzeros", qzeros, forms["qzeros"], origin)
    words.check_tensor("scales", scales, forms["scales"], origin)
    if g_idx is not None:
        words.check_tensor("g_idx", g_idx, forms["g_idx"], origin)
    for name, tensor in (("qzeros", qzeros), ("scales", scales), ("g_idx", g_idx)):
        if tensor is not None and tensor.device != qweight.device:
            raise wrong_value(FUNCTION, name, f"device {qweight.device}, that of qweight", tensor.device)
    return group_size


def _check(
    input: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    eps: float,
    kind: str,
    kv_features: int | None,
    checkpoint_format: str,
) -> tuple[int, int]:
    """Refuse what no variant computes, before anything is packed.

    Returns:
        Where keys and values begin.
    """
    group_size = _check_weight(qweight, qzeros, scales, g_idx, group_size, checkpoint_format)
    k, n = 8 * qweight.shape[0], qweight.shape[1]
    if input.dim() == 0 or input.shape[-1] != k:
        raise wrong_value(FUNCTION, "input", f"shape [..., hidden] = [..., {k}]", list(input.shape))
    if not kind:
        raise wrong_value(FUNCTION, "kind", f"one of {list(linear.NORMS)}", repr(kind))
    split1, split2 = splits(FUNCTION, "qweight", n, k, kv_features)
    weight = linear.Unpacked(k, n, (qweight, scales, qzeros, g_idx))
    linear.check(
        input, weight, bias, None, ln_weight, ln_bias, eps, kind, "", split1, split2, _WORDS
    )  # fmt: skip
    return split1, split2


def _cpu(
    input: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    eps: float,
    kind: str,
    kv_features: int | None,
    checkpoint_format: str,
    variant: str,
) -> Tensor:
    split1, split2 = _check(
        input, qweight, qzeros, scales, ln_weight, ln_bias, g_idx, bias, group_size, eps, kind, kv_features,
        checkpoint_format,
    )  # fmt: skip
    weight = packed(qweight, qzeros, scales, g_idx, group_size, checkpoint_format)
    return linear.cpu(
        input, weight, bias, variant, None, ln_weight, ln_bias, eps, kind, "", split1, split2, _WORDS
    )  # fmt: skip


def _cuda(
    input: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    eps: float,
    kind: str,
    kv_features: int | None,
    checkpoint_format: str,
    variant: str,
) -> Tensor:
    """The warm path: one look whether the weight is still the packed one; the linear looks at the rest."""
    held = _PACKED.get((id(qweight), id(qzeros), id(scales), id(g_idx), group_size, checkpoint_format))
    if held is not None and kind and held.state == _state(qweight, qzeros, scales, g_idx):
        weight = held.weight
        n, width = weight.out_features, weight.in_features if kv_features is None else kv_features
        split1, split2 = n - 2 * width, n - width
        warm = split1 == width if kv_features is None else split1 > 0 < width
        if warm:
            return linear.cuda(
                input, weight, bias, variant, None, ln_weight, ln_bias, eps, kind, "", split1, split2, _WORDS
            )  # fmt: skip
    split1, split2 = _check(
        input, qweight, qzeros, scales, ln_weight, ln_bias, g_idx, bias, group_size, eps, kind, kv_features,
        checkpoint_format,
    )  # fmt: skip
    weight = packed(qweight, qzeros, scales, g_idx, group_size, checkpoint_format)
    return linear.cuda(
        input, weight, bias, variant, None, ln_weight, ln_bias, eps, kind, "", split1, split2, _WORDS
    )  # fmt: skip


def _fake(
    input: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    eps: float,
    kind: str,
    kv_features: int | None,
    checkpoint_format: str,
    variant: str,
) -> Tensor:
    split1, split2 = _check(
        input, qweight, qzeros, scales, ln_weight, ln_bias, g_idx, bias, group_size, eps, kind, kv_features,
        checkpoint_format,
    )  # fmt: skip
    return input.new_empty(linear.result_shape(input.shape[:-1], qweight.shape[1], "", split1, split2))


_fused_ln_qkv_gptq = register(
    "fused_ln_qkv_gptq(Tensor input, Tensor qweight, Tensor qzeros, Tensor scales, Tensor ln_weight, Tensor? ln_bias, "
    "Tensor? g_idx, Tensor? bias, int group_size, float eps, str kind, int? kv_features, str checkpoint_format, "
    "str variant) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)


def _three(y: Tensor, lead: torch.Size, hidden: int, n: int, kv: int | None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The operator's result as the functions return it; views."""
    if y.dim() != 1:
        return y if y.shape[-1] == hidden else tuple(y.unbind(0))  # type: ignore[return-value]
    assert kv is not None, "three widths without kv_features"
    width, rows = n - 2 * kv, lead.numel()
    q, k, v = y.split((rows * width, rows * kv, rows * kv))
    return q.view(*lead, width), k.view(*lead, kv), v.view(*lead, kv)


def fused_ln_qkv_gptq(
    input: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor | None,
    *,
    group_size: int = 128,
    eps: float = 1e-5,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layernorm",
    kv_features: int | None = None,
    checkpoint_format: str = "gptq",
    variant: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Norm, then queries, keys and values from a 4-bit GPTQ weight in its on-disk layout.

    The first call packs the weight and remembers that for these very tensors: another 4.13 to 4.16 bits a weight at
    group 128 (26 MB for 4096 x 12288) beside the tensors themselves. It is packed again when a tensor is written in
    place or moves (an inference tensor has no version: call :func:`nybble.release_packed` after writing one), dropped
    when one of them dies, and freed by :func:`nybble.release_packed`. Packing waits for the device, so call once
    before a CUDA graph is captured. :func:`nybble.ln_qkv` takes a packed weight and remembers nothing.

    Args:
        input: ``[B, S, H]``, float16 or bfloat16 (float32 runs the reference). Any leading shape.
        qweight: int32 ``[H/8, N]``, the columns of Q, then K, then V.
        qzeros: int32 ``[G, N/8]``.
        scales: ``[G, N]``, float16, bfloat16 or float32.
        ln_weight, ln_bias: ``[H]``, the dtype of ``input``; no bias with rmsnorm.
        group_size: 16, 32, 64, 128, 256, or -1 for one group of H features.
        eps: added to the variance, or to the mean square.
        g_idx: int32 ``[H]``, the group of each feature (act-order).
        bias: ``[N]`` of the projection, the dtype of ``input``.
        kind: ``"layernorm"`` or ``"rmsnorm"``.
        kv_features: the width of K and of V where it is not H (grouped queries); Q has what is left of N.
        checkpoint_format: ``"gptq"`` (v1) or ``"gptq_v2"``: how zero points are stored.
        variant: ``"auto"``; ``"digits"`` (one row), ``"wgmma"`` or ``"stream"`` (few): one launch; ``"composed"`` (one
            kernel after the other) or ``"reference"``.

    Returns:
        ``[3, B, S, H]``, three contiguous planes, when Q, K and V are each H wide; else a tuple of three contiguous
        tensors ``[B, S, width]``, which share one allocation.

    Raises:
        TypeError: a dtype. ValueError: a shape, device or value. UnsupportedError: the variant can't run here.

    Numerics: as :func:`nybble.w4a16_linear` with a norm.
    """
    y = _fused_ln_qkv_gptq(
        input, qweight, qzeros, scales, ln_weight, ln_bias, g_idx, bias, group_size, eps, kind, kv_features,
        checkpoint_format, variant,
    )  # fmt: skip
    shape = input.shape
    return _three(y, shape[:-1], shape[-1], qweight.shape[1], kv_features)


def ln_qkv(
    x: Tensor,
    weight: PackedWeight,
    norm: linear.Norm,
    *,
    bias: Tensor | None = None,
    kv_features: int | None = None,
    variant: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Norm, then queries, keys and values from a packed weight of 4 or 8 bits.

    Args:
        x: ``[..., H]``, float16 or bfloat16 (float32 runs the reference).
        weight: a packed ``[H, N]`` weight, the columns of Q, then K, then V.
        norm: a :class:`nybble.Norm` of ``x``.
        bias: ``[N]``, the dtype of ``x``.
        kv_features: the width of K and of V where it is not H; Q has what is left of N.
        variant: as :func:`nybble.fused_ln_qkv_gptq`.

    Returns:
        ``[3, ..., H]`` when Q, K and V are each H wide; else a tuple of three contiguous tensors ``[..., width]``,
        which share one allocation.

    Raises:
        TypeError: a dtype. ValueError: a shape, device or value. UnsupportedError: the variant can't run here.

    Numerics: as :func:`nybble.w4a16_linear` with a norm.
    """
    if not isinstance(weight, PackedWeight):
        remedy = "Pack with PackedWeight.from_quantized."
        raise wrong_type("ln_qkv", "weight", "a nybble.PackedWeight", type(weight).__name__, remedy)
    if not isinstance(norm, linear.Norm):
        raise wrong_type("ln_qkv", "norm", "a nybble.Norm", type(norm).__name__)
    k, n = weight.in_features, weight.out_features
    split1, split2 = splits("ln_qkv", "weight", n, k, kv_features)
    y = linear.run(x, weight, bias, variant, None, norm, "", split1, split2, _PACKED_WORDS)
    return _three(y, x.shape[:-1], k, n, kv_features)
