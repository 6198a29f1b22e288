"""Models of int4 weights and activations: packed, loaded, compared, and refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import nybble
from nybble.formats import flatquant as folder_format
from nybble.formats.channels import ChannelWeight
from nybble.models import flatquant
from nybble.models.flatquant import FlatQuantLinear, FlatQuantTransform
from nybble.ops.flatquant.reference import unpack
from nybble.runtime.errors import CheckpointError, UnsupportedError

MakeModel = Callable[..., PreTrainedModel]
KINDS = pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen2", "qwen3", "gpt2"])


def packed(model: PreTrainedModel, tmp_path: Path, **options: Any) -> tuple[Path, Path]:
    """(plain folder, packed folder)."""
    plain, to = tmp_path / "plain", tmp_path / "packed"
    model.save_pretrained(plain)
    tensors, quantization = flatquant.convert(nybble.load(plain, device="cpu"), dtype=torch.float32, **options)
    flatquant.write(plain, to, tensors, quantization, torch.float32)
    return plain, to


class Exact(torch.nn.Module):
    """What a FlatQuantLinear computes, from the file's tensors alone and without rounding the activations."""

    def __init__(self, tensors: dict[str, torch.Tensor], name: str, transform: str) -> None:
        super().__init__()
        words = tensors[f"{name}.weight_int4"]
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        q = (words[..., None] >> shifts & 15).flatten(1)
        q = torch.where(q > 7, q - 16, q).double() * tensors[f"{name}.weight_scale"].double()[:, None]
        left, right = (tensors[f"{transform}.{short}_trans"].double() for short in ("left", "right"))
        self.weight = (torch.kron(left, right) @ q.t()).float()
        self.bias = tensors.get(f"{name}.bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


@KINDS
def test_a_packed_model_is_that_of_its_tensors(
    kind: str, make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With activations that are not rounded, the model is the one that the file's weights and transforms make up."""
    plain, to = packed(make_model(kind), tmp_path)
    model = nybble.load(to, device="cpu", dtype=torch.float32)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FlatQuantLinear)}
    stated = json.loads((to / "config.json").read_text())["quantization_config"]["modules"]
    assert set(layers) == set(stated)
    assert len(layers) == sum(1 for name, _ in flatquant._linears(nybble.load(plain, device="cpu")))
    tensors = load_file(to / "model.safetensors")
    oracle = nybble.load(plain, device="cpu", dtype=torch.float32)
    for name in layers:
        oracle.set_submodule(name, Exact(tensors, name, stated[name]["transform"]))

    def unrounded(self: FlatQuantTransform, x: torch.Tensor, clip_ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
        m, n = self.left_trans.shape[0], self.right_trans.shape[0]
        y = self.left_trans.t() @ x.reshape(-1, m, n) @ self.right_trans
        return y.reshape(x.shape), torch.ones(x.shape[:-1])

    def multiply(q: torch.Tensor, scales: torch.Tensor, weight: ChannelWeight, **rest: Any) -> torch.Tensor:
        values, by = weight.unpack()
        y = q @ (values.float() * by)
        return y if rest["bias"] is None else y + rest["bias"]

    monkeypatch.setattr(FlatQuantTransform, "quantize", unrounded)
    monkeypatch.setattr(flatquant, "w4a4_linear", multiply)
    torch.testing.assert_close(model(ids).logits, oracle(ids).logits, rtol=1e-3, atol=2e-4)


@KINDS
def test_a_packed_model_is_near_the_original(
    kind: str, make_model: MakeModel, ids: torch.Tensor, tmp_path: Path
) -> None:
    plain, to = packed(make_model(kind), tmp_path)
    want = nybble.load(plain, device="cpu", dtype=torch.float32)(ids).logits.log_softmax(-1)
    got = nybble.load(to, device="cpu", dtype=torch.float32)(ids).logits.log_softmax(-1)
    assert torch.corrcoef(torch.stack((got.flatten(), want.flatten())))[0, 1] > 0.8


def test_layers_of_the_same_input_share_one_launch(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path) -> None:
    _, to = packed(make_model("llama"), tmp_path)
    model = nybble.load(to, device="cpu", dtype=torch.float32)
    attention = model.get_submodule("model.layers.0.self_attn")
    assert attention.q_proj.transform is attention.k_proj.transform is attention.v_proj.transform
    assert attention.o_proj.transform is not attention.q_proj.transform
    launches = []
    quantize = flatquant.flatquant_dynamic_quantize

    def counted(*arguments: Any) -> Any:
        launches.append(arguments[0].shape)
        return quantize(*arguments)

    flatquant.flatquant_dynamic_quantize = counted
    try:
        with torch.no_grad():
            model(ids)
    finally:
        flatquant.flatquant_dynamic_quantize = quantize
    assert len(launches) == 2 * 4  # layers; qkv, o, gate and up, down
    assert all(m._kept is None for m in model.modules() if isinstance(m, FlatQuantTransform))


def test_sharing_notices_another_input_and_a_changed_one() -> None:
    torch.manual_seed(0)
    weights = [ChannelWeight.from_float(torch.randn(16, 32)) for _ in range(3)]
    matrices = folder_format.orthogonal(4, 0), folder_format.orthogonal(8, 1)

    def layers(shared: bool) -> list[FlatQuantLinear]:
        of = [FlatQuantTransform(*matrices) for _ in range(1 if shared else 3)] * (3 if shared else 1)
        clips = (1.0, 0.8, 1.0)
        return [FlatQuantLinear(w, t, clip) for w, t, clip in zip(weights, of, clips, strict=True)]

    together, apart = layers(True), layers(False)
    x, y = torch.randn(5, 32), torch.randn(2, 3, 32)
    order = ((0, x), (1, x), (0, y), (2, y), (2, x), (1, y), (0, x))
    for which, given in order:
        assert torch.equal(together[which](given), apart[which](given))
    together[0](x)
    x.mul_(2).add_(1)
    assert torch.equal(together[1](x), apart[1](x))
    clone = copy.deepcopy(together[2])
    assert torch.equal(clone(x), apart[2](x))


def test_the_transforms_are_orthogonal_and_spread() -> None:
    for size in (1, 2, 16, 43, 64, 80, 86, 112, 128, 224):
        matrix = folder_format.orthogonal(size, 5).double()
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size).double(), rtol=0, atol=1e-5)
        assert matrix.abs().max() <= (2 / size) ** 0.5 + 1e-6
        assert not torch.equal(matrix, folder_format.orthogonal(size, 6).double()) or size < 3


def test_weights_of_any_invertible_transform() -> None:
    torch.manual_seed(0)
    left, right = torch.eye(4) + 0.2 * torch.randn(4, 4), torch.eye(8) + 0.2 * torch.randn(8, 8)
    weight = torch.randn(16, 32)
    made = folder_format.quantize_weight(weight, left, right)
    want = weight.double() @ torch.linalg.inv(torch.kron(left.double(), right.double())).t()
    q, scale = unpack(made["weight_int4"]), made["weight_scale"].double()[:, None]
    assert ((q * scale - want).abs() <= 0.5001 * scale).all()


def test_sizes_of_a_width() -> None:
    assert flatquant.decompose(4096) == (64, 64)
    assert flatquant.decompose(1000) == (20, 50)
    assert flatquant.decompose(250) == (10, 25)
    with pytest.raises(ValueError, match="two numbers up to 256"):
        flatquant.decompose(2 * 1000003)


def test_saving_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    _, to = packed(make_model("gpt_neox"), tmp_path)
    with pytest.raises(UnsupportedError, match="save_pretrained"):
        nybble.load(to, device="cpu").save_pretrained(tmp_path / "again")


def edits() -> list[tuple[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]]:
    q = "gpt_neox.layers.0.attention.dense"

    def at(c: dict[str, Any]) -> dict[str, Any]:
        return c["quantization_config"]

    return [
        ("version", lambda c, t: at(c).update(format_version=2), "format_version: expected 1, got 2"),
        ("bits", lambda c, t: at(c).update(bits=8), "bits: expected 4, got 8"),
        ("modules", lambda c, t: at(c).update(modules={}), "modules: expected an object"),
        ("clip", lambda c, t: at(c)["modules"][q].update(clip_ratio=1.5), "expected a clip_ratio in"),
        ("transform", lambda c, t: at(c)["modules"][q].update(transform=3), "the name of a transform"),
        ("no transform", lambda c, t: t.pop(f"{q}.flatquant.left_trans"), "left_trans: missing"),
        ("no weight", lambda c, t: t.pop(f"{q}.weight_int4"), "weight_int4: missing"),
        (
            "dtype",
            lambda c, t: t.update({f"{q}.weight_scale": t[f"{q}.weight_scale"].half()}),
            "expected torch.float32",
        ),
        ("scale", lambda c, t: t[f"{q}.weight_scale"].fill_(float("nan")), "not finite"),
        ("sizes", lambda c, t: t.update({f"{q}.flatquant.left_trans": torch.eye(4)}), "sizes that multiply to"),
        ("square", lambda c, t: t.update({f"{q}.flatquant.left_trans": torch.ones(4, 5)}), "square"),
        ("bias", lambda c, t: t.pop(f"{q}.bias"), "bias: missing"),
        ("unnamed", lambda c, t: at(c)["modules"].pop(q), "does not name this module"),
        ("unknown", lambda c, t: t.update(extra=torch.ones(1)), "unexpected"),
        ("width", lambda c, t: c.update(intermediate_size=256), "from config.json"),
    ]


@pytest.mark.parametrize(("edit", "text"), [e[1:] for e in edits()], ids=[e[0] for e in edits()])
def test_folders_that_are_refused(edit: Callable[..., Any], text: str, make_model: MakeModel, tmp_path: Path) -> None:
    _, to = packed(make_model("gpt_neox"), tmp_path)
    config, tensors = json.loads((to / "config.json").read_text()), load_file(to / "model.safetensors")
    edit(config, tensors)
    (to / "config.json").write_text(json.dumps(config))
    save_file(tensors, to / "model.safetensors")
    with pytest.raises(CheckpointError, match=text):
        nybble.load(to, device="cpu")


@pytest.mark.parametrize(
    ("options", "text"),
    [({"transform": "fourier"}, "transform: expected one of"), ({"clip_ratio": 0.0}, "clip_ratio: expected a number")],
)
def test_packing_refuses(options: dict[str, Any], text: str, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        packed(make_model("llama"), tmp_path, **options)


def test_a_folder_is_written_whole_or_not_at_all(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, to = packed(make_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="where there is nothing yet"):
        flatquant.write(to, to, {}, {}, torch.float16)
    monkeypatch.setattr(flatquant, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        flatquant.write(to, tmp_path / "other", {}, {}, torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "plain"]
