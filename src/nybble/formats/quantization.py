"""What a folder says of its own quantisation, in whichever of the keys and files its writer used.

========================  ==============================================================================
``config.json``           under ``quantization_config`` (transformers, GPTQModel, AutoAWQ)
``quantize_config.json``  AutoGPTQ, GPTQModel; without a method it means gptq
``quant_config.json``     AutoAWQ before it wrote ``config.json``; without a method it means awq
========================  ==============================================================================

Each may be there alone or with others. A key left out of one is taken from the other; two that differ are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from nybble.runtime.errors import CheckpointError

SUPPORTED = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
"""Method -> the tensor formats of it that are read."""

SUPPORTED_BITS = {"gptq": (4, 8), "awq": (4,)}
"""Method -> the bits of a weight that are read."""

_SUPPORTED_TEXT = "; ".join(f"{method} (format {', '.join(names)})" for method, names in SUPPORTED.items())

_SOURCES = (("config.json", ""), ("quantize_config.json", "gptq"), ("quant_config.json", "awq"))
"""File, and the method that it means where it names none."""

_SPELLINGS: dict[str, tuple[str, ...]] = {
    "method": ("quant_method", "method"),
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size"),
    "checkpoint_format": ("checkpoint_format", "format"),
    "version": ("version",),
    "sym": ("sym",),
    "zero_point": ("zero_point",),
    "desc_act": ("desc_act",),
    "static_groups": ("static_groups",),
    "lm_head": ("lm_head",),
    "dynamic": ("dynamic",),
    "modules_to_not_convert": ("modules_to_not_convert",),
    "pack_dtype": ("pack_dtype",),
    "rotation": ("rotation",),
    "is_marlin_format": ("is_marlin_format",),
    "is_bitblas_format": ("is_bitblas_format",),
}
"""The name used here -> the names that writers use."""

_TYPES: dict[str, type] = {
    **dict.fromkeys(("bits", "group_size"), int),
    **dict.fromkeys(("sym", "zero_point", "desc_act", "static_groups", "lm_head"), bool),
    **dict.fromkeys(("is_marlin_format", "is_bitblas_format"), bool),
    **dict.fromkeys(("method", "checkpoint_format", "pack_dtype"), str),
    "dynamic": dict,
    "modules_to_not_convert": list,
}

_HINTS = {"desc_act": any, "lm_head": any, "static_groups": all}
"""Flags that two files may state differently, for the tensors decide; and how the two become one, the careful way."""


class Override(NamedTuple):
    """One entry of ``dynamic``: what differs for the modules whose name ``pattern`` matches from its start.

    Attributes:
        pattern: regular expression.
        skip: the modules are not quantised.
        values: the keys that differ, under the names of :class:`QuantizationConfig`.
    """

    pattern: str
    skip: bool
    values: dict[str, Any]


@dataclass(frozen=True)
class QuantizationConfig:
    """How the quantised modules of a folder are stored.

    Attributes:
        method: ``"gptq"`` or ``"awq"``.
        bits: 4, or 8 with gptq (an override of one module may say otherwise, and is refused when that module is
            quantised and its bits are not supported).
        group_size: features per group, -1 for the whole of K.
        sym: all zero points are 8 (128 with 8 bits), says the file.
        desc_act: columns were quantised by activation order, says the file. ``g_idx`` decides.
        checkpoint_format: ``"gptq"`` (v1, also where no format is named), ``"gptq_v2"`` or ``"gemm"``.
        dynamic: per-module overrides; the first that matches counts.
        lm_head: the head is quantised, says the file. Its tensors decide.
        modules_to_not_convert: names of modules left as they were.
        source_file: where it was read, for messages.
        static_groups: groups were fixed before reordering, so that act-order leaves no trace.
    """

    method: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: str
    dynamic: tuple[Override, ...]
    lm_head: bool
    modules_to_not_convert: tuple[str, ...]
    source_file: Path
    static_groups: bool = False

    def for_module(self, name: str) -> QuantizationConfig | None:
        """The configuration of one module, overrides applied; ``None`` where it says that it isn't quantised."""
        for listed in self.modules_to_not_convert:
            # "lm_head", "mlp.gate", "model.layers.0": whole components of the name, never part of one
            if f".{listed}." in f".{name}.":
                return None
        for override in self.dynamic:
            if re.match(override.pattern, name):
                return None if override.skip else replace(self, **override.values)
        return self


def read_quantization(folder: str | Path) -> QuantizationConfig | None:
    """What the folder's files say of its quantisation, or ``None`` where none says anything.

    Raises:
        CheckpointError: a file is no JSON, two statements differ, or what is stated can't be read here: the
            method, format, bits or word size is another, a value has the wrong type, a pattern is no regular
            expression. The text names file and key.
    """
    stated: dict[str, Any] = {}
    where: dict[str, Path] = {}
    default_method, sources = "", []
    for name, default in _SOURCES:
        file = Path(folder) / name
        raw = _raw(file)
        if raw is None:
            continue
        sources.append(file)
        default_method = default_method or default
        for key, value in _stated(raw, file).items():
            if key in stated and stated[key] != value:
                if key not in _HINTS:
                    raise CheckpointError(file, key, f"is {value!r}, but {where[key].name} says {stated[key]!r}")
                value = _HINTS[key]((stated[key], value))
            stated[key] = value
            where.setdefault(key, file)
    if not sources:
        return None
    return _config(stated, where, default_method, sources[0])


def _raw(file: Path) -> Mapping[str, Any] | None:
    """The JSON object about quantisation in ``file``, or ``None``."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(file, "", f"not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(file, "", f"expected a JSON object, got {type(content).__name__}")
    if file.name != "config.json":
        return content
    if content.get("compression_config") and not content.get("quantization_config"):
        raise CheckpointError(file, "compression_config", _unsupported("quantisation method", "compressed-tensors"))
    raw = content.get("quantization_config")
    if raw is not None and not isinstance(raw, dict):
        raise CheckpointError(file, "quantization_config", f"expected a JSON object, got {type(raw).__name__}")
    return raw


def only_bits(method: str) -> str:
    """``"only 4-bit and 8-bit weights are supported"``, as the method has it."""
    named = " and ".join(f"{bits}-bit" for bits in SUPPORTED_BITS[method])
    return f"only {named} weights are supported" + (" with awq" if method == "awq" else "")


def _unsupported(what: str, name: object) -> str:
    return f"{what} {name!r} is not supported; supported: {_SUPPORTED_TEXT}"


def _stated(raw: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The keys of ``raw`` that matter here, under one name each, checked for type; null counts as left out."""
    meta = raw.get("meta")
    found: dict[str, Any] = {}
    for key, spellings in _SPELLINGS.items():
        for spelling in spellings:
            value = raw.get(spelling)
            if value is None and key == "static_groups" and isinstance(meta, dict):
                value = meta.get(spelling)
            if value is None:
                continue
            value = _typed(key, value, file, spelling)
            if key in found and found[key] != value:
                raise CheckpointError(file, spelling, f"is {value!r}, but {spellings[0]} says {found[key]!r}")
            found[key] = value
    if raw.get("backend") == "llm-awq":  # a layout of its own, whatever the format says
        found["version"] = found["checkpoint_format"] = "llm-awq"
    return found


def _typed(key: str, value: Any, file: Path, spelling: str) -> Any:
    wanted = _TYPES.get(key)
    if wanted is int and isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        value = int(value)
    if wanted is not None and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
        raise CheckpointError(file, spelling, f"expected {wanted.__name__}, got {value!r}")
    if isinstance(value, list):
        return tuple(sorted(map(str, value)))
    return value.lower() if isinstance(value, str) else value


def _config(stated: dict[str, Any], where: Mapping[str, Path], default_method: str, first: Path) -> QuantizationConfig:
    def refuse(key: str, reason: str) -> CheckpointError:
        return CheckpointError(where.get(key, first), _SPELLINGS[key][0], reason)

    method = stated.get("method", default_method)
    if not method:
        raise refuse("method", f"missing; supported: {_SUPPORTED_TEXT}")
    if method not in SUPPORTED:
        raise refuse("method", _unsupported("quantisation method", method))
    for flag in ("is_marlin_format", "is_bitblas_format"):
        if stated.get(flag):
            raise refuse(flag, _unsupported("tensor format", flag.removeprefix("is_").removesuffix("_format")))
    key = "checkpoint_format" if "checkpoint_format" in stated or method != "awq" else "version"
    # AutoGPTQ names no format and means v1; AWQ's own default is GEMM.
    checkpoint_format = stated.get(key, SUPPORTED[method][0])
    if checkpoint_format not in SUPPORTED[method]:
        raise refuse(key, _unsupported(f"{method} tensor format", checkpoint_format))
    if method == "awq" and stated.get("version", checkpoint_format) != checkpoint_format:
        raise refuse("version", f"is {stated['version']!r}, but the format is {checkpoint_format!r}")
    if str(stated.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
        raise refuse("pack_dtype", f"expected int32 words, got {stated['pack_dtype']}")
    if stated.get("rotation"):
        raise refuse("rotation", f"activations rotated by {stated['rotation']!r} are not supported")
    for key in ("bits", "group_size"):
        if key not in stated:
            raise refuse(key, "missing")
    if stated["bits"] not in SUPPORTED_BITS[method]:
        expected = " or ".join(map(str, SUPPORTED_BITS[method]))
        raise refuse("bits", f"expected {expected}, got {stated['bits']}: {only_bits(method)}")
    if stated["group_size"] != -1 and stated["group_size"] <= 0:
        raise refuse("group_size", f"expected -1 or a positive number, got {stated['group_size']}")
    return QuantizationConfig(
        method=method,
        bits=stated["bits"],
        group_size=stated["group_size"],
        sym=stated.get("sym", not stated.get("zero_point", method == "awq")),
        desc_act=stated.get("desc_act", False),
        checkpoint_format=checkpoint_format,
        dynamic=_overrides(stated.get("dynamic", {}), where.get("dynamic", first), method),
        lm_head=stated.get("lm_head", False),
        modules_to_not_convert=stated.get("modules_to_not_convert", ()),
        source_file=where.get("group_size", first),
        static_groups=stated.get("static_groups", False),
    )


def _overrides(dynamic: Mapping[str, Any], file: Path, method: str) -> tuple[Override, ...]:
    overrides = []
    for written, raw in dynamic.items():
        skip = written.startswith("-:")
        pattern = written.removeprefix("-:") if skip else written.removeprefix("+:")
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(file, f"dynamic[{written!r}]", f"no regular expression: {error}") from error
        if not skip and not isinstance(raw, dict):
            raise CheckpointError(file, f"dynamic[{written!r}]", f"expected a JSON object, got {raw!r}")
        values = {} if skip else _stated(raw, file)
        if values.get("method", method) != method or values.get("pack_dtype", "int32") != "int32":
            raise CheckpointError(file, f"dynamic[{written!r}]", "another method or word size for some modules")
        if values.get("checkpoint_format", SUPPORTED[method][0]) not in SUPPORTED[method]:
            reason = _unsupported(f"{method} tensor format", values["checkpoint_format"])
            raise CheckpointError(file, f"dynamic[{written!r}]", reason)
        kept = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "static_groups")
        overrides.append(Override(pattern, skip, {key: values[key] for key in kept if key in values}))
    return tuple(overrides)
