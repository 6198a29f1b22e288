"""The 4-bit or 8-bit linear with what goes before and after it: public functions, checks and registration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.formats.tiles import PackedWeight
from nybble.ops.norm import op as norms
from nybble.ops.register import eager, register
from nybble.ops.w4a16 import cost, reference
from nybble.runtime import hardware, tuned, workspace
from nybble.runtime.build import compile_kernel
from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.errors import wrong_type, wrong_value
from nybble.runtime.plan import MAP, Plan
from nybble.runtime.source import PACKAGE, Source

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu_mul")

KERNELS = {
    variant: PACKAGE / "ops" / "w4a16" / f"{variant}.cu" for variant in ("mma", "wgmma", "gemm", "stream", "digits")
}
PARAMETERS = {"mma": "8q", "wgmma": "11qd", "digits": "11qd", "gemm": f"{MAP}8q", "stream": "11qd", "gather": "4q"}
GATHER, GATHER_THREADS = PACKAGE / "ops" / "w4a16" / "gather.cu", 128

_INF = float("inf")
_MAX_TEMPLATES = 1024


class Norm(NamedTuple):
    """A norm of the activations over their last dimension, before a linear layer.

    Attributes:
        weight, bias: ``[K]``, the dtype of the activations; a bias only with layernorm.
        eps: added to the variance (layernorm) or to the mean square (rmsnorm).
        kind: ``"layernorm"`` or ``"rmsnorm"``.
    """

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5
    kind: str = "layernorm"


class Words(NamedTuple):
    """What the messages of a public function call it and its arguments."""

    function: str = "w4a16_linear"
    x: str = "x"
    weight: tuple[str, ...] = ("weight.qweight", "weight.scales", "weight.qzeros", "weight.perm")
    norm_kind: str = "norm.kind"
    norm_weight: str = "norm.weight"
    norm_bias: str = "norm.bias"
    eps: str = "norm.eps"


WORDS = Words()


class Unpacked(NamedTuple):
    """What :func:`check` looks at in a weight, for one that is not packed yet."""

    in_features: int
    out_features: int
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Ready(NamedTuple):
    """A plan and what its launches need besides.

    Attributes:
        variant: which kernel file it is. plan: the kernel.
        tile_m: rows a block. across: blocks, of ``gemm.cu`` clusters' tiles, side by side along the output features.
        most: clusters of ``gemm.cu`` that run at once. share: rows of x that each of its blocks fetches at a time.
        left: with stream-K, bytes of the workspace in which blocks leave sums for others; else 0.
        gather: for act-order, the kernel that brings the activations into the weight's order before the product.
        templates: for each shape of x one element, expanded to the shape of the output. `empty_like` of that takes
            half the host time of `new_empty` with a shape, 0.6 us.
        maps: of ``gemm.cu``: where x was and its rows, and what the driver encoded for them.
    """

    variant: str
    plan: Plan
    tile_m: int
    across: int
    most: int
    share: int
    left: int
    gather: Plan | None
    templates: dict[tuple[int, ...], Tensor]
    maps: dict[tuple[int, int], bytes]


_PLANS: dict[tuple[Any, ...], Ready | str] = {}
"""The plan of a request, or the name of the variant that has none."""


def check(
    x: Tensor,
    weight: PackedWeight | Unpacked,
    bias: Tensor | None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_kind: str = "",
    activation: str = "",
    split1: int = 0,
    split2: int = 0,
    words: Words = WORDS,
) -> None:
    """Refuse what no variant computes; the same on every device and under tracing. The weight has checked itself.

    Raises:
        TypeError: a dtype. ValueError: a shape, a device or a value.
    """
    k, n, function = weight.in_features, weight.out_features, words.function
    if x.dtype not in DTYPES:
        raise wrong_type(function, words.x, "float16, bfloat16 or float32", x.dtype)
    if x.dim() == 0 or x.shape[-1] != k:
        raise wrong_value(function, words.x, f"shape [..., in_features] = [..., {k}]", list(x.shape))
    if activation and activation not in ACTIVATIONS:
        raise wrong_value(function, "activation", f"None or one of {list(ACTIVATIONS)}", repr(activation))
    if split1 or split2:
        if not 0 < split1 < split2 < n or split1 % 8 or split2 % 8:
            expected = f"two multiples of 8 that rise, within {n} output features"
            raise wrong_value(function, "split1, split2", expected, (split1, split2))
        if activation == "silu_mul" or residual is not None:
            raise wrong_value(function, "split1, split2", "0 with silu_mul or a residual", (split1, split2))
    if norm_kind and norm_kind not in NORMS:
        raise wrong_value(function, words.norm_kind, f"one of {list(NORMS)}", repr(norm_kind))
    if bool(norm_kind) != (norm_weight is not None):
        expected = "a weight with a kind of norm" if norm_kind else "a kind of norm with its weight"
        raise wrong_value(function, words.norm_weight, expected, "None" if norm_weight is None else "a weight alone")
    if norm_bias is not None and norm_kind != "layernorm":
        remedy = "Only layernorm has a bias."
        raise wrong_value(function, words.norm_bias, f"None with {norm_kind or 'no norm'}", "a tensor", remedy)
    if norm_kind and not 0.0 <= eps < _INF:
        raise wrong_value(function, words.eps, "a finite number >= 0", eps)
    out = n // 2 if activation == "silu_mul" else n
    for name, tensor, letters, shape in (
        ("bias", bias, "[out_features]", (n,)),
        (words.norm_weight, norm_weight, "[in_features]", (k,)),
        (words.norm_bias, norm_bias, "[in_features]", (k,)),
        ("residual", residual, "that of the result", (*x.shape[:-1], out)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise wrong_type(function, name, f"{x.dtype}, the dtype of {words.x}", tensor.dtype)
        if tensor.shape != shape:
            raise wrong_value(function, name, f"shape {letters} = {list(shape)}", list(tensor.shape))
    names = (*words.weight, "bias", "residual", words.norm_weight, words.norm_bias)
    for name, tensor in zip(names, (*weight.tensors, bias, residual, norm_weight, norm_bias), strict=True):
        if tensor is not None and tensor.device != x.device:
            raise wrong_value(function, name, f"device {x.device}, that of {words.x}", tensor.device)


def result_shape(lead: Sequence[int], n: int, activation: str, split1: int, split2: int) -> tuple[int, ...]:
    """Of the operator's result: ``[..., N]``; half of N with silu_mul; three equal planes ``[3, ..., N / 3]``; three
    others flat, one behind the other."""
    if not split1:
        return (*lead, n // 2 if activation == "silu_mul" else n)
    if split2 == 2 * split1 and n == 3 * split1:
        return (3, *lead, split1)
    return (math.prod(lead) * n,)


def _reference(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, *around: Any, split1: int = 0, split2: int = 0
) -> Tensor:
    """``around``: residual to activation, as the operator takes them."""
    k, n = weight.in_features, weight.out_features
    y = reference.linear(x, *weight.tensors, bias, k, n, weight.group_size, *around, bits=weight.bits)
    if not split1:
        return y
    return reference.planes(y, (split1, split2)).view(result_shape(x.shape[:-1], n, "", split1, split2))


def _composed(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    norm_kind: str,
    activation: str,
    split1: int,
    split2: int,
) -> Tensor:
    """One kernel after the other, each rounding its result: the norm, then all the rest as it is best without a norm;
    without one the plain product, then PyTorch's functions."""
    if norm_weight is not None:
        normed = (
            norms.rmsnorm(x, norm_weight, eps)
            if norm_kind == "rmsnorm"
            else norms.layernorm(x, norm_weight, norm_bias, eps)
        )
        return _launch(
            normed, weight, bias, "auto", residual, activation=activation, split1=split1, split2=split2
        )  # fmt: skip
    y = reference.epilogue(_launch(x, weight, bias, "auto"), activation, residual)
    if not split1:
        return y
    return reference.planes(y, (split1, split2)).view(
        result_shape(x.shape[:-1], weight.out_features, "", split1, split2)
    )


def _spec(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    variant: str,
    residual: Tensor | None,
    norm_bias: Tensor | None,
    norm_kind: str,
    activation: str,
    split1: int,
    split2: int,
) -> cost.Spec:
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
        norm_kind,
        activation,
        residual is not None,
        norm_bias is not None,
        (split1, split2) if split1 else (),
        weight.bits,
    )


def _plain(tensor: Tensor) -> bool:
    """Contiguous and 16-byte aligned, as the kernels read it."""
    return tensor.is_contiguous() and tensor.data_ptr() & 15 == 0


def _straight(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or _plain(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _launch(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    variant: str,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_kind: str = "",
    activation: str = "",
    split1: int = 0,
    split2: int = 0,
    words: Words = WORDS,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The warm path: one look at each tensor, one at the plans, the launch. ``out_dtype``, where it is not that of x:
    float32, with nothing around the product."""
    qweight, scales, qzeros, perm = weight.qweight, weight.scales, weight.qzeros, weight.perm
    device, dtype, shape, k = x.get_device(), x.dtype, x.shape, weight.in_features
    rows = x.numel() // k
    odd = qweight.get_device() != device or scales.get_device() != device
    if bias is not None:
        odd |= bias.dtype is not dtype or bias.shape != (weight.out_features,) or bias.get_device() != device
        odd |= not _plain(bias)
    around = None
    if norm_kind or activation or split1 or residual is not None or norm_weight is not None or norm_bias is not None:
        around = (norm_kind, norm_weight is None, norm_bias is None, activation, residual is None, split1, split2)
        if norm_weight is not None:
            odd |= norm_weight.dtype is not dtype or norm_weight.shape != (k,) or norm_weight.get_device() != device
            odd |= not _plain(norm_weight) or not 0.0 <= eps < _INF
            if norm_bias is not None:
                odd |= norm_bias.dtype is not dtype or norm_bias.shape != (k,) or norm_bias.get_device() != device
                odd |= not _plain(norm_bias)
        if residual is not None:
            odd |= residual.dtype is not dtype or residual.get_device() != device or residual.dim() != x.dim()
            odd |= not _plain(residual) or residual.shape[:-1] != shape[:-1]
            odd |= residual.shape[-1:] != (weight.out_features >> (activation == "silu_mul"),)
    key = (
        k, weight.out_features, weight.group_size, weight.bits, dtype, scales.dtype, qzeros is None, perm is None,
        bias is not None, (rows - 1).bit_length(), variant, device, around, out_dtype,
    )  # fmt: skip
    ready = _PLANS.get(key)
    if odd or ready is None or not shape or shape[-1] != k:
        check(
            x, weight, bias, residual, norm_weight, norm_bias, eps, norm_kind, activation, split1, split2, words
        )  # fmt: skip
        if ready is None:
            spec = _spec(
                x, weight, bias, variant, residual, norm_bias, norm_kind, activation, split1, split2
            )  # fmt: skip
            ready = _PLANS[key] = _make(spec._replace(out_dtype=out_dtype), device)
        if not isinstance(ready, str):
            bias, residual = _straight(bias), _straight(residual)
            norm_weight, norm_bias = _straight(norm_weight), _straight(norm_bias)
    if isinstance(ready, str):
        if ready == "composed":
            return _composed(
                x, weight, bias, residual, norm_weight, norm_bias, eps, norm_kind, activation, split1, split2
            )  # fmt: skip
        return _reference(
            x, weight, bias, residual, norm_weight, norm_bias, eps, norm_kind, activation,
            split1=split1, split2=split2,
        ).to(out_dtype or dtype)  # fmt: skip
    kernel, plan, tile_m, across, most, share, left, gather, templates, maps = ready
    if not _plain(x):
        x = x.clone(memory_format=torch.contiguous_format)
    template = templates.get(shape)
    if template is None:
        if len(templates) >= _MAX_TEMPLATES:
            templates.clear()
        out = result_shape(shape[:-1], weight.out_features, activation, split1, split2)
        template = templates[shape] = x.new_empty(1, dtype=out_dtype or dtype).expand(out)
    y = torch.empty_like(template, memory_format=torch.contiguous_format)
    if not rows:
        return y
    zeros, order = 0 if qzeros is None else qzeros.data_ptr(), 0 if perm is None else perm.data_ptr()
    added = 0 if bias is None else bias.data_ptr()
    if kernel == "mma":
        plan.launch(
            (-(-rows // tile_m), across, 1),
            x.data_ptr(), qweight.data_ptr(), scales.data_ptr(), zeros, order, added, y.data_ptr(), rows,
        )  # fmt: skip
        return y
    down, alone = -(-rows // tile_m), plan.overlap and weight.settle()
    if gather is not None:
        ordered = torch.empty_like(x)
        blocks = -(-rows * k // (8 * GATHER_THREADS))
        gather.launch((blocks, 1, 1), x.data_ptr(), order, ordered.data_ptr(), rows, alone=alone)
        x = ordered
    if kernel == "gemm":
        place = (x.data_ptr(), rows)
        encoded = maps.get(place)
        if encoded is None:
            if len(maps) >= _MAX_TEMPLATES:
                maps.clear()
            encoded = maps[place] = plan.tensor_map(x, rows, share)
        plan.launch(
            # With stream-K every worker must have a unit of 128 features: whoever adds waits for all before it.
            (min(down * across * (-(-k // 128) if left else 1), most) * plan.cluster, 1, 1),
            encoded, qweight.data_ptr(), scales.data_ptr(), zeros, added,
            0 if residual is None else residual.data_ptr(), y.data_ptr(),
            workspace.address(device, left) if left else 0, rows, alone=alone,
        )  # fmt: skip
        return y
    arguments = (
        x.data_ptr(), qweight.data_ptr(), scales.data_ptr(), zeros, order, added,
        0 if residual is None else residual.data_ptr(),
        0 if norm_weight is None else norm_weight.data_ptr(),
        0 if norm_bias is None else norm_bias.data_ptr(),
        y.data_ptr(), rows, eps,
    )  # fmt: skip
    plan.launch((across, down, 1), *arguments, alone=alone)
    return y


def source(spec: cost.Spec, candidate: Candidate) -> Source:
    """The specialisation of a candidate's kernel file for a request."""
    constants: tuple[tuple[str, Any], ...] = (
        ("X", spec.dtype),
        ("S", spec.scale_dtype),
        ("N", spec.n),
        ("K", spec.k),
        ("GROUP", spec.group_size),
        ("ZEROS", spec.zeros),
        ("PERM", spec.perm),
        ("BIAS", spec.bias),
    )
    if candidate.variant in ("wgmma", "gemm"):
        constants += (("BITS", spec.bits),)
    if candidate.variant in ("wgmma", "gemm", "digits"):
        constants += (("Y", spec.out_dtype or spec.dtype),)
    if candidate.variant != "mma":
        split1, split2 = spec.splits or (spec.n, spec.n)
        constants += (
            ("NORM", ("", *NORMS).index(spec.norm)),
            ("NORM_BIAS", spec.norm_bias),
            ("ACT", ("", *ACTIVATIONS).index(spec.activation)),
            ("RESIDUAL", spec.residual),
            ("SPLIT1", split1),
            ("SPLIT2", split2),
        )
    return Source(KERNELS[candidate.variant], (*constants, *candidate.config))


def gather_source(spec: cost.Spec) -> Source:
    """The kernel that gathers the activations of a request with act-order."""
    return Source(GATHER, (("X", spec.dtype), ("K", spec.k), ("THREADS", GATHER_THREADS)))


_forced: tuple[str, Candidate] | None = None


@contextmanager
def forced(spec: cost.Spec, candidate: Candidate, plans: dict[tuple[Any, ...], Ready | str]) -> Iterator[None]:
    """Inside, this request runs this candidate, and ``plans`` keeps what is built. For measuring, in one thread."""
    global _PLANS, _forced
    kept = _PLANS, _forced
    _PLANS, _forced = plans, (cost.key(spec), candidate)
    try:
        yield
    finally:
        _PLANS, _forced = kept


def choose(spec: cost.Spec, card: hardware.Hardware | None) -> Choice:
    """The variant for this request: what ``nybble tune`` measured on this GPU, else what is predicted.

    Raises:
        ValueError: ``spec.variant`` is unknown.
        UnsupportedError: the variant asked for can't run here; the text says why.
    """
    predicted = cost.choose(spec, card)
    if spec.variant != "auto" or card is None:
        return predicted
    name = cost.key(spec)
    measured = _forced[1] if _forced is not None and _forced[0] == name else tuned.lookup(card, name)
    if measured is None:
        return predicted
    return Choice(measured, (measured, *(c for c in predicted.candidates if c.variant != measured.variant)))


def _make(spec: cost.Spec, device: int) -> Ready | str:
    card = hardware.current(device)
    assert card is not None, "a CUDA tensor without a CUDA device"
    chosen = choose(spec, card).pick
    if chosen.variant not in KERNELS:
        return chosen.variant
    binary, config = compile_kernel(source(spec, chosen), card.arch), dict(chosen.config)
    if chosen.variant == "mma":
        plan = Plan(binary, PARAMETERS["mma"], device=device, threads=128 * config["SLICES"])
        return Ready("mma", plan, config["TILE_M"], -(-spec.n // 64), 0, 0, 0, None, {}, {})
    cluster = config.get("CLUSTER", 1)
    if chosen.variant == "stream":
        features, threads = 16 * config["WARPS_N"] * config["STRIPS"], 32 * config["WARPS_N"] * config["SLICES"]
    else:  # a warp more in wgmma.cu and digits.cu, a warpgroup in gemm.cu, to ask for the weights
        copying = 128 if chosen.variant == "gemm" else 32
        features, threads = 64 * config["TEAMS"], 128 * config["TEAMS"] * config.get("SLICES", 1) + copying
    plan = Plan(
        binary,
        PARAMETERS[chosen.variant],
        device=device,
        threads=threads,
        shared_bytes=config["SHARED"],
        cluster=cluster,
        overlap=card.capability >= (9, 0),
    )
    tiles = -(-spec.n // features)
    # Workers that take tile after tile are as many as run at once; so are the blocks of gemm.cu.
    workers = min(tiles, plan.clusters_at_once()) if chosen.variant in ("wgmma", "digits") else tiles
    gather = None
    if config.get("GATHERED"):
        gathering = compile_kernel(gather_source(spec), card.arch)
        gather = Plan(gathering, PARAMETERS["gather"], device=device, threads=GATHER_THREADS, overlap=True)
    if chosen.variant == "gemm":
        wide = cluster // config["WAYS"]
        tile_m, most = config["TILE_M"], plan.clusters_at_once()
        across, left = -(-spec.n // (features * wide)), 0
        if config["STREAM_K"]:
            most = min(most, workspace.FLAG_BYTES // (16 * config["TEAMS"] * cluster))  # four flags a warpgroup
            left = workspace.FLAG_BYTES + most * cluster * features * tile_m * 4
        return Ready("gemm", plan, tile_m, across, most, tile_m // wide, left, gather, {}, {})
    tile_m = config.get("TILE_M", 1)  # digits.cu has one row
    return Ready(chosen.variant, plan, tile_m, workers * cluster, 0, 0, 0, gather, {}, {})


# The operator takes the packed weight's fields one by one, as torch's schemas know no classes. PyTorch leaves out
# trailing arguments that are their schema's defaults, hence the same defaults here.


def cpu(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    variant: str,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_kind: str = "",
    activation: str = "",
    split1: int = 0,
    split2: int = 0,
    words: Words = WORDS,
) -> Tensor:
    """What runs on a CPU: the checks, then the reference."""
    check(x, weight, bias, residual, norm_weight, norm_bias, eps, norm_kind, activation, split1, split2, words)
    if variant not in ("auto", "reference"):
        spec = _spec(x, weight, bias, variant, residual, norm_bias, norm_kind, activation, split1, split2)
        cost.choose(spec, None)  # raises: unknown, or refused with its reason
    return _reference(
        x, weight, bias, residual, norm_weight, norm_bias, eps, norm_kind, activation, split1=split1, split2=split2
    )


def cuda(x: Tensor, weight: PackedWeight, bias: Tensor | None, variant: str, *around: Any) -> Tensor:
    """What runs on CUDA; arguments as :func:`cpu`."""
    return _launch(x, weight, bias, variant, *around)


def product(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> Tensor:
    """``x @ W`` on CUDA, of inputs that were checked, in float32 or the dtype of x."""
    card = hardware.current(x.get_device())
    if out_dtype is x.dtype or card is None or card.capability != (9, 0):
        return _launch(x, weight, None, "auto").to(out_dtype)
    return _launch(x, weight, None, "auto", out_dtype=out_dtype)


def fake(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    variant: str,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_kind: str = "",
    activation: str = "",
    split1: int = 0,
    split2: int = 0,
) -> Tensor:
    """Shape and dtype for tracing; arguments as :func:`cpu`."""
    check(x, weight, bias, residual, norm_weight, norm_bias, eps, norm_kind, activation, split1, split2)
    return x.new_empty(result_shape(x.shape[:-1], weight.out_features, activation, split1, split2))


def _from_fields(run: Any) -> Any:
    def implementation(
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        qzeros: Tensor | None,
        perm: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        group_size: int,
        variant: str,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        eps: float = 1e-5,
        norm_kind: str = "",
        activation: str = "",
        split1: int = 0,
        split2: int = 0,
        bits: int = 4,
    ) -> Tensor:
        weight = PackedWeight(qweight, scales, qzeros, perm, in_features, out_features, group_size, bits)
        return run(
            x, weight, bias, variant, residual, norm_weight, norm_bias, eps, norm_kind, activation, split1, split2
        )  # fmt: skip

    return implementation


_w4a16 = register(
    "w4a16(Tensor x, Tensor qweight, Tensor scales, Tensor? qzeros, Tensor? perm, Tensor? bias, "
    "int in_features, int out_features, int group_size, str variant, Tensor? residual=None, Tensor? norm_weight=None, "
    "Tensor? norm_bias=None, float eps=1e-5, str norm_kind='', str activation='', int split1=0, int split2=0, "
    "int bits=4) -> Tensor",
    cpu=_from_fields(cpu),
    cuda=_from_fields(cuda),
    fake=_from_fields(fake),
)


def run(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    variant: str,
    residual: Tensor | None,
    norm: Norm | None,
    activation: str,
    split1: int,
    split2: int,
    words: Words,
) -> Tensor:
    """The quickest correct way to the operator, with what goes around the product."""
    if not isinstance(weight, PackedWeight):
        remedy = "Pack with PackedWeight.from_quantized."
        raise wrong_type(words.function, "weight", "a nybble.PackedWeight", type(weight).__name__, remedy)
    if norm is None:
        norm_weight, norm_bias, eps, kind = None, None, 1e-5, ""
    elif isinstance(norm, Norm):
        norm_weight, norm_bias, eps, kind = norm
        if not kind:
            raise wrong_value(words.function, words.norm_kind, f"one of {list(NORMS)}", repr(kind))
    else:
        raise wrong_type(words.function, "norm", "a nybble.Norm or None", type(norm).__name__)
    if eager((x, bias, residual, norm_weight, norm_bias)):
        return _launch(
            x, weight, bias, variant, residual, norm_weight, norm_bias, eps, kind, activation, split1, split2, words
        )  # fmt: skip
    return _w4a16(
        x, *weight.tensors, bias, weight.in_features, weight.out_features, weight.group_size, variant,
        residual, norm_weight, norm_bias, eps, kind, activation, split1, split2, weight.bits,
    )  # fmt: skip


def w4a16_linear(
    x: Tensor,
    weight: PackedWeight,
    *,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    variant: str = "auto",
) -> Tensor:
    """Linear layer with a weight of 4 or 8 bits: ``y = activation(norm(x) @ W + bias) + residual``.

    Each part but the product is optional.

    ``W[k, n] = scales[g, n] * (q[k, n] - zeros[g, n])`` with ``g = k // group_size``, or ``g_idx[k]`` with act-order.

    Args:
        x: ``[..., K]``, float16 or bfloat16 (float32 runs the reference). Any leading shape, zero rows included.
        weight: a packed ``[K, N]`` weight on the device of ``x``; K and N multiples of 8, any group size. It says
            whether it has 4 bits or 8; with 8 there are kernels for Hopper, and other devices run the reference.
        bias: ``[N]``, the dtype of ``x``.
        norm: a :class:`nybble.Norm` of ``x`` over K, its tensors ``[K]`` in the dtype of ``x``.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"``, or ``"silu_mul"``: ``silu(gate) * up``, where the first half of
            the N output features is the gate and the second half is up.
        residual: the shape of the result, the dtype of ``x``; added last.
        variant: ``"auto"`` (the cost model's pick), ``"mma"`` (the product and a bias), ``"digits"`` (all of
            it, one row, Hopper), ``"wgmma"`` (all of it, at most 64 rows, Hopper), ``"gemm"`` (all but a norm, many
            rows, Hopper), ``"stream"`` (as wgmma, on other GPUs), ``"reference"``; ``"composed"``, one kernel after
            the other, where there is anything around the product.

    Returns:
        ``[..., N]``, or ``[..., N / 2]`` with silu_mul; contiguous, the dtype of ``x``.

    Raises:
        TypeError: a dtype. ValueError: a shape, device or value. UnsupportedError: the variant can't run here.

    Numerics: ``q - zero`` is exact, products and sums are fp32, the scale multiplies the fp32 sum of a group. Only from
        129 rows on may ``scale * (q - zero)`` be rounded to the dtype of ``x`` first, as a 16-bit model has it. One
        row of ``x`` may be taken in steps of 2^-30 of the largest of 128 neighbours, and its result is NaN where it is
        not finite. A norm has fp32 statistics and is rounded once to the dtype of ``x``, as the product reads it. Bias,
        activation and residual are fp32, and the result is rounded once; composed, after each kernel. Deterministic.
        NaN and Inf in a row of ``x`` reach that row of ``y`` only.
    """
    return run(x, weight, bias, variant, residual, norm, "" if activation is None else activation, 0, 0, WORDS)
