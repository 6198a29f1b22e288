from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import gguf_files
from models.conftest import WIDE
from torch import nn
from transformers import PreTrainedModel, StaticCache
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXModel

import nybble
from nybble.models import flatquant
from nybble.models.flatquant import FlatQuantLinear

MakeModel = Callable[..., PreTrainedModel]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "gptqmodel"

RESIDUALS = pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def neox(make_model: MakeModel, *, parallel: bool = True, attention: str = "sdpa") -> PreTrainedModel:
    return make_model("gpt_neox", use_parallel_residual=parallel, attn_implementation=attention)


def calls_per_forward(layers: int, *, parallel: bool) -> dict[str, int]:
    if parallel:
        return {"layernorm": 2, "add_dual_layernorm": layers - 1, "add_layernorm": 1}
    return {"layernorm": 1, "add_layernorm": 2 * layers}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@RESIDUALS
@ATTENTION
def test_logits_of_a_prompt_agree_and_the_fused_path_ran(
    make_model: MakeModel, ids: torch.Tensor, parallel: bool, attention: str
) -> None:
    model = neox(make_model, parallel=parallel, attention=attention)
    expected = model(ids).logits
    report = nybble.fuse(model)
    got = model(ids).logits
    close(got, expected)
    assert expected.std() > 0.1  # else any two would agree
    assert report.calls() == calls_per_forward(3, parallel=parallel)
    assert [name for name, _ in report.replaced] == [
        *(f"gpt_neox.layers.{i}" for i in range(3)),
        "gpt_neox.final_layer_norm",
    ]
    assert report.refused == []


@RESIDUALS
@ATTENTION
def test_left_padding(make_model: MakeModel, ids: torch.Tensor, parallel: bool, attention: str) -> None:
    model = neox(make_model, parallel=parallel, attention=attention)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    assert (expected[0] - model(ids).logits[0]).abs().max() > 1e-2  # the mask matters
    nybble.fuse(model)
    got = model(ids, attention_mask=mask, position_ids=positions).logits
    close(got[mask.bool()], expected[mask.bool()])


@RESIDUALS
@ATTENTION
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_decode_with_a_cache(
    make_model: MakeModel, ids: torch.Tensor, parallel: bool, attention: str, static: bool
) -> None:
    model = neox(make_model, parallel=parallel, attention=attention)

    def decode() -> torch.Tensor:
        cache: Any = StaticCache(config=model.config, max_cache_len=32) if static else None
        out = model(ids[:, :6], past_key_values=cache, use_cache=True)
        steps = [out.logits]
        for i in range(6, ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        return torch.cat(steps, 1)

    expected, whole = decode(), model(ids).logits
    report = nybble.fuse(model)
    got = decode()
    close(got, expected)
    close(got, whole)
    assert report.calls() == {k: 6 * v for k, v in calls_per_forward(3, parallel=parallel).items()}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(make_model: MakeModel, ids: torch.Tensor, cache: str) -> None:
    model = neox(make_model)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    kind = {"cache_implementation": "static"} if cache == "static" else {}
    arguments: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, **kind)
    expected = model.generate(ids, **arguments)  # type: ignore[operator]
    report = nybble.fuse(model)
    assert torch.equal(model.generate(ids, **arguments), expected)  # type: ignore[operator]
    assert report.calls() == {k: 8 * v for k, v in calls_per_forward(3, parallel=True).items()}


def test_inputs_embeds_and_tuple_output(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = neox(make_model)
    embeds = model.get_input_embeddings()(ids)
    expected = model(ids).logits
    report = nybble.fuse(model)
    close(model(inputs_embeds=embeds).logits, expected)
    assert report.calls() == calls_per_forward(3, parallel=True)
    close(model(ids, return_dict=False)[0], expected)
    assert isinstance(model.base_model(ids, return_dict=False), tuple)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeds)


@RESIDUALS
def test_half_precision_stays_close(make_model: MakeModel, ids: torch.Tensor, parallel: bool) -> None:
    model = neox(make_model, parallel=parallel)
    exact = model(ids).logits
    model.bfloat16()
    error = (model(ids).logits.float() - exact).abs().mean()
    report = nybble.fuse(model)
    assert (model(ids).logits.float() - exact).abs().mean() < 1.2 * error
    assert report.calls() == calls_per_forward(3, parallel=parallel)


# --------------------------------------------------------------------------------------------------- when to step aside


def test_output_hidden_states_and_attentions_come_from_the_original(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = neox(make_model, attention="eager")
    expected = model(ids, output_hidden_states=True, output_attentions=True)
    report = nybble.fuse(model)
    got = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == 4 and len(got.attentions) == 3
    both = zip(got.hidden_states + got.attentions, expected.hidden_states + expected.attentions, strict=True)
    for mine, theirs in both:
        assert torch.equal(mine, theirs)
    assert report.calls() == {}
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 4
    model.config.output_hidden_states = False
    model(ids)  # the capturing hooks that transformers left on the layers don't keep the fused path away
    assert report.calls() == calls_per_forward(3, parallel=True)


@pytest.mark.parametrize("where", ["", ".input_layernorm", ".post_attention_layernorm", ".post_attention_dropout"])
@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_on_a_layer_run(make_model: MakeModel, ids: torch.Tensor, where: str, kind: str) -> None:
    model = neox(make_model)
    expected = model(ids).logits
    report = nybble.fuse(model)
    seen: list[torch.Tensor] = []
    module = model.get_submodule(f"gpt_neox.layers.1{where}")
    if kind == "forward":
        handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out))
    else:
        handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    assert torch.equal(model(ids).logits, expected)
    assert len(seen) == 1 and report.calls() == {}
    handle.remove()
    close(model(ids).logits, expected)
    assert len(seen) == 1 and report.calls() == calls_per_forward(3, parallel=True)


def test_hooks_inside_a_layer_run_on_the_fused_path(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = neox(make_model)
    report, seen = nybble.fuse(model), []
    model.get_submodule("gpt_neox.layers.1.mlp").register_forward_hook(lambda *_: seen.append(1))
    model(ids)
    assert seen == [1] and report.calls() == calls_per_forward(3, parallel=True)


@RESIDUALS
def test_training_gives_gradients(make_model: MakeModel, ids: torch.Tensor, parallel: bool) -> None:
    model = neox(make_model, parallel=parallel)
    report = nybble.fuse(model)
    model.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    weight = model.get_submodule("gpt_neox.layers.1.input_layernorm").weight
    assert isinstance(weight, nn.Parameter) and weight.grad is not None and weight.grad.abs().sum() > 0
    assert report.calls() == {}
    with torch.no_grad():
        model(ids)
    assert report.calls() == calls_per_forward(3, parallel=parallel)
    model.requires_grad_(False).train()
    model(ids)
    assert report.calls() == calls_per_forward(3, parallel=parallel)


def test_a_gradient_to_the_input_alone(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = neox(make_model)
    report = nybble.fuse(model)
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None and report.calls() == {}


@pytest.mark.parametrize("where", ["layers.1", "layers.1.post_mlp_dropout"])
def test_dropout_turned_on_in_one_place(make_model: MakeModel, ids: torch.Tensor, where: str) -> None:
    model = make_model("gpt_neox", hidden_dropout=0.5)
    report = nybble.fuse(model)
    model.get_submodule(f"gpt_neox.{where}").train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert report.calls() == {}


def test_autocast_takes_the_original(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = neox(make_model)
    report = nybble.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert report.calls() == {}


def test_a_norm_changed_afterwards_takes_the_original(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = neox(make_model)
    report = nybble.fuse(model)
    model.gpt_neox.layers[2].input_layernorm = nn.Identity().eval()  # type: ignore[union-attr, index]
    got = model(ids).logits
    report.undo()
    assert torch.equal(got, model(ids).logits) and report.calls() == {}


# ------------------------------------------------------------------------------------------------------- what it leaves


def state(model: nn.Module) -> list[tuple[str, type, list[str]]]:
    return [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()]


KINDS = pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen2", "qwen3", "gpt2"])


@KINDS
def test_undo_restores_exactly(make_model: MakeModel, ids: torch.Tensor, kind: str) -> None:
    model = make_model(kind)
    before, names, logits = state(model), list(model.state_dict()), model(ids).logits
    report = nybble.fuse(model)
    assert state(model) != before
    assert list(model.state_dict()) == names
    model(ids)
    calls = report.calls()
    assert calls
    report.undo()
    assert state(model) == before
    assert torch.equal(model(ids).logits, logits)
    assert report.calls() == calls
    report.undo()
    assert state(model) == before


@KINDS
def test_another_model_of_the_class_is_untouched(make_model: MakeModel, ids: torch.Tensor, kind: str) -> None:
    model, other = make_model(kind), make_model(kind)
    before = state(other)
    report = nybble.fuse(model)
    other(ids)
    assert state(other) == before and report.calls() == {}
    assert state(make_model(kind)) == before


@KINDS
def test_deepcopy_is_fused_and_independent(make_model: MakeModel, ids: torch.Tensor, kind: str) -> None:
    model = make_model(kind)
    expected = model(ids).logits
    report = nybble.fuse(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a twin bound to the original would see it
    close(twin(ids).logits, expected)
    assert report.calls() == {}
    report.undo()
    second = nybble.fuse(twin)
    assert second.already_fused and second.calls()
    second.undo()
    assert state(twin) == state(make_model(kind))


@KINDS
def test_pickle(make_model: MakeModel, ids: torch.Tensor, kind: str) -> None:
    model = make_model(kind)
    expected = model(ids).logits
    nybble.fuse(model)
    close(pickle.loads(pickle.dumps(model))(ids).logits, expected)


@KINDS
def test_fusing_twice_changes_nothing(make_model: MakeModel, ids: torch.Tensor, kind: str) -> None:
    model = make_model(kind)
    first = nybble.fuse(model)
    after = state(model)
    second = nybble.fuse(model)
    assert state(model) == after
    assert second.already_fused and not first.already_fused
    assert second.replaced == [] and "already fused" in str(second)
    model(ids)
    assert second.calls() == first.calls() != {}


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_compiles_once_without_a_graph_break(make_model: MakeModel, ids: torch.Tensor, kind: str) -> None:
    model = make_model(kind)
    expected = model(ids).logits
    report = nybble.fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(ids, use_cache=False).logits, expected)
        model(ids)  # the count of calls moves on, and must not be part of the compiled graph
        calls = report.calls()
        with torch.compiler.set_stance("fail_on_recompile"):
            close(compiled(ids, use_cache=False).logits, expected)
    assert report.calls() == calls


def test_compiled_decode_with_a_static_cache(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = neox(make_model)
    expected = model(ids).logits
    nybble.fuse(model)
    cache: Any = StaticCache(config=model.config, max_cache_len=32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        steps = [model(ids[:, :6], past_key_values=cache, use_cache=True).logits]
        for i in range(6, ids.shape[1]):
            position = torch.full((2, 1), i)
            out = compiled(ids[:, i : i + 1], position_ids=position, past_key_values=cache, use_cache=True)
            steps.append(out.logits)
    close(torch.cat(steps, 1), expected)


def test_a_quantised_model_compiles_once_without_a_graph_break() -> None:
    model = nybble.load(FIXTURES / "llama_v2_asym_actorder_g32", device="cpu")
    ids = torch.arange(20).reshape(2, 10)
    expected = copy.deepcopy(model)(ids).logits
    nybble.fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(ids, use_cache=False).logits, expected)
        close(model(ids).logits, expected)  # now every layer holds a packed weight, which must not matter
        with torch.compiler.set_stance("fail_on_recompile"):
            close(compiled(ids, use_cache=False).logits, expected)


def test_a_quantised_checkpoint() -> None:
    model = nybble.load(FIXTURES / "neox_v1_sym_g32", device="cpu")
    ids = torch.arange(20).reshape(2, 10)
    expected = model(ids).logits
    report = nybble.fuse(model)
    close(model(ids).logits, expected)
    assert report.calls() == calls_of("gpt_neox", model.config.num_hidden_layers, packed=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("without_points", ["k_proj", "up_proj"])
def test_zero_points_that_some_layers_leave_out(
    make_packed: MakeModel, ids: torch.Tensor, bits: int, without_points: str
) -> None:
    model = make_packed("llama", {"zeros": without_points, "bits": bits})
    assert model.get_submodule(f"model.layers.0.{AT[without_points]}").qzeros is None
    expected = model(ids).logits
    report = nybble.fuse(model)
    close(model(ids).logits, expected)
    assert report.calls() == calls_of("llama", 2, packed=True) and report.refused == []


def test_layers_of_4_and_8_bits_are_not_joined(make_packed: MakeModel, ids: torch.Tensor) -> None:
    model, other = make_packed("llama"), make_packed("llama", {"bits": 8})
    model.set_submodule("model.layers.0.mlp.up_proj", other.get_submodule("model.layers.0.mlp.up_proj"))
    expected = model(ids).logits
    report = nybble.fuse(model)
    assert report.refused == [("model.layers.0.mlp.{gate_proj,up_proj}", "not one product: they differ in their bits")]
    close(model(ids).logits, expected)


AT = {"k_proj": "self_attn.k_proj", "up_proj": "mlp.up_proj"}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_gguf_file(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, kind: str) -> None:
    gguf_files.write(tmp_path / "m.gguf", make_model(kind, **WIDE[kind]))
    model = nybble.load(tmp_path / "m.gguf", device="cpu")
    expected = model(ids).logits
    report = nybble.fuse(model)
    close(model(ids).logits, expected)
    assert report.calls() == calls_of(kind, 2, packed=True) and report.refused == []


def int4(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with int4 weights and activations."""
    model.save_pretrained(folder / "plain")
    tensors, quantization = flatquant.convert(nybble.load(folder / "plain", device="cpu"), dtype=torch.float32)
    flatquant.write(folder / "plain", folder / "packed", tensors, quantization, torch.float32)
    return nybble.load(folder / "packed", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt_neox", "gpt2"])
def test_int4_activations(
    make_model: MakeModel, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = int4(make_model(kind, **WIDE[kind]), tmp_path)
    plain = model(ids).logits
    apart = nybble.fuse(model, without=("qkv", "gate_up"))
    expected, calls = model(ids).logits, apart.calls()
    apart.undo()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size, scales = bytes_of(model), [m._scales.clone() for m in model.modules() if isinstance(m, FlatQuantLinear)]
    launches = []
    quantize = flatquant.flatquant_dynamic_quantize
    monkeypatch.setattr(flatquant, "flatquant_dynamic_quantize", lambda *a: launches.append(1) or quantize(*a))
    report = nybble.fuse(model)
    got = model(ids).logits
    # The same norms, so the same integers, whose products are exact.
    assert torch.equal(got, expected)
    # An activation that lies between two integers may fall to the other side where the norm rounds otherwise.
    assert torch.corrcoef(torch.stack((got.flatten(), plain.flatten())))[0, 1] > 0.99
    layers = model.config.num_hidden_layers
    assert len(launches) == 4 * layers and report.refused == []
    if kind in ("llama", "qwen2", "qwen3"):
        assert calls["w4a4_linear"] == 7 * layers and report.calls()["w4a4_linear"] == 4 * layers
        attn = model.get_submodule("model.layers.0.self_attn")
        layers_of = [attn.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
        assert len({m.get_parameter("qweight").untyped_storage().data_ptr() for m in layers_of}) == 1
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, got)
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, plain)
    assert bytes_of(model) == size
    report.undo()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    after = [m._scales for m in model.modules() if isinstance(m, FlatQuantLinear)]
    assert all(torch.equal(a, b) for a, b in zip(after, scales, strict=True))
    assert len({t.untyped_storage().data_ptr() for t in after}) == len(after) and bytes_of(model) == size
    assert torch.equal(model(ids).logits, plain)


def test_int4_layers_that_share_no_transform_or_ratio(make_model: MakeModel, ids: torch.Tensor, tmp_path: Path) -> None:
    model = int4(make_model("llama", **WIDE["llama"]), tmp_path)
    first, second = (model.get_submodule(f"model.layers.{i}.self_attn.k_proj") for i in range(2))
    assert isinstance(first, FlatQuantLinear) and isinstance(second, FlatQuantLinear)
    own = copy.deepcopy(first.transform)
    own.users, own.ratios = 0, []
    model.set_submodule("model.layers.0.self_attn.k_proj", FlatQuantLinear(first.packed(), own))
    other = FlatQuantLinear(second.packed(), second.transform, 0.9)
    second.transform.users -= 1
    model.set_submodule("model.layers.1.self_attn.k_proj", other.eval())
    model.eval()
    expected = model(ids).logits
    report = nybble.fuse(model)
    assert [why for _, why in report.refused] == [
        "not one product: they do not share a transform",
        "not one product: they differ in their clip ratio",
    ]
    got = model(ids).logits
    assert torch.corrcoef(torch.stack((got.flatten(), expected.flatten())))[0, 1] > 0.99


# ----------------------------------------------------------------------------------------------------- all the families


def calls_of(kind: str, layers: int, *, packed: bool) -> dict[str, int]:
    """What one forward of a fused model calls."""
    rms = kind in ("llama", "qwen2", "qwen3")
    alone = "rmsnorm" if rms else "layernorm"
    heads = 2 * layers if kind == "qwen3" else 0  # the norms of queries and keys
    if kind == "gpt_neox":  # one kernel adds both results and has both norms
        return calls_per_forward(layers, parallel=True) | ({"w4a16_linear": 4 * layers} if packed else {})
    if not packed:
        return {alone: 1 + heads, f"add_{alone}": 2 * layers}
    return {"ln_qkv": layers, "w4a16_linear": 3 * layers, alone: 1 + heads}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("gpt_neox", {}),
    "neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "neox-no-bias": ("gpt_neox", {"attention_bias": False}),
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
    "gpt2-erf": ("gpt2", {"activation_function": "gelu"}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu"}),
}
EACH = pytest.mark.parametrize("variant", VARIANTS)


@EACH
@pytest.mark.parametrize("how", [None, {}, {"zeros": True}, {"act_order": True}], ids=["fp32", "w4", "zeros", "order"])
def test_logits_of_every_family(
    make_model: MakeModel, make_packed: MakeModel, ids: torch.Tensor, variant: str, how: dict[str, Any] | None
) -> None:
    kind, changes = VARIANTS[variant]
    model = make_model(kind, **changes) if how is None else make_packed(kind, how, **changes)
    cache_of = model(ids[:, :7], use_cache=True)
    expected = model(ids).logits
    expected_step = model(ids[:, 7:9], past_key_values=cache_of.past_key_values).logits
    assert expected.std() > 0.1  # else any two would agree
    report = nybble.fuse(model)
    close(model(ids).logits, expected)
    layers = model.config.num_hidden_layers
    if variant != "neox-sequential":
        assert report.calls() == calls_of(kind, layers, packed=how is not None)
    elif how is not None:
        assert report.calls() == {"w4a16_linear": 4 * layers, "layernorm": 1}
    cache_of = model(ids[:, :7], use_cache=True)
    close(model(ids[:, 7:9], past_key_values=cache_of.past_key_values).logits, expected_step)
    assert len(report.replaced) == layers + 1
    relu = [("transformer.h.0.mlp", "the activation relu stays outside of the product")]
    assert report.refused[:1] == (relu if variant == "gpt2-relu" and how is not None else [])


@pytest.mark.parametrize(
    "without", [("carry",), ("qkv",), ("gate_up",), ("prologue",), ("epilogue",), ("attention",), "all"], ids=str
)
@EACH
@pytest.mark.parametrize("packed", [False, True], ids=["fp32", "w4"])
def test_each_fusion_can_be_left_out(
    make_model: MakeModel,
    make_packed: MakeModel,
    ids: torch.Tensor,
    variant: str,
    without: tuple[str, ...] | str,
    packed: bool,
) -> None:
    kind, changes = VARIANTS[variant]
    model = (make_packed if packed else make_model)(kind, **changes)
    expected = model(ids).logits
    left_out = ("carry", "qkv", "gate_up", "prologue", "epilogue", "attention") if without == "all" else without
    report = nybble.fuse(model, without=left_out)
    close(model(ids).logits, expected)
    calls = report.calls()
    assert sum(calls.values()) > 0
    if "carry" in left_out:
        assert not any(name.startswith("add_") for name in calls)
    if "prologue" in left_out:
        assert "ln_qkv" not in calls


def test_what_cant_be_left_out(make_model: MakeModel) -> None:
    for wrong in (("norms",), "carry"):
        with pytest.raises(ValueError, match=r"fuse: without: expected some of \['carry'"):
            nybble.fuse(make_model("llama"), without=wrong)


def bytes_of(model: nn.Module) -> int:
    """Of all storages, each counted once; joined weights included."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("packed", [False, True], ids=["fp32", "w4"])
def test_joined_weights_are_held_once_and_undo_gives_each_its_own(
    make_model: MakeModel, make_packed: MakeModel, ids: torch.Tensor, packed: bool
) -> None:
    model = make_packed("qwen2", {"zeros": True}) if packed else make_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size, names = bytes_of(model), list(before)
    logits = model(ids).logits
    report = nybble.fuse(model)
    attn = model.get_submodule("model.layers.0.self_attn")
    own = [
        p for m in ("q_proj", "k_proj", "v_proj") for n, p in attn.get_submodule(m).named_parameters() if "weight" in n
    ]
    assert len({p.untyped_storage().data_ptr() for p in own}) == 1
    assert bytes_of(model) == size
    model(ids)
    assert bytes_of(model) == size and list(model.state_dict()) == names
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    report.undo()
    assert len({p.untyped_storage().data_ptr() for p in own}) == 3
    assert bytes_of(model) == size and torch.equal(model(ids).logits, logits)


def test_a_written_weight_is_seen_and_a_moved_one_is_joined_again(make_packed: MakeModel, ids: torch.Tensor) -> None:
    model = make_packed("llama")
    report = nybble.fuse(model)
    layer = model.get_submodule("model.layers.0.self_attn.k_proj")
    scales: Any = layer.scales
    scales.mul_(1.5)
    fused = model(ids).logits
    calls = report.calls()
    twin = copy.deepcopy(model)
    close(twin(ids).logits, fused)
    scales.data = scales.data.clone() * 0.5  # as `.to` does: no view of the joined weight any more
    with report.paused():
        moved = model(ids).logits
    assert (moved - fused).abs().max() > 1e-2
    close(model(ids).logits, moved)
    assert {name: n - calls[name] for name, n in report.calls().items()} == calls
    report.undo()
    close(model(ids).logits, moved)


@pytest.mark.parametrize("where", ["self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp", "mlp.down_proj"])
def test_hooks_on_what_is_not_called_take_the_original(make_packed: MakeModel, ids: torch.Tensor, where: str) -> None:
    model = make_packed("llama")
    expected = model(ids).logits
    report, seen = nybble.fuse(model), []
    handle = model.get_submodule(f"model.layers.1.{where}").register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model(ids).logits, expected) and seen == [1] and report.calls() == {}
    handle.remove()
    close(model(ids).logits, expected)
    assert report.calls()


def test_a_replaced_projection_takes_the_original(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = make_model("llama")
    report = nybble.fuse(model)
    attn: Any = model.get_submodule("model.layers.1.self_attn")
    attn.q_proj = nn.Linear(64, 64, bias=False).requires_grad_(False).eval()
    got = model(ids).logits
    assert report.calls() == {}
    report.undo()
    assert torch.equal(model(ids).logits, got)


def test_projections_that_differ_are_computed_one_by_one(make_packed: MakeModel, ids: torch.Tensor) -> None:
    model = make_packed("llama", num_key_value_heads=1)  # keys of 32 features: no whole block of the packed layout
    expected = model(ids).logits
    report = nybble.fuse(model)
    close(model(ids).logits, expected)
    reason = "not one product: the packed layout joins multiples of 64 output features"
    assert report.refused[0] == ("model.layers.0.self_attn.{q_proj,k_proj,v_proj}", reason)
    assert report.calls() == {"rmsnorm": 3, "w4a16_linear": 6}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_of_packed_models(make_packed: MakeModel, ids: torch.Tensor, kind: str, cache: str) -> None:
    model = make_packed(kind)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    how: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    how |= {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **how)  # type: ignore[operator]
    report = nybble.fuse(model)
    assert torch.equal(model.generate(ids, **how), expected)  # type: ignore[operator]
    assert report.calls()["w4a16_linear"] > 0


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_decode_of_packed_models(make_packed: MakeModel, ids: torch.Tensor, kind: str, backend: str) -> None:
    torch.compiler.reset()  # what tests before compiled counts against the limit of recompilations
    model = make_packed(kind)
    expected = model(ids).logits
    nybble.fuse(model)
    cache: Any = StaticCache(config=model.config, max_cache_len=32)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        steps = [model(ids[:, :8], past_key_values=cache, use_cache=True).logits]
        for i in range(8, ids.shape[1]):
            position = torch.full((2, 1), i)
            out = compiled(ids[:, i : i + 1], position_ids=position, past_key_values=cache, use_cache=True)
            steps.append(out.logits)
    close(torch.cat(steps, 1), expected)


def test_the_report_of_a_packed_model(make_packed: MakeModel) -> None:
    assert str(nybble.fuse(make_packed("llama"))) == (
        "replaced:\n"
        "  model.layers.0..1  q, k, v as one with its norm, attention of a step as one, output with the residual, "
        "gate and up as one with its norm with silu_mul, down with the residual\n"
        "  model.norm         rmsnorm"
    )


# ------------------------------------------------------------------------------------------------------ what it refuses


def test_an_unknown_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = state(model)
    report = nybble.fuse(model)
    assert state(model) == before
    assert report.replaced == [] and report.calls() == {}
    (name, reason), *rest = report.refused
    assert name == "" and "Sequential" in reason and "GPTNeoXModel" in reason and not rest
    report.undo()
    assert state(model) == before


def test_what_is_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"fuse: model: expected a torch\.nn\.Module, got dict"):
        nybble.fuse({})  # type: ignore[arg-type]


class OtherLayer(GPTNeoXLayer): ...


class OtherModel(GPTNeoXModel): ...


def _other_layer(model: Any) -> None:
    model.gpt_neox.layers[1].__class__ = OtherLayer


def _other_norm(model: Any) -> None:
    model.gpt_neox.layers[1].input_layernorm = nn.RMSNorm(64)


def _other_model(model: Any) -> None:
    model.gpt_neox.__class__ = OtherModel


def _other_forward(model: Any) -> None:
    model.gpt_neox.layers[1].forward = lambda *a, **k: None


def _own_forward(model: Any) -> None:
    model.gpt_neox.forward = lambda *a, **k: None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_layer, "layer 1 is a OtherLayer"),
        (_other_norm, "layers.1.input_layernorm is a RMSNorm"),
        (_other_model, "OtherModel is a subclass"),
        (_other_forward, "the forward of layer 1 was replaced"),
        (_own_forward, "the model's forward was replaced"),
    ],
)
def test_a_model_that_differs_is_refused_with_the_reason(
    make_model: MakeModel, change: Callable[[Any], None], reason: str
) -> None:
    model = neox(make_model)
    change(model)
    before = state(model)
    report = nybble.fuse(model)
    assert report.replaced == [] and state(model) == before
    assert [name for name, _ in report.refused] == ["gpt_neox"]
    assert reason in report.refused[0][1]


def test_the_report_reads_as_a_table(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = neox(make_model)
    report = nybble.fuse(model)
    model(ids)
    assert str(report) == (
        "replaced:\n"
        "  gpt_neox.layers.0          layernorm of the embedding, twice\n"
        "  gpt_neox.layers.1..2       add_dual_layernorm: both residual additions and both LayerNorms\n"
        "  gpt_neox.final_layer_norm  add_layernorm: the last residual addition and the final norm\n"
        "calls: add_dual_layernorm 2, add_layernorm 1, layernorm 2"
    )
