"""LayerNorm and RMSNorm with the residual additions around them: public functions, checks and registration.

Every function takes tensors of one dtype (float32, float16 or bfloat16) and one device, any leading shape (zero rows
included) and any hidden size. Statistics are fp32 and robust to a large mean; a sum ``h`` is normalised in fp32 before
it is rounded, so a 16-bit result is within one rounding of the exact one. NaN and Inf reach the outputs of their own
row only. Results are deterministic.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
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

PARAMETERS = "11qqd"
"""Pointers, the number of rows, eps: what ``norm.cu`` takes."""

_INF = float("inf")


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


def _make(spec: cost.Spec, device: int) -> tuple[Plan | None, int, bool]:
    """The plan of a request, the rows of one block, and whether the Triton twin runs instead."""
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    chosen = cost.choose(spec, card).pick
    if chosen.variant == "triton" and spec.variant == "auto" and find_spec("triton") is None:
        chosen = cost.choose(spec._replace(variant="cuda"), card).pick
    if chosen.variant != "cuda":
        return None, 1, chosen.variant == "triton"
    config = dict(chosen.config)
    binary = compile_kernel(source(spec, chosen.config), card.arch)
    cluster, together = config["CLUSTER"], config["ROWS"]
    threads, overlap = config["THREADS"] * together, card.capability >= (9, 0)
    return (
        Plan(binary, PARAMETERS, device=device, threads=threads, cluster=cluster, overlap=overlap),
        together,
        False,
    )


def _twin(spec: cost.Spec, rows: tuple[Any, ...], vectors: tuple[Tensor | None, ...], eps: float) -> Any:
    from nybble.ops.norm import twin  # imports Triton

    form = cost.FORMS[spec.function]
    pairs: list[Any] = list(zip(vectors[::2], vectors[1::2], strict=True))
    after = rows[-1] if form.after else None
    addends = list(rows[: form.addends])
    outputs = twin.norm(addends, pairs, after, eps, rms=form.rms, store_sum=form.store_sum, config=cost.tile(spec))
    return outputs[0] if len(outputs) == 1 else outputs


def _operator(function: str, rows: tuple[str, ...], vectors: tuple[str, ...], arrange: Callable[..., Any]) -> Any:
    """Register one function.

    Args:
        function: its public name.
        rows, vectors: the names of its ``[..., hidden]`` and of its ``[hidden]`` arguments.
        arrange: turns an implementation, which takes every argument a function of the family can have, into one of
            this function's own arguments.
    """
    form = cost.FORMS[function]
    names = (*rows, *vectors)
    plans: dict[tuple[Any, ...], tuple[Plan | None, int, bool]] = {}

    def checked(*arguments: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        x0, x1, x2, after, w1, b1, w2, b2, eps, _ = arguments
        given = (x0, x1, x2)[: form.addends] + ((after,) if form.after else ())
        pairs = (w1, b1, w2, b2)[: 2 * form.norms]
        check(function, names, given, pairs[:: 1 + form.rms], eps)
        return given, pairs

    def request(x: Tensor, b1: Tensor | None, bits: int, count: int, variant: str) -> cost.Spec:
        rounded = 1 << max(0, count - 1).bit_length()
        return cost.Spec(
            function, x.dtype, x.shape[-1], b1 is not None, 16 if not bits else bits & -bits, rounded, variant
        )

    def cpu(*arguments: Any) -> Any:
        given, pairs = checked(*arguments)
        eps, variant = arguments[-2:]
        if variant not in ("auto", "reference"):
            spec = request(given[0], pairs[1], 0, given[0].shape[:-1].numel(), variant)
            if variant == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
                return _twin(spec, tuple(t.contiguous() for t in given), _contiguous(pairs), eps)
            cost.choose(spec, None)  # raises: unknown, or refused with its reason
        return _reference(function, given, pairs, eps)

    def cuda(
        x: Tensor, x1: Tensor | None, x2: Tensor | None, after: Tensor | None,
        w1: Tensor, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, eps: float, variant: str,
    ) -> Any:  # fmt: skip
        """The warm path: one look at each tensor, one at the plans, the launch. What looks odd goes to `careful`.

        Written out tensor by tensor: a loop over them costs 2 us more of 8.
        """
        shape, dtype, device = x.shape, x.dtype, x.get_device()
        if not shape or not shape[-1] or not x.is_contiguous():
            return careful(x, x1, x2, after, w1, b1, w2, b2, eps, variant)
        hidden = shape[-1]
        width = (hidden,)
        p0, p1, p2, p3, q1, q2, q3, q4 = x.data_ptr(), 0, 0, 0, w1.data_ptr(), 0, 0, 0
        odd = w1.shape != width or w1.dtype is not dtype or w1.get_device() != device or not w1.is_contiguous()
        if x1 is not None:
            p1 = x1.data_ptr()
            odd |= x1.shape != shape or x1.dtype is not dtype or x1.get_device() != device or not x1.is_contiguous()
        if x2 is not None:
            p2 = x2.data_ptr()
            odd |= x2.shape != shape or x2.dtype is not dtype or x2.get_device() != device or not x2.is_contiguous()
        if after is not None:
            p3 = after.data_ptr()
            odd |= after.shape != shape or after.dtype is not dtype
            odd |= after.get_device() != device or not after.is_contiguous()
        if b1 is not None:
            q2 = b1.data_ptr()
            odd |= b1.shape != width or b1.dtype is not dtype or b1.get_device() != device or not b1.is_contiguous()
        if w2 is not None:
            q3 = w2.data_ptr()
            odd |= w2.shape != width or w2.dtype is not dtype or w2.get_device() != device or not w2.is_contiguous()
            odd |= (b1 is None) != (b2 is None)
        if b2 is not None:
            q4 = b2.data_ptr()
            odd |= b2.shape != width or b2.dtype is not dtype or b2.get_device() != device or not b2.is_contiguous()
        if odd or not 0.0 <= eps < _INF:
            return careful(x, x1, x2, after, w1, b1, w2, b2, eps, variant)
        count = x.numel() // hidden
        bits = (p0 | p1 | p2 | p3 | q1 | q2 | q3 | q4) & 15
        key = (hidden, dtype, q2 == 0, bits, (count - 1).bit_length(), variant, device)
        entry = plans.get(key)
        if entry is None:
            entry = plans[key] = _make(request(x, b1, bits, count, variant), device)
        plan, together, triton = entry
        if plan is None:
            given, pairs = checked(x, x1, x2, after, w1, b1, w2, b2, eps, variant)
            if triton:
                return _twin(request(x, b1, bits, count, variant), given, pairs, eps)
            return _reference(function, given, pairs, eps)
        y1 = torch.empty_like(x)
        y2 = torch.empty_like(x) if w2 is not None else None
        total = torch.empty_like(x) if form.store_sum else None
        if count:
            r1, r2, r3 = y1.data_ptr(), 0 if y2 is None else y2.data_ptr(), 0 if total is None else total.data_ptr()
            blocks = -(-count // together) * plan.cluster
            plan.launch((blocks, 1, 1), p0, p1, p2, p3, q1, q2, q3, q4, r1, r2, r3, count, eps)
        if y2 is not None:
            return y1, y2, total
        return y1 if total is None else (y1, total)

    def careful(*arguments: Any) -> Any:
        """Refuse with the reason, or make every tensor contiguous and go on."""
        checked(*arguments)
        return cuda(*_contiguous(arguments))

    def fake(*arguments: Any) -> Any:
        x = checked(*arguments)[0][0]
        made = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(form.norms + form.store_sum)]
        return tuple(made) if len(made) > 1 else made[0]

    typed = ", ".join(f"Tensor{'?' if name.startswith('b') else ''} {name}" for name in names)
    outputs = form.norms + form.store_sum
    returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    schema = f"{function}({typed}, float eps, str variant) -> {returns}"
    return register(schema, cpu=arrange(cpu), cuda=arrange(cuda), fake=arrange(fake))


def _contiguous(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.contiguous() if isinstance(t, Tensor) else t for t in arguments)


_layernorm = _operator(
    "layernorm",
    ("x",),
    ("weight", "bias"),
    lambda run: lambda x, w, b, eps, variant: run(x, None, None, None, w, b, None, None, eps, variant),
)
_rmsnorm = _operator(
    "rmsnorm",
    ("x",),
    ("weight",),
    lambda run: lambda x, w, eps, variant: run(x, None, None, None, w, None, None, None, eps, variant),
)
_layernorm_residual = _operator(
    "layernorm_residual",
    ("x", "residual"),
    ("weight", "bias"),
    lambda run: lambda x, after, w, b, eps, variant: run(x, None, None, after, w, b, None, None, eps, variant),
)
_add_layernorm = _operator(
    "add_layernorm",
    ("x", "residual"),
    ("weight", "bias"),
    lambda run: lambda x, x1, w, b, eps, variant: run(x, x1, None, None, w, b, None, None, eps, variant),
)
_add_rmsnorm = _operator(
    "add_rmsnorm",
    ("x", "residual"),
    ("weight",),
    lambda run: lambda x, x1, w, eps, variant: run(x, x1, None, None, w, None, None, None, eps, variant),
)
_add_dual_layernorm = _operator(
    "add_dual_layernorm",
    ("hidden", "attn", "mlp"),
    ("w1", "b1", "w2", "b2"),
    lambda run: lambda x, x1, x2, w1, b1, w2, b2, eps, variant: run(x, x1, x2, None, w1, b1, w2, b2, eps, variant),
)


def layernorm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, variant: str = "auto"
) -> Tensor:
    """LayerNorm over the last dimension: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        x: ``[..., hidden]``, float32, float16 or bfloat16.
        weight, bias: ``[hidden]``, the dtype of ``x``; ``bias`` may be ``None``.
        eps: added to the biased variance.
        variant: ``"auto"``, ``"cuda"``, ``"triton"`` (on a CPU only with ``TRITON_INTERPRET=1``) or ``"reference"``.

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
