"""The adapters: every peer that runs on a CPU computes each case; the others get their arguments as they document them.

Libraries that need a GPU stand in as stubs with the signatures of their releases, which compute in PyTorch.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nybble.bench import peers
from nybble.bench.peers import Inapplicable, flatquant, ln_qkv, norm, w4a4, w4a16
from nybble.bench.run import as_tuple, fault
from nybble.ops import OPERATIONS
from nybble.ops.flatquant.cases import FlatQuantCase
from nybble.ops.ln_qkv.cases import LnQkvCase
from nybble.ops.norm.cases import FUNCTIONS, NormCase
from nybble.ops.w4a4.cases import W4A4Case
from nybble.ops.w4a16.cases import W4A16Case

NORM = [NormCase(function, 3, 64, dtype) for function in FUNCTIONS for dtype in (torch.float32, torch.float16)]
SYMMETRIC = W4A16Case(5, 64, 256, 64, torch.float32)
W4A16 = [SYMMETRIC, replace(SYMMETRIC, symmetric=False), replace(SYMMETRIC, bias=True, group_size=128)]


def is_right(build, case) -> bool:
    inputs = case.make()
    call = build(case, inputs)
    got = case.readable(as_tuple(call.function(*call.arguments)))
    return fault(case, inputs, got, case.truth(inputs), own=False) == ""


def is_right_or_inapplicable(build, case) -> bool | None:
    try:
        return is_right(build, case)
    except Inapplicable:
        return None


@pytest.fixture
def stub(monkeypatch):
    def install(name: str, **attributes) -> None:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        for key, value in attributes.items():
            setattr(sys.modules[name], key, value)
        for end in range(1, len(parts)):
            setattr(sys.modules[".".join(parts[:end])], parts[end], sys.modules[".".join(parts[: end + 1])])

    return install


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_has_peers(op):
    assert len({(peer.name, peer.variant) for peer in peers.peers_of(op)}) == len(peers.peers_of(op)) > 0


def test_an_operation_nobody_wrote_an_adapter_for_has_none():
    assert peers.peers_of("no_such_operation") == ()


@pytest.mark.parametrize("case", NORM, ids=str)
def test_eager_torch_computes_every_norm(case):
    assert is_right(norm._eager, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_eager_torch_quantises_as_flatquant_does(packed, dtype):
    case = FlatQuantCase(9, 16, 32, dtype, packed=packed, clip=0.9)
    assert is_right(flatquant._eager, case)
    with pytest.raises(Inapplicable, match="one clip ratio"):
        is_right(flatquant._eager, replace(case, clips=2))
    with pytest.raises(Inapplicable, match="CUDA only"):
        is_right(flatquant._compiled, case)


@pytest.mark.parametrize("bias", [True, False])
def test_the_dense_product_of_int4_activations(bias):
    case = W4A4Case(20, 64, 128, torch.float16, bias=bias)
    assert is_right(w4a4._dense, case)
    with pytest.raises(Inapplicable, match="CUDA"):
        is_right(w4a4._int8, case)
    inputs = case.make()
    y = w4a4.int8(inputs.q_x, inputs.scale_x, inputs.q, inputs.scales, inputs.bias, torch.float16)
    assert fault(case, inputs, (y,), case.truth(inputs), own=False) == ""


def test_compiled_torch_is_left_to_gpus():
    with pytest.raises(Inapplicable):
        norm._compiled(NORM[0], NORM[0].make())


@pytest.mark.parametrize("case", [*W4A16, replace(SYMMETRIC, act_order=True)], ids=str)
def test_the_dense_product_computes_every_weight(case):
    assert is_right(w4a16._dense, case)


def test_of_8_bits_the_dense_product_is_the_only_peer():
    case = replace(SYMMETRIC, bits=8)
    assert is_right(w4a16._dense, case)
    with pytest.raises(Inapplicable, match="4-bit weights, not 8"):
        w4a16._int4pack(case, case.make())


@pytest.mark.parametrize("around", [{"norm": "rmsnorm"}, {"activation": "gelu"}, {"residual": True}], ids=str)
def test_a_plain_product_is_no_peer_of_more(around):
    case = replace(SYMMETRIC, **around)
    for peer in w4a16.PEERS[:2]:
        with pytest.raises(Inapplicable, match="no norm, activation or residual"):
            peer.build(case, case.make())


@pytest.mark.parametrize("peer", ln_qkv.PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("n", [192, 96])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_peer_computes_queries_keys_and_values(peer, n, norm, dtype):
    assert is_right(peer.build, LnQkvCase(3, n, 64, 32, dtype, symmetric=False, bias=True, norm=norm))


@pytest.mark.parametrize("case", W4A16, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torchs_int4_product_gets_the_same_weight(case, dtype):
    assert is_right(w4a16._int4pack, replace(case, dtype=dtype))


@pytest.mark.parametrize(
    "case", [replace(SYMMETRIC, act_order=True), replace(SYMMETRIC, group_size=16), replace(SYMMETRIC, n=72)], ids=str
)
def test_torchs_int4_product_is_left_out_where_its_layout_cannot_hold_the_weight(case):
    with pytest.raises(Inapplicable):
        w4a16._int4pack(case, case.make())


def test_liger(stub):
    def rms_norm_forward(X, W, eps, offset, casting_mode, row_mode):
        assert (offset, casting_mode) == (0.0, "llama")
        return F.rms_norm(X, X.shape[-1:], W, eps), X

    def layer_norm_forward(X, W, B, eps):
        return F.layer_norm(X, X.shape[-1:], W, B, eps), X

    def fused_add_rms_norm_forward(X, R, W, eps, offset, casting_mode):
        return F.rms_norm(X + R, X.shape[-1:], W, eps), X + R, None

    stub("liger_kernel.ops.rms_norm", rms_norm_forward=rms_norm_forward)
    stub("liger_kernel.ops.layer_norm", layer_norm_forward=layer_norm_forward)
    stub("liger_kernel.ops.fused_add_rms_norm", fused_add_rms_norm_forward=fused_add_rms_norm_forward)
    right = {case.function: is_right_or_inapplicable(norm._liger, case) for case in NORM}
    assert {name for name, value in right.items() if value} == {"rmsnorm", "layernorm", "add_rmsnorm"}
    assert False not in right.values()


def test_quack(stub):
    def rmsnorm_fwd(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6):
        h = x if residual is None else x + residual
        return F.rms_norm(h, x.shape[-1:], weight, eps), h, None

    def layernorm_fwd(x, weight, bias: Any = None, eps=1e-6):
        assert weight.dtype == bias.dtype == torch.float32
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)

    stub("quack.rmsnorm", rmsnorm_fwd=rmsnorm_fwd, layernorm_fwd=layernorm_fwd)
    right = {case.function: is_right_or_inapplicable(norm._quack, case) for case in NORM}
    assert {name for name, value in right.items() if value} == {"rmsnorm", "layernorm", "add_rmsnorm"}
    assert False not in right.values()


def test_flash_attn(stub):
    def layer_norm_fn(
        x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, prenorm=False, is_rms_norm=False
    ):
        h: Any = sum((extra for extra in (residual, x1) if extra is not None), x)
        shape = x.shape[-1:]
        y = F.rms_norm(h, shape, weight, eps) if is_rms_norm else F.layer_norm(h, shape, weight, bias, eps)
        both = (y,) if weight1 is None else (y, F.layer_norm(h, shape, weight1, bias1, eps))
        results = (*both, h) if prenorm else both
        return results if len(results) > 1 else results[0]

    stub("flash_attn.ops.triton.layer_norm", layer_norm_fn=layer_norm_fn)
    right = {case.function: is_right_or_inapplicable(norm._flash_attn, case) for case in NORM}
    assert {name for name, value in right.items() if not value} == {"layernorm_residual"}
    assert False not in right.values()


def test_gemlite_is_left_to_gpus(stub):
    stub("gemlite.core", DType=SimpleNamespace(FP16=1, BF16=2), GemLiteLinearTriton=None)
    with pytest.raises(Inapplicable):
        w4a16._gemlite(SYMMETRIC, SYMMETRIC.make())


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """GPTQ's words ``[K/8, N]`` as values ``[K, N]``."""
    shifts = torch.arange(0, 32, 4)
    return (words[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, words.shape[1])


def types():
    return SimpleNamespace(uint4b8="uint4b8", uint4="uint4")


@pytest.mark.parametrize("case", W4A16, ids=str)
def test_machete(stub, case):
    def machete_prepack_B(b_q_weight, a_type, b_type, group_scales_type):
        assert b_q_weight.stride(0) == 1  # column-major, as it wants it
        return b_q_weight

    def machete_mm(a, b_q, b_type, b_group_scales: Any = None, b_group_zeros: Any = None, b_group_size=None):
        q = nibbles(b_q).float() - (8 if b_type == "uint4b8" else 0)
        weight = q * b_group_scales.repeat_interleave(b_group_size, 0)
        if b_group_zeros is not None:
            weight = weight + b_group_zeros.repeat_interleave(b_group_size, 0)
        return a @ weight

    stub("vllm._custom_ops", machete_prepack_B=machete_prepack_B, machete_mm=machete_mm)
    stub("vllm.scalar_type", scalar_types=types())
    assert is_right(w4a16._machete, case)


def marlin_stub(stub, gemm_name: str, *, old: bool) -> None:
    def product(a, b_q_weight, b_scales, b_zeros, g_idx, perm, workspace, b_q_type, size_m, size_n, size_k):
        assert (size_m, size_n, size_k) == (*a.shape[:1], b_q_weight.shape[1], a.shape[1])
        order = perm.long() if perm.numel() else torch.arange(size_k)
        groups = g_idx.long() if g_idx.numel() else torch.arange(size_k) // (size_k // b_scales.shape[0])
        zeros = b_zeros.float()[groups] if b_zeros.numel() else 8.0
        assert b_q_type == ("uint4" if b_zeros.numel() else "uint4b8")
        return a[:, order] @ ((nibbles(b_q_weight)[order] - zeros) * b_scales[groups])

    def new_gemm(
        a, c, b_q_weight, b_bias, b_scales, a_scales, global_scale, b_zeros, g_idx, perm, workspace, b_q_type, size_m,
        size_n, size_k, is_k_full=True, use_atomic_add=False, use_fp32_reduce=False, is_zp_float=False,
    ):  # fmt: skip
        return product(
            a, b_q_weight, b_scales, b_zeros, g_idx, perm, workspace, b_q_type, size_m, size_n, size_k
        )  # fmt: skip

    def old_gemm(
        a, c, b_q_weight, b_scales, global_scale, b_zeros, g_idx, perm, workspace, b_q_type, size_m, size_n, size_k,
        is_k_full=True, use_atomic_add=False, use_fp32_reduce=False, is_zp_float=False,
    ):  # fmt: skip
        return product(
            a, b_q_weight, b_scales, b_zeros, g_idx, perm, workspace, b_q_type, size_m, size_n, size_k
        )  # fmt: skip

    def sort(g_idx):
        order = torch.argsort(g_idx).to(torch.int)
        return g_idx[order], order

    gemm = {gemm_name: old_gemm if old else new_gemm}
    stub("vllm._custom_ops", gptq_marlin_repack=lambda words, perm, size_k, size_n, num_bits: words, **gemm)
    stub("vllm.backends.compute.scalar_type", scalar_types=types())
    stub(
        "vllm.model_executor.layers.quantization.utils.marlin_utils",
        marlin_sort_g_idx=sort,
        marlin_permute_scales=lambda s, size_k, size_n, group_size: s,
        marlin_zero_points=lambda zp, size_k, size_n, num_bits: zp,
        marlin_make_workspace_new=lambda device: torch.zeros(1, dtype=torch.int32),
    )


@pytest.mark.parametrize("case", [*W4A16, replace(SYMMETRIC, act_order=True)], ids=str)
@pytest.mark.parametrize(("gemm_name", "old"), [("marlin_gemm", False), ("gptq_marlin_gemm", True)])
def test_marlin_of_two_releases(stub, case, gemm_name, old):
    marlin_stub(stub, gemm_name, old=old)
    assert is_right(w4a16._marlin, case)


@pytest.mark.parametrize(
    "case", [replace(SYMMETRIC, group_size=16), replace(SYMMETRIC, n=72), replace(SYMMETRIC, k=192)], ids=str
)
def test_marlin_is_left_out_where_it_has_no_kernel(stub, case):
    marlin_stub(stub, "marlin_gemm", old=False)
    with pytest.raises(Inapplicable):
        w4a16._marlin(case, case.make())
