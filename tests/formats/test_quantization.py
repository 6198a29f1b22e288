"""What a folder says of its quantisation: each statement that can't be read here is refused with file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from formats.folders import AWQ, GPTQ, gptq, weight, write

from nybble.formats.quantization import read_quantization
from nybble.runtime.errors import CheckpointError

SUPPORTED = "supported: gptq (format gptq, gptq_v2); awq (format gemm)"
BAD_CONFIGS = [
    ({"bits": 3}, "bits", "expected 4 or 8, got 3: only 4-bit and 8-bit weights are supported"),
    ({"bits": 2}, "bits", "expected 4 or 8, got 2: only 4-bit and 8-bit weights are supported"),
    (
        {"quant_method": "awq", "bits": 8},
        "bits",
        "expected 4, got 8: only 4-bit weights are supported with awq",
    ),
    ({"bits": None}, "bits", "missing"),
    ({"bits": 4.5}, "bits", "expected int, got 4.5"),
    ({"bits": True}, "bits", "expected int, got True"),
    ({"group_size": None}, "group_size", "missing"),
    ({"group_size": 0}, "group_size", "expected -1 or a positive number, got 0"),
    ({"sym": "yes"}, "sym", "expected bool, got 'yes'"),
    (
        {"checkpoint_format": "marlin"},
        "checkpoint_format",
        f"gptq tensor format 'marlin' is not supported; {SUPPORTED}",
    ),
    ({"format": "gptq_p"}, "checkpoint_format", f"gptq tensor format 'gptq_p' is not supported; {SUPPORTED}"),
    ({"is_marlin_format": True}, "is_marlin_format", f"tensor format 'marlin' is not supported; {SUPPORTED}"),
    ({"is_bitblas_format": True}, "is_bitblas_format", f"tensor format 'bitblas' is not supported; {SUPPORTED}"),
    ({"format": "gptq_v2", "checkpoint_format": "gptq"}, "format", "is 'gptq_v2', but checkpoint_format says 'gptq'"),
    ({"method": "awq"}, "method", "is 'awq', but quant_method says 'gptq'"),
    ({"pack_dtype": "int64"}, "pack_dtype", "expected int32 words, got int64"),
    ({"rotation": "hadamard"}, "rotation", "activations rotated by 'hadamard' are not supported"),
    ({"quant_method": None}, "quant_method", f"missing; {SUPPORTED}"),
    ({"quant_method": "marlin"}, "quant_method", f"quantisation method 'marlin' is not supported; {SUPPORTED}"),
    (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "quant_method",
        f"quantisation method 'compressed-tensors' is not supported; {SUPPORTED}",
    ),
    (
        {"quant_method": "bitsandbytes", "bits": None},
        "quant_method",
        f"quantisation method 'bitsandbytes' is not supported; {SUPPORTED}",
    ),
    ({"quant_method": "awq", "version": "gemv"}, "version", f"awq tensor format 'gemv' is not supported; {SUPPORTED}"),
    (
        {"quant_method": "awq", "version": "GEMM", "backend": "llm-awq"},
        "checkpoint_format",
        f"awq tensor format 'llm-awq' is not supported; {SUPPORTED}",
    ),
    ({"quant_method": "awq", "version": "gemv", "format": "gemm"}, "version", "is 'gemv', but the format is 'gemm'"),
    (
        {"dynamic": {"-:(": {}}},
        "dynamic['-:(']",
        "no regular expression: missing ), unterminated subpattern at position 0",
    ),
    ({"dynamic": {"x": 8}}, "dynamic['x']", "expected a JSON object, got 8"),
    ({"dynamic": {"x": {"method": "awq"}}}, "dynamic['x']", "another method or word size for some modules"),
    ({"dynamic": {"x": {"pack_dtype": "int16"}}}, "dynamic['x']", "another method or word size for some modules"),
    (
        {"dynamic": {"x": {"format": "marlin"}}},
        "dynamic['x']",
        f"gptq tensor format 'marlin' is not supported; {SUPPORTED}",
    ),
    ({"dynamic": ["x"]}, "dynamic", "expected dict, got ['x']"),
]


@pytest.mark.parametrize(("change", "key", "reason"), BAD_CONFIGS)
def test_a_configuration_is_refused_with_file_and_key(
    tmp_path: Path, change: dict[str, Any], key: str, reason: str
) -> None:
    folder = write(tmp_path, gptq(weight()), {**GPTQ, **change})
    with pytest.raises(CheckpointError) as caught:
        read_quantization(folder)
    assert str(caught.value) == f"{folder / 'config.json'}: {key}: {reason}"


def test_the_old_key_of_compressed_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"compression_config": {"format": "pack-quantized"}}))
    with pytest.raises(
        CheckpointError, match="compression_config: quantisation method 'compressed-tensors' is not supported"
    ):
        read_quantization(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("bits", 8, "is 8, but config.json says 4"),
        ("group_size", 128, "is 128, but config.json says 32"),
        ("sym", True, "is True, but config.json says False"),
        ("checkpoint_format", "gptq", "is 'gptq', but config.json says 'gptq_v2'"),
        ("dynamic", {"-:a": {}}, "is {'-:a': {}}, but config.json says {'-:b': {}}"),
    ],
)
def test_two_files_that_differ_are_refused(tmp_path: Path, key: str, value: object, reason: str) -> None:
    stated = {**GPTQ, "checkpoint_format": "gptq_v2", "dynamic": {"-:b": {}}}
    folder = write(tmp_path, gptq(weight()), stated, quantize_config={**stated, key: value})
    with pytest.raises(CheckpointError) as caught:
        read_quantization(folder)
    assert str(caught.value) == f"{folder / 'quantize_config.json'}: {key}: {reason}"


def test_two_files_may_differ_in_flags_that_the_tensors_decide(tmp_path: Path) -> None:
    stated = {**GPTQ, "static_groups": True, "lm_head": False}
    other = {**GPTQ, "desc_act": True, "static_groups": False, "lm_head": True}
    config = read_quantization(write(tmp_path, gptq(weight()), stated, quantize_config=other))
    assert config is not None and (config.desc_act, config.static_groups, config.lm_head) == (True, False, True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"quantization_config": 4}', "expected a JSON object, got int"),
    ],
)
def test_a_broken_config_file_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_quantization(tmp_path)
    assert caught.value.file == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("config", "sym"),
    [
        ({**GPTQ, "sym": False}, False),
        ({**GPTQ, "sym": None}, True),  # AutoGPTQ's own default
        ({**AWQ, "zero_point": True}, False),
        ({**AWQ, "zero_point": False}, True),
        ({**AWQ, "zero_point": None}, False),
    ],
)
def test_symmetry_as_stated_or_by_the_writers_default(tmp_path: Path, config: dict[str, Any], sym: bool) -> None:
    read = read_quantization(write(tmp_path, gptq(weight()), config))
    assert read is not None and read.sym is sym
