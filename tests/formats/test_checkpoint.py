"""Folders as writers leave them: each loads to the right weight, or is refused with file, tensor and reason."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.folders import AWQ, GPTQ, GROUP, NAME, K, N, gptq, load, named, refusal, same, weight, write, write_shards
from safetensors.torch import save_file

from nybble.formats.awq import pack_awq
from nybble.formats.checkpoint import Checkpoint, load_bias, load_quantized, preflight, read_quantization
from nybble.formats.grouped import QuantizedWeight
from nybble.runtime.errors import CheckpointError

# ---- what loads


@pytest.mark.parametrize(
    "config",
    [
        GPTQ,  # AutoGPTQ names no format: v1
        {**GPTQ, "checkpoint_format": "gptq"},
        {
            **GPTQ,
            "format": "gptq",
            "checkpoint_format": "gptq",
            "method": "gptq",
            "pack_dtype": "int32",
            "dynamic": None,
        },
        {**GPTQ, "is_marlin_format": False},
        {**GPTQ, "bits": "4", "meta": {"static_groups": False, "damp_percent": 0.05}},
        {**GPTQ, "quant_method": "GPTQ", "checkpoint_format": "GPTQ"},
    ],
)
def test_gptq_v1_under_every_spelling(tmp_path: Path, config: dict[str, Any]) -> None:
    w = weight()
    assert same(load(write(tmp_path, gptq(w), config)), w)


def test_gptq_v2(tmp_path: Path) -> None:
    w = weight(shuffled=True)
    assert same(load(write(tmp_path, gptq(w, "gptq_v2"), {**GPTQ, "checkpoint_format": "gptq_v2"})), w)


@pytest.mark.parametrize(
    "config",
    [
        AWQ,
        {"quant_method": "awq", "w_bit": 4, "q_group_size": GROUP, "version": "GEMM", "zero_point": True},
        {"quant_method": "awq", "bits": 4, "group_size": GROUP},
        {**AWQ, "format": "gemm", "checkpoint_format": "gemm", "backend": "autoawq"},
    ],
)
def test_awq_under_every_spelling(tmp_path: Path, config: dict[str, Any]) -> None:
    w = weight()
    assert same(load(write(tmp_path, named(pack_awq(w)), config)), w)


def test_awq_described_only_by_quant_config(tmp_path: Path) -> None:
    config = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
    w = weight()
    assert same(load(write(tmp_path, named(pack_awq(w)), quant_config=config)), w)


@pytest.mark.parametrize("files", ["config", "quantize_config", "both"])
def test_the_config_may_stand_in_either_file_or_both(tmp_path: Path, files: str) -> None:
    v2 = {**GPTQ, "checkpoint_format": "gptq_v2"}
    own = {key: value for key, value in v2.items() if key != "quant_method"}
    w = weight()
    extra: dict[str, Any] = {} if files == "config" else {"quantize_config": own}
    folder = write(tmp_path, gptq(w, "gptq_v2"), None if files == "quantize_config" else v2, **extra)
    assert same(load(folder), w)
    config = read_quantization(folder)
    assert config is not None
    assert config.source_file == folder / ("quantize_config.json" if files == "quantize_config" else "config.json")


def test_a_key_left_out_of_one_file_is_taken_from_the_other(tmp_path: Path) -> None:
    w = weight()
    folder = write(tmp_path, gptq(w, "gptq_v2"), GPTQ, quantize_config={"checkpoint_format": "gptq_v2"})
    assert same(load(folder), w)


def test_a_file_of_autogptq_by_its_own_name(tmp_path: Path) -> None:
    w = weight()
    config = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": False, "is_marlin_format": False}
    folder = write(tmp_path, gptq(w), file="gptq_model-4bit-128g.safetensors", quantize_config=config)
    assert same(load(folder), w)


def test_one_modules_tensors_over_several_files(tmp_path: Path) -> None:
    w = weight(shuffled=True)
    shards = {f"model-{i}.safetensors": {name: tensor} for i, (name, tensor) in enumerate(gptq(w).items())}
    assert len(shards) == 4
    folder = write_shards(tmp_path, shards, GPTQ)
    assert same(load(folder), w)
    assert Checkpoint(folder).file_of(f"{NAME}.qzeros").name == "model-1.safetensors"


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_act_order_is_what_g_idx_says_not_the_flag(tmp_path: Path, desc_act: bool, shuffled: bool) -> None:
    w = weight(shuffled=shuffled)
    assert same(load(write(tmp_path, gptq(w), {**GPTQ, "desc_act": desc_act})), w)


def test_a_file_without_g_idx(tmp_path: Path) -> None:
    w = weight()
    assert same(load(write(tmp_path, gptq(w, without=("g_idx",)), GPTQ)), w)


@pytest.mark.parametrize("static", [{"static_groups": True}, {"meta": {"static_groups": True}}])
def test_static_groups_explain_a_missing_g_idx(tmp_path: Path, static: dict[str, Any]) -> None:
    w = weight()
    assert same(load(write(tmp_path, gptq(w, without=("g_idx",)), {**GPTQ, "desc_act": True, **static})), w)


def test_act_order_without_g_idx_is_refused(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, gptq(weight(), without=("g_idx",)), {**GPTQ, "desc_act": True}))
    assert error.tensor == f"{NAME}.g_idx" and error.file.endswith("model.safetensors")
    assert error.reason == "missing, and desc_act without static_groups leaves each feature's group unknown"


@pytest.mark.parametrize("with_g_idx", [False, True])
def test_one_group_per_channel(tmp_path: Path, with_g_idx: bool) -> None:
    w = weight(group_size=K)
    tensors = gptq(w, without=() if with_g_idx else ("g_idx",))
    got = load(write(tmp_path, tensors, {**GPTQ, "group_size": -1, "desc_act": True}))
    assert same(got, w) and got.g_idx is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    w = weight()
    w = QuantizedWeight(w.q, w.zeros, w.scales.to(dtype), w.group_size)
    assert same(load(write(tmp_path, gptq(w), GPTQ)), w)


def test_a_file_mislabelled_v1_with_zeros_of_eight(tmp_path: Path) -> None:
    w = weight(symmetric=True)
    folder = write(tmp_path, gptq(w, "gptq_v2"), {**GPTQ, "sym": True})
    with pytest.warns(
        UserWarning, match=r"model\.safetensors: says checkpoint_format 'gptq' and sym, .*read as 'gptq_v2'"
    ):
        assert same(load(folder), w)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_a_symmetric_file_warns_of_nothing(tmp_path: Path, checkpoint_format: str) -> None:
    w = weight(symmetric=True)
    folder = write(tmp_path, gptq(w, checkpoint_format), {**GPTQ, "sym": True, "checkpoint_format": checkpoint_format})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load(folder), w)


# ---- which modules


def test_plain_modules_beside_quantised_ones(tmp_path: Path) -> None:
    tensors = {**gptq(weight()), "lm_head.weight": torch.zeros(N, K), "model.norm.weight": torch.ones(K)}
    folder = write(tmp_path, tensors, {**GPTQ, "modules_to_not_convert": ["lm_head"]})
    plans = preflight(Checkpoint(folder), read_quantization(folder), {NAME: (K, N), "lm_head": (K, N)})
    assert plans["lm_head"] is None
    plan = plans[NAME]
    assert plan is not None and plan.group_size == GROUP
    assert plan.tensors == {short: f"{NAME}.{short}" for short in ("qweight", "qzeros", "scales", "g_idx")}


def test_a_plain_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, {f"{NAME}.weight": torch.zeros(N, K), "x.scales": torch.ones(3)})
    assert read_quantization(folder) is None
    assert preflight(Checkpoint(folder), None, {NAME: (K, N)}) == {NAME: None}


def test_dynamic_overrides_one_module_and_skips_another(tmp_path: Path) -> None:
    other, skipped = "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"
    w, v = weight(), weight(group_size=16)
    tensors = {**gptq(w), **gptq(v, "gptq_v2", name=other), f"{skipped}.weight": torch.zeros(N, K)}
    dynamic = {
        r"-:model\.layers\.2\.": {},
        r"+:model\.layers\.1\.": {"group_size": 16, "checkpoint_format": "gptq_v2"},
        r"layers\.0": {"group_size": 64},  # matches from the start of a name, so not this one
        r"model\.layers\..*": {"sym": False},
    }
    folder = write(tmp_path, tensors, {**GPTQ, "dynamic": dynamic})
    checkpoint, config = Checkpoint(folder), read_quantization(folder)
    assert config is not None
    assert config.dynamic[0] == (r"model\.layers\.2\.", True, {})
    plans = preflight(checkpoint, config, dict.fromkeys((NAME, other, skipped), (K, N)))
    assert plans[skipped] is None
    assert same(load_quantized(checkpoint, config, NAME), w)
    assert same(load_quantized(checkpoint, config, other), v)


@pytest.mark.parametrize(
    "config",
    [{"dynamic": {r"-:.*up_proj": {}}}, {"modules_to_not_convert": ["up_proj"]}, {"modules_to_not_convert": [NAME]}],
)
def test_a_quantised_module_that_the_config_skips_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    error = refusal(write(tmp_path, gptq(weight()), {**GPTQ, **config}))
    assert (error.tensor, error.reason) == (f"{NAME}.qweight", "quantised, but config.json says that the module is not")


def test_part_of_a_name_is_not_the_module(tmp_path: Path) -> None:
    w = weight()
    assert same(load(write(tmp_path, gptq(w), {**GPTQ, "modules_to_not_convert": ["up", "proj", "layers.0.ml"]})), w)


def test_a_quantised_head_of_the_same_scheme(tmp_path: Path) -> None:
    w = weight()
    got = load(write(tmp_path, gptq(w, name="lm_head"), {**GPTQ, "lm_head": True}), name="lm_head")
    assert same(got, w)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_folder_of_8_bits(tmp_path: Path, shuffled: bool, checkpoint_format: str) -> None:
    w = weight(shuffled=shuffled, bits=8)
    config = {**GPTQ, "bits": 8, "checkpoint_format": checkpoint_format}
    assert same(load(write(tmp_path, gptq(w, checkpoint_format), config)), w)


def test_a_head_of_8_bits_beside_layers_of_4(tmp_path: Path) -> None:
    w = weight(group_size=64, bits=8)
    dynamic = {"lm_head": {"bits": 8, "group_size": 64}}
    config = {**GPTQ, "lm_head": True, "dynamic": dynamic}
    assert same(load(write(tmp_path, gptq(w, name="lm_head"), config), name="lm_head"), w)


def test_a_three_bit_head_is_refused_by_its_override(tmp_path: Path) -> None:
    tensors = {**gptq(weight(), name="lm_head"), "lm_head.qweight": torch.zeros(K * 3 // 32, N, dtype=torch.int32)}
    dynamic = {"lm_head": {"bits": 3, "group_size": 64}}
    error = refusal(write(tmp_path, tensors, {**GPTQ, "lm_head": True, "dynamic": dynamic}), name="lm_head")
    assert error.tensor == "lm_head" and error.file.endswith("config.json")
    assert error.reason == "quantised to 3 bits (dynamic): only 4-bit and 8-bit weights are supported"


@pytest.mark.parametrize(("says", "bits"), [(4, 2), (4, 3), (4, 8), (8, 2), (8, 4)])
def test_another_bit_width_is_seen_by_the_shape(tmp_path: Path, says: int, bits: int) -> None:
    tensors = {**gptq(weight(bits=says)), f"{NAME}.qweight": torch.zeros(K * bits // 32, N, dtype=torch.int32)}
    error = refusal(write(tmp_path, tensors, {**GPTQ, "bits": says}))
    assert error.tensor == f"{NAME}.qweight"
    why = "only 4-bit and 8-bit weights are supported" if bits < 4 else f"config.json says {says}"
    assert error.reason == f"its shape [{K * bits // 32}, 16] is that of {bits}-bit weights; {why}"


def test_awq_of_8_bits_is_refused_by_its_override(tmp_path: Path) -> None:
    tensors = named(pack_awq(weight()))
    error = refusal(write(tmp_path, tensors, {**AWQ, "dynamic": {NAME: {"bits": 8}}}))
    assert error.reason == "quantised to 8 bits (dynamic): only 4-bit weights are supported with awq"


def test_quantised_tensors_of_no_layer_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {**gptq(weight()), **gptq(weight(), name="visual.proj")}, GPTQ)
    error = refusal(folder)
    assert (error.tensor, error.reason) == ("visual.proj.qweight", "the model has no linear layer of this name")


def test_a_quantised_file_without_a_config_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, gptq(weight()))
    with pytest.raises(
        CheckpointError, match=r"a quantised tensor, but neither config\.json nor quantize_config\.json says"
    ):
        preflight(Checkpoint(folder), None, {NAME: (K, N)})


def test_a_config_without_quantised_modules_is_refused(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, {f"{NAME}.weight": torch.zeros(N, K)}, GPTQ))
    assert (error.tensor, error.reason) == ("quant_method", "says gptq, but the checkpoint holds no quantised module")


def test_a_layout_that_the_config_hides_is_refused(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, {**gptq(weight()), "a.weight_packed": torch.zeros(4, dtype=torch.int32)}, GPTQ))
    assert error.tensor == "a.weight_packed"
    assert error.reason == "the compressed-tensors layout is not supported; supported: GPTQ, AWQ GEMM"


# ---- tensors that are wrong


@pytest.mark.parametrize("short", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor(tmp_path: Path, short: str) -> None:
    error = refusal(write(tmp_path, gptq(weight(), without=(short,)), GPTQ))
    others = ", ".join(other for other in ("qweight", "qzeros", "scales", "g_idx") if other != short)
    assert error.file.endswith("model.safetensors")
    assert (error.tensor, error.reason) == (f"{NAME}.{short}", f"missing; the module has {others} only")


BAD_TENSORS = [
    ("qzeros", torch.zeros(2, 4, dtype=torch.int32), "expected shape [G, N/8] = [2, 2], got [2, 4]"),
    ("qweight", torch.zeros(8, 32, dtype=torch.int32), "expected shape [K/8, N] = [8, 16], got [8, 32]"),
    ("scales", torch.ones(4, 16).half(), "expected shape [G, N] = [2, 16], got [4, 16]"),
    ("g_idx", torch.zeros(32, dtype=torch.int32), "expected shape [K] = [64], got [32]"),
    ("qweight", torch.zeros(8, 16, dtype=torch.int64), "expected torch.int32, got torch.int64"),
    (
        "scales",
        torch.ones(2, 16).double(),
        "expected torch.float16 or torch.bfloat16 or torch.float32, got torch.float64",
    ),
    ("bias", torch.zeros(17), "expected shape [N] = [16], got [17]"),
]


@pytest.mark.parametrize(("short", "value", "reason"), BAD_TENSORS)
def test_a_misshapen_tensor_is_found_by_its_header(
    tmp_path: Path, short: str, value: torch.Tensor, reason: str
) -> None:
    folder = write_shards(
        tmp_path, {"a.safetensors": gptq(weight(), without=(short,)), "b.safetensors": {f"{NAME}.{short}": value}}, GPTQ
    )
    checkpoint, config = Checkpoint(folder), read_quantization(folder)
    checkpoint.tensor = lambda name: pytest.fail("read a tensor")  # type: ignore[method-assign, assignment]
    with pytest.raises(CheckpointError) as caught:
        preflight(checkpoint, config, {NAME: (K, N)})
    assert str(caught.value) == f"{folder / 'b.safetensors'}: {NAME}.{short}: {reason}"


def test_a_g_idx_out_of_range_is_refused_with_its_own_file(tmp_path: Path) -> None:
    tensors = gptq(weight())
    g_idx = tensors.pop(f"{NAME}.g_idx") + 1
    folder = write_shards(tmp_path, {"a.safetensors": tensors, "b.safetensors": {f"{NAME}.g_idx": g_idx}}, GPTQ)
    assert str(refusal(folder)) == f"{folder / 'b.safetensors'}: {NAME}.g_idx: expected groups 0..1, got 1..2"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    w = weight()
    w.scales[1, 3] = value
    error = refusal(write(tmp_path, gptq(w), GPTQ))
    assert (error.tensor, error.reason) == (f"{NAME}.scales", "holds values that are not finite")


@pytest.mark.parametrize(
    ("shape", "axis", "size"), [((60, 16), "K (in_features)", 60), ((64, 12), "N (out_features)", 12)]
)
def test_a_layer_whose_sides_fill_no_words(tmp_path: Path, shape: tuple[int, int], axis: str, size: int) -> None:
    error = refusal(write(tmp_path, gptq(weight()), GPTQ), shape=shape)
    assert (error.tensor, error.reason) == (f"{NAME}.qweight", f"expected {axis} to be a multiple of 8, got {size}")


def test_a_group_size_that_is_not_supported(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, gptq(weight()), {**GPTQ, "group_size": 48}))
    assert error.reason == "expected -1, one of (16, 32, 64, 128, 256), or K = 64, got 48"


def test_a_plain_weight_beside_the_quantised_one(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, {**gptq(weight()), f"{NAME}.weight": torch.zeros(N, K)}, GPTQ))
    assert (error.tensor, error.reason) == (f"{NAME}.weight", "there beside the same module's qweight")


def test_awq_with_a_g_idx_is_refused(tmp_path: Path) -> None:
    tensors = {**named(pack_awq(weight())), f"{NAME}.g_idx": torch.zeros(K, dtype=torch.int32)}
    error = refusal(write(tmp_path, tensors, AWQ))
    assert (error.tensor, error.reason) == (f"{NAME}.g_idx", "awq has no tensor of this name")


def test_gptq_tensors_under_an_awq_config_are_refused(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, gptq(weight(), without=("g_idx",)), AWQ))
    assert (error.tensor, error.reason) == (f"{NAME}.qweight", "expected shape [K, N/8] = [64, 2], got [8, 16]")


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    folder = write(tmp_path, gptq(weight()), GPTQ)
    config = read_quantization(folder)
    assert config is not None
    with pytest.raises(CheckpointError) as caught:
        load_quantized(Checkpoint(folder), config, "model.other")
    assert str(caught.value) == f"{folder}: model.other.qweight: missing from the checkpoint"


# ---- bias


def test_a_wanted_bias_is_read(tmp_path: Path) -> None:
    bias = torch.arange(N).half()
    checkpoint = Checkpoint(write(tmp_path, {**gptq(weight()), f"{NAME}.bias": bias}, GPTQ))
    got = load_bias(checkpoint, NAME, N, wanted=True)
    assert got is not None and torch.equal(got, bias) and got.dtype == bias.dtype


def test_a_bias_of_zeros_on_a_layer_without_one_is_dropped(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, {**gptq(weight()), f"{NAME}.bias": torch.zeros(N).half()}, GPTQ))
    assert load_bias(checkpoint, NAME, N, wanted=False) is None
    assert load_bias(checkpoint, "model.norm", N, wanted=False) is None


@pytest.mark.parametrize("value", [1e-7, float("nan")])
def test_any_other_bias_on_such_a_layer_is_refused(tmp_path: Path, value: float) -> None:
    bias = torch.zeros(N)
    bias[3] = value
    checkpoint = Checkpoint(write(tmp_path, {**gptq(weight()), f"{NAME}.bias": bias}, GPTQ))
    with pytest.raises(CheckpointError) as caught:
        load_bias(checkpoint, NAME, N, wanted=False)
    reason = "is not zero, and the model's layer has no bias: config.json describes another model"
    assert str(caught.value) == f"{tmp_path / 'model.safetensors'}: {NAME}.bias: {reason}"


def test_a_missing_or_misshapen_bias_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, {**gptq(weight()), "x.bias": torch.zeros(3)}, GPTQ))
    with pytest.raises(CheckpointError, match=f"{NAME}.bias: missing; the model's layer has a bias of 16$"):
        load_bias(checkpoint, NAME, N, wanted=True)
    with pytest.raises(CheckpointError, match=r"x.bias: expected shape \[N\] = \[16\], got \[3\]$"):
        load_bias(checkpoint, "x", N, wanted=True)


# ---- files


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -4096, -1])
def test_a_truncated_file_is_refused_before_anything_else(tmp_path: Path, kept: int) -> None:
    folder = write(tmp_path, {"x": torch.zeros(4096), **gptq(weight())}, GPTQ)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    size = len(data[:kept])
    assert str(caught.value).startswith(f"{path}: truncated or not a safetensors file ({size} bytes: ")


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, gptq(weight()), GPTQ)
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"..")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        Checkpoint(folder)


def test_a_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"a.safetensors": gptq(weight()), "b.safetensors": {"x": torch.zeros(64)}}, GPTQ)
    path = folder / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        Checkpoint(folder)
    assert caught.value.file == str(path)


def test_a_git_lfs_pointer_is_named_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    with pytest.raises(CheckpointError, match="a Git LFS pointer, not the file itself"):
        Checkpoint(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"a.safetensors": gptq(weight())}, GPTQ, {"x": "b.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    reason = "the file is missing, and model.safetensors.index.json names it"
    assert str(caught.value) == f"{folder / 'b.safetensors'}: x: {reason}"


def test_an_index_that_names_an_absent_tensor(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"a.safetensors": gptq(weight())}, GPTQ, {"x": "a.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert str(caught.value) == f"{folder / 'a.safetensors'}: x: missing, though the index names this file for it"


@pytest.mark.parametrize("file", ["../other.safetensors", "pytorch_model.bin"])
def test_an_index_that_leaves_the_folder_or_names_a_pickle(tmp_path: Path, file: str) -> None:
    folder = write_shards(tmp_path, {"a.safetensors": gptq(weight())}, GPTQ, {"x": file})
    with pytest.raises(CheckpointError, match="is no safetensors file of this folder"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 4}', '{"weight_map": {}}'])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map: (not readable|names no tensor)"):
        Checkpoint(tmp_path)


def test_the_index_decides_where_a_tensor_stands_twice(tmp_path: Path) -> None:
    shards = {"a.safetensors": {"x": torch.zeros(2), "y": torch.zeros(1)}, "b.safetensors": {"x": torch.ones(2)}}
    assert torch.equal(Checkpoint(write_shards(tmp_path, shards, GPTQ)).tensor("x"), torch.ones(2))


def test_a_tensor_that_stands_twice_and_not_in_the_index_is_refused(tmp_path: Path) -> None:
    shards = {file: {file[0]: torch.zeros(1), "x": torch.zeros(2)} for file in ("a.safetensors", "b.safetensors")}
    folder = write_shards(tmp_path, shards, GPTQ)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert str(caught.value) == f"{folder / 'b.safetensors'}: x: is also in a.safetensors"


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickle_files_are_never_opened(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert str(caught.value).startswith(
        f"{tmp_path}: weights load from safetensors only, and there are pickle files alone: {file}. Convert them"
    )


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file$"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder$"):
        Checkpoint(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"not a folder$"):
        Checkpoint(tmp_path / "file")


def test_two_files_and_no_index_are_refused(tmp_path: Path) -> None:
    for file in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"can't tell which files to read: a\.safetensors, b\.safetensors"):
        Checkpoint(tmp_path)


def test_names_shapes_and_dtypes_come_from_the_headers(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(2, 3).bfloat16(), "a": torch.tensor(4), "c": torch.zeros(0, 5, dtype=torch.uint8)}
    checkpoint = Checkpoint(write(tmp_path, tensors))
    assert checkpoint.names() == ["a", "b", "c"]
    assert [checkpoint.shape_dtype(name) for name in "abc"] == [
        ((), torch.int64),
        ((2, 3), torch.bfloat16),
        ((0, 5), torch.uint8),
    ]
    assert "a" in checkpoint and "z" not in checkpoint
    for method in (checkpoint.file_of, checkpoint.shape_dtype, checkpoint.tensor):
        with pytest.raises(CheckpointError) as caught:
            method("z")
        assert str(caught.value) == f"{tmp_path}: z: missing from the checkpoint"
