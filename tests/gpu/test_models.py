"""Whole models on a GPU against the same folders on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nybble
from nybble.models.generate import generate
from nybble.models.layers import W4A16Linear
from nybble.models.perplexity import perplexity

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gptqmodel"
DEMO = Path(nybble.__file__).parent / "assets" / "demo"
ALL = [DEMO, *sorted(folder for folder in FIXTURES.iterdir() if folder.is_dir())]
FOLDERS = pytest.mark.parametrize("folder", ALL, ids=lambda folder: folder.name)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
PROMPT = list(range(1, 13))


@FOLDERS
def test_packing_on_the_gpu_gives_the_same_bytes(folder: Path) -> None:
    here = nybble.load(folder, device="cpu", dtype=torch.float16).state_dict()
    there = nybble.load(folder, device="cuda", dtype=torch.float16).state_dict()
    assert list(here) == list(there)
    for name, tensor in there.items():
        assert tensor.is_cuda and torch.equal(tensor.cpu(), here[name]), name


@FOLDERS
def test_the_default_device_and_dtype(folder: Path) -> None:
    model = nybble.load(folder)
    assert {p.device.type for p in model.parameters()} == {b.device.type for b in model.buffers()} | {"cuda"}
    stored = torch.bfloat16 if folder.name.startswith("qwen2") else torch.float16  # as its unquantised tensors are
    assert model.dtype == stored


@FOLDERS
@HALVES
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_greedy_tokens_are_the_cpus_but_for_ties(folder: Path, dtype: torch.dtype, fused: bool) -> None:
    model = nybble.load(folder, device="cuda", dtype=dtype)
    assert any(isinstance(m, W4A16Linear) for m in model.modules())
    report = nybble.fuse(model) if fused else None
    tokens = list(generate(model, PROMPT, max_new_tokens=80 if folder == DEMO else 16))
    exact = nybble.load(folder, device="cpu", dtype=torch.float32)
    logits = exact(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    spread = float(logits.max() - logits.min())
    behind = logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    # A token differs from the CPU's only where the top two are this close: ten roundings of 16-bit activations.
    assert float(behind.max()) <= spread * 10 * (2.0**-11 if dtype is torch.float16 else 2.0**-8)
    if report is not None:
        assert sum(report.calls().values()) > 0


@HALVES
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_fused_logits_and_batched_generation(dtype: torch.dtype, cache: str) -> None:
    model = nybble.load(FIXTURES / "neox_v1_sym_g32", device="cuda", dtype=dtype)
    ids = torch.arange(1, 25, device="cuda").view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    plain = model(ids, attention_mask=mask).logits[mask.bool()].float()
    report = nybble.fuse(model)
    fused = model(ids, attention_mask=mask).logits[mask.bool()].float()
    scale = float(plain.abs().max())
    assert float((fused - plain).abs().max()) <= scale * (0.01 if dtype is torch.float16 else 0.06)
    layers = model.config.num_hidden_layers
    # Both norms of a layer and both additions before them are one kernel; the first layer has nothing to add.
    once = {"w4a16_linear": 4 * layers, "layernorm": 2, "add_dual_layernorm": layers - 1, "add_layernorm": 1}
    assert report.calls() == once
    kind: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, **kind
    )
    assert out.shape == (2, 17) and torch.equal(out[:, :12], ids)
    assert report.calls() == {name: 6 * calls for name, calls in once.items()}


def test_fused_and_unfused_perplexity_on_the_gpu() -> None:
    from transformers import AutoTokenizer

    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    stream = torch.tensor(AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"])
    exact = perplexity(nybble.load(DEMO, device="cpu"), stream[:2048], window=512)
    model = nybble.load(DEMO, device="cuda")
    plain = perplexity(model, stream[:2048], window=512)
    report = nybble.fuse(model)
    fused = perplexity(model, stream[:2048], window=512)
    assert fused.ppl == pytest.approx(plain.ppl, rel=1e-3)
    assert fused.ppl == pytest.approx(exact.ppl, rel=1e-3)
    assert report.calls()["w4a16_linear"] > 0


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_gguf_file_on_the_gpu_is_the_one_on_the_cpu(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import transformers
    from models.gguf_files import write

    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind.capitalize()}Config")(**sizes)
    original = getattr(transformers, f"{kind.capitalize()}ForCausalLM")(config)
    file = tmp_path / "tiny.gguf"
    write(file, original)
    exact, model = (nybble.load(file, device=device) for device in ("cpu", "cuda"))
    assert model.dtype == torch.float16
    here = exact.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), here[name].to(tensor.dtype)), name
    ids = torch.tensor([PROMPT])
    want, got = exact(ids).logits, model(ids.cuda()).logits.cpu().float()
    # Ten roundings of 16-bit activations, of the spread of the logits.
    assert float((got - want).abs().max()) <= float(want.max() - want.min()) * 10 * 2.0**-11
