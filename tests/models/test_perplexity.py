"""Comparisons of models by their predictions, and of caches by what they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import nybble
from nybble.models.layers import W4A16Linear
from nybble.models.perplexity import compare, dequantised, perplexity, streaming

MakeModel = Callable[..., PreTrainedModel]


def text(count: int) -> torch.Tensor:
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(5))


def logits_of(model: Any) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda ids, keep: model(input_ids=ids[None], logits_to_keep=keep).logits[0]


def test_the_divergence_of_two_models(make_model: MakeModel) -> None:
    first, second = make_model("llama"), make_model("llama", rms_norm_eps=0.5)
    ids = text(40)
    found = compare({"a": logits_of(first), "b": logits_of(second)}, first, ids, window=64)
    p, q = (model(ids[None, :-1]).logits[0].double().softmax(-1) for model in (first, second))
    apart = (p * (p / q).log()).sum(-1)
    (_, same), (b, away) = found["a"], found["b"]
    assert (same.mean, same.largest, same.agree) == (0.0, 0.0, 1.0)
    assert away.mean == pytest.approx(float(apart.mean()), rel=1e-4)
    assert away.largest == pytest.approx(float(apart.max()), rel=1e-4)
    assert away.agree == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert b.ppl == pytest.approx(perplexity(second, ids, window=64).ppl, rel=1e-5)


def test_windows_are_those_of_perplexity(make_model: MakeModel) -> None:
    model, ids = make_model("gpt_neox"), text(150)
    ((mine, _),) = compare({"a": logits_of(model)}, model, ids, window=20, stride=7).values()
    assert mine.ppl == pytest.approx(perplexity(model, ids, window=20, stride=7).ppl, rel=1e-5)
    with pytest.raises(ValueError, match="compare: window: expected 1 to 64"):
        compare({}, model, ids, window=65)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("how", [{"zeros": True}, {"act_order": True}], ids=["zeros", "order"])
def test_plain_layers_of_the_same_weights(make_packed: MakeModel, kind: str, how: dict[str, Any]) -> None:
    model, ids = make_packed(kind, how), text(12)[None]
    plain = dequantised(model)
    assert not any(isinstance(m, W4A16Linear) for m in plain.modules())
    assert any(isinstance(m, W4A16Linear) for m in model.modules())
    assert sum(isinstance(m, nn.Linear) for m in plain.modules()) > 4
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def test_a_paused_model_takes_the_original(make_model: MakeModel) -> None:
    model, ids = make_model("llama"), text(12)[None]
    expected = model(ids).logits
    report = nybble.fuse(model)
    with report.paused():
        assert torch.equal(model(ids).logits, expected) and report.calls() == {}
    model(ids)
    assert report.calls()


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_kinds_of_caches(make_model: MakeModel, kind: str) -> None:
    """With one layer each kind is a fresh text of what it keeps."""
    model, ids = make_model(kind, num_hidden_layers=1), text(40)
    seen: list[tuple[str, int, int]] = []
    found = streaming(model, ids, sinks=3, window=9, progress=lambda *a: seen.append(a))
    kept = {
        "dense": lambda i: ids[:i],
        "window": lambda i: ids[max(0, i - 12) : i],
        "sinks + window": lambda i: torch.cat((ids[: min(3, i)], ids[max(3, i - 9) : i])),
        "recomputed": lambda i: ids[max(0, i - 12) : i],
    }
    assert list(found) == list(kept)
    for name, keep in kept.items():
        nll = -sum(float(model(keep(i)[None]).logits[0, -1].log_softmax(-1)[ids[i]]) for i in range(1, 40))
        assert found[name].nll == pytest.approx(nll, rel=1e-5), name
        assert (name, 39, 39) in seen
    assert "recomputed" not in streaming(model, ids, sinks=3, window=9, recompute=False)
