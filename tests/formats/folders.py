"""Checkpoint folders made to measure, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nybble.formats.checkpoint import Checkpoint, load_quantized, preflight, read_quantization
from nybble.formats.gptq import pack_gptq
from nybble.formats.grouped import QuantizedWeight
from nybble.runtime.errors import CheckpointError

NAME = "model.layers.0.mlp.up_proj"
K, N, GROUP = 64, 16, 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}

Tensors = dict[str, torch.Tensor]


def weight(
    k: int = K,
    n: int = N,
    group_size: int = GROUP,
    *,
    symmetric: bool = False,
    shuffled: bool = False,
    bits: int = 4,
) -> QuantizedWeight:
    groups = -(-k // group_size)
    zeros = torch.full((groups, n), 1 << (bits - 1)) if symmetric else torch.randint(1 << bits, (groups, n))
    g_idx = (torch.arange(k, dtype=torch.int32) // group_size)[torch.randperm(k)] if shuffled else None
    q = torch.randint(1 << bits, (k, n), dtype=torch.uint8)
    return QuantizedWeight(q, zeros.to(torch.uint8), torch.rand(groups, n).half(), group_size, g_idx, bits)


def named(packed: Mapping[str, torch.Tensor], name: str = NAME, *, without: tuple[str, ...] = ()) -> Tensors:
    return {f"{name}.{short}": tensor.contiguous() for short, tensor in packed.items() if short not in without}


def gptq(w: QuantizedWeight, checkpoint_format: str = "gptq", **options: Any) -> Tensors:
    return named(pack_gptq(w, checkpoint_format=checkpoint_format), **options)


def write(folder: Path, tensors: Tensors, config: Any = None, *, file: str = "model.safetensors", **files: Any) -> Path:
    """The folder, with ``config`` as config.json's quantization_config and ``files`` as <name>.json."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file)
    whole = {"model_type": "llama"} | ({} if config is None else {"quantization_config": config})
    (folder / "config.json").write_text(json.dumps(whole))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_shards(
    folder: Path, shards: Mapping[str, Tensors], config: Any, extra: Mapping[str, str] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors} | dict(extra or {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def load(folder: Path, name: str = NAME, shape: tuple[int, int] = (K, N)) -> QuantizedWeight:
    """As the model loader goes about it: headers first, then the tensors."""
    checkpoint, config = Checkpoint(folder), read_quantization(folder)
    assert config is not None
    plan = preflight(checkpoint, config, {name: shape})[name]
    assert plan is not None and (plan.in_features, plan.out_features) == shape
    return load_quantized(checkpoint, config, name)


def same(got: QuantizedWeight, expected: QuantizedWeight) -> bool:
    return (
        torch.equal(got.q, expected.q)
        and torch.equal(got.zeros, expected.zeros)
        and torch.equal(got.scales, expected.scales)
        and got.bits == expected.bits
        and got.scales.dtype == expected.scales.dtype
        and torch.equal(got.group_of(), expected.group_of())
        and (got.g_idx is None) == (expected.g_idx is None)
    )


def refusal(folder: Path, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    return caught.value
