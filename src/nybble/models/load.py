"""A checkpoint folder in, a Hugging Face model with packed 4-bit and 8-bit layers out.

The order matters: the folder's JSON, then every file's header, then an empty model on the meta device, and only when
all of them agree (:class:`_Plan`) is a tensor read and moved to the device. Transformers gives the model's code and
configuration; no part of its own loading is used, nothing is downloaded and no code of the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nybble.formats.checkpoint import (
    Checkpoint,
    QuantizationConfig,
    QuantizedModule,
    load_bias,
    load_quantized,
    preflight,
    read_quantization,
)
from nybble.formats.grouped import QuantizedWeight
from nybble.formats.tiles import PackedWeight
from nybble.models.architectures import HEAD, Architecture, architecture_of
from nybble.models.layers import W4A16Linear
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
) -> PreTrainedModel:
    """Load a local folder: a GPT-NeoX, Llama, Qwen2, Qwen3 or GPT-2 causal language model.

    Quantised linear layers (GPTQ v1 and v2 of 4 or 8 bits, AWQ GEMM of 4) become
    :class:`~nybble.models.layers.W4A16Linear`; a folder without quantisation loads as it is. Nothing is downloaded.

    Args:
        path: folder with ``config.json`` and safetensors files.
        device: where the model goes; default the current CUDA device, or the CPU where there is none.
        dtype: of the unquantised tensors and the activations: float16, bfloat16 or float32. Default on CUDA
            bfloat16 for a checkpoint stored so and float16 for others; on the CPU float32. The scales of quantised
            layers keep the dtype of the file: the kernels take any.
        progress: called with (tensors done, tensors in all) while they load.

    Returns:
        The model in eval mode, no parameter requiring a gradient.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing, damaged, misshapen, unexpected or of a kind that
            is not supported. Whatever headers can show is found before anything is moved to the device.
        TypeError, ValueError: an argument.
    """
    folder = _folder(path)
    device = _device(device)
    if dtype is not None and dtype not in DTYPES:
        raise wrong_type("load", "dtype", "torch.float16, torch.bfloat16, torch.float32 or None", dtype)
    raw = _read_config(folder / "config.json")
    architecture = architecture_of(raw, folder / "config.json")
    quantization = read_quantization(folder)
    checkpoint = Checkpoint(folder)
    dtype = dtype or _default_dtype(checkpoint, architecture, device)
    model = _empty_model(raw, architecture, checkpoint, dtype)
    plan = _plan(model, architecture, checkpoint, quantization)
    _fill(model, plan, checkpoint, device, dtype, progress)
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
    """

    quantization: QuantizationConfig | None
    quantized: dict[str, QuantizedModule]
    parameters: dict[str, str]


def _plan(
    model: PreTrainedModel, architecture: Architecture, checkpoint: Checkpoint, quantization: QuantizationConfig | None
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

    parameters = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in quantized or name in {f"{t}.weight" for t in tied}:
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
    return _Plan(quantization, quantized, parameters)


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
) -> None:
    total = len(plan.quantized) + len(plan.parameters)
    done = 0
    for name, found in plan.parameters.items():
        owner, _, last = name.rpartition(".")
        value = _convert(checkpoint.tensor(found), dtype, checkpoint, found)
        setattr(model.get_submodule(owner), last, nn.Parameter(value.to(device), requires_grad=False))
        done += 1
        if progress:
            progress(done, total)
    for name, module_plan in plan.quantized.items():
        assert plan.quantization is not None
        has_bias = model.get_submodule(name).bias is not None
        weight = load_quantized(checkpoint, plan.quantization, module_plan.name, device=device)
        bias = load_bias(checkpoint, module_plan.name, module_plan.out_features, wanted=has_bias)
        if bias is not None:
            bias = _convert(bias, dtype, checkpoint, f"{module_plan.name}.bias").to(device)
        model.set_submodule(name, W4A16Linear(_pack(weight, checkpoint, module_plan), bias))
        done += 1
        if progress:
            progress(done, total)
    if plan.quantized:
        # No loader knows the tiles; transformers would read such a folder, warn, and leave the weights random.
        model.__dict__["save_pretrained"] = _refuse_to_save
    if model.config.tie_word_embeddings:
        model.get_submodule(HEAD).weight = model.get_input_embeddings().weight
    _recompute_buffers(model, device)


def _refuse_to_save(*_: object, **__: object) -> None:
    raise UnsupportedError(
        "save_pretrained: the packed layers of a model from nybble.load have no format on disk that other "
        "programs read. Keep the folder that it was loaded from."
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


def _recompute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no file holds (rotary frequencies) were made on the meta device, without values: make them again."""
    for name, module in model.named_modules():
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            fresh = type(module)(config=module.config)  # type: ignore[call-arg]
            for key in module._buffers:
                module._buffers[key] = fresh.get_buffer(key).to(device)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                raise RuntimeError(f"load: {name}.{key} was left without a value; this is a bug in nybble")
