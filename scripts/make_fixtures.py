#!/usr/bin/env python3
"""Make tests/fixtures/gptqmodel with GPTQModel, a packer that is not ours.

Each fixture is a tiny model with random weights, quantised on random tokens and saved by GPTQModel, plus
``expected.safetensors``:

    input_ids              int64 [1, 24]
    logits                 fp32  [1, 24, vocabulary]: the plain transformers model in fp32 with the dequantised weights
                           (and the other tensors of the checkpoint), so they depend on no 4-bit kernel
    <module>.first_rows    fp32  [8, in_features]: the first 8 output features of the dequantised weight
    metadata "<module>"    sha256 of the whole dequantised weight: little-endian fp32, [out_features, in_features]

The dequantised weights come from GPTQModel's own functions. These return [in_features, out_features] in the dtype of
the scales, fp16, where the product is rounded; here they are given the same scales widened to fp32, where it is exact,
and the result is transposed. For GPT-2 (Conv1D, whose own weight is [in_features, out_features]) the hash is of
[out_features, in_features] too. Some weights are made one-sided, so that asymmetric zero points reach 0 and 15: a v1
file stores them minus one by subtracting 0x11111111 from the whole word, and a 0 borrows from its neighbour.

``--demo`` writes ``demo_expected.json`` in the same way for the demo model. GPTQModel is a development tool only,
installed with ``--no-deps``. Example: ``python scripts/make_fixtures.py gpt2_v1_sym_g32``; no name means all fixtures.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
os.environ.setdefault("GPTQ_TORCH_TRITON_DEQUANT", "0")

import tokenizers
import torch
import transformers
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "gptqmodel"
DEMO = ROOT / "src" / "nybble" / "assets" / "demo"
VOCABULARY, TOKENS, ROWS_KEPT = 96, 24, 8
KEPT_FILES = {"config.json", "quantize_config.json", "model.safetensors"}


class Fixture(NamedTuple):
    """A tiny architecture and the recipe it is quantised with."""

    model: transformers.PretrainedConfig
    recipe: dict[str, Any]
    dtype: torch.dtype = torch.float16


def llama(hidden: int) -> transformers.LlamaConfig:
    """Two layers; four query heads share two key/value heads."""
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )


GPTQ = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "format": "gptq"}
FIXTURES_BY_NAME = {
    "neox_v1_sym_g32": Fixture(
        transformers.GPTNeoXConfig(
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            use_parallel_residual=True,
        ),
        GPTQ,
        torch.float32,
    ),
    "llama_v2_asym_actorder_g32": Fixture(llama(128), {**GPTQ, "sym": False, "desc_act": True, "format": "gptq_v2"}),
    "qwen2_v1_asym_g64": Fixture(
        transformers.Qwen2Config(
            hidden_size=128,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
        ),
        {**GPTQ, "sym": False, "group_size": 64},
        torch.bfloat16,
    ),
    "gpt2_v1_sym_g32": Fixture(
        transformers.GPT2Config(n_embd=64, n_head=2, n_layer=2, vocab_size=VOCABULARY, n_positions=64, n_inner=128),
        GPTQ,
    ),
    "llama_channel": Fixture(llama(64), {**GPTQ, "group_size": -1, "act_group_aware": False}),
    "llama_awq_g32": Fixture(
        llama(128),
        {"bits": 4, "group_size": 32, "sym": False, "quant_method": "awq", "format": "gemm", "desc_act": False},
    ),
}


def random_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Weights wide enough that logits differ between tokens; no bias or norm left at its trivial value."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.normal_(0.0, 0.12)
            if parameter.ndim == 2 and ".layers." in name:  # one-sided weights: zero points of 0 and 15
                parameter[3::16].abs_()
                parameter[4::16].abs_().neg_()
    return model


def save_tokenizer(folder: str) -> None:
    """GPTQModel insists on a tokenizer; this one is not kept."""
    words = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)


def quantize(fixture: Fixture, folder: Path) -> None:
    """Let GPTQModel quantise and save; keep the files a loader reads."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCABULARY, (48,), generator=generator).tolist() for _ in range(32)]
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # GPTQModel writes logs/ where it runs
        random_model(fixture.model).save_pretrained(f"{scratch}/float")
        save_tokenizer(f"{scratch}/float")
        recipe = QuantizeConfig(offload_to_disk=False, **fixture.recipe)
        model = GPTQModel.load(f"{scratch}/float", recipe, dtype=fixture.dtype)
        model.quantize(calibration, batch_size=8)
        model.save(f"{scratch}/packed")
        print(sorted(p.name for p in Path(scratch, "packed").iterdir()))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in sorted(KEPT_FILES):
            if Path(scratch, "packed", name).exists():
                shutil.copy(f"{scratch}/packed/{name}", folder / name)


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Module name -> fp32 [out_features, in_features], by GPTQModel's own code."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    awq = config["quant_method"] == "awq"
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        if not (folder / "tokenizer.json").exists():
            save_tokenizer(scratch)
        # Left to itself it would load the fp16 scales as bf16, and round them.
        model = GPTQModel.load(scratch, backend=backend, device="cpu", dtype=torch.float16).model
    weights = {}
    for name, module in model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        scales = module.scales.float()
        if awq:
            group = module.group_size
            weight = dequantize_gemm(module.qweight, module.qzeros, scales, module.bits, group)
        else:
            module.scales = scales
            weight = type(module).dequantize_weight(module)
        assert weight.dtype == torch.float32 and weight.shape == (module.in_features, module.out_features)
        weights[name] = weight.t().contiguous()
    return weights


def plain_logits(folder: Path, weights: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits of the unquantised architecture carrying `weights` and the other tensors of the checkpoint."""
    config = transformers.AutoConfig.from_pretrained(folder)
    delattr(config, "quantization_config")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stored = load_file(folder / "model.safetensors")
    state = {key: value.float() for key, value in stored.items() if key.rpartition(".")[0] not in weights}
    for name, weight in weights.items():
        conv1d = type(model.get_submodule(name)).__name__ == "Conv1D"
        state[f"{name}.weight"] = weight.t() if conv1d else weight
        if f"{name}.bias" in stored:
            state[f"{name}.bias"] = stored[f"{name}.bias"].float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{folder}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits.float().contiguous()


def sha256(weight: torch.Tensor) -> str:
    """Hash of the bytes of `weight`."""
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()


def make(name: str) -> None:
    """One fixture folder."""
    folder = FIXTURES / name
    quantize(FIXTURES_BY_NAME[name], folder)
    weights = dequantized(folder)
    input_ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(2))
    tensors = {"input_ids": input_ids, "logits": plain_logits(folder, weights, input_ids)}
    tensors |= {f"{module}.first_rows": weight[:ROWS_KEPT].contiguous() for module, weight in weights.items()}
    save_file(tensors, folder / "expected.safetensors", {module: sha256(weight) for module, weight in weights.items()})
    (folder / "expected.safetensors").chmod(0o644)
    print(f"{name}: {len(weights)} modules, {sum(p.stat().st_size for p in folder.iterdir()):,} bytes")


def make_demo_expected() -> None:
    """Hashes and last-position logits of the demo model."""
    weights = dequantized(DEMO)
    prompt = "def read_config(path):\n"
    input_ids = transformers.AutoTokenizer.from_pretrained(DEMO)(prompt, return_tensors="pt").input_ids
    logits = plain_logits(DEMO, weights, input_ids)[0, -1]
    expected = {
        "prompt": prompt,
        "input_ids": input_ids[0].tolist(),
        "last_logits_fp32": [float(value) for value in logits],
        "sha256_fp32_out_in": {module: sha256(weight) for module, weight in weights.items()},
    }
    (FIXTURES / "demo_expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(f"demo: {len(weights)} modules")


def main() -> None:
    """Make the fixtures named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIXTURES_BY_NAME)}")
    parser.add_argument("--demo", action="store_true", help="write demo_expected.json")
    args = parser.parse_args()
    for name in args.names or ([] if args.demo else FIXTURES_BY_NAME):
        make(name)
    if args.demo:
        make_demo_expected()


if __name__ == "__main__":
    main()
