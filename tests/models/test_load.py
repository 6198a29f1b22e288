"""Folders that load right, and folders that are refused before anything is moved."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import nybble
from nybble.formats.gptq import pack_gptq
from nybble.models.layers import W4A16Linear
from nybble.runtime.errors import CheckpointError, UnsupportedError

MakeModel = Callable[..., PreTrainedModel]
Tensors = dict[str, torch.Tensor]

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gptqmodel"
LLAMA = FIXTURES / "llama_channel"
KINDS = pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen2", "qwen3", "gpt2"])


def altered(
    source: Path, target: Path, edit: Callable[[Tensors], Any], config: Callable[[dict[str, Any]], Any] | None = None
) -> Path:
    """A copy of a folder with one single file, its tensors and its configuration edited."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("expected.safetensors"))
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, target / "model.safetensors")
    if config is not None:
        raw = json.loads((target / "config.json").read_text())
        config(raw)
        (target / "config.json").write_text(json.dumps(raw))
    return target


@pytest.fixture
def nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which a tensor is put into the model."""
    monkeypatch.setattr("nybble.models.load._fill", lambda *_: pytest.fail("a tensor was moved"))


# --------------------------------------------------------------------------------------------- what someone else packed


@pytest.mark.parametrize("folder", sorted(f for f in FIXTURES.iterdir() if f.is_dir()), ids=lambda folder: folder.name)
def test_folders_of_gptqmodel(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    model = nybble.load(folder, device="cpu", dtype=torch.float32)
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, W4A16Linear)}
    assert len(quantized) in (8, 14)  # every linear layer of two, GPT-style or Llama-style
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    rows = [name for name in expected if name.endswith(".first_rows")]
    assert rows
    for name in rows:
        weight = quantized[name.removesuffix(".first_rows")].packed().unpack().dequantize().t()
        assert torch.equal(weight[: len(expected[name])], expected[name]), name
    logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)


def test_act_order_and_zero_points_survive() -> None:
    model = nybble.load(FIXTURES / "llama_v2_asym_actorder_g32", device="cpu")
    layers = [m for m in model.modules() if isinstance(m, W4A16Linear)]
    assert any(m.perm is not None for m in layers) and any(m.qzeros is not None for m in layers)


# -------------------------------------------------------------------------------------------------------- plain folders


@KINDS
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_folders(
    make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, kind: str, stored: torch.dtype
) -> None:
    make_model(kind).to(stored).save_pretrained(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = nybble.load(tmp_path, device="cpu")
    assert type(model) is type(expected)
    assert model.dtype == torch.float32 and model.config.dtype == torch.float32
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in expected.named_parameters()]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@KINDS
def test_shards_and_a_dtype(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, kind: str) -> None:
    make_model(kind).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = nybble.load(str(tmp_path), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert all(b.dtype == torch.float32 for b in model.buffers())  # rotary frequencies


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 32}),
        ("qwen2", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}),
        ("llama", {"rope_type": "linear", "factor": 2.0}),
    ],
    ids=["llama3", "yarn", "linear"],
)  # fmt: skip
def test_rotary_frequencies_are_computed_not_left(
    make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, kind: str, rope: dict[str, Any]
) -> None:
    original = make_model(kind, rope_parameters={"rope_theta": 500.0, **rope})
    original.save_pretrained(tmp_path)
    model = nybble.load(tmp_path, device="cpu")
    for (name, mine), (_, theirs) in zip(model.named_buffers(), original.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert torch.equal(model(ids).logits, original(ids).logits)


@pytest.mark.parametrize("head", ["embed_out", "lm_head"])
def test_both_names_of_the_neox_head(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, head: str) -> None:
    original = make_model("gpt_neox")
    original.save_pretrained(tmp_path / "a")

    def rename(tensors: Tensors) -> None:
        weight = tensors.pop("embed_out.weight", None)
        tensors[f"{head}.weight"] = tensors.pop("lm_head.weight") if weight is None else weight

    model = nybble.load(altered(tmp_path / "a", tmp_path / "b", rename), device="cpu")
    assert torch.equal(model(ids).logits, original(ids).logits)


def test_a_folder_of_the_bare_base_model(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path) -> None:
    original = make_model("gpt2")
    original.base_model.save_pretrained(tmp_path)
    assert "h.0.ln_1.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(nybble.load(tmp_path, device="cpu")(ids).logits, original(ids).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_a_tied_head_is_the_embedding(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, kind: str) -> None:
    original = make_model(kind, tie_word_embeddings=True)
    original.save_pretrained(tmp_path / "a")
    model = nybble.load(tmp_path / "a", device="cpu")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert torch.equal(model(ids).logits, original(ids).logits)
    embedding = original.get_input_embeddings().weight

    twice = altered(tmp_path / "a", tmp_path / "b", lambda t: t.update({"lm_head.weight": embedding}))
    model = nybble.load(twice, device="cpu")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]

    own = altered(tmp_path / "a", tmp_path / "c", lambda t: t.update({"lm_head.weight": embedding * 2}))
    model = nybble.load(own, device="cpu")
    model.tie_weights()
    torch.testing.assert_close(model(ids).logits, 2 * original(ids).logits)


def test_generation_config_is_read(make_model: MakeModel, tmp_path: Path) -> None:
    original = make_model("llama")
    original.generation_config.eos_token_id = [5, 9]
    original.save_pretrained(tmp_path)
    assert nybble.load(tmp_path, device="cpu").generation_config.eos_token_id == [5, 9]  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ drift between writers


def llama_logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(1, 25)[None]).logits


def test_a_bias_of_zeros_is_dropped(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(".scales")]:
            tensors[name.replace("scales", "bias")] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
        tensors["lm_head.bias"] = torch.zeros(96)

    model = nybble.load(altered(LLAMA, tmp_path / "b", add), device="cpu")
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert torch.equal(llama_logits(model), llama_logits(nybble.load(LLAMA, device="cpu")))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "lm_head.bias"])
@pytest.mark.usefixtures("nothing_moves")
def test_a_bias_that_the_model_has_not_is_refused(tmp_path: Path, name: str) -> None:
    size = (
        96
        if name == "lm_head.bias"
        else load_file(LLAMA / "model.safetensors")[name.replace("bias", "scales")].shape[1]
    )
    folder = altered(LLAMA, tmp_path / "b", lambda t: t.update({name: torch.ones(size)}))
    with pytest.raises(CheckpointError, match=r"the model's layer has no bias") as caught:
        nybble.load(folder, device="cpu")
    assert caught.value.tensor == name and caught.value.file.endswith("model.safetensors")


def test_tensors_that_the_model_computes_are_ignored(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path) -> None:
    old = {
        "gpt_neox": ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias",
                     "gpt_neox.layers.0.attention.rotary_emb.inv_freq"],
        "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
        "gpt2": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
    }  # fmt: skip
    for kind, names in old.items():
        original = make_model(kind)
        original.save_pretrained(tmp_path / kind)
        extra = dict.fromkeys(names, torch.ones(4))
        folder = altered(tmp_path / kind, tmp_path / f"{kind}_old", lambda t, extra=extra: t.update(extra))
        assert torch.equal(nybble.load(folder, device="cpu")(ids).logits, original(ids).logits)


def test_bf16_beside_fp16_scales(tmp_path: Path) -> None:
    def convert(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(torch.float16 if name.endswith(".scales") else torch.bfloat16)

    folder = altered(LLAMA, tmp_path / "b", convert)
    model = nybble.load(folder, device="cpu", dtype=torch.bfloat16)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.scales.dtype == torch.float16  # exact, as the quantiser made them
    assert model.get_submodule("model.norm").weight.dtype == torch.bfloat16
    exact = llama_logits(nybble.load(folder, device="cpu", dtype=torch.float32))
    assert (llama_logits(model).float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_head(tmp_path: Path, tied: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (64, 96), generator=generator, dtype=torch.uint8)
    scales = torch.rand(1, 96, generator=generator).half()
    head = nybble.QuantizedWeight(q, torch.full((1, 96), 8, dtype=torch.uint8), scales, 64)

    def replace(tensors: Tensors) -> None:
        tensors.pop("lm_head.weight", None)
        for name, tensor in pack_gptq(head, checkpoint_format="gptq").items():
            tensors[f"lm_head.{name}"] = tensor

    def settings(raw: dict[str, Any]) -> None:
        raw["tie_word_embeddings"] = tied

    plain = nybble.load(LLAMA, device="cpu")
    model = nybble.load(altered(LLAMA, tmp_path / "b", replace, settings), device="cpu")
    assert isinstance(model.get_submodule("lm_head"), W4A16Linear)
    model.tie_weights()
    hidden = plain.base_model(torch.arange(1, 25)[None]).last_hidden_state
    torch.testing.assert_close(llama_logits(model), hidden @ head.dequantize(), rtol=1e-5, atol=1e-4)


def to_bytes(weight: torch.Tensor, group_size: int, *, shuffled: bool) -> nybble.QuantizedWeight:
    """``[K, N]`` rounded to 8 bits by groups, from the least value of each to the largest."""
    k, n = weight.shape
    order = torch.randperm(k) if shuffled else torch.arange(k)
    parts = weight[order].view(k // group_size, group_size, n)
    low, high = parts.amin(1), parts.amax(1)
    scales = ((high - low) / 255).half()
    zeros = (-low / scales.float()).round().clamp(0, 255)
    q = torch.empty(k, n)
    q[order] = (parts / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 255).view(k, n)
    g_idx = torch.empty(k, dtype=torch.int32)
    g_idx[order] = torch.arange(k, dtype=torch.int32) // group_size
    return nybble.QuantizedWeight(
        q.to(torch.uint8), zeros.to(torch.uint8), scales, group_size, g_idx if shuffled else None, bits=8
    )


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_model_of_8_bits(
    make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, kind: str, shuffled: bool, checkpoint_format: str
) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        exact = model(ids).logits
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix):
            if isinstance(module, torch.nn.Linear):
                weight = to_bytes(module.weight.t(), 32, shuffled=shuffled)
                del tensors[f"{name}.weight"]
                packed = pack_gptq(weight, checkpoint_format=checkpoint_format)
                tensors |= {f"{name}.{short}": tensor.contiguous() for short, tensor in packed.items()}
                module.weight.copy_(weight.dequantize().t())
        expected = model(ids).logits
    save_file(tensors, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": shuffled, "sym": False,
        "checkpoint_format": checkpoint_format,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loaded = nybble.load(tmp_path, device="cpu")
    layers = [module for module in loaded.modules() if isinstance(module, W4A16Linear)]
    assert layers and {layer.bits for layer in layers} == {8}
    assert all((layer.perm is not None) == shuffled for layer in layers)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-4)
    # and 8 bits are close to the model that they were made of
    assert 0 < (expected - exact).norm() < 0.05 * exact.norm()


# ------------------------------------------------------------------------------------------------------------- refusals


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("edit", "tensor", "reason"),
    [
        (drop("model.norm.weight"), "model.norm.weight", r"missing \(nor is there norm.weight\)"),
        (drop("model.embed_tokens.weight"), "model.embed_tokens.weight", "missing"),
        (drop("lm_head.weight"), "lm_head.weight", "missing"),
        (drop("model.layers.1.mlp.up_proj.scales"), "model.layers.1.mlp.up_proj.scales", "missing"),
        (drop("model.layers.1.mlp.up_proj.qweight"), "model.layers.1.mlp.up_proj.qweight", "missing"),
        (put("model.norm.weight", torch.ones(63)), "model.norm.weight", r"expected shape \[64\].*got \[63\]"),
        (put("lm_head.weight", torch.ones(64, 96)), "lm_head.weight", r"expected shape \[96, 64\].*got \[64, 96\]"),
        (put("model.norm.weight", torch.ones(64, dtype=torch.int32)), "model.norm.weight", "floating-point"),
        (put("model.layers.2.input_layernorm.weight", torch.ones(64)), "model.layers.2.input_layernorm.weight",
         "unexpected: a llama model of this config.json has no such tensor"),
        (put("extra", torch.ones(1)), "extra", "unexpected"),
        (put("model.layers.0.mlp.up_proj.qweight", torch.ones(8, 8, dtype=torch.int32)),
         "model.layers.0.mlp.up_proj.qweight", "expected"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_moves")
def test_a_wrong_tensor_is_refused_by_name(
    tmp_path: Path, edit: Callable[[Tensors], Any], tensor: str, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        nybble.load(altered(LLAMA, tmp_path / "b", edit), device="cpu")
    assert caught.value.tensor == tensor
    assert str(tmp_path) in caught.value.file


@pytest.mark.usefixtures("nothing_moves")
def test_a_missing_bias_of_a_quantised_layer(tmp_path: Path) -> None:
    name = "gpt_neox.layers.0.attention.dense.bias"
    folder = altered(FIXTURES / "neox_v1_sym_g32", tmp_path / "b", drop(name))
    with pytest.raises(CheckpointError, match="missing") as caught:
        nybble.load(folder, device="cpu")
    assert caught.value.tensor == name


@pytest.mark.usefixtures("nothing_moves")
def test_a_truncated_file(tmp_path: Path) -> None:
    folder = altered(LLAMA, tmp_path / "b", lambda _: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        nybble.load(folder, device="cpu")
    assert caught.value.file == str(file)


def change(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda raw: raw.update(values)


@pytest.mark.parametrize(
    ("config", "key", "reason"),
    [
        (change(model_type="bloom"), "model_type", "'bloom' is not supported; supported are gpt_neox, llama, qwen2, "
                                                   "qwen3, gpt2"),
        (lambda raw: raw.pop("model_type"), "model_type", "missing; expected one of gpt_neox"),
        (change(num_attention_heads="many"), "", "no valid llama configuration"),
        (change(hidden_act="nonsense"), "", "no valid llama configuration"),
        (change(auto_map={"AutoModelForCausalLM": "evil.Evil"}, model_type="evil"), "model_type", "'evil' is not"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_moves")
def test_a_configuration_that_does_not_load(
    tmp_path: Path, config: Callable[[dict[str, Any]], Any], key: str, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        nybble.load(altered(LLAMA, tmp_path / "b", lambda _: None, config), device="cpu")
    assert caught.value.tensor == key and caught.value.file.endswith("config.json")


def test_a_path_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"EleutherAI/pythia-70m: no such folder\. Nybble loads local folders"):
        nybble.load("EleutherAI/pythia-70m")
    with pytest.raises(CheckpointError, match=r"config.json: missing"):
        nybble.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        nybble.load(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        nybble.load(tmp_path / "config.json")
    with pytest.raises(TypeError, match="load: path: expected a str or Path, got int"):
        nybble.load(3)  # type: ignore[arg-type]


def test_a_wrong_device_or_dtype() -> None:
    with pytest.raises(ValueError, match="load: device: expected a torch device"):
        nybble.load(LLAMA, device="gpu please")
    with pytest.raises(ValueError, match="load: device: expected 'cuda' or 'cpu', got 'meta'"):
        nybble.load(LLAMA, device="meta")
    with pytest.raises(TypeError, match=r"load: dtype: expected torch.float16.*got torch.int8"):
        nybble.load(LLAMA, dtype=torch.int8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA is told")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device here"):
        nybble.load(LLAMA, device="cuda")


def test_values_that_float16_can_not_hold(tmp_path: Path) -> None:
    big = put("lm_head.weight", torch.full((96, 64), 1e6, dtype=torch.float32))
    folder = altered(LLAMA, tmp_path / "b", big)
    with pytest.raises(CheckpointError, match=r"beyond the range of float16.*dtype=torch.bfloat16") as caught:
        nybble.load(folder, device="cpu", dtype=torch.float16)
    assert caught.value.tensor == "lm_head.weight"
    nybble.load(folder, device="cpu", dtype=torch.bfloat16)


def test_a_packed_model_is_not_saved_as_something_else(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Keep the folder that it was loaded from"):
        nybble.load(LLAMA, device="cpu").save_pretrained(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    make_model("llama").save_pretrained(tmp_path / "plain")
    nybble.load(tmp_path / "plain", device="cpu").save_pretrained(tmp_path / "again")
    nybble.load(tmp_path / "again", device="cpu")


# --------------------------------------------------------------------------------------------------------- side effects


def test_no_quantisation_library_is_used_and_no_global_name_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    for name in ("optimum", "gptqmodel", "auto_gptq", "awq", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    default, class_state = torch.get_default_dtype(), dict(transformers.LlamaForCausalLM.__dict__)
    nybble.fuse(nybble.load(LLAMA, device="cpu"))
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert torch.get_default_dtype() == default
    assert dict(transformers.LlamaForCausalLM.__dict__) == class_state


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    model = nybble.load(LLAMA, device="cpu", progress=lambda done, total: seen.append((done, total)))
    total = len(seen)
    assert seen == [(i + 1, total) for i in range(total)]
    assert total == 14 + sum(1 for n, _ in model.named_parameters() if "proj" not in n)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_loaded_model_generates(cache: str) -> None:
    model = nybble.load(FIXTURES / "neox_v1_sym_g32", device="cpu")
    prompt = torch.arange(1, 9)[None]
    kind = {"cache_implementation": "static"} if cache == "static" else {}
    got = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, **kind)  # type: ignore[operator]
    for _ in range(6):
        prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, prompt)
