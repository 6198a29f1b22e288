"""Checkpoints made by GPTQModel, whose own dequantised weights came with them, bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import nybble
from nybble.formats.checkpoint import Checkpoint, load_quantized, preflight, read_quantization

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gptqmodel"
DEMO = Path(nybble.__file__).parent / "assets" / "demo"

# name -> (method, format, group size, symmetric, act-order): what the file names promise
EXPECTED = {
    "neox_v1_sym_g32": ("gptq", "gptq", 32, True, False),
    "llama_v2_asym_actorder_g32": ("gptq", "gptq_v2", 32, False, True),
    "qwen2_v1_asym_g64": ("gptq", "gptq", 64, False, False),
    "gpt2_v1_sym_g32": ("gptq", "gptq", 32, True, False),
    "llama_channel": ("gptq", "gptq", -1, True, False),
    "llama_awq_g32": ("awq", "gemm", 32, False, False),
}


def sha256(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()


def test_every_fixture_is_listed() -> None:
    assert {folder.name for folder in FIXTURES.iterdir() if folder.is_dir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.filterwarnings("error")
def test_dequantised_weights_are_the_packers_own(name: str) -> None:
    folder = FIXTURES / name
    checkpoint, config = Checkpoint(folder), read_quantization(folder)
    method, checkpoint_format, group_size, symmetric, act_order = EXPECTED[name]
    assert config is not None
    assert (config.method, config.checkpoint_format, config.group_size) == (method, checkpoint_format, group_size)
    assert (config.sym, config.desc_act) == (symmetric, act_order)
    with safe_open(folder / "expected.safetensors", "pt") as expected:
        hashes, rows = (
            expected.metadata(),
            {module: expected.get_tensor(f"{module}.first_rows") for module in expected.metadata()},
        )
    quantized = {name.removesuffix(".qweight") for name in checkpoint.names() if name.endswith(".qweight")}
    assert quantized and set(hashes) == quantized
    shuffled = 0
    for module in sorted(quantized):
        w = load_quantized(checkpoint, config, module)
        weight = w.dequantize().t()
        assert torch.equal(weight[: rows[module].shape[0]], rows[module]), module
        assert sha256(weight) == hashes[module], module
        assert w.symmetric == symmetric, module
        shuffled += w.g_idx is not None
    assert (shuffled == len(quantized)) if act_order else (shuffled == 0)


@pytest.mark.parametrize("name", EXPECTED)
def test_preflight_accepts_them_by_their_headers(name: str) -> None:
    checkpoint, config = Checkpoint(FIXTURES / name), read_quantization(FIXTURES / name)
    with safe_open(FIXTURES / name / "expected.safetensors", "pt") as expected:
        modules = list(expected.metadata())
    shapes = {}
    for module in modules:
        _, n = checkpoint.shape_dtype(f"{module}.scales")[0]
        words = checkpoint.shape_dtype(f"{module}.qweight")[0][0]
        shapes[module] = (words if name == "llama_awq_g32" else 8 * words, n)
    plans = preflight(checkpoint, config, {**shapes, "lm_head": (shapes[modules[0]][0], 96)})
    assert plans.pop("lm_head") is None
    for module, plan in plans.items():
        assert plan is not None and (plan.in_features, plan.out_features) == shapes[module]


@pytest.mark.filterwarnings("error")
def test_the_demo_model_is_the_packers_own() -> None:
    expected = json.loads((FIXTURES / "demo_expected.json").read_text())["sha256_fp32_out_in"]
    checkpoint, config = Checkpoint(DEMO), read_quantization(DEMO)
    assert config is not None and expected
    assert {name.removesuffix(".qweight") for name in checkpoint.names() if name.endswith(".qweight")} == set(expected)
    for module, digest in expected.items():
        assert sha256(load_quantized(checkpoint, config, module).dequantize().t()) == digest, module
