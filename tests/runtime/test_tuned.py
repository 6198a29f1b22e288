"""The file of measured choices: what is kept, what is ignored, and that nothing is lost."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from nybble.runtime import tuned
from nybble.runtime.choice import Candidate
from nybble.runtime.hardware import A100, H200

PATH = tuned.path
CHOICE = Candidate("gemm", (("TILE_M", 64), ("TEAMS", 3)), 15.25, "whatever")


pytestmark = pytest.mark.usefixtures("choices")


def test_a_choice_comes_back_in_another_process() -> None:
    assert tuned.lookup(H200, "a") is None
    file = tuned.write(H200, {"a": CHOICE})
    tuned._READ.clear()
    found = tuned.lookup(H200, "a")
    assert found is not None
    assert (found.variant, found.config, found.us) == ("gemm", CHOICE.config, 15.25)
    assert "measured" in found.reason
    assert file.name == "h200.json"
    assert tuned.lookup(A100, "a") is None


def test_choices_add_up_whoever_writes() -> None:
    tuned.write(H200, {"a": CHOICE})
    tuned._READ.clear()
    tuned.read(H200)
    text = json.loads(tuned.path(H200).read_text())
    text["choices"]["of another process"] = text["choices"]["a"]
    tuned.path(H200).write_text(json.dumps(text))
    tuned.write(H200, {"b": CHOICE})
    assert set(json.loads(tuned.path(H200).read_text())["choices"]) == {"a", "b", "of another process"}


def damaged(change: Any) -> None:
    tuned.write(H200, {"a": CHOICE})
    tuned._READ.clear()
    file = tuned.path(H200)
    text = json.loads(file.read_text())
    file.write_text(change(text) or json.dumps(text))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: '{"format": 1, "gp', "can't be read"),
        (lambda text: "[]", "is damaged"),
        (lambda text: text.update(nybble="0.0.1+0"), "is of other kernels"),
        (lambda text: text.update(format=2), "is of other kernels"),
        (lambda text: text.update(gpu="NVIDIA H20"), "is of another GPU"),
        (lambda text: text.pop("choices") and None, "is damaged"),
        (lambda text: text["choices"]["a"].pop("variant") and None, "is damaged"),
        (lambda text: text["choices"]["a"].update(variant=5), "is damaged"),
        (lambda text: text["choices"]["a"].update(us="soon"), "is damaged"),
        (lambda text: text["choices"]["a"].update(config={"TILE_M": "64"}), "is damaged"),
        (lambda text: text["choices"]["a"].update(config=[1]), "is damaged"),
    ],
)
def test_a_file_that_can_not_be_used_is_ignored_with_one_warning(change: Any, said: str) -> None:
    damaged(change)
    before = tuned.path(H200).read_text()
    with pytest.warns(RuntimeWarning, match=said):
        assert tuned.lookup(H200, "a") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.lookup(H200, "a") is None
        assert tuned.path(H200).read_text() == before  # reading changes nothing
        tuned.write(H200, {"b": CHOICE})  # measuring again replaces it
    assert set(tuned.read(H200)) == {"b"}


def test_a_folder_that_can_not_be_written_leaves_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.write(H200, {"a": CHOICE})
    before = tuned.path(H200).read_text()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("nybble.runtime.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        tuned.write(H200, {"b": CHOICE})
    assert tuned.path(H200).read_text() == before
    assert [file.name for file in tuned.path(H200).parent.iterdir()] == ["h200.json"]


def test_the_file_is_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nybble.runtime.settings.CACHE_DIR", tmp_path)
    assert PATH(H200) == tmp_path / "tuned" / "h200.json"


def test_forgotten_is_gone() -> None:
    assert not tuned.forget(H200)
    tuned.write(H200, {"a": CHOICE})
    assert tuned.forget(H200)
    assert tuned.lookup(H200, "a") is None


def test_without_a_cache_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.write(H200, {"a": CHOICE})
    tuned._READ.clear()
    monkeypatch.setattr("nybble.runtime.settings.USE_CACHE", False)
    assert tuned.lookup(H200, "a") is None


def test_the_version_is_of_the_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = tuned.version()
    kernel = tmp_path / "ops" / "w4a16" / "gemm.cu"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("// another kernel")
    monkeypatch.setattr(tuned, "PACKAGE", tmp_path)
    assert tuned.version.__wrapped__() != now
    assert tuned.version.__wrapped__().startswith("0.")
