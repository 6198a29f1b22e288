"""A checkpoint folder in, a Hugging Face model with packed 4-bit and 8-bit layers out; GGUF files are ``gguf_load``'s.

The order matters: the folder's JSON, then every file's header, then an empty model on the meta device, and only when
all of them agree (:class:`_Plan`) is a tensor read and moved to the device. Transformers gives the model's code and
configuration; no part of its own loading is used, nothing is downloaded and no code of the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nybble.formats.checkpoint import (
    Checkpoint,
    QuantizationConfig,
    QuantizedModule,
    act_order,
    load_bias,
    load_quantized,
    preflight,
    read_quantization,
)
from nybble.formats.flatquant import LEFT, RIGHT, FlatModule, is_flatquant, load_weight, read_flatquant
from nybble.formats.gguf_file import is_gguf
from nybble.formats.grouped import QuantizedWeight
from nybble.formats.parts import Cut, cut
from nybble.formats.tiles import PackedWeight
from nybble.models.architectures import HEAD, Architecture, architecture_of
from nybble.models.flatquant import FlatQuantLinear, FlatQuantTransform
from nybble.models.layers import W4A16Linear
from nybble.models.ranks import WHOLE, Ranks, Share
from nybble.runtime.errors import CheckpointError, UnsupportedError, wrong_type, wrong_value

Progress = Callable[[int, int], None]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STORED = (*DTYPES, torch.float64)
"""What an unquantised tensor may be stored as."""


def load(
    path: str | Path,
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    mesh: DeviceMesh | None = None,
) -> PreTrainedModel:
    """Load a causal language model: a folder (GPT-NeoX, Llama, Qwen2, Qwen3, GPT-2) or a GGUF file (Llama, Qwen2).

    Quantised linear layers (GPTQ v1 and v2 of 4 or 8 bits, AWQ GEMM of 4) become
    :class:`~nybble.models.layers.W4A16Linear`, those of ``nybble pack --to flatquant``
    :class:`~nybble.models.flatquant.FlatQuantLinear`; a folder without quantisation loads as it is. Of a GGUF file,
    linear layers in Q4_0 become W4A16Linear; other tensors (F32, F16, BF16, Q8_0, Q6_K, and embeddings in Q4_0) become
    floats. Nothing is downloaded.

    Args:
        path: folder with ``config.json`` and safetensors files, or a ``.gguf`` file.
        device: where the model goes; default the current CUDA device, or the CPU where there is none.
        dtype: of the unquantised tensors and the activations: float16, bfloat16 or float32. Default on CUDA
            bfloat16 for a checkpoint stored so and float16 for others; on the CPU float32. The scales of quantised
            layers keep the dtype of the file: the kernels take any.
        progress: called with (tensors done, tensors in all) while they load.
        mesh: processes that share the model, each of which calls this: a mesh of one dimension, as
            ``torch.distributed.device_mesh.init_device_mesh`` makes it. Each reads and holds its part of the linear
            layers, and the results of all are put together inside of the model, which behaves as a whole one.

    Returns:
        The model in eval mode, no parameter requiring a gradient.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing, damaged, misshapen, unexpected or of a kind that
            is not supported. Whatever headers can show is found before anything is moved to the device.
        TypeError, ValueError: an argument; or a mesh of more processes than heads and widths can be divided among.
        ElsewhereError: another process of the mesh failed.
    """
    if mesh is None:
        return _load(path, device, dtype, progress, None)
    ranks = Ranks(mesh)
    return ranks.agreed(lambda: _load(path, device, dtype, progress, ranks))


def _load(
    path: str | Path,
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
    progress: Progress | None,
    ranks: Ranks | None,
) -> PreTrainedModel:
    whole = isinstance(path, (str, Path)) and is_gguf(path)
    folder = Path(path) if whole else _folder(path)
    device = _device(device)
    if dtype is not None and dtype not in DTYPES:
        raise wrong_type("load", "dtype", "torch.float16, torch.bfloat16, torch.float32 or None", dtype)
    if whole:
        from nybble.models.gguf_load import load_gguf

        return load_gguf(path, device, dtype, progress, ranks)
    raw = _read_config(folder / "config.json")
    architecture = architecture_of(raw, folder / "config.json")
    flat = is_flatquant(raw)
    quantization = None if flat else read_quantization(folder)
    checkpoint = Checkpoint(folder)
    modules = read_flatquant(raw, checkpoint) if flat else {}
    dtype = dtype or _default_dtype(checkpoint, architecture, device)
    model = _empty_model(raw, architecture, checkpoint, dtype)
    plan = _plan(model, architecture, checkpoint, quantization, modules)
    if ranks is not None:
        plan = _divided(model, plan, checkpoint, ranks)
    _fill(model, plan, checkpoint, device, dtype, progress, ranks)
    return model.eval().requires_grad_(False)


def _folder(path: str | Path) -> Path:
    if not isinstance(path, (str, Path)):
        raise wrong_type("load", "path", "a str or Path", type(path).__name__)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise CheckpointError(folder, "", f"{what}. Nybble loads local folders and downloads nothing")
    return folder


def _device(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise wrong_value("load", "device", "a torch device such as 'cuda' or 'cpu'", repr(device)) from error
    if chosen.type not in ("cpu", "cuda"):
        raise wrong_value("load", "device", "'cuda' or 'cpu'", repr(device))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise wrong_value("load", "device", "a device of this machine", repr(device), "torch sees no CUDA device here.")
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _read_config(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(file, "", "missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(file, "", f"not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(file, "", f"expected a JSON object, got {type(raw).__name__}")
    return raw


def _default_dtype(checkpoint: Checkpoint, architecture: Architecture, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    embedding = architecture.name_in_file(architecture.embedding, checkpoint)
    stored = checkpoint.shape_dtype(embedding)[1] if embedding else None
    return torch.bfloat16 if stored is torch.bfloat16 else torch.float16


def _empty_model(
    raw: dict[str, Any], architecture: Architecture, checkpoint: Checkpoint, dtype: torch.dtype
) -> PreTrainedModel:
    """The model that the configuration describes, on the meta device."""
    model_class: type[PreTrainedModel] = getattr(transformers, architecture.class_name)
    file = checkpoint.folder / "config.json"
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    try:
        config: PreTrainedConfig = model_class.config_class.from_dict(plain)  # type: ignore[union-attr]
        config.dtype = dtype
        config.name_or_path = str(checkpoint.folder)
        config.tie_word_embeddings = bool(config.tie_word_embeddings) and _tied(architecture, checkpoint)
        with torch.device("meta"):
            model = model_class(config)
    except CheckpointError:
        raise
    except Exception as error:  # transformers validates with errors of many types
        raise CheckpointError(file, "", f"no valid {architecture.model_type} configuration: {error}") from error
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        model.generation_config = GenerationConfig.from_dict(_read_config(generation))
    return model


def _tied(architecture: Architecture, checkpoint: Checkpoint) -> bool:
    """Whether a head that the configuration calls tied really is: the file has none of its own, or an equal one."""
    if architecture.name_in_file(f"{HEAD}.qweight", checkpoint):
        return False
    head = architecture.name_in_file(f"{HEAD}.weight", checkpoint)
    embedding = architecture.name_in_file(architecture.embedding, checkpoint)
    if head is None or embedding is None or head == embedding:
        return True
    if checkpoint.shape_dtype(head) != checkpoint.shape_dtype(embedding):
        return False
    return torch.equal(checkpoint.tensor(head), checkpoint.tensor(embedding))


@dataclass
class _Plan:
    """Where everything comes from; made of headers alone (and the few tensors that only their values can excuse).

    Attributes:
        quantization: of the folder, ``None`` when plain.
        quantized: module of the model -> its plan.
        parameters: parameter of the model -> name in the file.
        flat: module of the model -> what becomes a FlatQuantLinear.
        shares: module of the model -> this process's part of it; others it has whole.
    """

    quantization: QuantizationConfig | None
    quantized: dict[str, QuantizedModule]
    parameters: dict[str, str]
    flat: dict[str, FlatModule]
    shares: Mapping[str, Share] = field(default_factory=dict)


def _divided(model: PreTrainedModel, plan: _Plan, checkpoint: Checkpoint, ranks: Ranks) -> _Plan:
    """The plan of one of several processes."""
    from nybble.models.parallel import divide, shrink

    def order_of(name: str) -> tuple[Tensor, int] | None:
        module = plan.quantized.get(name)
        found = None if module is None else act_order(checkpoint, module)
        return None if module is None or found is None else (found, module.group_size)

    shares = divide(model, ranks, order_of, plan.flat)
    shrink(model, shares)
    return replace(plan, shares=shares)


def _plan(
    model: PreTrainedModel,
    architecture: Architecture,
    checkpoint: Checkpoint,
    quantization: QuantizationConfig | None,
    modules: dict[str, FlatModule],
) -> _Plan:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    in_file = {name: _module_in_file(name, architecture, checkpoint) for name in linears}
    tied = {HEAD} if model.config.tie_word_embeddings else set()
    shapes = {in_file[name]: _features(module) for name, module in linears.items() if name not in tied}
    plans = preflight(checkpoint, quantization, shapes)
    quantized = {name: p for name in linears if name not in tied and (p := plans[in_file[name]]) is not None}
    used = {tensor for p in quantized.values() for tensor in p.tensors.values()}
    for name, p in quantized.items():
        has_bias = linears[name].bias is not None
        if has_bias and "bias" not in p.tensors:
            load_bias(checkpoint, p.name, p.out_features, wanted=True)  # raises: missing
        if not has_bias:
            used.discard(f"{p.name}.bias")  # looked at below, with all that is too much

    flat = _flat(linears, modules, checkpoint)
    used.update(tensor for module in flat.values() for tensor in module.tensors)
    parameters = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in quantized or owner in flat or name in {f"{t}.weight" for t in tied}:
            continue
        found = architecture.name_in_file(name, checkpoint)
        if found is None:
            others = " or ".join(architecture.candidates(name)[1:])
            reason = "missing" + (f" (nor is there {others})" if others else "")
            raise CheckpointError(checkpoint.folder, name, reason)
        shape, dtype = checkpoint.shape_dtype(found)
        if shape != tuple(parameter.shape):
            reason = f"expected shape {list(parameter.shape)} from config.json, got {list(shape)}"
            raise CheckpointError(checkpoint.file_of(found), found, reason)
        if dtype not in STORED:
            reason = f"expected a floating-point dtype of 16 bits or more, got {dtype}"
            raise CheckpointError(checkpoint.file_of(found), found, reason)
        parameters[name] = found
        used.add(found)

    if tied:  # the head may be there too; it is equal to the embedding, or it would not count as tied
        used.update(architecture.candidates(f"{HEAD}.weight"))
    bias_free = {in_file[name]: module for name, module in linears.items() if module.bias is None}
    for name in checkpoint.names():
        if name in used or architecture.is_derived(name):
            continue
        module, _, last = name.rpartition(".")
        if last == "bias" and module in bias_free:
            load_bias(checkpoint, module, _features(bias_free[module])[1], wanted=False)  # raises unless all zero
            continue
        reason = f"unexpected: a {architecture.model_type} model of this config.json has no such tensor"
        raise CheckpointError(checkpoint.file_of(name), name, reason)
    return _Plan(quantization, quantized, parameters, flat)


def _flat(
    linears: Mapping[str, nn.Module], modules: dict[str, FlatModule], checkpoint: Checkpoint
) -> dict[str, FlatModule]:
    """The modules as the model has them, which are named so in the file."""
    for name, module in modules.items():
        tensor = module.tensors[0]
        if name not in linears:
            raise CheckpointError(checkpoint.file_of(tensor), tensor, "the model has no linear layer of this name")
        got, want = (module.in_features, module.out_features), _features(linears[name])
        if got != want:
            reason = (
                f"expected {want[0]} input and {want[1]} output features from config.json, got {got[0]} and {got[1]}"
            )
            raise CheckpointError(checkpoint.file_of(tensor), tensor, reason)
        if module.bias != (linears[name].bias is not None):
            reason = (
                "there is one, and the model's layer has none" if module.bias else "missing; the model's layer has one"
            )
            raise CheckpointError(checkpoint.folder, f"{name}.bias", reason)
    return modules


def _module_in_file(name: str, architecture: Architecture, checkpoint: Checkpoint) -> str:
    for candidate in architecture.candidates(name):
        if f"{candidate}.qweight" in checkpoint or f"{candidate}.weight" in checkpoint:
            return candidate
    return name


def _features(module: nn.Module) -> tuple[int, int]:
    """(in, out). A Conv1D of GPT-2 is a linear layer whose weight lies as [in, out]."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _fill(
    model: PreTrainedModel,
    plan: _Plan,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
    ranks: Ranks | None,
) -> None:
    total = len(plan.quantized) + len(plan.parameters) + len(plan.flat)
    done = 0
    for name, found in plan.parameters.items():
        owner, _, last = name.rpartition(".")
        module, share = model.get_submodule(owner), plan.shares.get(owner, WHOLE)
        if last == "weight" and owner in plan.shares:
            value = checkpoint.part(found, *share.of_weight(module))
        elif last == "bias" and owner in plan.shares:
            value = checkpoint.part(found, share.outputs)
            if not share.bias:
                value = torch.zeros_like(value) if isinstance(module, Conv1D) else None
        else:
            value = checkpoint.tensor(found)
        if value is not None:
            value = _convert(value, dtype, checkpoint, found)
            setattr(module, last, nn.Parameter(value.to(device), requires_grad=False))
        done += 1
        if progress:
            progress(done, total)
    for name, module_plan in plan.quantized.items():
        assert plan.quantization is not None
        share, has_bias = plan.shares.get(name, WHOLE), model.get_submodule(name).bias is not None
        weight = load_quantized(
            checkpoint, plan.quantization, module_plan.name, device=device, inputs=share.inputs, outputs=share.outputs
        )
        bias = None
        if share.bias:
            bias = load_bias(checkpoint, module_plan.name, module_plan.out_features, wanted=has_bias)
        if bias is not None:
            bias = _convert(cut(bias, 0, share.outputs), dtype, checkpoint, f"{module_plan.name}.bias").to(device)
        model.set_submodule(name, W4A16Linear(_pack(weight, checkpoint, module_plan), bias))
        done += 1
        if progress:
            progress(done, total)
    transforms: dict[str, FlatQuantTransform] = {}
    for name, module in plan.flat.items():
        if module.transform not in transforms:
            pair = [f"{module.transform}.{short}" for short in (LEFT, RIGHT)]
            matrices = [_convert(checkpoint.tensor(t), dtype, checkpoint, t).to(device) for t in pair]
            transforms[module.transform] = FlatQuantTransform(*matrices)
        bias, outputs = None, plan.shares.get(name, WHOLE).outputs
        if module.bias:
            bias = _convert(checkpoint.part(f"{name}.bias", outputs), dtype, checkpoint, f"{name}.bias").to(device)
        weight = load_weight(checkpoint, module, device, outputs)
        layer = FlatQuantLinear(weight, transforms[module.transform], module.clip_ratio, bias)
        model.set_submodule(name, layer)
        done += 1
        if progress:
            progress(done, total)
    if plan.quantized or plan.flat or ranks is not None:
        # No loader knows the tiles; transformers would read such a folder, warn, and leave the weights random.
        model.__dict__["save_pretrained"] = refuse_to_save
    tie(model, plan.shares.get(HEAD, WHOLE).outputs)
    if ranks is not None:
        from nybble.models.parallel import connect

        connect(model, plan.shares, ranks)
    recompute_buffers(model, device)


def tie(model: PreTrainedModel, tokens: Cut) -> None:
    """Let a head that is tied be the embedding, or some tokens of it."""
    if not model.config.tie_word_embeddings:
        return
    weight: Any = model.get_input_embeddings().weight  # type: ignore[union-attr]
    if isinstance(tokens, tuple):
        ((begin, end),) = tokens
        weight = nn.Parameter(weight.data[begin:end], requires_grad=False)
    model.get_submodule(HEAD).weight = weight


def refuse_to_save(*_: object, **__: object) -> None:
    """``save_pretrained`` of a model with packed layers."""
    raise UnsupportedError(
        "save_pretrained: the packed layers of a model from nybble.load, and parts that processes share, have no "
        "format on disk that other programs read. Keep the folder that it was loaded from."
    )


def _convert(tensor: Tensor, dtype: torch.dtype, checkpoint: Checkpoint, name: str) -> Tensor:
    converted = tensor.to(dtype)
    if dtype is torch.float16 and tensor.dtype is not dtype and bool((converted.isinf() & tensor.isfinite()).any()):
        reason = f"holds values beyond the range of float16 (stored as {tensor.dtype}). Load with dtype=torch.bfloat16"
        raise CheckpointError(checkpoint.file_of(name), name, reason)
    return converted


def _pack(weight: QuantizedWeight, checkpoint: Checkpoint, plan: QuantizedModule) -> PackedWeight:
    try:
        return PackedWeight.from_quantized(weight)
    except ValueError as error:
        tensor = plan.tensors["qweight"]
        raise CheckpointError(checkpoint.file_of(tensor), plan.name, str(error)) from error


def recompute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no file holds (rotary frequencies) were made on the meta device, without values: make them again."""
    for name, module in model.named_modules():
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            fresh = type(module)(config=module.config)  # type: ignore[call-arg]
            for key in module._buffers:
                module._buffers[key] = fresh.get_buffer(key).to(device)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                raise RuntimeError(f"load: {name}.{key} was left without a value; this is a bug in nybble")
