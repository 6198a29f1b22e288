"""What the documents mention exists, and the repository's text is fit to publish.

Documents: every ``.md`` file outside of the assets. Looked at in them:

- links: a relative one leads to a file, its ``#anchor`` to a heading;
- code, which is `spans` in backticks and fenced blocks: paths, ``nybble.…`` and ``torch.ops.nybble.…`` names,
  ``nybble`` commands with their options, ``make`` targets;
- ``<…>`` and ``*`` stand for anything: ``ops/<op>/op.py`` exists when one such file does.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "nybble"
CACHES = {"__pycache__", "build", "dist", "nybble.egg-info"}


@cache
def repository_files() -> tuple[Path, ...]:
    """What git tracks or would add; where there is no git (an unpacked archive), every file outside of dot-folders."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(listing, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        found = (f.relative_to(ROOT) for f in ROOT.rglob("*"))
        listed = [str(f) for f in found if not any(p.startswith(".") or p in CACHES for p in f.parts[:-1])]
    return tuple(sorted(file for name in listed if name and (file := ROOT / name).is_file()))


DOCUMENTS = [f for f in repository_files() if f.suffix == ".md" and PACKAGE / "assets" not in f.parents]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda f: str(f.relative_to(ROOT)))

FENCE = re.compile(r"^(```+)([^\n`]*)\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SHELL = {"", "sh", "bash", "shell", "console", "text"}


def prose(text: str) -> str:
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    return SPAN.findall(prose(text))


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, body) of each fenced block."""
    return [(m[2].strip(), m[3]) for m in FENCE.finditer(text)]


def commands(text: str) -> list[str]:
    """Lines a reader may type: code spans, and the lines of shell blocks without prompt, comment and assignments."""
    bodies = [body.replace("\\\n", " ") for language, body in blocks(text) if language in SHELL]
    lines = [*spans(text), *(line for body in bodies for line in body.splitlines())]
    cleaned = (re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in lines)
    parts = (part.strip() for line in cleaned for part in re.split(r"\s(?:&&|\|\|?)\s|;\s", line))
    return [re.sub(r"^(?:\w+=(?:\"[^\"]*\"|\S*)\s+)+", "", part) for part in parts if part]


# Paths


PATH = re.compile(r"\.?[\w.<>*{},-]+(?:/[\w.<>*{},-]+)*/?")
SOURCE_SUFFIXES = {".py", ".cu", ".cuh", ".md", ".toml", ".jsonl", ".yaml"}
TOP = {p.name for p in ROOT.iterdir()} | {"src", "tests", "docs", "results", "scripts", ".ci"}
INSIDE = {p.name for p in PACKAGE.iterdir() if p.is_dir()}


def looks_like_ours(token: str) -> bool:
    first, *rest = token.strip("/").split("/")
    if rest or token.endswith("/"):
        return first in TOP | INSIDE
    # A lone `.py` or `*.cu` is a kind of file, not a file.
    return token in TOP or (Path(token).suffix in SOURCE_SUFFIXES and not token.startswith("*"))


def expand(token: str) -> list[str]:
    """``a/{b,c}.py`` -> both; ``<…>`` becomes ``*``."""
    braces = re.search(r"\{([^{}]*)\}", token)
    if braces:
        options = braces[1].split(",")
        return [p for option in options for p in expand(token[: braces.start()] + option + token[braces.end() :])]
    return [re.sub(r"<[^<>]*>", "*", token).strip("/")]


def exists(token: str, document: Path) -> bool:
    """From the root, beside the document, in the package; a lone file name, anywhere."""

    def one(pattern: str) -> bool:
        if any(next(base.glob(pattern), None) for base in (ROOT, document.parent, PACKAGE)):
            return True
        return "/" not in pattern and any(f.match(pattern) for f in repository_files())

    return all(one(pattern) for pattern in expand(token))


def paths(text: str) -> list[str]:
    tokens = [word for span in spans(text) for word in span.split()]
    for _, body in blocks(text):
        tokens += re.findall(r"(?<![\w/.:-])[\w.<>*{},/-]+", body)
    tokens = [re.sub(r"(::.*|:\d+)$", "", token).rstrip(".,;:") for token in tokens]
    return [t for t in tokens if PATH.fullmatch(t) and looks_like_ours(t)]


@each_document
def test_paths_exist(document: Path) -> None:
    missing = [p for p in paths(document.read_text(encoding="utf-8")) if not exists(p, document)]
    assert missing == []


# Links


def slugs(document: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(document.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", prose(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (document.parent / file).resolve() if file else document
        if not page.exists() or not page.is_relative_to(ROOT) or (anchor and anchor not in slugs(page)):
            broken.append(target)
    assert broken == []


# Names


def resolves(dotted: str) -> bool:
    """Import as far as it goes, then attributes."""
    parts = dotted.split(".")
    value: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return part in getattr(value, "__annotations__", {})
    return True


def names(text: str) -> set[str]:
    code = "\n".join([*spans(text), *(body for _, body in blocks(text))])
    found = set(re.findall(r"(?<![\w./-])nybble(?:\.[A-Za-z_]\w*)+", code))
    for module, imported in re.findall(r"^from (nybble[\w.]*) import \(?([\w, \n]+)", code, flags=re.MULTILINE):
        found |= {f"{module}.{name.strip()}" for name in imported.split(",") if name.strip()}
    return found


def operators(text: str) -> set[str]:
    return set(re.findall(r"torch\.ops\.nybble\.(\w+)", text))


@each_document
def test_names_resolve(document: Path) -> None:
    assert sorted(n for n in names(document.read_text(encoding="utf-8")) if not resolves(n)) == []


@each_document
def test_operators_are_registered(document: Path) -> None:
    wanted = operators(document.read_text(encoding="utf-8"))
    if not wanted:
        return
    import torch

    from nybble.ops import OPERATIONS

    for operation in OPERATIONS:
        importlib.import_module(f"nybble.ops.{operation}.op")
    assert sorted(o for o in wanted if not hasattr(torch.ops.nybble, o)) == []


# Commands


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def unknown_targets(command: str) -> list[str]:
    words = shlex.split(command)
    if not words or words[0] != "make":
        return []
    targets = [w for w in words[1:] if "=" not in w and not w.startswith(("-", "<"))]
    return [t for t in targets if t not in make_targets() and t != "TARGET"]


@each_document
def test_make_targets_exist(document: Path) -> None:
    lines = commands(document.read_text(encoding="utf-8"))
    assert [f"make {t}" for line in lines if line.startswith("make ") for t in unknown_targets(line)] == []


def cli_error(command: str) -> str | None:
    """What is wrong with a ``nybble …`` line, by the command line's own parsers: command, subcommand and options."""
    from typer.main import get_command

    from nybble.cli import app

    here: Any = get_command(app)
    words = shlex.split(command)[1:]
    while words and hasattr(here, "commands") and not words[0].startswith(("-", "<", "[", "…")):
        word = words.pop(0)
        alternatives = word.split("|")  # as in `nybble bench list|run|explain`
        unknown = [w for w in alternatives if w not in here.commands]
        if unknown:
            return f"{command}: no command {unknown[0]}"
        here = here.commands[alternatives[0]]
    known = {"--help"} | {o for p in here.params for o in (*p.opts, *p.secondary_opts)}
    wrong = [w for w in words if re.match(r"--?[a-z]", w) and w.partition("=")[0] not in known]
    return f"{command}: no option {wrong[0]}" if wrong else None


def nybble_commands(text: str) -> list[str]:
    lines = [re.sub(r"^\S*bin/nybble\b|^python3? -m nybble\b(?:\.cli)?", "nybble", line) for line in commands(text)]
    return [line for line in lines if re.match(r"nybble (?!=)", line)]


@each_document
def test_commands_exist(document: Path) -> None:
    lines = nybble_commands(document.read_text(encoding="utf-8"))
    assert [error for error in map(cli_error, lines) if error] == []


# The repository's text


KERNEL_SECTIONS = ("Computes", "Tensors", "Layout", "Mapping", "Shared memory", "Constants", "Roof", "Source")


def header_problems(text: str) -> list[str]:
    """What the opening comment of a kernel file lacks; the sections come in this order."""
    header = re.match(r"(?:[ \t]*//[^\n]*\n|[ \t]*\n)*", text)
    lines = header[0].splitlines() if header else []
    titles = [s for line in lines for s in KERNEL_SECTIONS if re.match(rf"\s*//\s*{s}\b(?=\s+\S)", line)]
    problems = [f"no {section}" for section in KERNEL_SECTIONS if section not in titles]
    if not problems and titles != list(KERNEL_SECTIONS):
        problems.append(f"sections out of order: {titles}")
    if not re.search(r'static_assert\([^;]*"[^"]+"\s*\);', text):
        problems.append("no static_assert with a message")
    return problems


def test_every_kernel_explains_itself() -> None:
    kernels = [f for f in repository_files() if f.suffix == ".cu"]
    assert kernels
    assert {f.name: p for f in kernels if (p := header_problems(f.read_text(encoding="utf-8")))} == {}


def test_every_operation_has_its_page() -> None:
    from nybble.ops import OPERATIONS

    assert [op for op in OPERATIONS if not (ROOT / "docs" / "ops" / f"{op}.md").exists()] == []


UNFIT = {
    "a path of somebody's machine": re.compile(
        r"(?<![\w./~<>:)\]}$*-])/(?!usr/|etc/|dev/|proc/|sys/|bin/|opt/|path/)[a-z][\w-]*/[\w.-]+|file://"
    ),
    "a note to oneself": re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b"),
    "a debugger left in": re.compile(r"\bbreakpoint\(\)|\bpdb\.set_trace\b"),
    "a merge conflict": re.compile(r"^(?:<{7}|>{7}|={7})(?: |$)", re.MULTILINE),
    "a package index": re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host"),
}


def unfit(text: str) -> list[str]:
    return [f"{what}: {m[0]!r}" for what, pattern in UNFIT.items() for m in pattern.finditer(text)]


def test_no_file_says_what_only_its_writer_needs() -> None:
    found = {}
    for file in repository_files():
        if PACKAGE / "assets" in file.parents or ROOT / "tests" / "fixtures" in file.parents or file == Path(__file__):
            continue
        if file.stat().st_size > 1 << 20:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        problems = unfit(text)
        if len(ROOT.parts) > 2 and str(ROOT) in text:
            problems.append(f"the folder of this checkout: {ROOT}")
        if problems:
            found[str(file.relative_to(ROOT))] = problems
    assert found == {}


# The finders themselves: a check that finds nothing to check would pass for ever.


SAMPLE = """
# A title (with `code`)
See [the page](docs/api.md#no-such-heading), [home](https://example.org),
`src/nybble/nowhere.py` or `ops/<op>/nothing.cu`.
Call `nybble.fold(model)` or `torch.ops.nybble.nothing`, or type `make everything ARGS="-k norm"`.
```sh
$ CI=true make test  # comment
.venv/bin/nybble sing --loud && nybble generate --volume 3
```
"""


def test_finders_find_what_is_missing() -> None:
    here = ROOT / "README.md"
    assert [p for p in paths(SAMPLE) if not exists(p, here)] == ["src/nybble/nowhere.py", "ops/<op>/nothing.cu"]
    assert [n for n in names(SAMPLE) if not resolves(n)] == ["nybble.fold"]
    assert operators(SAMPLE) == {"nothing"}
    makes = [line for line in commands(SAMPLE) if line.startswith("make ")]
    assert makes == ['make everything ARGS="-k norm"', "make test"]
    assert [t for line in makes for t in unknown_targets(line)] == ["everything"]
    assert nybble_commands(SAMPLE) == ["nybble sing --loud", "nybble generate --volume 3"]
    assert slugs(ROOT / "docs" / "api.md") >= {"the-public-api", "operations"}


def test_finders_find_what_is_there() -> None:
    good = (
        "`tests/test_docs.py`, `ops/<op>/op.py`, `src/nybble/runtime/{errors,settings}.py`, `settings.py:12`, `.ci/run`"
    )
    assert len(paths(good)) == 5
    assert [p for p in paths(good) if not exists(p, ROOT / "README.md")] == []
    assert resolves("nybble.runtime.errors.CheckpointError")
    assert paths("`and/or`, `fp16/bf16`, `--json`, `w4a16`, `model.safetensors`, `a * b`") == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("see /home/someone/notes", "a path"),
        ("in '/tmp/x.bin'", "a path"),
        ("# TO" + "DO: later", "a note"),
        ("<<<<<<< HEAD\n", "a merge"),
        ("pip install --index-url https://example.org x", "a package index"),
    ],
)
def test_unfit_text_is_noticed(text: str, what: str) -> None:
    assert any(problem.startswith(what) for problem in unfit(text))


@pytest.mark.parametrize(
    "text", ["/usr/local/cuda/bin", "model = load('/path/to/model')", "a / b / c", "https://x.org/a/b", "</b>"]
)
def test_fit_text_is_left_alone(text: str) -> None:
    assert unfit(text) == []


def test_kernel_header_check_can_fail() -> None:
    whole = "".join(f"// {s}  x\n" for s in KERNEL_SECTIONS) + 'static_assert(N > 0, "some columns");\n'
    assert header_problems(whole) == []
    assert header_problems(whole.replace("// Roof", "// Rooftop")) == ["no Roof"]
    assert header_problems(whole.replace(', "some columns"', "")) == ["no static_assert with a message"]
    assert header_problems('static_assert(N > 0, "a");\n')[0] == "no Computes"
    swapped = whole.replace("Roof", "?").replace("Source", "Roof").replace("?", "Source")
    assert header_problems(swapped)[0].startswith("sections out of order")
