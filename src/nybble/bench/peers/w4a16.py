"""Peers of the 4-bit linear: the weight in 16 bits (cuBLAS; with 8 bits it alone), PyTorch's int4 matmul, GemLite, and
vLLM's Marlin and Machete.

Each gets the same quantised weight in its own layout. Where a layout can't hold the zero points or the activation
order exactly, the peer is left out with that reason rather than timed on another weight.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F

from nybble.bench.peers import Inapplicable, Peer
from nybble.bench.timing import Call
from nybble.formats.grouped import QuantizedWeight
from nybble.ops.case import Case


def _parts(inputs: Any) -> tuple[torch.Tensor, QuantizedWeight, torch.Tensor | None]:
    if inputs.norm is not None or inputs.activation or inputs.residual is not None:
        raise Inapplicable("the product and a bias only: no norm, activation or residual")
    x = inputs.x.reshape(-1, inputs.x.shape[-1])
    return x, inputs.quantized, inputs.bias


def _nibbles(weight: QuantizedWeight) -> None:
    if weight.bits != 4:
        raise Inapplicable(f"set up here for 4-bit weights, not {weight.bits}")


def _sequential(weight: QuantizedWeight) -> None:
    if weight.g_idx is not None:
        raise Inapplicable("no act-order")


def _with_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y.add_(bias)


def _dense(case: Case, inputs: Any) -> Call:
    x, weight, bias = _parts(inputs)
    return Call(F.linear, (x, weight.dequantize(x.dtype).t().contiguous(), bias))


def _int4pack(case: Case, inputs: Any) -> Call:
    x, weight, bias = _parts(inputs)
    _nibbles(weight)
    _sequential(weight)
    k, n = weight.in_features, weight.out_features
    if weight.group_size not in (32, 64, 128, 256):
        raise Inapplicable(f"groups of 32, 64, 128 or 256, not {weight.group_size}")
    tiles = next((tiles for tiles in (8, 4, 2) if k % (16 * tiles) == 0), None)
    if tiles is None or n % 16 or k % weight.group_size:
        raise Inapplicable(f"K a multiple of 32 and of the group, N of 16, not K={k}, N={n}")
    # It computes scale * (q - 8) + zero, so a true zero point z becomes (8 - z) * scale; 8 itself gives exactly 0.
    dtype = torch.bfloat16 if x.device.type == "cuda" else x.dtype
    scales = weight.scales.float()
    shift = (8.0 - weight.zeros.float()) * scales
    scales_and_zeros = torch.stack((scales, shift), dim=-1).to(dtype).contiguous()
    by_output = weight.q.t().contiguous()
    if x.device.type == "cuda":
        multiply = torch.ops.aten._weight_int4pack_mm
        packed = torch.ops.aten._convert_weight_to_int4pack(by_output[:, ::2] << 4 | by_output[:, 1::2], tiles)
    else:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(by_output.int(), tiles)
    group_size = weight.group_size
    bias = None if bias is None else bias.to(dtype)
    return Call(
        lambda x, packed, scales_and_zeros, bias: _with_bias(multiply(x, packed, group_size, scales_and_zeros), bias),
        (x.to(dtype), packed, scales_and_zeros, bias),
    )


def _gemlite(case: Case, inputs: Any) -> Call:
    from gemlite.core import DType, GemLiteLinearTriton

    x, weight, bias = _parts(inputs)
    _nibbles(weight)
    _sequential(weight)
    if x.device.type != "cuda":
        raise Inapplicable("CUDA only")
    dtype = DType.FP16 if x.dtype == torch.float16 else DType.BF16
    linear = GemLiteLinearTriton(
        4,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        input_dtype=dtype,
        output_dtype=dtype,
    )
    scales = weight.scales.to(x.dtype).t().contiguous()
    linear.pack(weight.q.t().contiguous(), scales, weight.zeros.to(x.dtype).t().contiguous(), bias=bias)
    return Call(lambda x, linear: linear(x), (x, linear))


def _scalar_types() -> Any:
    for home in ("vllm.scalar_type", "vllm.backends.compute.scalar_type"):
        try:
            return importlib.import_module(home).scalar_types
        except ImportError:
            continue
    raise Inapplicable("vllm has no scalar_types where it used to")


def _marlin(case: Case, inputs: Any) -> Call:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    from nybble.formats.gptq import pack_gptq

    x, weight, bias = _parts(inputs)
    _nibbles(weight)
    k, n = weight.in_features, weight.out_features
    per_channel = weight.group_size == k
    if not per_channel and weight.group_size not in (32, 64, 128):
        raise Inapplicable(f"groups of 32, 64, 128 or one for all of K, not {weight.group_size}")
    if n % 64 or k % 128:
        raise Inapplicable(f"K a multiple of 128 and N of 64, not K={k}, N={n}")
    symmetric, device = weight.symmetric, x.device
    if weight.g_idx is not None and not symmetric:
        raise Inapplicable("no zero points together with act-order")
    empty = torch.empty(0, dtype=torch.int32, device=device)
    order, groups = empty, empty
    if weight.g_idx is not None:
        groups, order = marlin_utils.marlin_sort_g_idx(weight.g_idx)
    packed = ops.gptq_marlin_repack(pack_gptq(weight)["qweight"], order, k, n, 4)
    scales = marlin_utils.marlin_permute_scales(
        weight.scales.to(x.dtype), k, n, -1 if per_channel else weight.group_size
    )
    zeros = empty if symmetric else marlin_utils.marlin_zero_points(weight.zeros.int(), weight.groups, n, 4)
    types = _scalar_types()
    gemm = getattr(ops, "marlin_gemm", None) or ops.gptq_marlin_gemm
    constants = {
        "c": None,
        "b_bias": None,
        "a_scales": None,
        "global_scale": None,
        "b_q_type": types.uint4b8 if symmetric else types.uint4,
        "size_m": x.shape[0],
        "size_n": n,
        "size_k": k,
        "is_k_full": True,
        "use_atomic_add": False,
        "use_fp32_reduce": True,
        "is_zp_float": False,
    }
    accepted = inspect.signature(gemm).parameters  # they differ from release to release
    constants = {name: value for name, value in constants.items() if name in accepted}
    workspace = marlin_utils.marlin_make_workspace_new(device)

    def call(tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        return _with_bias(gemm(**tensors, **constants), bias)

    tensors = {
        "a": x,
        "b_q_weight": packed,
        "b_scales": scales,
        "b_zeros": zeros,
        "g_idx": groups,
        "perm": order,
        "workspace": workspace,
    }
    return Call(call, (tensors, bias))


def _machete(case: Case, inputs: Any) -> Call:
    from vllm import _custom_ops as ops

    from nybble.formats.gptq import pack_gptq

    x, weight, bias = _parts(inputs)
    _nibbles(weight)
    _sequential(weight)
    if weight.group_size not in (64, 128, weight.in_features):
        raise Inapplicable(f"groups of 64, 128 or one for all of K, not {weight.group_size}")
    symmetric, group_size = weight.symmetric, weight.group_size
    types = _scalar_types()
    kind = types.uint4b8 if symmetric else types.uint4
    words = pack_gptq(weight)["qweight"]
    packed = ops.machete_prepack_B(words.t().contiguous().t(), a_type=x.dtype, b_type=kind, group_scales_type=x.dtype)
    scales = weight.scales.to(x.dtype).contiguous()
    # It adds the zero after the scale, so the zero point goes in scaled and negated.
    zeros = None if symmetric else (-weight.zeros.float() * weight.scales.float()).to(x.dtype).contiguous()
    return Call(
        lambda x, packed, scales, zeros, bias: _with_bias(
            ops.machete_mm(
                a=x,
                b_q=packed,
                b_type=kind,
                b_group_scales=scales,
                b_group_zeros=zeros,
                b_group_size=group_size,
            ),
            bias,
        ),
        (x, packed, scales, zeros, bias),
    )


PEERS = (
    Peer("torch", "dense", "torch", _dense),
    Peer("torch", "int4pack", "torch", _int4pack),
    Peer("gemlite", "triton", "gemlite", _gemlite),
    Peer("vllm", "marlin", "vllm", _marlin),
    Peer("vllm", "machete", "vllm", _machete),
)
