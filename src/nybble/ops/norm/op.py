"""LayerNorm and RMSNorm with the residual additions around them: public functions, checks and registration.

Every function takes tensors of one dtype (float32, float16 or bfloat16) and one device, any leading shape (zero rows
included) and any hidden size. Statistics are fp32 and robust to a large mean; a sum ``h`` is normalised in fp32 before
it is rounded, so a 16-bit result is within one rounding of the exact one. NaN and Inf reach the outputs of their own
row only. Results are deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.ops.norm import cost
from nybble.ops.norm.reference import norm
from nybble.ops.register import register
from nybble.runtime import hardware
from nybble.runtime.build import compile_kernel
from nybble.runtime.errors import wrong_type, wrong_value
from nybble.runtime.plan import Plan
from nybble.runtime.source import PACKAGE, Source

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL = PACKAGE / "ops" / "norm" / "norm.cu"

_INF = float("inf")
_MISSING: Any = object()


def check(
    function: str,
    names: tuple[str, ...],
    rows: tuple[Tensor, ...],
    vectors: tuple[Tensor | None, ...],
    eps: float,
) -> None:
    """Refuse what no variant computes; the same on every device and under tracing.

    Args:
        function: public name, for the messages.
        names: the arguments' names: those of ``rows``, then those of ``vectors``.
        rows: tensors ``[..., hidden]`` that must agree in shape, dtype and device.
        vectors: ``(weight, bias)`` pairs ``[hidden]``; a bias may be ``None``, but then in every pair.
        eps: finite and not negative.

    Raises:
        TypeError: a dtype. ValueError: a shape, device or value.
    """
    x = rows[0]
    dtype, shape, device = x.dtype, x.shape, x.device
    if dtype not in DTYPES:
        raise wrong_type(function, names[0], "float32, float16 or bfloat16", dtype)
    if len(shape) == 0 or shape[-1] == 0:
        raise wrong_value(function, names[0], "shape [..., hidden] with hidden >= 1", list(shape))
    for name, tensor in zip(names[1:], (*rows[1:], *vectors), strict=True):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise wrong_type(
                function, name, f"{dtype}, the dtype of {names[0]}", tensor.dtype, f"Convert it with .to({dtype})."
            )
        if tensor.device != device:
            raise wrong_value(function, name, f"device {device}, that of {names[0]}", tensor.device)
    for name, tensor in zip(names[1 : len(rows)], rows[1:], strict=True):
        if tensor.shape != shape:
            raise wrong_value(function, name, f"shape {list(shape)}, that of {names[0]}", list(tensor.shape))
    for name, tensor in zip(names[len(rows) :], vectors, strict=True):
        if tensor is not None and (tensor.dim() != 1 or tensor.shape[0] != shape[-1]):
            raise wrong_value(function, name, f"shape [hidden] = [{shape[-1]}]", list(tensor.shape))
    if len(vectors) == 4 and (vectors[1] is None) != (vectors[3] is None):
        raise wrong_value(function, names[-1], f"both {names[-3]} and {names[-1]}, or neither", "one of them")
    if not 0.0 <= eps < _INF:
        raise wrong_value(function, "eps", "a finite number >= 0", eps)


def _reference(function: str, rows: tuple[Tensor, ...], vectors: tuple[Tensor | None, ...], eps: float) -> Any:
    form = cost.FORMS[function]
    pairs: list[Any] = list(zip(vectors[::2], vectors[1::2], strict=True))
    after = rows[-1] if form.after else None
    addends = [tensor.contiguous() for tensor in rows[: form.addends]]  # one order of summation whatever the strides
    outputs: Any = norm(addends, pairs, after, eps, rms=form.rms)[: form.norms + form.store_sum]
    return outputs if len(outputs) > 1 else outputs[0]


def source(spec: cost.Spec, config: tuple[tuple[str, Any], ...]) -> Source:
    """The specialisation of ``norm.cu`` for a request and the constants of a candidate."""
    form = cost.FORMS[spec.function]
    constants = (
        ("T", spec.dtype),
        ("HIDDEN", spec.hidden),
        ("ADDENDS", form.addends),
        ("NORMS", form.norms),
        ("RMS", form.rms),
        ("BIAS", spec.bias),
        ("AFTER", form.after),
        ("STORE_SUM", form.store_sum),
        *config,
    )
    return Source(KERNEL, constants)


def _make(spec: cost.Spec, device: int) -> Plan | None:
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    chosen = cost.choose(spec, card).pick
    if chosen.variant == "reference":
        return None
    binary = compile_kernel(source(spec, chosen.config), card.arch)
    return Plan(binary, device=device, threads=dict(chosen.config)["THREADS"])


def _empty(form: cost.Form, x: Tensor) -> Any:
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(form.norms + form.store_sum)]
    return tuple(made) if len(made) > 1 else made[0]


def _operator(function: str, names: tuple[str, ...], tensors: int) -> Any:
    """Register one function; its first ``tensors`` arguments are ``[..., hidden]``, the rest ``[hidden]``."""
    form = cost.FORMS[function]
    # The kernel takes x0 x1 x2 after w1 b1 w2 b2: zeros fill what this function does not have.
    fill = [0] * (3 - form.addends) if form.after else [0] * (4 - tensors)
    tail = [0] * (4 - (len(names) - tensors))
    last_read = 1 if form.after else tensors  # where `fill` goes
    plans: dict[tuple[Any, ...], Plan | None] = {}

    def split(arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...], float, str]:
        rows, vectors = arguments[:tensors], arguments[tensors:-2]
        check(function, names, rows, vectors, arguments[-2])
        return rows, (*vectors, None) if form.rms else vectors, arguments[-2], arguments[-1]

    def cpu(*arguments: Any) -> Any:
        rows, vectors, eps, variant = split(arguments)
        if variant not in ("auto", "reference"):
            x = rows[0]
            spec = cost.Spec(function, x.dtype, x.shape[-1], vectors[1] is not None, True, 1, variant)
            cost.choose(spec, None)  # raises: unknown, or refused with its reason
        return _reference(function, rows, vectors, eps)

    def cuda(*arguments: Any) -> Any:
        """The warm path: one look at each tensor, one at the plans, the launch. What looks odd goes to `careful`."""
        x, eps, variant = arguments[0], arguments[-2], arguments[-1]
        dtype, shape, device = x.dtype, x.shape, x.get_device()
        if not shape or not x.is_contiguous():
            return careful(arguments)
        hidden = shape[-1]
        aligned = x.data_ptr()
        pointers = [aligned]
        for t in arguments[1:tensors]:
            if t.shape != shape or t.dtype is not dtype or t.get_device() != device or not t.is_contiguous():
                return careful(arguments)
            pointer = t.data_ptr()
            aligned |= pointer
            pointers.append(pointer)
        pointers[last_read:last_read] = fill
        width = (hidden,)
        for t in arguments[tensors:-2]:
            if t is None:
                pointers.append(0)
                continue
            if t.shape != width or t.dtype is not dtype or t.get_device() != device or not t.is_contiguous():
                return careful(arguments)
            pointer = t.data_ptr()
            aligned |= pointer
            pointers.append(pointer)
        pointers += tail
        count = x.numel() // hidden if hidden else 0
        key = (hidden, dtype, pointers[5] == 0, aligned & 15, (count - 1).bit_length(), variant, device)
        plan = plans.get(key, _MISSING)
        if plan is _MISSING:
            split(arguments)
            spec = cost.Spec(
                function,
                dtype,
                hidden,
                pointers[5] != 0,
                aligned & 15 == 0,
                1 << max(0, count - 1).bit_length(),
                variant,
            )
            plan = plans[key] = _make(spec, device)
        if plan is None or not 0.0 <= eps < _INF or (form.norms == 2 and (pointers[5] == 0) != (pointers[7] == 0)):
            rows, vectors, eps, _ = split(arguments)
            return _reference(function, rows, vectors, eps)
        y1 = torch.empty_like(x)
        y2 = torch.empty_like(x) if form.norms == 2 else None
        total = torch.empty_like(x) if form.store_sum else None
        if count:
            plan.launch(
                (count, 1, 1),
                *pointers,
                y1.data_ptr(),
                0 if y2 is None else y2.data_ptr(),
                0 if total is None else total.data_ptr(),
                count,
                eps,
            )
        if y2 is not None:
            return y1, y2, total
        return y1 if total is None else (y1, total)

    def careful(arguments: tuple[Any, ...]) -> Any:
        """Refuse with the reason, or make every tensor contiguous and go on."""
        split(arguments)
        return cuda(*(t.contiguous() if isinstance(t, Tensor) else t for t in arguments))

    def fake(*arguments: Any) -> Any:
        return _empty(form, split(arguments)[0][0])

    typed = ", ".join(f"Tensor{'?' if name.startswith('b') else ''} {name}" for name in names)
    outputs = form.norms + form.store_sum
    returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    return register(f"{function}({typed}, float eps, str variant) -> {returns}", cpu=cpu, cuda=cuda, fake=fake)


_layernorm = _operator("layernorm", ("x", "weight", "bias"), 1)
_rmsnorm = _operator("rmsnorm", ("x", "weight"), 1)
_layernorm_residual = _operator("layernorm_residual", ("x", "residual", "weight", "bias"), 2)
_add_layernorm = _operator("add_layernorm", ("x", "residual", "weight", "bias"), 2)
_add_rmsnorm = _operator("add_rmsnorm", ("x", "residual", "weight"), 2)
_add_dual_layernorm = _operator("add_dual_layernorm", ("hidden", "attn", "mlp", "w1", "b1", "w2", "b2"), 3)


def layernorm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, variant: str = "auto"
) -> Tensor:
    """LayerNorm over the last dimension: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        x: ``[..., hidden]``, float32, float16 or bfloat16.
        weight, bias: ``[hidden]``, the dtype of ``x``; ``bias`` may be ``None``.
        eps: added to the biased variance.
        variant: ``"auto"``, ``"cuda"`` or ``"reference"``.

    Returns:
        ``[..., hidden]``, contiguous, the dtype of ``x``.

    Raises:
        TypeError: a dtype. ValueError: a shape, device or value. UnsupportedError: the variant can't run here.

    Numerics: fp32 statistics; float32 results within 1e-6 of the row's scale, 16-bit ones within one rounding.
    """
    return _layernorm(x, weight, bias, eps, variant)


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, variant: str = "auto") -> Tensor:
    """RMSNorm over the last dimension: ``x / sqrt(mean(x^2) + eps) * weight``.

    Args, Returns, Raises and Numerics as :func:`layernorm`, without a bias.
    """
    return _rmsnorm(x, weight, eps, variant)


def layernorm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, variant: str = "auto"
) -> Tensor:
    """LayerNorm, then the residual: ``LN(x) * weight + bias + residual``.

    Args:
        x, residual: ``[..., hidden]``, one shape and dtype.
        weight, bias, eps, variant: as :func:`layernorm`.

    Returns:
        ``[..., hidden]``. Raises and Numerics as :func:`layernorm`; the residual is added before the one rounding.
    """
    return _layernorm_residual(x, residual, weight, bias, eps, variant)


def add_layernorm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, variant: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The residual, then LayerNorm: ``h = x + residual``; ``LN(h) * weight + bias``.

    Args as :func:`layernorm_residual`.

    Returns:
        ``(normed, h)``, both ``[..., hidden]``. ``h`` is rounded for the caller; the norm is of the unrounded sum.
    """
    return _add_layernorm(x, residual, weight, bias, eps, variant)


def add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, variant: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The residual, then RMSNorm: ``h = x + residual``; ``h / rms(h) * weight``.

    Args as :func:`layernorm_residual`, without a bias.

    Returns:
        ``(normed, h)``, both ``[..., hidden]``. ``h`` is rounded for the caller; the norm is of the unrounded sum.
    """
    return _add_rmsnorm(x, residual, weight, eps, variant)


def add_dual_layernorm(
    hidden: Tensor,
    attn: Tensor,
    mlp: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    eps: float = 1e-5,
    *,
    variant: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """GPT-NeoX's parallel residual: ``h = hidden + attn + mlp``, then two LayerNorms of ``h`` that share statistics.

    Args:
        hidden, attn, mlp: ``[..., hidden]``, one shape and dtype: a layer's input and its two branches.
        w1, b1: weight and bias ``[hidden]`` of the next layer's ``input_layernorm``.
        w2, b2: those of its ``post_attention_layernorm``; both biases or neither.
        eps, variant: as :func:`layernorm`.

    Returns:
        ``(normed1, normed2, h)``, each ``[..., hidden]``; ``h`` is rounded for the caller, the norms are of the
        unrounded sum.
    """
    return _add_dual_layernorm(hidden, attn, mlp, w1, b1, w2, b2, eps, variant)
