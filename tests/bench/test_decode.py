"""The decode bench on a CPU: random models of true shapes, the four cells, and what it says about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from nybble.bench import decode
from nybble.cli import app
from nybble.models.layers import W4A16Linear
from nybble.models.ranks import Ranks

SMALL: dict[str, dict[str, Any]] = {
    "llama3-8b": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    "pythia-2.8b": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4},
    "gpt2-xl": {"n_embd": 256, "n_head": 4},
}


def small(shape: str, **more: Any):
    changes = SMALL[shape] | {"vocab_size": 100}
    return decode.random_model(shape, device=torch.device("cpu"), dtype=torch.float32, layers=2, **changes, **more)


@pytest.mark.parametrize("shape", decode.SHAPES)
def test_the_four_cells_and_the_ablation(shape: str) -> None:
    model = small(shape)
    layers = [m for m in model.modules() if isinstance(m, W4A16Linear)]
    assert len(layers) == (14 if shape == "llama3-8b" else 8)
    logits = model(torch.arange(10)[None]).logits
    assert logits.isfinite().all() and 0.01 < logits.std() < 100
    found = list(decode.measure(model, batches=(1, 2), context=20, steps=4, prompts=(8,), ablation=True))
    names = [decode.name_of(r) for r in found]
    four = ["eager, unfused", "graph, unfused", "eager, fused", "graph, fused"]
    each = [f"graph, fused without {name}" for name in (*decode.FUSIONS, "all")]
    assert names == [*four, *four, *each]
    assert [r.wrong for r in found] == [""] * len(found)
    for r in found:
        assert 0 < r.tpot_ms_p50 <= r.tpot_ms_p99
        assert r.tokens_per_s == pytest.approx(1e3 * r.batch / r.tpot_ms_p50)
        assert list(r.ttft_ms) == ([8] if r.batch == 1 and not r.without else [])
        assert (r.roof_ms, r.of_roof, r.peak_bytes) == (0, 0, 0)
    assert not any("forward" in m.__dict__ for m in model.modules())  # left as it was


def test_the_bytes_of_a_token() -> None:
    model = small("llama3-8b")
    packed = sum(m.packed().nbytes for m in model.modules() if isinstance(m, W4A16Linear))
    head, norms, cache = 100 * 256 * 4, 5 * 256 * 4, 2 * 2 * 2 * 64 * 4 * 30
    assert decode.token_bytes(model, 3, 30) == packed + head + norms + 3 * cache
    tied = small("gpt2-xl")  # whose head is its embedding
    with_positions = sum(p.numel() * 4 for p in tied.parameters() if p.dtype == torch.float32)
    ints = sum(p.numel() * p.element_size() for p in tied.parameters() if p.dtype != torch.float32)
    positions = tied.get_submodule("transformer.wpe").weight.numel() * 4  # type: ignore[union-attr, operator]
    assert decode.token_bytes(tied, 1, 0) == with_positions + ints - positions


class Place(Ranks):
    """A place among processes that are not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("shape", decode.SHAPES)
def test_a_part_of_a_model(shape: str) -> None:
    whole, parts = small(shape), [small(shape, ranks=Place(rank, 2)) for rank in range(2)]
    layers = [[m for m in model.modules() if isinstance(m, W4A16Linear)] for model in (whole, *parts)]
    for one, first, second in zip(*layers, strict=True):
        assert 2 * first.in_features * first.out_features == one.in_features * one.out_features
        assert (first.in_features, first.out_features) == (second.in_features, second.out_features)
        assert not torch.equal(first.qweight, second.qweight)
        if one.bias is not None:  # the first process adds those of products that are added up
            assert first.bias is not None and (second.bias is not None) is (first.in_features == one.in_features)
    embeddings = [model.get_input_embeddings().weight for model in (whole, *parts)]  # type: ignore[union-attr]
    assert all(torch.equal(weight, embeddings[0]) for weight in embeddings)  # type: ignore[arg-type]
    heads = [model.get_output_embeddings() for model in parts]
    vocabulary = 100  # which does not divide into multiples of 8
    assert all(head.weight.shape[0] == vocabulary for head in heads)  # type: ignore[union-attr]
    bytes_of = [decode.token_bytes(model, 1, 1 << 20) for model in (whole, parts[0])]
    assert 0.5 <= bytes_of[1] / bytes_of[0] < 0.52


def test_the_true_shapes_have_the_true_sizes() -> None:
    for shape, size in (("llama3-8b", 8.03e9), ("pythia-2.8b", 2.78e9), ("gpt2-xl", 1.56e9)):
        family, settings = decode.SHAPES[shape]
        config = getattr(transformers, f"{family}Config")(**settings)
        with torch.device("meta"):
            model = getattr(transformers, decode.CLASSES[family])(config)
        assert model.num_parameters() == pytest.approx(size, rel=0.01)


def test_16_bit_layers() -> None:
    model = small("pythia-2.8b", bits=16)
    assert not any(isinstance(m, W4A16Linear) for m in model.modules())
    result = next(decode.measure(model, batches=(1,), context=8, steps=2, prompts=(), cells=("eager",)))
    assert result.wrong == ""


def test_a_cell_that_cant_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> list[float]:
        raise RuntimeError("no room")

    monkeypatch.setattr(decode, "_graph_steps", broken)
    found = list(decode.measure(small("gpt2-xl"), batches=(1,), context=8, steps=2, prompts=()))
    assert [r.wrong for r in found] == ["", "RuntimeError: no room"] * 2


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"bench decode: shape: expected one of \['llama3-8b'"):
        decode.random_model("llama", device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match="bits: expected 4 or 16, got 8"):
        small("gpt2-xl", bits=8)


def nybble(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", "decode", *map(str, arguments)], prog_name="nybble")


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(decode.SHAPES, "gpt2-xl", ("GPT2", decode.SHAPES["gpt2-xl"][1] | SMALL["gpt2-xl"]))
    sizes = ("--batch", "1,2", "--context", 8, "--tokens", 3, "--prompts", "8")
    arguments = ("--shape", "gpt2-xl", "--layers", 1, *sizes, "--device", "cpu")
    saved = nybble(*arguments, "--save", "--results", tmp_path, "--commit", "abc", "--json")
    assert saved.exit_code == 0, saved.output
    facts = json.loads(saved.stdout)
    assert len(facts["rows"]) == 8 and facts["rows"][0]["commit"] == "abc"
    lines = (tmp_path / "cpu" / "decode.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == facts["rows"]
    row = facts["rows"][0]
    assert (row["op"], row["model"], row["layers"], row["cell"], row["fused"]) == (
        "decode",
        "gpt2-xl",
        1,
        "eager",
        False,
    )
    shown = nybble(*arguments)
    assert "graph, fused" in shown.stdout and "TPOT P50" in shown.stdout


def test_mistakes_of_the_command() -> None:
    for arguments, said in (
        ((), "give --model or --shape"),
        (("--shape", "gpt3", "--device", "cpu"), "expected one of ['llama3-8b'"),
        (("--model", "x", "--layers", 2), "--layers and --bits are of a --shape"),
        (("--shape", "gpt2-xl", "--batch", "one", "--device", "cpu"), "expected numbers above 0"),
    ):
        result = nybble(*arguments)
        assert result.exit_code == 2 and said in result.stderr, result.output
