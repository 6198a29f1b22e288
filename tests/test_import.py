"""``import nybble`` is light, and what it offers is what docs/api.md lists.

Each question about ``sys.modules`` is asked in a fresh interpreter: pytest's own has long imported everything.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nybble

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api.md"

GPU_STACK = ("cuda", "triton")
HEAVY = (*GPU_STACK, "transformers", "tokenizers", "safetensors", "matplotlib", "typer", "rich", "numpy")
OPERATIONS = [name for name, home in nybble._HOME.items() if home.startswith("nybble.ops.")]


def brought_in(code: str) -> set[str]:
    """The modules in memory once a fresh interpreter has run ``code``."""
    script = f"{code}\nimport sys, json; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "src", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def of(libraries: tuple[str, ...], modules: set[str]) -> list[str]:
    """Those of ``modules`` that belong to ``libraries``."""
    return sorted(name for name in modules if name.partition(".")[0] in libraries)


def test_import_is_silent_and_brings_in_nothing_heavy() -> None:
    modules = brought_in("import nybble")
    assert "nybble" in modules
    assert of(("torch", *HEAVY), modules) == []


def test_public_operations_bring_in_torch_and_no_model_or_gpu_library() -> None:
    """Every one named, and one called on the CPU. Module by module, because torch itself imports cuda.bindings."""
    resolve = "; ".join(f"nybble.{name}" for name in (*OPERATIONS, "QuantizedWeight", "PackedWeight"))
    call = "nybble.layernorm(torch.ones(2, 8), torch.ones(8), torch.zeros(8))"
    added = brought_in(f"import torch, nybble; {resolve}; {call}") - brought_in("import torch")
    assert "nybble" in added
    assert of(HEAVY, added) == []


def test_import_survives_a_machine_without_the_gpu_and_model_libraries() -> None:
    """As on a machine where they are not installed: ``None`` in sys.modules makes an import of the name fail."""
    blocked = ("cuda", "triton", "transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import nybble"
    assert brought_in("; ".join([code, *(f"nybble.{name}" for name in OPERATIONS)])) >= {"nybble", "torch"}


def documented() -> dict[str, str]:
    """Name -> what its row of docs/api.md shows of it, in order: ``"fuse" -> "fuse(model)"``."""
    rows = re.findall(r"^\| `(\w+)([^`]*)` \|", API.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a name is documented twice"
    return {name: name + rest for name, rest in rows}


def test_all_is_the_documented_list() -> None:
    assert nybble.__all__ == list(documented())


def test_every_lazy_name_is_public_and_known_to_type_checkers() -> None:
    assert {*nybble._HOME, "__version__"} == set(nybble.__all__)
    tree = ast.parse(Path(nybble.__file__).read_text(encoding="utf-8"))
    for_checkers = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nybble.")
        for alias in node.names
    }
    assert for_checkers == nybble._HOME


@pytest.mark.parametrize("name", nybble.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(nybble, name)
    assert name in dir(nybble)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*", value)
        return
    assert value.__name__ == name
    assert value.__module__ == nybble._HOME[name]
    # vars, not getdoc: a class without a docstring would show its parent's, a dataclass its signature.
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own
    assert not own.startswith(f"{name}(")


@pytest.mark.parametrize("name", [name for name, shown in documented().items() if "(" in shown])
def test_documented_signature_is_the_real_one(name: str) -> None:
    signature = inspect.signature(getattr(nybble, name))
    bare = signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    # Compared as Python, so that 1e-5 is 1e-05 and either quote will do.
    real, shown = (ast.unparse(ast.parse(f"def {text}: ...")) for text in (f"{name}{bare}", documented()[name]))
    assert shown == real


def test_functions_are_documented_with_their_arguments() -> None:
    functions = [name for name in nybble._HOME if inspect.isfunction(getattr(nybble, name))]
    assert [name for name in functions if "(" not in documented()[name]] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'w4a17_linear'"):
        _ = nybble.w4a17_linear
