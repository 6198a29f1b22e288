"""GGUF files: weights against the gguf library, logits against transformers' own dequantising loader, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models.gguf_files import changed, interleaved, tensors_of, write
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import nybble
from nybble.formats.gguf_file import GGUFFile
from nybble.models.layers import W4A16Linear
from nybble.runtime.errors import CheckpointError, UnsupportedError

MakeModel = Callable[..., PreTrainedModel]
KINDS = pytest.mark.parametrize("kind", ["llama", "qwen2"])
FLOAT = torch.float32


def theirs(file: Path) -> PreTrainedModel:
    """The model as transformers loads it: configuration, names, rows and dequantised values are its own."""
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=FLOAT).eval()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"} if config.tie_word_embeddings else not missing
    return model


def layers(model: PreTrainedModel) -> dict[str, W4A16Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, W4A16Linear)}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same arithmetic in another order: sums of up to 96 terms in float32, through two layers."""
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@KINDS
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers(
    make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, kind: str, tied: bool
) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, make_model(kind, tie_word_embeddings=tied), {"token_embd.weight": "Q4_0" if tied else "Q8_0"})
    model = nybble.load(file, device="cpu")
    assert len(layers(model)) == 2 * 7 + (not tied)
    assert model.dtype == FLOAT
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        close(model(ids).logits, theirs(file)(ids).logits)
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]


@KINDS
def test_every_weight_is_what_gguf_dequantizes(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    file, original = tmp_path / "tiny.gguf", make_model(kind)
    write(file, original)
    model, expected = nybble.load(file, device="cpu"), theirs(file).state_dict()
    for name, layer in layers(model).items():
        assert layer.scales.dtype == torch.float16
        assert layer.group_size == 32
        assert torch.equal(layer.packed().unpack().dequantize(FLOAT), expected[f"{name}.weight"].t())
        if layer.bias is not None:
            assert torch.equal(layer.bias, expected[f"{name}.bias"])
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.equal(parameter, expected[name])


def test_rows_of_queries_and_keys_lie_in_the_model_order(make_model: MakeModel, tmp_path: Path) -> None:
    """Not by transformers' word for it: what was interleaved here comes back where it was."""
    file, original = tmp_path / "tiny.gguf", make_model("llama")
    values = write(file, original, {f"blk.0.attn_{part}.weight": "F32" for part in "qk"})
    model = nybble.load(file, device="cpu")
    for part in ("q", "k"):
        weight = original.get_submodule(f"model.layers.0.self_attn.{part}_proj").weight
        assert torch.equal(model.get_submodule(f"model.layers.0.self_attn.{part}_proj").weight, weight)
        packed = layers(model)[f"model.layers.1.self_attn.{part}_proj"].packed().unpack().dequantize(FLOAT).t()
        heads = {"q": 4, "k": 2}[part]
        assert np.array_equal(interleaved(packed.numpy(), heads), values[f"blk.1.attn_{part}.weight"])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_types_beside_q4_0(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "tiny.gguf"
    changed_types = dict.fromkeys(("token_embd.weight", "output.weight", "blk.1.ffn_down.weight"), kind)
    write(file, make_model("llama"), changed_types)
    model = nybble.load(str(file), device="cpu")
    assert len(layers(model)) == 2 * 7 - 1
    with torch.no_grad():
        close(model(ids).logits, theirs(file)(ids).logits)


def test_a_head_in_q6_k(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path) -> None:
    """As llama.cpp's own Q4_0 files have it."""
    file = tmp_path / "tiny.gguf"
    values = write(file, make_model("llama", hidden_size=256), {"output.weight": "Q6_K"})
    model = nybble.load(file, device="cpu")
    assert np.array_equal(model.get_output_embeddings().weight.numpy(), values["output.weight"])  # type: ignore[union-attr]
    with torch.no_grad():
        close(model(ids).logits, theirs(file)(ids).logits)


def test_a_head_of_odd_width_becomes_floats(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(file, make_model("llama", vocab_size=99), tokenizer=False)
    model = nybble.load(file, device="cpu")
    assert len(layers(model)) == 2 * 7
    with torch.no_grad():
        close(model(ids).logits, theirs(file)(ids).logits)


def test_rotary_factors(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path) -> None:
    """Llama 3's scaling, which llama.cpp stores as what each frequency is divided by."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    plain, scaled = (make_model("llama", rope_parameters={"rope_theta": 500.0, **more}) for more in ({}, rope))
    rotary = [model.base_model.rotary_emb.inv_freq for model in (plain, scaled)]  # type: ignore[union-attr]
    factors = (rotary[0] / rotary[1]).numpy()
    assert factors.max() > 2
    file = tmp_path / "tiny.gguf"
    types = dict.fromkeys(tensors_of(plain), "F32")
    write(file, plain, types, extra={"rope_freqs.weight": factors})
    model = nybble.load(file, device="cpu")
    with torch.no_grad():
        close(model(ids).logits, scaled(ids).logits)
    write(file, plain, types, extra={"rope_freqs.weight": factors[:3]})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight: expected F32 of shape \[8\], got F32 of \[3\]"):
        nybble.load(file, device="cpu")


def test_biases_of_a_llama(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path) -> None:
    file, original = tmp_path / "tiny.gguf", make_model("llama", attention_bias=True)
    write(file, original, dict.fromkeys(tensors_of(original), "F32"))
    with torch.no_grad():
        close(nybble.load(file, device="cpu")(ids).logits, original(ids).logits)


def test_progress_dtype_and_saving(make_model: MakeModel, tmp_path: Path) -> None:
    file, seen = tmp_path / "tiny.gguf", []
    write(file, make_model("qwen2"))
    model = nybble.load(file, device="cpu", dtype=torch.bfloat16, progress=lambda *counts: seen.append(counts))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 95  # type: ignore[union-attr]
    with pytest.raises(UnsupportedError, match="save_pretrained"):
        model.save_pretrained(tmp_path / "copy")


@KINDS
def test_the_tokenizer_comes_from_the_file(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    from nybble.cli.model import load_model

    file = tmp_path / "tiny.gguf"
    write(file, make_model(kind))
    _, tokenizer = load_model(file, "cpu", "auto", hidden=True)
    text = "abc" if kind == "qwen2" else "a b"
    tokens = tokenizer(text)["input_ids"]
    assert tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == text
    if kind == "qwen2":
        assert tokens == [93, 66]  # "ab", then "c"
    bare = tmp_path / "bare.gguf"
    write(bare, make_model(kind), tokenizer=False)
    with pytest.raises(CheckpointError, match=r"bare\.gguf: tokenizer\.ggml\.model: no tokenizer"):
        load_model(bare, "cpu", "auto", hidden=True)


def refused(file: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        nybble.load(file, device="cpu")
    assert caught.value.file == str(file)


def test_files_that_are_refused(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("a tensor was read before the file was refused")

    monkeypatch.setattr(GGUFFile, "tensor", read)
    monkeypatch.setattr(GGUFFile, "bytes", read)
    model, file = make_model("llama"), tmp_path / "tiny.gguf"
    refused(tmp_path / "none.gguf", "no such file")
    (tmp_path / "text.gguf").write_text("hello")
    refused(tmp_path / "text.gguf", r"not a GGUF file \(5 bytes\)")
    (tmp_path / "lfs.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path / "lfs.gguf", "a Git LFS pointer")
    write(file, model)
    for size in (-1, -4096, 3000, 60, 12):
        refused(changed(file, size), "truncated")
    write(file, model, {"blk.1.ffn_up.weight": "Q5_0"})
    refused(file, r"blk\.1\.ffn_up\.weight: is of type Q5_0; supported are Q4_0, F32, F16, BF16, Q8_0, Q6_K")
    write(file, model, leave_out=("blk.0.attn_v.weight",))
    refused(file, r"blk\.0\.attn_v\.weight: missing; it is model\.layers\.0\.self_attn\.v_proj\.weight")
    write(file, model, extra={"blk.0.extra.weight": np.zeros((8, 32), np.float32)})
    refused(file, r"blk\.0\.extra\.weight: unexpected")
    write(file, model, fields={"llama.rope.scaling.type": "yarn"})
    refused(file, r"llama\.rope\.scaling\.type: rotary scaling 'yarn' is not supported")
    wide = make_model("llama", intermediate_size=128)
    wide.config.intermediate_size = 96
    write(file, wide)
    refused(file, r"ffn_\w+\.weight: expected shape \[\d+, \d+\] from the file's metadata, got")


def test_another_family_is_refused(tmp_path: Path) -> None:
    import gguf

    file = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(str(file), "falcon")
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(file, r"general\.architecture: 'falcon' is not supported; supported are llama, qwen2")


def test_values_beyond_float16(make_model: MakeModel, tmp_path: Path) -> None:
    file, original = tmp_path / "tiny.gguf", make_model("llama")
    original.model.norm.weight[3] = 1e6
    write(file, original)
    with pytest.raises(CheckpointError, match=r"output_norm\.weight: holds values beyond the range of float16"):
        nybble.load(file, device="cpu", dtype=torch.float16)
    nybble.load(file, device="cpu", dtype=torch.bfloat16)


@KINDS
@pytest.mark.parametrize("option", [(), ("--model",)], ids=["as MODEL", "as --model"])
def test_generate_takes_a_file(make_model: MakeModel, tmp_path: Path, kind: str, option: tuple[str, ...]) -> None:
    import json

    from typer.testing import CliRunner

    from nybble.cli import app

    file = tmp_path / "tiny.gguf"
    write(file, make_model(kind))
    arguments = ["generate", *option, str(file), "--prompt", "ab", "--max-tokens", "4", "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["model"] == str(file)
    assert 0 < len(said["tokens"]) <= 4
    missing = CliRunner().invoke(app, ["generate", *option, str(tmp_path / "none.gguf"), "--device", "cpu"])
    assert missing.exit_code != 0
    assert "none.gguf: no such file" in missing.output + str(missing.exception or "")
