"""AWQ in its GEMM layout: ``qweight``, ``qzeros``, ``scales``.

::

    qweight int32 [K, N/8]    nibble i of word c is column 8*c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros  int32 [G, N/8]    the same along N; the zero points as they are
    scales        [G, N]      float16, bfloat16 or float32

    W[k, n] = scales[k // group_size, n] * (q[k, n] - z[k // group_size, n])
"""

from __future__ import annotations

import torch

from nybble.formats.grouped import QuantizedWeight
from nybble.formats.words import (
    NIBBLES,
    SCALE,
    WORD,
    Form,
    Origin,
    check_packable,
    check_tensor,
    check_words,
    features_per_group,
    pack_columns,
    unpack_columns,
)

COLUMN_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, within its eight, that nibble ``i`` of a word holds."""


def awq_forms(k: int, n: int, group_size: int) -> dict[str, Form]:
    """What the tensors of a layer with ``k`` inputs and ``n`` outputs must look like."""
    groups = -(-k // group_size)
    return {
        "qweight": Form("[K, N/8]", (k, n // NIBBLES), WORD),
        "qzeros": Form("[G, N/8]", (groups, n // NIBBLES), WORD),
        "scales": Form("[G, N]", (groups, n), SCALE),
    }


def unpack_awq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    *,
    group_size: int,
    file: str = "",
    name: str = "",
) -> QuantizedWeight:
    """An AWQ GEMM layer's tensors as the one meaning of a 4-bit weight.

    Args:
        qweight: int32 ``[K, N/8]``.
        qzeros: int32 ``[G, N/8]``.
        scales: ``[G, N]`` float16, bfloat16 or float32; kept as they are.
        group_size: 16, 32, 64, 128, 256, or -1 for one group of K features.
        file, name: file and module, for messages.

    Returns:
        The weight, on the device of ``qweight``, sharing ``scales`` with the argument.

    Raises:
        CheckpointError: a tensor has the wrong dtype or shape, and ``file`` or ``name`` is given.
        TypeError, ValueError: the same without them, or an argument that is no tensor.
    """
    origin = Origin("unpack_awq", file, name)
    check_words("qweight", qweight, origin)
    k, n = qweight.shape[0], NIBBLES * qweight.shape[1]
    check_packable(k, n, origin)
    group_size = features_per_group(group_size, k, origin)
    forms = awq_forms(k, n, group_size)
    check_tensor("qzeros", qzeros, forms["qzeros"], origin)
    check_tensor("scales", scales, forms["scales"], origin)
    q, zeros = unpack_columns(qweight, COLUMN_ORDER), unpack_columns(qzeros, COLUMN_ORDER)
    return QuantizedWeight(q, zeros, scales, group_size)


def pack_awq(w: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors of a weight as AWQ GEMM stores them: the inverse of :func:`unpack_awq`, bit for bit.

    Args:
        w: K and N multiples of 8, without act-order.

    Returns:
        ``qweight``, ``qzeros`` and ``scales``.

    Raises:
        ValueError: K or N is not a multiple of 8, ``w`` has other than 4 bits, or ``w.g_idx`` is there, for which the
            layout has no place.
    """
    origin = Origin("pack_awq")
    check_packable(w.in_features, w.out_features, origin)
    if w.bits != 4:
        raise origin.refuse("w.bits", "4", w.bits, why="AWQ GEMM packs nibbles; use pack_gptq")
    if w.g_idx is not None:
        raise origin.refuse("w.g_idx", "None", "act-order", why="AWQ GEMM has no g_idx; use pack_gptq")
    return {
        "qweight": pack_columns(w.q, COLUMN_ORDER),
        "qzeros": pack_columns(w.zeros, COLUMN_ORDER),
        "scales": w.scales,
    }
