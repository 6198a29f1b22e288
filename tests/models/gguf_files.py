"""Small GGUF files, written by the gguf library as llama.cpp's own converter would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, quants
from transformers import PreTrainedModel

WORDS = ("<unk>", "<s>", "</s>")


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp rotates them: those of a head's two halves take turns."""
    half = rows.shape[0] // heads // 2
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(half):
            out[2 * (head * half + i)] = rows[2 * head * half + i]
            out[2 * (head * half + i) + 1] = rows[2 * head * half + half + i]
    return out


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """What llama.cpp calls the parameters of a Llama or Qwen2, and their values in its order."""
    config = model.config
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        values = parameter.detach().float().numpy()
        if config.model_type == "llama" and ".q_proj" in name:
            values = interleaved(values, config.num_attention_heads)
        if config.model_type == "llama" and ".k_proj" in name:
            values = interleaved(values, config.num_key_value_heads)
        found[f"{names.get_name(module)}.{last}"] = values
    return found


def write(
    file: Path,
    model: PreTrainedModel,
    types: dict[str, str] | None = None,
    *,
    extra: dict[str, np.ndarray] | None = None,
    fields: dict[str, str] | None = None,
    leave_out: tuple[str, ...] = (),
    tokenizer: bool = True,
) -> dict[str, np.ndarray]:
    """Write a model with its linear layers in Q4_0; ``types`` changes the type of single tensors.

    Returns:
        float32 values of every tensor, as the gguf library dequantises what was written.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(str(file), config.model_type)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (fields or {}).items():
        writer.add_string(key, value)
    if tokenizer:
        (add_llama_tokenizer if config.model_type == "llama" else add_bpe_tokenizer)(writer, config.vocab_size)
    values = {}
    for name, tensor in {**tensors_of(model), **(extra or {})}.items():
        if name in leave_out:
            continue
        default = "F32" if tensor.ndim == 1 else "F16" if name.startswith("token_embd") else "Q4_0"
        kind = GGMLQuantizationType[(types or {}).get(name, default)]
        tensor = np.ascontiguousarray(tensor, dtype=np.float32)
        if kind is GGMLQuantizationType.F32:
            writer.add_tensor(name, tensor)
            values[name] = tensor
            continue
        data = random_q6_k(tensor) if kind is GGMLQuantizationType.Q6_K else quants.quantize(tensor, kind)
        if kind is GGMLQuantizationType.F16:
            data = tensor.astype(np.float16)
        writer.add_tensor(name, data, raw_dtype=kind)
        values[name] = quants.dequantize(data, kind).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def random_q6_k(tensor: np.ndarray) -> np.ndarray:
    """Blocks of Q6_K, which the gguf library reads and does not write: any bytes, with a small float16 scale."""
    draw = np.random.default_rng(3)
    rows, blocks = tensor.shape[0], tensor.shape[1] // 256
    data = draw.integers(0, 256, (rows, blocks, 210), dtype=np.uint8)
    data[..., 208:] = np.array([1e-4], np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def add_llama_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    letters = [f"<0x{byte:02X}>" for byte in range(size)][: size - len(WORDS) - 27]
    words = [*WORDS, *letters, "▁", *(chr(ord("a") + i) for i in range(26))][:size]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * len(letters)]
    kinds += [gguf.TokenType.NORMAL] * (size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def add_bpe_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    words = [chr(33 + i) for i in range(size - 3)] + ["ab", "Ġ", "<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * (size - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(size - 1)
    writer.add_eos_token_id(size - 1)


def changed(file: Path, size: int) -> Path:
    """A copy with only its first ``size`` bytes (from the end where negative)."""
    short = file.with_name(f"short{abs(size)}.gguf")
    short.write_bytes(file.read_bytes()[:size])
    return short
