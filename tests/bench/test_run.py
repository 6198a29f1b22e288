"""The harness: a wrong result is never timed, a peer that can't run is one line."""

from __future__ import annotations

import math

import pytest
import torch
from bench import fake_operation as fake

from nybble.bench import peers, run
from nybble.runtime.choice import Candidate, Choice
from nybble.runtime.hardware import H200

CPU = torch.device("cpu")


@pytest.fixture
def with_peers(monkeypatch):
    def install(*some: peers.Peer) -> None:
        monkeypatch.setattr(peers, "peers_of", lambda op: some if op == "fake" else ())

    return install


def bench(case: fake.FakeCase, **options):
    notes: list[str] = []
    measured = run.bench_case(case, device=CPU, rounds=3, note=notes.append, **options)
    return {(m.provider, m.variant): m for m in measured}, notes


def test_a_right_result_is_timed(with_peers):
    with_peers(fake.RIGHT)
    measured, notes = bench(fake.FakeCase())
    assert notes == []
    assert list(measured) == [("nybble", "reference"), ("right", "add")]
    for m in measured.values():
        assert not m.wrong
        assert m.rel_err < 1e-7
        assert m.timing is not None
        assert 0 < m.timing.us_p10 <= m.timing.us <= m.timing.us_p90
        assert m.timing.how == "wall"
        assert m.timing.host_us is None
    assert measured["nybble", "reference"].picked
    assert not measured["right", "add"].picked


def test_a_measurement_keeps_the_constants_of_its_kernel(with_peers, monkeypatch):
    with_peers(fake.RIGHT)
    chosen = Candidate("reference", (("TILE_M", 16),), 1.0)
    forms = Candidate("reference", (("TILE_M", 8),), 2.0), chosen, Candidate("reference", (("TILE_M", 32),), 3.0)
    monkeypatch.setattr(fake.FakeCase, "choice", lambda self, hardware, variant="auto": Choice(chosen, forms))
    measured, _ = bench(fake.FakeCase())
    assert measured["nybble", "reference"].config == (("TILE_M", 16),)
    assert measured["right", "add"].config == ()


@pytest.mark.parametrize("peer", [fake.WRONG, fake.NAN, fake.MISSHAPEN, fake.RAISES_LATER])
def test_a_peer_with_a_wrong_result_is_reported_and_not_timed(with_peers, peer):
    with_peers(peer, fake.RIGHT)
    measured, _ = bench(fake.FakeCase())
    wrong = measured[peer.name, peer.variant]
    assert wrong.timing is None
    assert wrong.wrong
    assert measured["right", "add"].timing is not None


def test_what_is_said_of_a_wrong_result(with_peers):
    with_peers(fake.WRONG, fake.MISSHAPEN, fake.RAISES_LATER)
    measured, _ = bench(fake.FakeCase())
    assert "relative error" in measured["wrong", "off"].wrong
    assert measured["wrong", "off"].rel_err > 0.1
    assert measured["misshapen", "short"].wrong == "outputs of shape [[1]], expected [[8]]"
    assert math.isnan(measured["misshapen", "short"].rel_err)
    assert measured["raises", "call"].wrong == "RuntimeError: no such kernel"


def test_nybbles_own_result_must_be_within_the_cases_tolerance_at_every_element(with_peers):
    with_peers(fake.RIGHT)
    measured, _ = bench(fake.FakeCase(off=1e-4))  # a relative error that a peer may have
    own = measured["nybble", "reference"]
    assert own.timing is None
    assert own.wrong.startswith("output 0 at (0,): ")


def test_a_nan_of_nybbles_own_is_wrong(with_peers):
    with_peers()
    measured, _ = bench(fake.FakeCase(off=float("nan")))
    own = measured["nybble", "reference"]
    assert own.timing is None
    assert own.wrong.startswith("output 0 at (0,): nan, expected ")


def test_a_missing_peer_is_one_line(with_peers):
    with_peers(fake.MISSING, fake.RAISES, fake.INAPPLICABLE, fake.RIGHT)
    measured, notes = bench(fake.FakeCase())
    assert notes == [
        "missing: not installed",
        "raises/build: RuntimeError: its interface changed",
        "picky/halves: doubles only halves",
    ]
    assert ("right", "add") in measured


def test_without_peers_only_nybble_runs(with_peers):
    with_peers(fake.RIGHT)
    measured, _ = bench(fake.FakeCase(), peers=False)
    assert list(measured) == [("nybble", "reference")]


def test_variants_on_a_gpu_are_the_kernels_and_on_a_cpu_the_reference():
    assert run.variants(fake.FakeCase(), H200) == (["cuda", "tiled"], "cuda")
    assert run.variants(fake.FakeCase(), None) == (["reference"], "reference")


def test_a_label_names_all_that_is_not_default():
    assert run.label(fake.FakeCase()) == "double n=8 float32"
    assert run.label(fake.FakeCase(twice=True, dtype=torch.float16)) == "double n=8 float16 twice=True"
    assert run.options(fake.FakeCase()) == {}
