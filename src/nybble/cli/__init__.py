"""The command line: ``nybble generate``, ``ppl``, ``info``, ``bench``, ``tune``, ``pack``.

Each command is a module of this package and imports what is heavy inside its function, so ``nybble --help`` is quick.
What a command makes goes to stdout; progress, summaries and errors go to stderr. ``--json`` puts one JSON object on
stdout and nothing else.
"""

from __future__ import annotations

from nybble.cli import bench, generate, info, pack, ppl, tune
from nybble.cli.console import new_app

app = new_app("4-bit language models at the speed of memory: generate, measure, explain.")
app.command("generate")(generate.generate)
app.command("ppl")(ppl.ppl)
app.command("info")(info.info)
app.command("tune")(tune.tune)
app.command("pack")(pack.pack)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of ``nybble`` and ``python -m nybble``."""
    app(prog_name="nybble")
