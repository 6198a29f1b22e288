"""A GGUF file in, a Hugging Face model with packed 4-bit layers out.

The configuration is what transformers reads from the file, and so is the tokenizer; the names of tensors are mapped by
transformers and the gguf library. Linear layers in Q4_0 stay 4-bit: their blocks are the 4-bit linear's groups of 32.
All other tensors become floats. As with folders, nothing is read or moved before all headers agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from nybble.formats.gguf_file import EVERY, GGUFFile
from nybble.formats.gguf_q4_0 import BLOCK, Q4_0_BYTES, unpack_q4_0
from nybble.formats.grouped import QuantizedWeight
from nybble.formats.parts import cut, length
from nybble.formats.tiles import PackedWeight
from nybble.models.architectures import HEAD, Architecture, architecture_of
from nybble.models.layers import W4A16Linear
from nybble.models.load import Progress, recompute_buffers, refuse_to_save, tie
from nybble.models.ranks import WHOLE, Ranks, Share
from nybble.runtime.errors import CheckpointError

FAMILIES = ("llama", "qwen2")
"""``general.architecture`` of the files that load."""
ROPE_FACTORS = "rope_freqs.weight"
"""What llama.cpp divides each rotary frequency by: how it stores Llama 3's scaling."""
_ROTATED = (".attn_q.", ".attn_k.")


class _Source(NamedTuple):
    """Where a parameter comes from: a tensor of the file, and the heads whose rows llama.cpp has interleaved (or 0)."""

    name: str
    heads: int


def load_gguf(
    path: str | Path,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress | None,
    ranks: Ranks | None = None,
) -> PreTrainedModel:
    """What :func:`nybble.load` does with a GGUF file; arguments as there, checked."""
    file = GGUFFile(path)
    family = file.field("general.architecture")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(file.file, "general.architecture", f"{family!r} is not supported; supported are {known}")
    _check_rope(file, family)
    raw = _config(file)
    architecture = architecture_of(raw, file.file)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    model = _empty_model(raw, architecture, file, dtype)
    sources = _plan(model, file, family)
    found: dict[str, Share] = {}
    if ranks is not None:
        from nybble.models.parallel import divide, shrink

        found = divide(model, ranks)
        shrink(model, found)
    _fill(model, sources, file, device, dtype, progress, found)
    if ranks is not None:
        from nybble.models.parallel import connect

        connect(model, found, ranks)
        model.__dict__["save_pretrained"] = refuse_to_save
    return model.eval().requires_grad_(False)


def _check_rope(file: GGUFFile, family: str) -> None:
    key = f"{family}.rope.scaling.type"
    kind = file.field(key)
    if kind not in (None, "none"):
        raise CheckpointError(file.file, key, f"rotary scaling {kind!r} is not supported in GGUF files")


def _config(file: GGUFFile) -> dict[str, Any]:
    """What transformers reads from the file."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        return dict(load_gguf_checkpoint(str(file.file), return_tensors=False)["config"])
    except Exception as error:  # transformers fails in many ways where a field is missing or odd
        raise CheckpointError(file.file, "", f"no configuration that transformers can read: {error}") from error


def _empty_model(
    raw: dict[str, Any], architecture: Architecture, file: GGUFFile, dtype: torch.dtype
) -> PreTrainedModel:
    """The model that the file describes, on the meta device."""
    model_class: type[PreTrainedModel] = getattr(transformers, architecture.class_name)
    try:
        config: PreTrainedConfig = model_class.config_class.from_dict(raw)  # type: ignore[union-attr]
        config.dtype = dtype
        config.name_or_path = str(file.file)
        if architecture.model_type == "llama":  # only its file can tell
            config.attention_bias = "blk.0.attn_q.bias" in file
            config.mlp_bias = "blk.0.ffn_up.bias" in file
        with torch.device("meta"):
            model = model_class(config)
        ends = file.field("tokenizer.ggml.eos_token_id")
        if ends is not None:
            begins = file.field("tokenizer.ggml.bos_token_id")
            model.generation_config = GenerationConfig(bos_token_id=begins, eos_token_id=int(ends))
    except Exception as error:  # transformers validates with errors of many types
        raise CheckpointError(file.file, "", f"no valid {architecture.model_type} configuration: {error}") from error
    return model


def _plan(model: PreTrainedModel, file: GGUFFile, family: str) -> dict[str, _Source]:
    """Parameter of the model -> where it comes from; made of headers alone."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    names = {theirs: ours for ours, theirs in get_gguf_hf_weights_map(model, TensorProcessor()).items()}
    tied = {f"{HEAD}.weight"} if model.config.tie_word_embeddings else set()
    heads = {".attn_q.": model.config.num_attention_heads, ".attn_k.": model.config.num_key_value_heads}
    sources: dict[str, _Source] = {}
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        found = names.get(name)
        if found is None or found not in file:
            raise CheckpointError(file.file, found or name, f"missing; it is {name} of the model")
        file.check_type(found)
        if file.shape(found) != tuple(parameter.shape):
            reason = f"expected shape {list(parameter.shape)} from the file's metadata, got {list(file.shape(found))}"
            raise CheckpointError(file.file, found, reason)
        rotated = next((part for part in _ROTATED if part in found), "") if family == "llama" else ""
        sources[name] = _Source(found, heads.get(rotated, 0))
    used = {source.name for source in sources.values()}
    for name in file.names():
        if name not in used and name != ROPE_FACTORS:
            reason = f"unexpected: a {family} model of this file's metadata has no such tensor"
            raise CheckpointError(file.file, name, reason)
    if ROPE_FACTORS in file:
        rotary: Any = model.base_model.rotary_emb  # type: ignore[union-attr]
        if file.check_type(ROPE_FACTORS) != "F32" or file.shape(ROPE_FACTORS) != tuple(rotary.inv_freq.shape):
            expected = f"F32 of shape {list(rotary.inv_freq.shape)}"
            got = f"{file.type(ROPE_FACTORS)} of {list(file.shape(ROPE_FACTORS))}"
            raise CheckpointError(file.file, ROPE_FACTORS, f"expected {expected}, got {got}")
    return sources


def _straight(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the model's order. llama.cpp rotates neighbours, transformers halves: in the file the
    rows of a head's two halves take turns."""
    if not heads:
        return rows
    return rows.unflatten(0, (heads, rows.shape[0] // heads // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _fill(
    model: PreTrainedModel,
    sources: dict[str, _Source],
    file: GGUFFile,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
    found: Mapping[str, Share],
) -> None:
    packed = False
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers: list[tuple[str, _Source]] = []
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(sources))

    for name, source in sources.items():
        owner, _, last = name.rpartition(".")
        # The kernels move eight output features at a time; a layer with others becomes floats.
        share = found.get(owner, WHOLE)
        whole = length(share.outputs, file.shape(source.name)[0]) % 8 == 0
        if last == "weight" and owner in linears and file.type(source.name) == "Q4_0" and whole:
            layers.append((owner, source))
            continue
        if last == "bias" and not share.bias:
            step()
            continue
        # Heads lie behind each other, so some of them are cut out before each is straightened.
        module, rows = model.get_submodule(owner), file.tensor(source.name)
        for dim, what in enumerate(share.of_weight(module) if last == "weight" else (share.outputs,)):
            rows = cut(rows, dim, what)
        rows = _straight(rows, _left(source.heads, share, file.shape(source.name)[0]))
        value = _convert(rows, dtype, file, source.name)
        setattr(module, last, nn.Parameter(value.to(device), requires_grad=False))
        step()
    for owner, source in layers:
        weight = PackedWeight.from_quantized(_part(file, source, found.get(owner, WHOLE), device))
        bias: Any = model.get_submodule(owner).bias
        model.set_submodule(owner, W4A16Linear(weight, bias))
        packed = True
        step()
    if packed:
        model.__dict__["save_pretrained"] = refuse_to_save
    tie(model, found.get(HEAD, WHOLE).outputs)
    recompute_buffers(model, device)
    if ROPE_FACTORS in file:
        rotary: Any = model.base_model.rotary_emb  # type: ignore[union-attr]
        factors = file.tensor(ROPE_FACTORS).to(device)
        for key in ("inv_freq", "original_inv_freq"):
            if key in rotary._buffers:
                rotary._buffers[key] = rotary._buffers[key] / factors


def _left(heads: int, share: Share, whole: int) -> int:
    """The heads in a share of the rows of all."""
    return heads * length(share.outputs, whole) // whole


def _part(file: GGUFFile, source: _Source, share: Share, device: torch.device) -> QuantizedWeight:
    """A share of a layer in Q4_0; its bytes alone are read."""
    whole, rows, columns = file.shape(source.name), EVERY, EVERY
    if isinstance(share.outputs, tuple):
        ((first, last),) = share.outputs
        rows = slice(first, last)
    begin, end = share.inputs or (0, whole[1])
    blocks = begin // BLOCK, -(-end // BLOCK)
    if share.inputs is not None:
        columns = slice(blocks[0] * Q4_0_BYTES, blocks[1] * Q4_0_BYTES)
    found = _straight(file.bytes(source.name, rows, columns), _left(source.heads, share, whole[0])).to(device)
    weight = unpack_q4_0(found, file=str(file.file), name=source.name)
    return weight.inputs(begin - BLOCK * blocks[0], end - BLOCK * blocks[0])


def _convert(tensor: Tensor, dtype: torch.dtype, file: GGUFFile, name: str) -> Tensor:
    converted = tensor.to(dtype)
    if dtype is torch.float16 and bool((converted.isinf() & tensor.isfinite()).any()):
        reason = (
            f"holds values beyond the range of float16 (stored as {file.type(name)}). Load with dtype=torch.bfloat16"
        )
        raise CheckpointError(file.file, name, reason)
    return converted
