"""Attention of one new token to a key-value cache of static shapes: public function, checks and registration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.ops.decode_attention import cost, reference
from nybble.ops.register import register
from nybble.runtime import hardware, workspace
from nybble.runtime.build import compile_kernel
from nybble.runtime.choice import Candidate
from nybble.runtime.errors import wrong_type, wrong_value
from nybble.runtime.plan import Plan
from nybble.runtime.source import PACKAGE, Source

FUNCTION = "decode_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HERE = PACKAGE / "ops" / "decode_attention"
KERNELS = {"cuda": _HERE / "decode_attention.cu", "stream": _HERE / "stream.cu"}
PARAMETERS = {"cuda": "25q2d", "stream": "25q2d2q"}
"""Sixteen pointers, kv heads, slots, seven strides, the scale, eps; of ``stream.cu`` the workspace and the pairs."""

_INF = float("inf")


class Sinks(NamedTuple):
    """First tokens whose keys are rotated anew at every step, as a window moves on.

    Attributes:
        still: their un-rotated keys, float32 ``[B, Hkv, sinks, rotary]``.
        turned: the same turned by a quarter, ``(-second half, first half)``.
        cos, sin: of where they are now, float32 ``[sinks, rotary]``.
    """

    still: Tensor
    turned: Tensor
    cos: Tensor
    sin: Tensor


def check(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot: Tensor, seen: Tensor,
    cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None,
    still: Tensor | None, turned: Tensor | None, sink_cos: Tensor | None, sink_sin: Tensor | None,
    scale: float, eps: float,
) -> None:  # fmt: skip
    """Refuse what no variant computes; the same on every device and under tracing.

    Raises:
        TypeError: a dtype. ValueError: a shape, a stride, a device or a value.
    """

    def alike(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = q.dtype) -> None:
        if tensor.dtype != dtype:
            raise wrong_type(FUNCTION, name, dtype, tensor.dtype, f"Convert it with .to({dtype}).")
        if tuple(tensor.shape) != shape:
            raise wrong_value(FUNCTION, name, f"shape {list(shape)}", list(tensor.shape))
        if tensor.device != q.device:
            raise wrong_value(FUNCTION, name, f"device {q.device}, that of q", tensor.device)

    if q.dtype not in DTYPES:
        raise wrong_type(FUNCTION, "q", "float16, bfloat16 or float32", q.dtype)
    if q.dim() != 3 or not q.shape[2]:
        raise wrong_value(FUNCTION, "q", "shape [batch, query heads, head_dim]", list(q.shape))
    if keys.dim() != 4 or not all(keys.shape[1:]):
        raise wrong_value(FUNCTION, "keys", "shape [batch, kv heads, slots, head_dim]", list(keys.shape))
    (batch, queries, d), (_, heads, slots, _) = q.shape, keys.shape
    if not queries or queries % heads:
        raise wrong_value(FUNCTION, "q", f"a multiple of {heads} query heads, the kv heads of keys", queries)
    for name, tensor in (("k", k), ("v", v)):
        alike(name, tensor, (batch, heads, d))
    for name, tensor in (("keys", keys), ("values", values)):
        alike(name, tensor, (batch, heads, slots, d))
        if not tensor.is_contiguous():
            remedy = "It is written in place, so that no copy will do."
            raise wrong_value(FUNCTION, name, "a contiguous cache", f"strides {list(tensor.stride())}", remedy)
    for name, tensor in (("slot", slot), ("seen", seen)):
        alike(name, tensor, (1,), torch.int64)
    for first, second, a, b in (("cos", "sin", cos, sin), ("q_norm", "k_norm", q_norm, k_norm)):
        if (a is None) is not (b is None):
            raise wrong_value(FUNCTION, second, f"both {first} and {second}, or neither", "one of them")
    rotary = 0
    if cos is not None and sin is not None:
        rotary = cos.shape[-1] if cos.dim() else 0
        if cos.dtype not in (q.dtype, torch.float32):
            raise wrong_type(FUNCTION, "cos", f"{q.dtype}, the dtype of q, or float32", cos.dtype)
        if cos.dim() != 2 or cos.shape[0] not in (1, batch) or rotary % 2 or not 2 <= rotary <= d:
            expected = f"shape [1 or {batch}, rotary] with an even rotary up to {d}"
            raise wrong_value(FUNCTION, "cos", expected, list(cos.shape))
        alike("cos", cos, tuple(cos.shape), cos.dtype)
        alike("sin", sin, tuple(cos.shape), cos.dtype)
    if q_norm is not None and k_norm is not None:
        alike("q_norm", q_norm, (d,))
        alike("k_norm", k_norm, (d,))
    given = [t is not None for t in (still, turned, sink_cos, sink_sin)]
    if any(given):
        if not all(given) or not rotary:
            got = "some of its tensors" if rotary else "sinks without cos and sin"
            raise wrong_value(FUNCTION, "sinks", "four tensors, and angles for the queries", got)
        assert still is not None and turned is not None and sink_cos is not None and sink_sin is not None
        count = still.shape[2] if still.dim() == 4 else 0
        if not 1 <= count <= slots:
            raise wrong_value(FUNCTION, "sinks.still", "shape [batch, kv heads, sinks, rotary]", list(still.shape))
        alike("sinks.still", still, (batch, heads, count, rotary), torch.float32)
        alike("sinks.turned", turned, (batch, heads, count, rotary), torch.float32)
        alike("sinks.cos", sink_cos, (count, rotary), torch.float32)
        alike("sinks.sin", sink_sin, (count, rotary), torch.float32)
    if not -_INF < scale < _INF:
        raise wrong_value(FUNCTION, "scale", "a finite number", scale)
    if not 0.0 <= eps < _INF:
        raise wrong_value(FUNCTION, "eps", "a finite number >= 0", eps)


def spec_of(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor | None, q_norm: Tensor | None, still: Tensor | None,
    variant: str,
) -> cost.Spec:  # fmt: skip
    """The request, with slots rounded up."""
    batch, heads, slots, d = keys.shape
    aligned = q.device.type != "cuda" or (keys.data_ptr() | values.data_ptr()) % 16 == 0
    return cost.Spec(
        q.dtype,
        q.dtype if cos is None else cos.dtype,
        d,
        q.shape[1] // heads,
        0 if cos is None else cos.shape[1],
        q_norm is not None,
        0 if still is None else still.shape[2],
        batch * heads,
        cost.rounded(slots),
        aligned,
        variant,
    )


def source(spec: cost.Spec, chosen: Candidate) -> Source:
    """The specialisation of a kernel for a request and a candidate that is not the reference."""
    constants = (
        ("T", spec.dtype),
        ("A", spec.angles),
        ("D", spec.d),
        ("GROUP", spec.group),
        ("ROTARY", spec.rotary),
        ("NORM", spec.norm),
        ("SINKS", spec.sinks),
        *chosen.config,
    )
    return Source(KERNELS[chosen.variant], constants)


class Launch(NamedTuple):
    """How a request is launched.

    Attributes:
        plan: its kernel.
        splits: blocks that share a head's keys, of one cluster; 0 of ``stream.cu``, whose blocks share all keys.
        warps: of a block. each: blocks of a multiprocessor, of sms. left: bytes a block leaves for another.
    """

    plan: Plan
    splits: int
    warps: int
    each: int
    sms: int
    left: int

    def blocks(self, pairs: int, slots: int) -> int:
        """Of a grid."""
        return pairs * self.splits or cost.stream_blocks(pairs, slots, self.warps, self.each, self.sms)

    def run(self, pairs: int, slots: int, *given: int | float, alone: bool = False) -> None:
        """Launch, with what :func:`arguments` returns, tensors as their addresses."""
        blocks = self.blocks(pairs, slots)
        if not self.splits:
            size = workspace.FLAG_BYTES + blocks * self.left
            given = *given, workspace.address(self.plan.device, size), pairs
        self.plan.launch((blocks, 1, 1), *given, alone=alone)


_PLANS: dict[tuple[cost.Spec, int], Launch | None] = {}
"""By request and device; ``None`` where the reference runs."""


def launch_of(spec: cost.Spec, chosen: Candidate, device: int) -> Launch:
    """The kernel of a candidate that is not the reference, built and loaded."""
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    config = dict(chosen.config)
    splits = config.get("SPLITS", 0)
    plan = Plan(
        compile_kernel(source(spec, chosen), card.arch),
        PARAMETERS[chosen.variant],
        device=device,
        threads=32 * config["WARPS"],
        shared_bytes=config["SHARED"],
        cluster=splits or 1,
        overlap=True,
    )
    return Launch(plan, splits, config["WARPS"], config.get("EACH", 0), card.sms, cost.stream_left(spec))


def _make(spec: cost.Spec, device: int) -> Launch | None:
    chosen = cost.choose(spec, hardware.current(device)).pick
    return None if chosen.variant == "reference" else launch_of(spec, chosen, device)


def arguments(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot: Tensor, seen: Tensor,
    cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None,
    still: Tensor | None, turned: Tensor | None, sink_cos: Tensor | None, sink_sin: Tensor | None,
    out: Tensor, scale: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    """What both kernels take, in their order: tensors, then numbers."""
    strides = [stride for t in (q, k, v) for stride in t.stride()[:2]]
    turn = 0 if cos is None or cos.shape[0] == 1 else cos.stride(0)
    return (
        q, k, v, keys, values, slot, seen, cos, sin, q_norm, k_norm, still, turned, sink_cos, sink_sin, out,
        keys.shape[1], keys.shape[2], *strides, turn, scale, eps,
    )  # fmt: skip


def cuda(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot: Tensor, seen: Tensor,
    cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None,
    still: Tensor | None, turned: Tensor | None, sink_cos: Tensor | None, sink_sin: Tensor | None,
    scale: float, eps: float, settled: bool, variant: str,
) -> Tensor:  # fmt: skip
    """What runs on CUDA: ``[B, Hq, D]``; keys and values have the new token in the slot."""
    given = q, k, v, keys, values, slot, seen, cos, sin, q_norm, k_norm, still, turned, sink_cos, sink_sin, scale, eps
    check(*given)
    device = q.get_device()
    key = spec_of(q, keys, values, cos, q_norm, still, variant), device
    if key not in _PLANS:
        _PLANS[key] = _make(*key)
    entry = _PLANS[key]
    if entry is None:
        return _reference(*given)
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    if cos is not None and sin is not None and (cos.stride(1) != 1 or cos.stride() != sin.stride()):
        cos, sin = cos.contiguous(), sin.contiguous()
    q_norm, k_norm, still, turned, sink_cos, sink_sin = (
        None if t is None else t.contiguous() for t in (q_norm, k_norm, still, turned, sink_cos, sink_sin)
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        taken = arguments(
            q, k, v, keys, values, slot, seen, cos, sin, q_norm, k_norm, still, turned, sink_cos, sink_sin, out, scale,
            eps,
        )  # fmt: skip
        pointers = [0 if t is None else t.data_ptr() for t in taken[:16]]
        entry.run(keys.shape[0] * keys.shape[1], keys.shape[2], *pointers, *taken[16:], alone=not settled)
    return out


def _reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot: Tensor, seen: Tensor,
    cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None,
    still: Tensor | None, turned: Tensor | None, sink_cos: Tensor | None, sink_sin: Tensor | None,
    scale: float, eps: float,
) -> Tensor:  # fmt: skip
    angles = None if cos is None or sin is None else (cos, sin)
    norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
    sinks = None
    if still is not None and turned is not None and sink_cos is not None and sink_sin is not None:
        sinks = (still, turned, sink_cos, sink_sin)
    return reference.decode_attention(q, k, v, keys, values, slot, seen, angles, norms, sinks, scale, eps)


def cpu(*given: Any) -> Tensor:
    """What runs on a CPU; arguments as :func:`cuda`."""
    variant = given[18]
    check(*given[:17])
    if variant not in ("auto", "reference"):
        q, keys, values, cos, q_norm, still = (given[i] for i in (0, 3, 4, 7, 9, 11))
        cost.choose(spec_of(q, keys, values, cos, q_norm, still, variant), None)  # raises: unknown, or refused
    return _reference(*given[:17])


def fake(*given: Any) -> Tensor:
    """Shapes and dtypes for tracing; arguments as :func:`cuda`."""
    check(*given[:-2])
    return torch.empty_like(given[0], memory_format=torch.contiguous_format)


_decode_attention = register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor slot, Tensor seen,"
    " Tensor? cos, Tensor? sin, Tensor? q_norm, Tensor? k_norm, Tensor? still, Tensor? turned, Tensor? sink_cos,"
    " Tensor? sink_sin, float scale, float eps, bool settled, str variant) -> Tensor",
    cpu=cpu,
    cuda=cuda,
    fake=fake,
)


def can_run(
    dtype: torch.dtype, d: int, group: int, sinks: int, device: torch.device, cos: torch.dtype | None = None
) -> bool:
    """Whether tensors of this kind on this device have something quicker than PyTorch's own attention: the kernel. On a
    CPU what runs is the reference, which is as quick as anything there."""
    if device.type != "cuda":
        return device.type == "cpu"
    card = hardware.current(device.index)
    spec = cost.Spec(dtype, cos or dtype, d, group, 0, False, sinks, 1, 1)
    return card is not None and card.capability >= (9, 0) and not cost.refused(spec)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    seen: Tensor,
    *,
    angles: tuple[Tensor, Tensor] | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    sinks: Sinks | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    settled: bool = False,
    variant: str = "auto",
) -> Tensor:
    """One new token a text attends to a cache: rotation, append and attention in one launch.

    Queries and keys are normed (with ``norms``) and rotated (with ``angles``), the key and the value are written into
    ``slot`` of the cache, and ``softmax(scale * q k^T) v`` is taken over the first ``min(seen + 1, slots)`` slots, the
    new one among them. Nothing is asked of the host, so a CUDA graph of it serves every step.

    Args:
        q: ``[B, Hq, D]``. k, v: ``[B, Hkv, D]``, any strides, of one dtype: float16, bfloat16 or float32; ``Hq`` is a
            multiple of ``Hkv``, and neighbouring query heads share a kv head.
        keys, values: ``[B, Hkv, slots, D]``, contiguous, of that dtype: the cache, written in place.
        slot: int64 ``[1]``, below ``min(seen + 1, slots)``: where the token goes.
        seen: int64 ``[1]``, the tokens before it.
        angles: cosines and sines ``[B or 1, rotary]``, of that dtype or float32: the halves of the first ``rotary``
            dimensions are rotated.
        norms: weights ``[D]`` of RMSNorms of queries and of keys, before the rotation. eps: of both.
        sinks: first slots whose keys are rotated anew instead of taken from the cache.
        scale: of scores; ``1 / sqrt(D)`` where ``None``.
        settled: the cache, ``slot``, ``seen`` and the angles were not written by the kernel before this one on the
            stream; then they are read while it still runs. ``q``, ``k`` and ``v`` may be.
        variant: ``"auto"``, ``"cuda"`` (blocks of a cluster share a head's keys), ``"stream"`` (all blocks share all
            keys) or ``"reference"``.

    Returns:
        ``[B, Hq, D]``, contiguous, the dtype of ``q``.

    Raises:
        TypeError: a dtype. ValueError: a shape, stride, device or value. UnsupportedError: the variant can't run here.

    Numerics: norm and rotation in float32, rounded once; scores and sums have float32 accumulators; the weights are
    rounded to the dtype where they multiply values. Slots that are not in use are not looked at. Deterministic.

    Source: Milakov and Gimelshein 2018; Flash-Decoding (Dao et al. 2023).
    """
    cos, sin = angles or (None, None)
    q_norm, k_norm = norms or (None, None)
    still, turned, sink_cos, sink_sin = sinks or (None, None, None, None)
    if scale is None:
        scale = q.shape[-1] ** -0.5 if isinstance(q, Tensor) and q.dim() and q.shape[-1] else 1.0
    return _decode_attention(
        q, k, v, keys, values, slot, seen, cos, sin, q_norm, k_norm, still, turned, sink_cos, sink_sin,
        scale, eps, settled, variant,
    )  # fmt: skip
