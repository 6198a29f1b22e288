"""Models that two processes share: the tokens of one, each process with half of the weights; and who is told of errors.

Processes are real ones, joined by gloo: one pair of them for all cases, started once.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import gguf_files, parallel_worker
from models.conftest import WIDE, MakeModel, made
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import nybble
from nybble.formats.awq import pack_awq
from nybble.formats.checkpoint import Checkpoint, load_quantized, read_quantization
from nybble.formats.gptq import pack_gptq
from nybble.formats.grouped import QuantizedWeight
from nybble.formats.parts import cut, divided, indices, length, shares
from nybble.models import flatquant, load, parallel
from nybble.models.ranks import Ranks, RowParallel, Vocabulary, ranks_of
from nybble.runtime.errors import CheckpointError, UnsupportedError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gptqmodel"
GROUPS = (32, 128, -1)


def random_weight(k: int, n: int, group_size: int, *, act_order: bool, bits: int = 4, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    size = k if group_size == -1 else group_size
    groups, levels = -(-k // size), 1 << bits
    q = torch.randint(levels, (k, n), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(levels * 5 // 16, levels * 11 // 16, (groups, n), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, n, generator=generator) + 0.5) * 3.2 / levels * k**-0.5
    g_idx = None
    if act_order:
        g_idx = (torch.randperm(k, generator=generator) // size).to(torch.int32)
    return QuantizedWeight(q, zeros, scales, size, g_idx, bits)


def gptq(to: Path, kind: str, group_size: int, *, act_order: bool = False, bits: int = 4, method: str = "gptq") -> Path:
    """A folder of random packed layers; GPT-2's layers with input features first are as GPTQ has them anyway."""
    model = made(kind, **WIDE[kind])
    model.save_pretrained(to)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head":
            k, n = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
            weight = random_weight(k, n, group_size, act_order=act_order, bits=bits, seed=seed)
            del tensors[f"{name}.weight"]
            packed = pack_awq(weight) if method == "awq" else pack_gptq(weight)
            tensors |= {f"{name}.{short}": tensor for short, tensor in packed.items()}
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, to / "model.safetensors")
    config = json.loads((to / "config.json").read_text())
    said = {"quant_method": method, "bits": bits, "group_size": group_size, "desc_act": act_order, "sym": False}
    said |= {"version": "gemm", "zero_point": True} if method == "awq" else {"checkpoint_format": "gptq_v2"}
    (to / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return to


def int4(to: Path, kind: str) -> Path:
    made(kind, **WIDE[kind]).save_pretrained(to / "plain")
    tensors, said = flatquant.convert(nybble.load(to / "plain", device="cpu"), dtype=torch.float32)
    flatquant.write(to / "plain", to / "int4", tensors, said, torch.float32)
    return to / "int4"


def folders(to: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for kind in ("llama", "gpt_neox"):
        for group_size in GROUPS:
            for act_order in (False, True) if group_size != -1 else (False,):
                name = f"{kind} g{group_size}{' act-order' if act_order else ''}"
                found[name] = gptq(to / name.replace(" ", "_"), kind, group_size, act_order=act_order)
    found["qwen2 act-order"] = gptq(to / "qwen2", "qwen2", 32, act_order=True)
    found["qwen3 8 bits"] = gptq(to / "qwen3", "qwen3", 32, bits=8)
    found["gpt2 act-order"] = gptq(to / "gpt2", "gpt2", 32, act_order=True)
    found["gpt2"] = FIXTURES / "gpt2_v1_sym_g32"
    found["llama awq"] = FIXTURES / "llama_awq_g32"
    found["gptqmodel act-order"] = FIXTURES / "llama_v2_asym_actorder_g32"
    for kind in ("llama", "gpt_neox"):
        (to / f"int4_{kind}").mkdir()
        found[f"{kind} int4"] = int4(to / f"int4_{kind}", kind)
    for kind, changes in (("llama", {"tie_word_embeddings": True}), ("gpt2", {})):
        made(kind, **WIDE[kind], **changes).save_pretrained(to / f"plain_{kind}")
        found[f"{kind} plain"] = to / f"plain_{kind}"
    gguf_files.write(to / "m.gguf", made("llama", **WIDE["llama"], attention_bias=True))
    found["llama gguf"] = to / "m.gguf"
    return found


def launch(arguments: list[str], processes: int = 2, seconds: int = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    source = str(Path(nybble.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=seconds)


def test_two_processes_give_the_tokens_of_one(tmp_path: Path) -> None:
    cases = folders(tmp_path)
    heads = tmp_path / "heads"
    made("llama", num_key_value_heads=1).save_pretrained(heads)
    job = {
        "cases": {name: str(folder) for name, folder in cases.items()},
        "failures": {"any": str(cases["llama g32"]), "heads": str(heads)},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    ran = launch([parallel_worker.__file__, str(tmp_path / "job.json"), str(tmp_path)])
    assert ran.returncode == 0, ran.stderr[:4000]
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    wrong = []
    for name, folder in cases.items():
        alone = parallel_worker.case(str(folder), None)
        first, second = (found[name] for found in both)
        for found in (first, second):
            if found["tokens"] != alone["tokens"]:
                wrong.append(f"{name}: {found['tokens']} instead of {alone['tokens']}")
            # int4 activations that lie between two integers may fall to the other side
            near = 0.05 if "int4" in name else 2e-5
            error = float((found["logits"] - alone["logits"]).abs().max() / alone["logits"].std())
            if error > near:
                wrong.append(f"{name}: logits are off by {error} of their deviation")
        for cache in ("dynamic", "static"):
            drawn = [found[f"drawn {cache}"] for found in (first, second)]
            if drawn[0] != drawn[1]:
                wrong.append(f"{name}: drew {drawn}")
        if not torch.equal(first["logits"], second["logits"]):
            wrong.append(f"{name}: the logits of the two differ")
        # the packed layout pads to 64 features, and norms are everybody's
        if max(first["bytes"], second["bytes"]) > 0.7 * alone["bytes"]:
            wrong.append(f"{name}: {first['bytes']} and {second['bytes']} bytes, {alone['bytes']} alone")
    assert not wrong, "\n".join(wrong)
    errors = [found["failures"] for found in both]
    assert errors[1]["one"] == "OSError: the disk is gone"
    assert errors[0]["one"] == "ElsewhereError: process 1 of 2 failed: OSError: the disk is gone"
    expected = (
        "ValueError: load: mesh: expected a number of processes that divides the 1 heads of keys and values, got 2"
    )
    assert errors[0]["heads"] == errors[1]["heads"] == expected
    sums = {name: both[1][name]["sums"] for name in cases}
    assert sums["llama g32"] == 2 * 2 and sums["llama g32 act-order"] == 2  # layers; attention and MLP, or MLP alone
    assert sums["gpt_neox g32"] == 3 and sums["llama int4"] == 0  # both at once; neither
    (code, out, said), silent = (found["refused"] for found in both)
    assert (code, out) == (2, "") and silent == (2, "", ""), (said, silent)
    assert len(said.splitlines()) == 1 and "max_new_tokens: expected at most" in said
    at = "model.layers.0."
    layers = {name: found["layers"] for name, found in both[1].items() if name in cases}
    assert layers["llama g32"][f"{at}self_attn.o_proj.linear"] == (64, 128, 32)
    assert layers["llama g32 act-order"][f"{at}self_attn.o_proj.linear"] == (128, 64, 32)  # its outputs are divided
    assert layers["llama g128 act-order"][f"{at}mlp.down_proj.linear"] == (96, 128, 32)  # from inside of a group on


def test_the_command(tmp_path: Path) -> None:
    arguments = ["-m", "nybble", "generate", "--max-tokens", "12", "--json", "--device", "cpu"]
    ran = launch(arguments)
    assert ran.returncode == 0, ran.stderr[-4000:]
    facts = json.loads(ran.stdout)  # of one process only
    assert facts["processes"] == 2 and facts["kernel_calls"]["w4a16_linear"] > 0
    model = nybble.load(Path(nybble.__file__).parent / "assets" / "demo", device="cpu")
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(model.config.name_or_path)(facts["prompt"])["input_ids"]
    assert facts["tokens"] == list(nybble.generate(model, prompt, max_new_tokens=12))


# ------------------------------------------------------------------------------------------- parts, without processes


class Place(Ranks):
    """A place among processes that are not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "order"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "group_size"), [(192, 128), (192, 32), (256, 128), (128, -1)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_a_weight(k: int, group_size: int, bits: int, act_order: bool, size: int) -> None:
    weight = random_weight(k, 48, group_size, act_order=act_order and group_size != -1, bits=bits)
    ordered = weight.in_order()
    assert ordered.g_idx is None
    whole = ordered.dequantize()
    order = torch.argsort(weight.group_of(), stable=True)
    assert torch.equal(whole, weight.dequantize()[order])
    parts = [ordered.inputs(*part) for part in shares(k, size)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole)
    index = torch.randperm(48)[:16]
    assert torch.equal(weight.outputs(index).dequantize(), weight.dequantize()[:, index])
    pieces = ((8, 24), (40, 48))
    assert torch.equal(weight.outputs(pieces).dequantize(), weight.dequantize()[:, indices(pieces)])


def test_a_part_that_no_groups_fit() -> None:
    weight = random_weight(96, 8, 32, act_order=False)
    with pytest.raises(
        ValueError, match=r"inputs: expected bounds at multiples of 16 within groups of 32, got \(8, 96\)"
    ):
        weight.inputs(8, 96)
    ragged = random_weight(96, 8, 32, act_order=True)
    assert ragged.g_idx is not None
    ragged.g_idx[0] = 1 - min(1, int(ragged.g_idx[0]))
    with pytest.raises(ValueError, match="g_idx: expected 32 features in group"):
        ragged.in_order()


@pytest.mark.parametrize("folder", sorted(f for f in FIXTURES.iterdir() if f.is_dir()), ids=lambda folder: folder.name)
def test_parts_of_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts put together are the whole, and of what lies in order no more is read than a part."""
    checkpoint, config = Checkpoint(folder), read_quantization(folder)
    assert config is not None
    each = 8
    names = [name.removesuffix(".qweight") for name in checkpoint.names() if name.endswith(".qweight")][:7]
    read: list[int] = []
    part = Checkpoint.part

    def counted(self: Checkpoint, name: str, *cuts: Any) -> torch.Tensor:
        tensor = part(self, name, *cuts)
        assert not any(isinstance(what, torch.Tensor) for what in cuts)
        if name.endswith(".qweight"):
            read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Checkpoint, "part", counted)
    for name in names:
        whole = load_quantized(checkpoint, config, name)
        all_words, ordered = read.pop(), whole.in_order().dequantize()
        k, n = whole.in_features, whole.out_features
        rows = [load_quantized(checkpoint, config, name, inputs=share) for share in shares(k, 4)]
        assert torch.equal(torch.cat([row.dequantize() for row in rows]), ordered)
        if whole.g_idx is None and (k // 4) % whole.group_size == 0:
            assert read == [all_words // 4] * 4
        read.clear()
        pieces = ((0, each), (n // 2, n // 2 + 2 * each))
        columns = load_quantized(checkpoint, config, name, outputs=pieces)
        assert torch.equal(columns.dequantize(), whole.dequantize()[:, indices(pieces)])
        assert read == [all_words * 3 * each // n]
        odd = torch.tensor([3, 1, n - 1, 0, 5, 9, 11, 2])
        some = load_quantized(checkpoint, config, name, outputs=odd)
        assert torch.equal(some.dequantize(), whole.dequantize()[:, odd])
        read.clear()
    why = re.compile("do not begin and end with words of 8|expected bounds at multiples of 16")
    with pytest.raises(CheckpointError, match=why):
        load_quantized(checkpoint, config, names[0], inputs=(4, 100))


def test_a_part_of_a_model_is_copied_and_not_pickled(make_model: MakeModel) -> None:
    model = wide(make_model)
    place = Place(0, 2)
    parallel.connect(model, parallel.divide(model, place), place)
    head = model.get_submodule("lm_head")
    assert isinstance(head, Vocabulary) and ranks_of(copy.deepcopy(model)) is ranks_of(model) is place
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), RowParallel)
    with pytest.raises(UnsupportedError, match="can't be pickled"):
        pickle.dumps(model)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_reads_its_part(make_model: MakeModel, tmp_path: Path, rank: int, monkeypatch: Any) -> None:
    wide(make_model).save_pretrained(tmp_path / "plain")
    gptq(tmp_path / "gptq", "llama", 32)
    (tmp_path / "flat").mkdir()
    folders = [tmp_path / "plain", tmp_path / "gptq", int4(tmp_path / "flat", "llama")]
    read: dict[str, int] = {}

    def counted(function: Any) -> Any:
        def call(self: Checkpoint, name: str, *rest: Any) -> torch.Tensor:
            tensor = function(self, name, *rest)
            read[name] = read.get(name, 0) + tensor.numel()
            return tensor

        return call

    for name in ("part", "tensor"):
        monkeypatch.setattr(Checkpoint, name, counted(getattr(Checkpoint, name)))
    for folder in folders:
        read.clear()
        load._load(folder, "cpu", None, None, Place(rank, 2))
        sizes = {name: math.prod(Checkpoint(folder).shape_dtype(name)[0]) for name in read}
        weights = [name for name in read if ".layers." in name and name.endswith(("proj.weight", "qweight", "int4"))]
        assert len(weights) == 14 and all(2 * read[name] == sizes[name] for name in weights)
        assert read["lm_head.weight"] * 2 == sizes["lm_head.weight"]


def test_cuts() -> None:
    x = torch.arange(24).reshape(4, 6)
    assert torch.equal(cut(x, 1, ((0, 2), (4, 5))), x[:, [0, 1, 4]])
    assert torch.equal(cut(x, 0, torch.tensor([3, 0])), x[[3, 0]])
    assert cut(x, 0, None) is x
    assert length(((0, 2), (4, 5)), 6) == 3 and length(None, 6) == 6 and length(torch.arange(4), 6) == 4
    assert divided(((0, 16), (24, 32)), 8) == ((0, 2), (3, 4)) and divided(((0, 12),), 8) is None
    assert shares(12, 3) == [(0, 4), (4, 8), (8, 12)]


def wide(make_model: MakeModel, **changes: Any) -> PreTrainedModel:
    return make_model("llama", **{**WIDE["llama"], **changes})


def test_what_is_divided_and_what_is_not(make_model: MakeModel) -> None:
    model = wide(make_model)
    order = torch.randperm(192) // 32
    found = parallel.divide(
        model, Place(1, 2), lambda name: (order, 32) if name.endswith("layers.1.mlp.down_proj") else None
    )
    at = "model.layers.0."
    assert found[f"{at}self_attn.q_proj"].outputs == ((64, 128),)
    assert found[f"{at}self_attn.k_proj"].outputs == ((32, 64),)
    assert found[f"{at}self_attn.o_proj"] == ("row", None, (64, 128), False)
    assert found[f"{at}mlp.up_proj"].outputs == ((96, 192),) and found[f"{at}mlp.down_proj"].inputs == (96, 192)
    ordered = found["model.layers.1.mlp.gate_proj"].outputs
    assert isinstance(ordered, torch.Tensor) and torch.equal(ordered, torch.argsort(order, stable=True)[96:])
    assert found["lm_head"] == ("vocabulary", ((48, 96),), None, True)
    gathered = parallel.divide(model, Place(0, 2), whole_rows={"model.layers.0.mlp.down_proj"})
    assert gathered["model.layers.0.mlp.down_proj"].style == "gathered"
    assert "lm_head" not in parallel.divide(wide(make_model, vocab_size=100), Place(0, 2))
    gpt2 = parallel.divide(make_model("gpt2", n_embd=128), Place(1, 2))
    assert gpt2["transformer.h.0.attn.c_attn"].outputs == ((64, 128), (192, 256), (320, 384))


@pytest.mark.parametrize(
    ("changes", "size", "text"),
    [
        ({}, 3, "divides the 4 heads, got 3"),
        ({}, 4, "divides the 2 heads of keys and values, got 4"),
        ({"intermediate_size": 200}, 2, "divides the 200 features of MLP into multiples of 8, got 2"),
        (
            {"head_dim": 6, "num_attention_heads": 4},
            2,
            "divides the 24 features of attention into multiples of 8, got 2",
        ),
        ({"head_dim": 12, "num_attention_heads": 4, "num_key_value_heads": 2}, 2, "divides the 24 features of keys"),
    ],
)
def test_models_that_cant_be_divided(make_model: MakeModel, changes: dict[str, Any], size: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parallel.divide(wide(make_model, **changes), Place(0, size))


def test_a_model_of_another_kind() -> None:
    class Other(nn.Module):
        base_model_prefix = ""

    model: Any = Other()
    model.base_model = model
    with pytest.raises(UnsupportedError, match="Other can't be divided among processes"):
        parallel.divide(model, Place(0, 2))
