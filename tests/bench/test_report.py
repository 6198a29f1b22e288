"""Rows have exactly the agreed keys, a file of them never loses one, git says which commit."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from bench.fake_operation import FakeCase
from rich.console import Console

from nybble.bench import report
from nybble.bench.run import Measurement
from nybble.bench.timing import Timing
from nybble.runtime.hardware import H200

AT = report.Stamp("abc1234", "NVIDIA H200", "580.1", "2.13.0", "2026-01-02T03:04:05+00:00")


def measurement(provider: str = "nybble", us: float = 2.0, **changes) -> Measurement:
    given = {
        "case": FakeCase(dtype=torch.float16),
        "provider": provider,
        "variant": "cuda",
        "picked": provider == "nybble",
        "rel_err": 1.23456e-4,
        "floor_us": 1.5,
        "timing": Timing(us, us - 0.1, us + 0.1, 7.5, "graph"),
    }
    return Measurement(**{**given, **changes})


def test_the_keys_of_a_row():
    row = report.row(measurement(), AT)
    assert list(row) == list(report.KEYS)
    assert row == {
        "op": "fake",
        "function": "double",
        "shape": {"n": 8},
        "dtype": "float16",
        "provider": "nybble",
        "variant": "cuda",
        "us": 2.0,
        "us_p10": 1.9,
        "us_p90": 2.1,
        "host_us": 7.5,
        "floor_us": 1.5,
        "rel_err": 1.23e-4,
        **AT._asdict(),
    }


def test_a_row_says_what_its_case_asked_for_beyond_the_shape():
    row = report.row(measurement(case=FakeCase(twice=True)), AT)
    assert row["options"] == {"twice": True}


def test_a_row_says_which_tile_the_kernel_had():
    row = report.row(measurement(config=(("TILE_M", 16), ("STREAM_K", 1))), AT)
    assert row["config"] == {"TILE_M": 16, "STREAM_K": 1}
    assert list(row)[: len(report.KEYS)] == list(report.KEYS)


def test_a_wrong_result_has_no_row():
    with pytest.raises(ValueError, match="relative error"):
        report.row(measurement(timing=None, wrong="relative error 3"), AT)


def test_append_keeps_old_rows(tmp_path):
    path = tmp_path / "h200" / "fake.jsonl"
    assert report.append(path, [{"us": 1}]) == 0
    assert report.append(path, [{"us": 2}, {"us": 3}]) == 0
    rows, damaged = report.read_lines(path.read_text().splitlines())
    assert ([row["us"] for row in rows], damaged) == ([1, 2, 3], 0)
    assert [child.name for child in path.parent.iterdir()] == ["fake.jsonl"]


def test_append_keeps_damaged_lines_and_counts_them(tmp_path):
    path = tmp_path / "fake.jsonl"
    old = b'{"us": 1}\n{"us": \n\n[3]\n\xff\xfe\n{"us": 4}'  # the last line has lost its end
    path.write_bytes(old)
    assert report.append(path, [{"us": 5}]) == 3
    assert path.read_bytes() == old + b'\n{"us": 5}\n'


def test_an_append_that_fails_leaves_the_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "fake.jsonl"
    report.append(path, [{"us": 1}])

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("nybble.runtime.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        report.append(path, [{"us": 2}])
    assert path.read_text() == '{"us": 1}\n'
    assert [child.name for child in tmp_path.iterdir()] == ["fake.jsonl"]


def test_the_best_peer_is_the_fastest_that_is_not_nybble():
    some = [measurement(us=1.0), measurement("slow", us=9.0), measurement("fast", us=3.0)]
    some.append(measurement("wrong", timing=None, wrong="relative error 3"))
    best = report.best_peer(some)
    assert best is not None
    assert best.provider == "fast"
    assert report.best_peer(some[:1]) is None


def test_the_table_shows_time_floor_ratio_and_the_pick():
    some = [measurement(us=2.0), measurement("torch", us=3.0)]
    some.append(measurement("bad", timing=None, wrong="relative error 3, at most 0.01 is right"))
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(report.table(some))
    title, _, own, torch_row, bad = (" ".join(line.split()) for line in captured.get().splitlines())
    assert title == "double n=8 float16 (floor 1.50 us)"
    assert own == "nybble/cuda * 2.00 1.90 - 2.10 75 % 1.50x 1.2e-04 7.5"
    assert torch_row == "torch/cuda 3.00 2.90 - 3.10 50 % 1.00x 1.2e-04 7.5"
    assert bad.startswith("bad/cuda wrong")
    assert report.wrong_lines(some) == ["bad/cuda: double n=8 float16: WRONG: relative error 3, at most 0.01 is right"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_the_commit_is_that_of_the_source_and_says_when_it_is_changed(tmp_path):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    git("init", "-q")
    git("commit", "-qm", "x", "--allow-empty")
    assert report.commit_of(package) == "unknown"  # inside a repository that does not track it
    git("add", ".")
    git("commit", "-qm", "x")
    commit = git("rev-parse", "--short", "HEAD")
    assert report.commit_of(package) == commit
    (tmp_path / "results.jsonl").write_text("outside the source")
    assert report.commit_of(package) == commit
    (package / "b.py").write_text("2")
    assert report.commit_of(package) == f"{commit}+dirty"
    assert report.commit_of(tmp_path / "nowhere") == "unknown"


def test_a_stamp_on_a_cpu_and_with_a_commit_that_is_given():
    at = report.stamp(None, commit="given")
    assert (at.commit, at.gpu, at.driver, at.torch) == ("given", "cpu", None, torch.__version__)
    assert json.dumps(at._asdict())


def test_a_stamp_on_a_gpu_names_the_driver_or_says_it_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert report.stamp(H200, commit="c")[1:3] == ("NVIDIA H200", "unknown")
