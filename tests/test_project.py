"""The project files agree with each other: metadata, constraints, Makefile, CI, hooks, changelog."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nybble

ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(text("pyproject.toml"))["project"]


def requirements() -> list[Requirement]:
    extras = project().get("optional-dependencies", {}).values()
    return [Requirement(line) for line in (*project()["dependencies"], *(line for extra in extras for line in extra))]


def pins() -> dict[str, str]:
    """Name -> version of constraints.txt; anything but ``name==version``, and a name twice, is an error."""
    found: dict[str, str] = {}
    for line in text("constraints.txt").splitlines():
        if not line.partition("#")[0].strip():
            continue
        match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line.strip())
        assert match, f"constraints.txt: not an exact pin: {line}"
        name = canonicalize_name(match[1])
        assert name not in found, f"constraints.txt: {name} twice"
        found[name] = match[2]
    return found


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_every_direct_dependency_has_a_pin_inside_its_range(requirement: Requirement) -> None:
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt: no pin for {requirement.name}"
    assert requirement.specifier.contains(pin), f"{requirement.name}: {pin} is outside of {requirement.specifier}"


def targets() -> dict[str, str]:
    """make target -> its line of help."""
    return dict(re.findall(r"^([a-z][\w-]*):[^=\n]*?## (.+)$", text("Makefile"), flags=re.MULTILINE))


def test_every_make_target_has_help_and_is_phony() -> None:
    defined = re.findall(r"^([a-z][\w-]*):(?!=)", text("Makefile"), flags=re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.+)$", text("Makefile"), flags=re.MULTILINE)
    assert phony is not None
    assert sorted(set(defined)) == sorted(targets()) == sorted(phony[1].split())


def test_files_that_the_makefile_runs_exist() -> None:
    named = re.findall(r"\b((?:tests|scripts)/[\w/.-]+)", text("Makefile"))
    assert named
    assert [file for file in named if not (ROOT / file).exists()] == []


def ci_stages() -> list[str]:
    return re.findall(r"^stage ([\w-]+)$", text(".ci/run"), flags=re.MULTILINE)


def test_ci_runs_make_targets() -> None:
    assert {"test", "lint", "types", "demo"} <= set(ci_stages()) <= set(targets())


def test_hooks_run_what_ci_runs_and_fetch_nothing() -> None:
    import yaml

    config = yaml.safe_load(text(".pre-commit-config.yaml"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {hook["entry"].split()[-1] for hook in hooks} == set(ci_stages()) - {"install"}


def test_the_version_is_said_once() -> None:
    assert project()["version"] == nybble.__version__
    assert re.search(rf"^## \[{re.escape(nybble.__version__)}\]", text("CHANGELOG.md"), flags=re.MULTILINE)


def test_the_oldest_python_is_said_once() -> None:
    oldest = re.fullmatch(r">=3\.(\d+)", project()["requires-python"])
    assert oldest is not None
    assert f"sys.version_info < (3, {oldest[1]})" in text("Makefile")
    assert tomllib.loads(text("pyproject.toml"))["tool"]["pyright"]["pythonVersion"] == f"3.{oldest[1]}"
