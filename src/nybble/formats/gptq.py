"""GPTQ as it lies on disk: ``qweight``, ``qzeros``, ``scales`` and perhaps ``g_idx``.

::

    qweight int32 [K/8, N]    row k of q is bits 4*(k%8) .. of row k//8           lowest nibble first, along K
    qzeros  int32 [G, N/8]    column n is bits 4*(n%8) .. of word n//8            lowest nibble first, along N
    scales        [G, N]      float16, bfloat16 or float32
    g_idx   int32 [K]         the group of each input feature; absent: k // group_size

    W[k, n] = scales[g, n] * (q[k, n] - z[g, n])

With 8 bits a word holds four values, bytes in the same order: qweight is ``[K/4, N]``, qzeros ``[G, N/4]``.

``checkpoint_format`` "gptq_v2" stores z. "gptq" (v1, and every file that names no format) stores each *word* of z
less 0x11111111 (8 bits: 0x01010101): a zero point of 0 has borrowed from its neighbour, so the word is restored, never
the nibble.
"""

from __future__ import annotations

import warnings

import torch

from nybble.formats.grouped import BITS, QuantizedWeight
from nybble.formats.words import (
    SCALE,
    WORD,
    Form,
    Origin,
    check_packable,
    check_tensor,
    check_words,
    features_per_group,
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_rows,
)

FORMATS = ("gptq", "gptq_v2")

_ONE_EACH = {4: 0x11111111, 8: 0x01010101}
_WORD_MASK = 0xFFFFFFFF
_SYMMETRIC_WORD = {
    4: {"gptq": 0x77777777, "gptq_v2": 0x88888888},
    8: {"gptq": 0x7F7F7F7F, "gptq_v2": 0x80808080},
}
"""By bits, the word that each format stores for zero points of 8, or of 128."""


def gptq_forms(k: int, n: int, group_size: int, bits: int = 4) -> dict[str, Form]:
    """What the tensors of a layer with ``k`` inputs and ``n`` outputs must look like; ``g_idx`` may be absent."""
    groups, each = -(-k // group_size), 32 // bits
    return {
        "qweight": Form(f"[K/{each}, N]", (k // each, n), WORD),
        "qzeros": Form(f"[G, N/{each}]", (groups, n // each), WORD),
        "scales": Form("[G, N]", (groups, n), SCALE),
        "g_idx": Form("[K]", (k,), WORD),
    }


def unpack_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    group_size: int,
    bits: int = 4,
    checkpoint_format: str = "gptq",
    symmetric: bool | None = None,
    file: str = "",
    name: str = "",
) -> QuantizedWeight:
    """A GPTQ layer's tensors as the one meaning of a quantised weight.

    Args:
        qweight: int32 ``[K/8, N]``, or ``[K/4, N]`` with 8 bits.
        qzeros: int32 ``[G, N/8]``, or ``[G, N/4]`` with 8 bits.
        scales: ``[G, N]`` float16, bfloat16 or float32; kept as they are.
        g_idx: int32 ``[K]`` or ``None``. One that says no more than ``k // group_size`` is dropped.
        group_size: 16, 32, 64, 128, 256, or -1 for one group of K features.
        bits: of a value, 4 or 8.
        checkpoint_format: ``"gptq"`` (v1) or ``"gptq_v2"``.
        symmetric: what the file says of itself. ``True`` lets a file that carries the wrong format name be seen
            (its zero points would all be one off): it is read as the format it is, with a warning.
        file, name: file and module, for messages.

    Returns:
        The weight, on the device of ``qweight``, sharing ``scales`` and ``g_idx`` with the arguments.

    Raises:
        CheckpointError: a tensor has the wrong dtype, shape or values, and ``file`` or ``name`` is given.
        TypeError, ValueError: the same without them, or an argument that is no tensor.
    """
    origin = Origin("unpack_gptq", file, name)
    if checkpoint_format not in FORMATS:
        raise origin.refuse("checkpoint_format", f"one of {FORMATS}", repr(checkpoint_format))
    if bits not in BITS:
        raise origin.refuse("bits", f"one of {BITS}", bits)
    check_words("qweight", qweight, origin)
    k, n = 32 // bits * qweight.shape[0], qweight.shape[1]
    check_packable(k, n, origin)
    group_size = features_per_group(group_size, k, origin)
    forms = gptq_forms(k, n, group_size, bits)
    check_tensor("qzeros", qzeros, forms["qzeros"], origin)
    check_tensor("scales", scales, forms["scales"], origin)
    if g_idx is not None:
        check_tensor("g_idx", g_idx, forms["g_idx"], origin)
        g_idx = without_trivial(g_idx, group_size, scales.shape[0], origin)
    zeros = unpack_columns(_true_zero_words(qzeros, bits, checkpoint_format, symmetric, origin), bits=bits)
    return QuantizedWeight(unpack_rows(qweight, bits), zeros, scales, group_size, g_idx, bits)


def pack_gptq(w: QuantizedWeight, *, checkpoint_format: str = "gptq_v2") -> dict[str, torch.Tensor]:
    """The tensors of a weight as GPTQ stores them: the inverse of :func:`unpack_gptq`, bit for bit.

    Args:
        w: K and N multiples of 8.
        checkpoint_format: ``"gptq"`` (v1) or ``"gptq_v2"``.

    Returns:
        ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` (written out even where it is ``k // group_size``, as
        the packers in use do).

    Raises:
        ValueError: K or N is not a multiple of 8, or the format's name is not known.
    """
    origin = Origin("pack_gptq")
    if checkpoint_format not in FORMATS:
        raise origin.refuse("checkpoint_format", f"one of {FORMATS}", repr(checkpoint_format))
    check_packable(w.in_features, w.out_features, origin)
    qzeros = pack_columns(w.zeros, bits=w.bits)
    if checkpoint_format == "gptq":
        qzeros = _add_to_words(qzeros, -_ONE_EACH[w.bits])
    return {
        "qweight": pack_rows(w.q, w.bits),
        "qzeros": qzeros,
        "scales": w.scales,
        "g_idx": w.group_of().to(torch.int32),
    }


def _add_to_words(words: torch.Tensor, number: int) -> torch.Tensor:
    """``words + number`` modulo 2^32, by way of int64: zero points are few, and int32 overflow is undefined in C++."""
    total = (words.to(torch.int64) + number) & _WORD_MASK
    return torch.where(total > _WORD_MASK >> 1, total - (_WORD_MASK + 1), total).to(torch.int32)


def _true_zero_words(
    qzeros: torch.Tensor, bits: int, checkpoint_format: str, symmetric: bool | None, origin: Origin
) -> torch.Tensor:
    """int32 words of the zero points themselves, in the shape of ``qzeros``."""
    if symmetric:
        (other,) = set(FORMATS) - {checkpoint_format}
        if bool(((qzeros.to(torch.int64) & _WORD_MASK) == _SYMMETRIC_WORD[bits][other]).all()):
            # No module name: a mislabelled file is wrong in every module, and one warning a file is enough.
            warnings.warn(
                f"{origin.file or origin.module or origin.operation}: says checkpoint_format {checkpoint_format!r} "
                f"and sym, but its zero points are stored as {other!r} stores {1 << (bits - 1)}; read as {other!r}",
                UserWarning,
                stacklevel=3,
            )
            checkpoint_format = other
    return _add_to_words(qzeros, _ONE_EACH[bits]) if checkpoint_format == "gptq" else qzeros


def without_trivial(g_idx: torch.Tensor, group_size: int, groups: int, origin: Origin) -> torch.Tensor | None:
    """``g_idx``, or ``None`` where it is ``k // group_size``: the tensor decides on act-order, not a flag."""
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise origin.refuse("g_idx", f"groups 0..{groups - 1}", f"{low}..{high}")
    in_order = torch.arange(g_idx.shape[0], device=g_idx.device) // group_size
    return None if torch.equal(g_idx.to(torch.int64), in_order) else g_idx
