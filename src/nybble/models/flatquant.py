"""Layers of int4 activations and weights, and how a model becomes one of them."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nybble.formats import flatquant as folder_format
from nybble.formats.channels import ChannelWeight
from nybble.models.architectures import HEAD
from nybble.models.layers import W4A16Linear
from nybble.ops.flatquant.op import LARGEST, flatquant_dynamic_quantize, get_decompose_dim
from nybble.ops.w4a4.op import w4a4_linear
from nybble.runtime.errors import wrong_value

SHARED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one parent that read the same activations, and so share a transform."""
TRANSFORMS = ("hadamard", "none")


class FlatQuantTransform(nn.Module):
    """Quantises activations for the layers that share them: the first of them launches, the others take its result.

    Args:
        left, right: ``[M, M]`` and ``[N, N]``, the dtype of the activations.
    """

    left_trans: Tensor
    right_trans: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        for name, matrix in (("left_trans", left), ("right_trans", right)):
            self.register_parameter(name, nn.Parameter(matrix.detach().contiguous(), requires_grad=False))
        self.ratios: list[float] = []
        self.users = 0
        self._kept: tuple[Any, int, Tensor, Tensor, int] | None = None

    def join(self, clip_ratio: float) -> None:
        """One more layer uses it, with this ratio."""
        self.users += 1
        if clip_ratio not in self.ratios:
            self.ratios.append(clip_ratio)

    def quantize(self, x: Tensor, clip_ratio: float) -> tuple[Tensor, Tensor]:
        """int8 values ``[..., K]`` and scales ``[...]`` of ``x``."""
        if self.users == 1 or torch.compiler.is_compiling():
            return self.quantize_once(x, clip_ratio)
        rows = x.reshape(-1, x.shape[-1])
        version, kept = -1 if x.is_inference() else x._version, self._kept
        if kept is None or kept[0]() is not x or kept[1] != version:
            q, scales = flatquant_dynamic_quantize(rows, self.left_trans, self.right_trans, self.ratios)
            kept = (weakref.ref(x), version, q, scales, self.users)
        where, version, q, scales, awaited = kept
        # Once all have had it, it is of no use any more.
        self._kept = (where, version, q, scales, awaited - 1) if awaited > 1 else None
        which = self.ratios.index(clip_ratio)
        return q[which].view(x.shape), scales[which].view(x.shape[:-1])

    def quantize_once(self, x: Tensor, clip_ratio: float) -> tuple[Tensor, Tensor]:
        """The same for a single reader: nothing is kept for others."""
        rows = x.reshape(-1, x.shape[-1])
        q, scales = flatquant_dynamic_quantize(rows, self.left_trans, self.right_trans, clip_ratio)
        return q.view(x.shape), scales.view(x.shape[:-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class FlatQuantLinear(nn.Module):
    """``y = Q(x P) W' + bias``: transform and quantise in one kernel, multiply in another. For inference only.

    Args:
        weight: of the transformed activations; its tensors are used as they are.
        transform: P, which several layers may share.
        clip_ratio: of the activations, in (0, 1].
        bias: ``[out_features]`` or ``None``.
    """

    qweight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: ChannelWeight, transform: FlatQuantTransform, clip_ratio: float = 1.0, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.clip_ratio = weight.in_features, weight.out_features, clip_ratio
        for name, tensor in (("qweight", weight.qweight), ("bias", bias)):
            constant = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, constant)
        # Kept in float32 where a model is turned to 16 bits, as the operation wants them.
        self._scales = weight.scales
        self.transform = transform
        transform.join(clip_ratio)
        self._held: ChannelWeight | None = weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlatQuantLinear:
        super()._apply(fn, recurse)
        self._scales = self._scales.to(self.qweight.device)
        return self

    def packed(self) -> ChannelWeight:
        """The weight as the operation takes it, sharing this layer's tensors."""
        held = self._held
        if held is None or held.qweight is not self._parameters["qweight"] or held.scales is not self._scales:
            held = ChannelWeight(self.qweight, self._scales, self.in_features, self.out_features)
            if not torch.compiler.is_compiling():
                self._held = held
        return held

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, the dtype of ``x``."""
        q, scales = self.transform.quantize(x, self.clip_ratio)
        return w4a4_linear(q, scales, self.packed(), bias=self.bias, dtype=x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, clip_ratio={self.clip_ratio}, "
            f"bias={self.bias is not None}"
        )


def decompose(features: int) -> tuple[int, int]:
    """``(M, N)`` for the transforms of a width: FlatQuant's search, or where it has no end or finds sizes above 256 the
    divisors nearest to each other.

    Raises:
        ValueError: no two sizes up to 256 multiply to it.
    """
    if features % 4 != 2:
        m, n = get_decompose_dim(features)
        if n <= LARGEST:
            return m, n
    for m in range(math.isqrt(features), 0, -1):
        if features % m == 0 and features // m <= LARGEST:
            return m, features // m
    raise wrong_value("pack", "features", f"a product of two numbers up to {LARGEST}", features)


def _weight_of(layer: nn.Module) -> Tensor:
    """float32 ``[out, in]`` of a linear layer, quantised or not."""
    if isinstance(layer, W4A16Linear):
        return layer.packed().unpack().dequantize(torch.float32).t()
    weight = layer.get_parameter("weight").detach().float()
    return weight.t() if isinstance(layer, Conv1D) else weight


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D, W4A16Linear)) and name != HEAD:
            yield name, module


def convert(
    model: PreTrainedModel,
    *,
    transform: str = "hadamard",
    clip_ratio: float = 1.0,
    dtype: torch.dtype = torch.float16,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every linear layer but the head, rounded to the nearest int4: tensors of a file and its ``quantization_config``.

    Args:
        model: loaded by :func:`nybble.load`, plain or quantised.
        transform: ``"hadamard"``: orthogonal matrices with random signs; ``"none"``: identities, to compare.
        clip_ratio: of all activations. dtype: of everything that is not quantised, transforms included.

    Raises:
        ValueError: an argument, or a layer whose sizes are no multiples of 8.
    """
    if transform not in TRANSFORMS:
        raise wrong_value("pack", "transform", f"one of {list(TRANSFORMS)}", repr(transform))
    if not 0.0 < clip_ratio <= 1.0:
        raise wrong_value("pack", "clip_ratio", "a number in (0, 1]", clip_ratio)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, tuple[str, float]] = {}
    layers = dict(_linears(model))
    for done, (name, layer) in enumerate(layers.items(), 1):
        weight, (parent, _, last) = _weight_of(layer), name.rpartition(".")
        if weight.shape[0] % 8 or weight.shape[1] % 8:
            raise wrong_value("pack", name, "sizes that are multiples of 8", list(weight.shape))
        group = next((group for group in SHARED if last in group), (last,))
        of = f"{parent}.{group[0]}.flatquant"
        if f"{of}.{folder_format.LEFT}" not in tensors:
            seed = len(modules)
            for short, size, extra in zip(
                (folder_format.LEFT, folder_format.RIGHT), decompose(weight.shape[1]), (0, 1), strict=True
            ):
                matrix = folder_format.orthogonal(size, 2 * seed + extra) if transform != "none" else torch.eye(size)
                tensors[f"{of}.{short}"] = matrix.to(dtype)
        left, right = tensors[f"{of}.{folder_format.LEFT}"], tensors[f"{of}.{folder_format.RIGHT}"]
        for short, tensor in folder_format.quantize_weight(weight, left, right).items():
            tensors[f"{name}.{short}"] = tensor
        bias = getattr(layer, "bias", None)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.detach().to(dtype)
        modules[name] = (of, clip_ratio)
        if progress:
            progress(done, len(layers))
    tied = {f"{HEAD}.weight"} if model.config.tie_word_embeddings else set()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in layers and name not in tied:
            if isinstance(model.get_submodule(name.rpartition(".")[0]), W4A16Linear):  # a quantised head
                continue
            tensors[name] = parameter.detach().to(dtype)
    head = model.get_submodule(HEAD)
    if isinstance(head, W4A16Linear):
        tensors[f"{HEAD}.weight"] = _weight_of(head).to(dtype)
    return {name: t.contiguous().cpu() for name, t in tensors.items()}, folder_format.describe(modules)


def write(folder: Path, to: Path, tensors: dict[str, Tensor], quantization: dict[str, Any], dtype: torch.dtype) -> None:
    """The folder ``to``, whole or not at all, with the configuration and the tokenizer of ``folder``.

    Raises:
        ValueError: ``to`` exists.
    """
    if to.exists():
        raise wrong_value("pack", "destination", "a path where there is nothing yet", to)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": quantization, "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    to.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        for file in folder.iterdir():
            kept = file.suffix in (".json", ".model", ".txt", ".jinja") and "safetensors" not in file.name
            if file.is_file() and kept and file.name not in ("config.json", "quantize_config.json"):
                shutil.copy2(file, beside)
        save_file(tensors, folder_format.file_of(beside), metadata={"format": "pt"})
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        beside.chmod(0o755)
        beside.replace(to)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
