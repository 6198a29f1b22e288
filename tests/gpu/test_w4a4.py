"""The W4A4 kernel on a GPU against float64, over rows, features and every form it can take."""

from __future__ import annotations

import pytest
import torch
from checks import check_case, within

import nybble
from nybble.ops.flatquant.cases import FlatQuantCase
from nybble.ops.w4a4 import cost, op
from nybble.ops.w4a4.cases import W4A4Case
from nybble.runtime.choice import Candidate
from nybble.runtime.hardware import current

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _hopper() -> None:
    card = current()
    if card is None or card.capability != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("m", [0, 1, 3, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 300, 1030])
def test_every_number_of_rows(m: int, dtype: torch.dtype) -> None:
    check_case(W4A4Case(m, 256, 1024, dtype, bias=True), "cuda", variant="gemm")


@pytest.mark.parametrize("m", [1, 40, 300])
@pytest.mark.parametrize(("n", "k"), [(8, 16), (64, 64), (72, 144), (1000, 528), (520, 8272), (8200, 272)])
def test_features_off_the_tile(n: int, k: int, m: int) -> None:
    check_case(W4A4Case(m, n, k, bias=True), "cuda", variant="gemm")


@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (12288, 4096), (4096, 11008)])
def test_shapes_of_real_models(n: int, k: int, m: int) -> None:
    check_case(W4A4Case(m, n, k), "cuda")


@pytest.mark.parametrize("form", cost.FORMS, ids=str)
def test_every_form(form: cost.Form) -> None:
    """With one tile, and with more than run at once."""
    card = current()
    assert card is not None
    for case in (W4A4Case(5, 200, 656), W4A4Case(700, 4104, 1040, torch.bfloat16, bias=True)):
        found = cost.shape(case.spec(), card, form)
        if found is None:
            continue
        inputs = case.make("cuda")
        ready = op.prepare(case.spec(), Candidate("gemm", tuple(found[1].items())), 0)
        y = op.launch(ready, inputs.q_x, inputs.scale_x, inputs.weight, inputs.bias, case.dtype)
        within(case, inputs, (y,))


def test_other_inputs() -> None:
    inputs = W4A4Case(6, 128, 256).make("cuda")
    want = nybble.w4a4_linear(inputs.q_x, inputs.scale_x, inputs.weight)
    wide = torch.zeros(6, 512, device="cuda", dtype=torch.int8)
    wide[:, ::2] = inputs.q_x
    shifted = torch.zeros(6 * 256 + 1, device="cuda", dtype=torch.int8)[1:].view(6, 256).copy_(inputs.q_x)
    for q_x in (wide[:, ::2], shifted):
        assert torch.equal(nybble.w4a4_linear(q_x, inputs.scale_x, inputs.weight), want)
    got = nybble.w4a4_linear(inputs.q_x.view(2, 3, 256), inputs.scale_x.view(2, 3), inputs.weight)
    assert torch.equal(got.view(6, 128), want)
    single = nybble.w4a4_linear(inputs.q_x, inputs.scale_x, inputs.weight, dtype=torch.float32)
    torch.testing.assert_close(single.half(), want, rtol=2e-3, atol=1e-6)


def test_a_scale_that_is_nan_stays_in_its_row() -> None:
    inputs = W4A4Case(40, 128, 256).make("cuda")
    clean = nybble.w4a4_linear(inputs.q_x, inputs.scale_x, inputs.weight)
    inputs.scale_x[7] = float("nan")
    y = nybble.w4a4_linear(inputs.q_x, inputs.scale_x, inputs.weight)
    assert y[7].isnan().all()
    others = [i for i in range(40) if i != 7]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("tokens", [1, 70, 600])
def test_behind_the_quantiser(tokens: int) -> None:
    """Overlapped with the kernel that writes its activations, eagerly and in a graph."""
    flat = FlatQuantCase(tokens, 64, 64).make("cuda")
    weight = W4A4Case(1, 4096, 4096).make("cuda").weight

    def both() -> torch.Tensor:
        q_x, scale_x = nybble.flatquant_dynamic_quantize(*flat)
        return nybble.w4a4_linear(q_x, scale_x, weight)

    q_x, scale_x = nybble.flatquant_dynamic_quantize(*flat)
    torch.cuda.synchronize()
    want = nybble.w4a4_linear(q_x, scale_x, weight)
    for _ in range(4):
        assert torch.equal(both(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = both()
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, want)


def test_opcheck() -> None:
    inputs = W4A4Case(3, 72, 208, bias=True).make("cuda")
    arguments = (inputs.q_x, inputs.scale_x, *inputs.weight.tensors, inputs.bias, 208, 72, torch.float16, "auto")
    torch.library.opcheck(torch.ops.nybble.w4a4.default, arguments)
