"""Nybble: 4-bit language models on NVIDIA Hopper at the speed of memory.

``import nybble`` brings in neither CUDA, Triton nor transformers: every public name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it
_HOME = {
    "load": "nybble.models.load",
    "fuse": "nybble.models.patch",
    "Report": "nybble.models.patch",
    "generate": "nybble.models.generate",
    "StreamingCache": "nybble.models.streaming",
    "layernorm": "nybble.ops.norm.op",
    "rmsnorm": "nybble.ops.norm.op",
    "layernorm_residual": "nybble.ops.norm.op",
    "add_layernorm": "nybble.ops.norm.op",
    "add_rmsnorm": "nybble.ops.norm.op",
    "add_dual_layernorm": "nybble.ops.norm.op",
    "w4a16_linear": "nybble.ops.w4a16.op",
    "fused_ln_qkv_gptq": "nybble.ops.ln_qkv.op",
    "ln_qkv": "nybble.ops.ln_qkv.op",
    "release_packed": "nybble.ops.ln_qkv.op",
    "q4_0_linear": "nybble.ops.q4_0.op",
    "gemm_q4_0_fp16": "nybble.ops.q4_0.op",
    "gemm_q4_0_q8_1": "nybble.ops.q4_0.op",
    "quantize_q8_1": "nybble.ops.q4_0.op",
    "Norm": "nybble.ops.w4a16.op",
    "flatquant_dynamic_quantize": "nybble.ops.flatquant.op",
    "dequantize_int4": "nybble.ops.flatquant.op",
    "get_decompose_dim": "nybble.ops.flatquant.op",
    "w4a4_linear": "nybble.ops.w4a4.op",
    "decode_attention": "nybble.ops.decode_attention.op",
    "Sinks": "nybble.ops.decode_attention.op",
    "QuantizedWeight": "nybble.formats.grouped",
    "PackedWeight": "nybble.formats.tiles",
    "quantize_q4_0": "nybble.formats.gguf_q4_0",
    "unpack_q4_0": "nybble.formats.gguf_q4_0",
    "ChannelWeight": "nybble.formats.channels",
}

__all__ = [  # noqa: RUF022 - in the order of the documentation
    "load",
    "fuse",
    "Report",
    "generate",
    "StreamingCache",
    "layernorm",
    "rmsnorm",
    "layernorm_residual",
    "add_layernorm",
    "add_rmsnorm",
    "add_dual_layernorm",
    "w4a16_linear",
    "fused_ln_qkv_gptq",
    "ln_qkv",
    "release_packed",
    "q4_0_linear",
    "gemm_q4_0_fp16",
    "gemm_q4_0_q8_1",
    "quantize_q8_1",
    "Norm",
    "flatquant_dynamic_quantize",
    "dequantize_int4",
    "get_decompose_dim",
    "w4a4_linear",
    "decode_attention",
    "Sinks",
    "QuantizedWeight",
    "PackedWeight",
    "quantize_q4_0",
    "unpack_q4_0",
    "ChannelWeight",
    "__version__",
]

if TYPE_CHECKING:
    from nybble.formats.channels import ChannelWeight
    from nybble.formats.gguf_q4_0 import quantize_q4_0, unpack_q4_0
    from nybble.formats.grouped import QuantizedWeight
    from nybble.formats.tiles import PackedWeight
    from nybble.models.generate import generate
    from nybble.models.load import load
    from nybble.models.patch import Report, fuse
    from nybble.models.streaming import StreamingCache
    from nybble.ops.decode_attention.op import Sinks, decode_attention
    from nybble.ops.flatquant.op import dequantize_int4, flatquant_dynamic_quantize, get_decompose_dim
    from nybble.ops.ln_qkv.op import fused_ln_qkv_gptq, ln_qkv, release_packed
    from nybble.ops.norm.op import (
        add_dual_layernorm,
        add_layernorm,
        add_rmsnorm,
        layernorm,
        layernorm_residual,
        rmsnorm,
    )
    from nybble.ops.q4_0.op import gemm_q4_0_fp16, gemm_q4_0_q8_1, q4_0_linear, quantize_q8_1
    from nybble.ops.w4a4.op import w4a4_linear
    from nybble.ops.w4a16.op import Norm, w4a16_linear


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nybble' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
