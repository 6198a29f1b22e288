"""The norm family in Triton: the same functions as ``norm.cu`` in another language, to compare the two.

Importing this module imports Triton. With ``TRITON_INTERPRET=1`` set before that, CPU tensors run too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# tl.sum is tl.reduce with this function, but tl.sum belongs to the mode, compiled or interpreted, in which Triton was
# first imported, perhaps by torch. The interpreter knows this function, and sums with numpy.
_ADD = tl.standard._sum_combine

# Triton's interpreter truncates to bfloat16, where a GPU rounds: `norm` keeps bfloat16 away from it.
_INTERPRETED: bool = knobs.runtime.interpret


@triton.jit
def _mean(values, HIDDEN: tl.constexpr):
    """Of each row: ``[ROWS, BLOCK]`` -> ``[ROWS, 1]``. What lies beyond a row's end must be zero."""
    return tl.reduce(values, 1, _ADD, keep_dims=True) / HIDDEN


@triton.jit
def _read(x0, x1, x2, start, column, inside, ADDENDS: tl.constexpr):
    """The sum in fp32, in the order of the addends; zero outside of the tensors."""
    h = tl.load(x0 + start + column, mask=inside, other=0.0).to(tl.float32)
    if ADDENDS >= 2:
        h += tl.load(x1 + start + column, mask=inside, other=0.0).to(tl.float32)
    if ADDENDS >= 3:
        h += tl.load(x2 + start + column, mask=inside, other=0.0).to(tl.float32)
    return h


@triton.jit
def _write(
    y, unit, weight, bias, residual, start, column, inside,
    HIDDEN: tl.constexpr, BIAS: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """``unit * weight (+ bias) (+ residual)``, rounded once."""
    in_row = column < HIDDEN
    result = unit * tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    if BIAS:
        result += tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
    if AFTER:
        result += residual
    tl.store(y + start + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x0, x1, x2, after, w1, b1, w2, b2, y1, y2, total, rows, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADDENDS: tl.constexpr, NORMS: tl.constexpr,
    RMS: tl.constexpr, BIAS: tl.constexpr, AFTER: tl.constexpr, STORE_SUM: tl.constexpr,
):  # fmt: skip
    """Rows ``ROWS * program`` onwards. Tensors as in ``norm.cu``; unused ones are ``None``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start = row * HIDDEN
    column = tl.arange(0, BLOCK)[None, :]

    if BLOCK >= HIDDEN:
        inside = (row < rows) & (column < HIDDEN)
        h = _read(x0, x1, x2, start, column, inside, ADDENDS)
        residual = 0.0
        if AFTER:  # asked for together with the row, so that its reading does not wait for the statistics
            residual = tl.load(after + start + column, mask=inside, other=0.0).to(tl.float32)
        if STORE_SUM:
            tl.store(total + start + column, h.to(total.dtype.element_ty), mask=inside)
        if not RMS:
            # The deviations are exact where the mean is large, and their own mean mends its rounding.
            h = tl.where(inside, h - _mean(h, HIDDEN), 0.0)
            h = tl.where(inside, h - _mean(h, HIDDEN), 0.0)
        unit = h * (1.0 / tl.sqrt_rn(_mean(h * h, HIDDEN) + eps))
        _write(y1, unit, w1, b1, residual, start, column, inside, HIDDEN, BIAS, AFTER)
        if NORMS == 2:
            _write(y2, unit, w2, b2, residual, start, column, inside, HIDDEN, BIAS, AFTER)
    else:
        # The same in passes over chunks of the row; each lane adds up its own columns, the lanes are added last.
        mean = tl.full([ROWS, 1], 0.0, tl.float32)
        shift = tl.full([ROWS, 1], 0.0, tl.float32)
        sums = tl.full([ROWS, BLOCK], 0.0, tl.float32)
        for chunk in range(0, HIDDEN, BLOCK):
            inside = (row < rows) & (chunk + column < HIDDEN)
            h = _read(x0, x1, x2, start, chunk + column, inside, ADDENDS)
            sums += h * h if RMS else h
            if STORE_SUM:
                tl.store(total + start + chunk + column, h.to(total.dtype.element_ty), mask=inside)
        if not RMS:
            mean = _mean(sums, HIDDEN)
            sums = tl.full([ROWS, BLOCK], 0.0, tl.float32)
            for chunk in range(0, HIDDEN, BLOCK):
                inside = (row < rows) & (chunk + column < HIDDEN)
                sums += tl.where(inside, _read(x0, x1, x2, start, chunk + column, inside, ADDENDS) - mean, 0.0)
            shift = _mean(sums, HIDDEN)
            sums = tl.full([ROWS, BLOCK], 0.0, tl.float32)
            for chunk in range(0, HIDDEN, BLOCK):
                inside = (row < rows) & (chunk + column < HIDDEN)
                h = _read(x0, x1, x2, start, chunk + column, inside, ADDENDS)
                h = tl.where(inside, h - mean - shift, 0.0)
                sums += h * h
        scale = 1.0 / tl.sqrt_rn(_mean(sums, HIDDEN) + eps)
        for chunk in range(0, HIDDEN, BLOCK):
            inside = (row < rows) & (chunk + column < HIDDEN)
            h = _read(x0, x1, x2, start, chunk + column, inside, ADDENDS)
            unit = (h - mean - shift) * scale
            residual = 0.0
            if AFTER:
                residual = tl.load(after + start + chunk + column, mask=inside, other=0.0).to(tl.float32)
            _write(y1, unit, w1, b1, residual, start, chunk + column, inside, HIDDEN, BIAS, AFTER)
            if NORMS == 2:
                _write(y2, unit, w2, b2, residual, start, chunk + column, inside, HIDDEN, BIAS, AFTER)


def norm(
    addends: Sequence[Tensor],
    weights: Sequence[tuple[Tensor, Tensor | None]],
    after: Tensor | None,
    eps: float,
    *,
    rms: bool,
    store_sum: bool,
    config: dict[str, int],
) -> tuple[Tensor, ...]:
    """Every function of the family, as ``reference.norm``, in one launch; nothing is checked here.

    Args:
        addends: one to three contiguous ``[..., hidden]`` tensors, float32, float16 or bfloat16; summed in fp32 in
            this order. All tensors have one dtype and device; on a CPU only in Triton's interpreter.
        weights: one or two ``(weight [hidden], bias [hidden] or None)``, contiguous, biases for both or neither.
        after: contiguous, like the addends; added to the normalised result, or ``None``.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm.
        store_sum: write the sum too.
        config: ``BLOCK``, ``WARPS`` and ``ROWS``, as :func:`nybble.ops.norm.cost.tile` makes them.

    Returns:
        ``(y for each weight)`` and then the sum if ``store_sum``, in the dtype of the addends, each rounded once.
    """
    x = addends[0]
    if _INTERPRETED and x.dtype is torch.bfloat16:
        addends = [t.float() for t in addends]
        weights = [(w.float(), None if b is None else b.float()) for w, b in weights]
        after = None if after is None else after.float()
        exact = norm(addends, weights, after, eps, rms=rms, store_sum=store_sum, config=config)
        return tuple(t.bfloat16() for t in exact)
    device = x.get_device()
    if device >= 0 and device != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(device):
            return norm(addends, weights, after, eps, rms=rms, store_sum=store_sum, config=config)
    hidden = x.shape[-1]
    w1, b1 = weights[0]
    dual = len(weights) == 2
    w2, b2 = weights[1] if dual else (None, None)
    y1 = torch.empty_like(x)
    y2 = torch.empty_like(x) if dual else None
    total = torch.empty_like(x) if store_sum else None
    count, together = x.numel() // hidden, config["ROWS"]
    if count:
        size = len(addends)
        _norm_kernel[(-(-count // together),)](
            x, addends[1] if size > 1 else None, addends[2] if size > 2 else None, after, w1, b1, w2, b2,
            y1, y2, total, count, eps,
            hidden, config["BLOCK"], together, size, 1 + dual, rms, b1 is not None, after is not None, store_sum,
            num_warps=config["WARPS"],  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    if y2 is not None:
        return (y1, y2) if total is None else (y1, y2, total)
    return (y1,) if total is None else (y1, total)
