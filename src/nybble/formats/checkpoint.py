"""A folder of safetensors files: what is in it, whether it is whole, and its quantised modules.

Everything that can be wrong and shows in the headers is found by :class:`Checkpoint` and :func:`preflight`, before
a tensor is read. Files are read by the safetensors library; pickle files are never opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nybble.formats.awq import awq_forms, unpack_awq
from nybble.formats.gptq import gptq_forms, unpack_gptq, without_trivial
from nybble.formats.grouped import QuantizedWeight
from nybble.formats.parts import Cut, Ranges, cut, divided
from nybble.formats.quantization import (
    SUPPORTED_BITS,
    Override,
    QuantizationConfig,
    only_bits,
    read_quantization,
)
from nybble.formats.words import NIBBLES, SCALE, WORD, Form, Origin, check_packable, features_per_group
from nybble.runtime.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "Override",
    "QuantizationConfig",
    "QuantizedModule",
    "load_bias",
    "load_quantized",
    "preflight",
    "read_quantization",
]

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

_PACKED = ("qweight", "qzeros", "scales", "g_idx")
"""Tensors of a quantised module, GPTQ or AWQ."""

_OTHER_LAYOUTS = {
    "weight_packed": "compressed-tensors",
    "weight.absmax": "bitsandbytes",
    "weight.quant_map": "bitsandbytes",
}
"""Last part of a tensor's name -> the method whose layout it shows."""


class Checkpoint:
    """The tensors of a folder, over however many safetensors files.

    ``model.safetensors`` where it is there, else the files of a ``*.safetensors.index.json``, else the one
    ``*.safetensors`` (AutoGPTQ names it after the quantisation). Making one reads every header, no tensor.

    Args:
        folder: path of the folder.

    Raises:
        CheckpointError: there are no such files (pickle files alone are refused), more than one could be meant, one
            is missing or truncated, or the index names a tensor that isn't in its file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(self.folder, "", "not a folder" if self.folder.exists() else "no such folder")
        index, files = _find(self.folder)
        self._open: dict[Path, Any] = {file: _open(file) for file in files}
        self._file: dict[str, Path] = {}
        held: dict[Path, set[str]] = {}
        for file, opened in self._open.items():
            held[file] = set(opened.keys())
            for name in held[file]:
                if name in self._file and name not in index:
                    raise CheckpointError(file, name, f"is also in {self._file[name].name}")
                self._file.setdefault(name, file)
        for name, file in index.items():
            if name not in held[file]:
                raise CheckpointError(file, name, "missing, though the index names this file for it")
            self._file[name] = file

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor. CheckpointError when none does."""
        if name not in self._file:
            raise CheckpointError(self.folder, name, "missing from the checkpoint")
        return self._file[name]

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, from its file's header. CheckpointError when it is missing."""
        file = self.file_of(name)
        view = self._open[file].get_slice(name)
        if view.get_dtype() not in _DTYPES:
            raise CheckpointError(file, name, f"dtype {view.get_dtype()} is not supported")
        return tuple(view.get_shape()), _DTYPES[view.get_dtype()]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU. CheckpointError when it is missing."""
        file = self.file_of(name)
        try:
            return self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(file, name, f"not readable: {error}") from error

    def part(self, name: str, *cuts: Cut) -> torch.Tensor:
        """A cut of the tensor, on the CPU, one for each dimension; of pieces, no more is read than they are.

        CheckpointError when it is missing.
        """
        if all(what is None or isinstance(what, torch.Tensor) for what in cuts):
            tensor = self.tensor(name)
        else:
            file = self.file_of(name)
            every: list[Ranges] = [
                what if isinstance(what, tuple) else ((0, size),)
                for what, size in zip(cuts, self.shape_dtype(name)[0], strict=True)
            ]
            try:
                tensor = _read(self._open[file].get_slice(name), every, [])
            except SafetensorError as error:
                raise CheckpointError(file, name, f"not readable: {error}") from error
        for dim, what in enumerate(cuts):
            if isinstance(what, torch.Tensor):
                tensor = cut(tensor, dim, what)
        return tensor


def _read(view: Any, every: list[Ranges], chosen: list[slice]) -> torch.Tensor:
    """The pieces of each dimension, put behind each other."""
    if len(chosen) == len(every):
        return view[tuple(chosen)]
    dim = len(chosen)
    parts = [_read(view, every, [*chosen, slice(begin, end)]) for begin, end in every[dim]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _find(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """``(tensor -> file, as an index says; files)``: the index is empty where there is none."""
    single = folder / "model.safetensors"
    if single.is_file():
        return {}, [single]
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        index = _read_index(indices[0])
        return index, sorted(set(index.values()))
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if indices or len(found) > 1:
        names = ", ".join(file.name for file in (indices or found))
        raise CheckpointError(folder, "", f"can't tell which files to read: {names}, and no single index names them")
    if not found:
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            reason = f"weights load from safetensors only, and there are pickle files alone: {', '.join(pickles)}"
            raise CheckpointError(folder, "", f"{reason}. Convert them with save_pretrained(safe_serialization=True)")
        raise CheckpointError(folder, "", "no *.safetensors file")
    return {}, found


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(path, "weight_map", f"not readable: {error!r}") from error
    if not files:
        raise CheckpointError(path, "weight_map", "names no tensor")
    for name, file in files.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(path, name, f"{file!r} is no safetensors file of this folder")
        if not (path.parent / file).is_file():
            raise CheckpointError(path.parent / file, name, f"the file is missing, and {path.name} names it")
    return {name: path.parent / file for name, file in files.items()}


def _open(file: Path) -> Any:
    try:
        # checks that the header is whole and that its tensors fill the file to the last byte
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError):
            raise CheckpointError(file, "", f"not readable: {error}") from error
        with file.open("rb") as stream:
            pointer = stream.read(40).startswith(b"version https://git-lfs")
        why = "a Git LFS pointer, not the file itself" if pointer else "truncated or not a safetensors file"
        raise CheckpointError(file, "", f"{why} ({file.stat().st_size} bytes: {error}). Download it again") from error


@dataclass(frozen=True)
class QuantizedModule:
    """One quantised module, all of whose tensors are there and of the right form.

    Attributes:
        name: the module's.
        in_features, out_features: K and N.
        group_size: features per group (K itself where the file says -1).
        config: what holds for this module, overrides applied.
        tensors: short name (``"qweight"``, ... ``"g_idx"`` and ``"bias"`` where there) -> name in the checkpoint.
    """

    name: str
    in_features: int
    out_features: int
    group_size: int
    config: QuantizationConfig
    tensors: dict[str, str]


def preflight(
    checkpoint: Checkpoint, config: QuantizationConfig | None, module_shapes: Mapping[str, tuple[int, int]]
) -> dict[str, QuantizedModule | None]:
    """Which linear modules are quantised, found and checked by headers alone.

    A module is quantised where the files hold packed tensors for it, whatever a flag says; a file that
    contradicts its own configuration is refused.

    Args:
        checkpoint: the files.
        config: what they say of their quantisation; ``None`` for a plain folder.
        module_shapes: every linear module of the model, under its name in the checkpoint: ``(in_features,
            out_features)``.

    Returns:
        For each name the plan, or ``None`` for a module that is not quantised.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape or dtype, a module is of another bit width, a
            size is not supported, or quantised tensors belong to no module of the model.
    """
    quantized = _quantized_names(checkpoint)
    for name in checkpoint.names():
        for ending, method in _OTHER_LAYOUTS.items():
            if name.endswith(f".{ending}"):
                reason = f"the {method} layout is not supported; supported: GPTQ, AWQ GEMM"
                raise CheckpointError(checkpoint.file_of(name), name, reason)
    for module, tensor in quantized.items():
        if config is None:
            reason = "a quantised tensor, but neither config.json nor quantize_config.json says how it is quantised"
            raise CheckpointError(checkpoint.file_of(tensor), tensor, reason)
        if module not in module_shapes:
            raise CheckpointError(checkpoint.file_of(tensor), tensor, "the model has no linear layer of this name")
    if config is not None and not quantized:
        reason = f"says {config.method}, but the checkpoint holds no quantised module"
        raise CheckpointError(config.source_file, "quant_method", reason)
    plans: dict[str, QuantizedModule | None] = dict.fromkeys(module_shapes)
    for name, (k, n) in module_shapes.items():
        if config is not None and name in quantized:
            plans[name] = _plan(checkpoint, config, name, k, n)
    return plans


def load_quantized(
    checkpoint: Checkpoint,
    config: QuantizationConfig,
    module_name: str,
    *,
    device: torch.device | str = "cpu",
    inputs: tuple[int, int] | None = None,
    outputs: Cut = None,
) -> QuantizedWeight:
    """The weight of one quantised module, or a part of it. Of a part no more is read than it needs, except that of
    input features in act-order and of single output features all are.

    Args:
        checkpoint: the files.
        config: what they say of their quantisation.
        module_name: such as ``"model.layers.0.mlp.down_proj"``.
        device: where it is unpacked. The words travel as they are: 4 or 8 bits a weight.
        inputs: (first, behind the last) of the input features, sorted by group where the module is in act-order.
        outputs: the output features.

    Raises:
        CheckpointError: as :func:`preflight`, for this module; or scales that are not finite, or a ``g_idx`` that
            names groups that aren't there, or ``inputs`` that no supported size of groups divides.
    """
    tensor = f"{module_name}.qweight"
    shape, dtype = checkpoint.shape_dtype(tensor)
    if len(shape) != 2 or dtype not in WORD:
        reason = f"expected int32 with 2 dimensions, got {dtype} {list(shape)}"
        raise CheckpointError(checkpoint.file_of(tensor), tensor, reason)
    own = config.for_module(module_name)
    each = NIBBLES if own is None or own.bits not in SUPPORTED_BITS[own.method] else 32 // own.bits  # or refused below
    k, n = (each * shape[0], shape[1]) if config.method == "gptq" else (shape[0], each * shape[1])
    plan = _plan(checkpoint, config, module_name, k, n)
    size, g_idx = plan.group_size, act_order(checkpoint, plan)
    group_size = -1 if size >= k else size
    rows: Ranges | None = None  # what of the features and groups is read; the rest is done with them in hand
    groups: Ranges | None = None
    left = inputs
    if inputs is not None and g_idx is None:
        begin, end = inputs
        if size < k:
            first, last = begin // size, -(-end // size)
            groups, left = ((first, last),), (begin - first * size, end - first * size)
            begin, end = first * size, min(last * size, k)
        else:
            left = 0, end - begin
        rows = divided(((begin, end),), each if config.method == "gptq" else 1)
        if rows is None:
            reason = f"the features {begin} to {end} do not begin and end with words of {each}"
            raise CheckpointError(checkpoint.file_of(tensor), tensor, reason)
    words: Ranges | None = divided(outputs, each) if isinstance(outputs, tuple) else None
    columns = None if words is None else outputs
    cuts: dict[str, tuple[Cut, Cut]] = {
        "qweight": (rows, columns if config.method == "gptq" else words),
        "qzeros": (groups, words),
        "scales": (groups, columns),
    }
    tensors = {short: checkpoint.part(plan.tensors[short], *what) for short, what in cuts.items()}
    if not bool(torch.isfinite(tensors["scales"]).all()):
        name = plan.tensors["scales"]
        raise CheckpointError(checkpoint.file_of(name), name, "holds values that are not finite")
    if g_idx is not None:
        tensors["g_idx"] = g_idx
    tensors = {short: words.to(device) for short, words in tensors.items()}
    config, file = plan.config, str(checkpoint.file_of(tensor))
    try:
        if config.method == "awq":
            weight = unpack_awq(**tensors, group_size=group_size, file=file, name=module_name)
        else:
            weight = unpack_gptq(
                **tensors,
                group_size=group_size,
                bits=config.bits,
                checkpoint_format=config.checkpoint_format,
                symmetric=config.sym,
                file=file,
                name=module_name,
            )
    except CheckpointError as error:  # with the file of the tensor at fault, which may be another shard
        raise CheckpointError(checkpoint.file_of(error.tensor), error.tensor, error.reason) from None
    if outputs is not None and columns is None:
        weight = weight.outputs(outputs)
    if inputs is None:
        return weight
    try:
        return weight.in_order().inputs(*(left or inputs))
    except ValueError as error:
        raise CheckpointError(file, module_name, str(error)) from error


def act_order(checkpoint: Checkpoint, module: QuantizedModule) -> torch.Tensor | None:
    """int32 ``[K]``: the group of each input feature; ``None`` where that is ``k // group_size``.

    Raises:
        CheckpointError: it names groups that aren't there.
    """
    name = module.tensors.get("g_idx")
    if name is None:
        return None
    groups = -(-module.in_features // module.group_size)
    origin = Origin("unpack_gptq", str(checkpoint.file_of(name)), module.name)
    return without_trivial(checkpoint.tensor(name), module.group_size, groups, origin)


def load_bias(checkpoint: Checkpoint, module_name: str, out_features: int, *, wanted: bool) -> torch.Tensor | None:
    """The bias of a module, quantised or not, as the model wants it.

    AutoGPTQ writes a bias of zeros for every layer without one: it is dropped here.

    Args:
        checkpoint: the files.
        module_name: the module's.
        out_features: N, the length it must have.
        wanted: the model's module has a bias.

    Returns:
        ``[N]`` in its stored dtype, or ``None`` where ``wanted`` is false.

    Raises:
        CheckpointError: a wanted bias is missing or misshapen, or an unwanted one is not all zero.
    """
    name = f"{module_name}.bias"
    if name not in checkpoint:
        if wanted:
            raise CheckpointError(checkpoint.folder, name, f"missing; the model's layer has a bias of {out_features}")
        return None
    _check_header(checkpoint, "bias", Form("[N]", (out_features,), SCALE), module_name)
    bias = checkpoint.tensor(name)
    if wanted:
        return bias
    if bool((bias != 0).any()):
        reason = "is not zero, and the model's layer has no bias: config.json describes another model"
        raise CheckpointError(checkpoint.file_of(name), name, reason)
    return None


def _quantized_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Module -> one of its packed tensors. ``scales`` alone proves nothing: the name is common."""
    found: dict[str, str] = {}
    for name in checkpoint.names():
        module, _, short = name.rpartition(".")
        if short in ("qweight", "qzeros", "g_idx") and (short == "qweight" or module not in found):
            found[module] = name
    return found


def _plan(checkpoint: Checkpoint, config: QuantizationConfig, name: str, k: int, n: int) -> QuantizedModule:
    present = {short: f"{name}.{short}" for short in (*_PACKED, "bias") if f"{name}.{short}" in checkpoint}
    file = checkpoint.file_of(next(iter(present.values()))) if present else checkpoint.folder
    own = config.for_module(name)
    if own is None:
        reason = f"quantised, but {config.source_file.name} says that the module is not"
        raise CheckpointError(file, f"{name}.qweight", reason)
    if own.bits not in SUPPORTED_BITS[own.method]:
        reason = f"quantised to {own.bits} bits (dynamic): {only_bits(own.method)}"
        raise CheckpointError(config.source_file, name, reason)
    for short in ("qweight", "qzeros", "scales"):
        if short not in present:
            others = ", ".join(other for other in present if other in _PACKED)
            raise CheckpointError(file, f"{name}.{short}", f"missing; the module has {others} only")
    if f"{name}.weight" in checkpoint:
        weight = f"{name}.weight"
        raise CheckpointError(checkpoint.file_of(weight), weight, "there beside the same module's qweight")
    origin = Origin("preflight", str(file), name)
    check_packable(k, n, origin)
    group_size = features_per_group(own.group_size, k, origin)
    _check_bits(checkpoint, present["qweight"], own, k, n)
    forms = gptq_forms(k, n, group_size, own.bits) if own.method == "gptq" else awq_forms(k, n, group_size)
    forms["bias"] = Form("[N]", (n,), SCALE)
    for short in present:
        if short not in forms:
            reason = f"{own.method} has no tensor of this name"
            raise CheckpointError(checkpoint.file_of(present[short]), present[short], reason)
        _check_header(checkpoint, short, forms[short], name)
    if own.method == "gptq" and own.desc_act and not own.static_groups and "g_idx" not in present and group_size < k:
        reason = "missing, and desc_act without static_groups leaves each feature's group unknown"
        raise CheckpointError(file, f"{name}.g_idx", reason)
    return QuantizedModule(name, k, n, group_size, own, present)


def _check_header(checkpoint: Checkpoint, short: str, form: Form, module: str) -> None:
    name = f"{module}.{short}"
    shape, dtype = checkpoint.shape_dtype(name)
    form.check(short, shape, dtype, Origin("preflight", str(checkpoint.file_of(name)), module))


def _check_bits(checkpoint: Checkpoint, name: str, config: QuantizationConfig, k: int, n: int) -> None:
    """Says the bit width of a qweight packed with another one, rather than only that its shape is wrong."""
    shape, _ = checkpoint.shape_dtype(name)
    for bits in {2, 3, 4, 8} - {config.bits}:
        packed = (k * bits // 32, n) if config.method == "gptq" else (k, n * bits // 32)
        if shape == packed:
            says = f"{config.source_file.name} says {config.bits}"
            if bits not in SUPPORTED_BITS[config.method]:
                says = only_bits(config.method)
            reason = f"its shape {list(shape)} is that of {bits}-bit weights; {says}"
            raise CheckpointError(checkpoint.file_of(name), name, reason)
