"""What ``generate`` and ``ppl`` share: a folder or a GGUF file becomes a model and a tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nybble.cli.console import device_of, dtype_of, stderr

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nybble.models.ranks import Ranks

MODEL = typer.Argument(None, metavar="[MODEL]", help="Folder or .gguf file; the demo model when left out.")
NAMED = typer.Option(None, "--model", help="The same as MODEL.")
DEVICE = typer.Option("auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")
DTYPE = typer.Option("auto", help="float32, float16, bfloat16; auto: float32 on a CPU, 16 bits on a GPU.")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
JSON = typer.Option(False, "--json", help="Print one JSON object and nothing else.")


def assets() -> Path:
    """The folder of the model that comes with Nybble, its tokenizer and its held-out text."""
    import nybble

    return Path(nybble.__file__).parent / "assets" / "demo"


def load_model(
    folder: Path, device: str, dtype: str, *, hidden: bool, ranks: Ranks | None = None
) -> tuple[PreTrainedModel, Any]:
    """The model, or with ``ranks`` this process's part of it, and its tokenizer; a progress bar on stderr unless
    ``hidden``.

    Raises:
        CheckpointError: the folder or file, or its tokenizer, can't be loaded.
    """
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn

    where, kind = device_of(device), dtype_of(dtype)
    console = stderr()
    columns = SpinnerColumn(), *Progress.get_default_columns()[:3], TextColumn("{task.completed:.0f} tensors")
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task(f"Loading {escape(folder.name)}", total=None)
        _quiet_libraries()
        from nybble.models.load import load

        model = load(
            folder,
            device=where,
            dtype=kind,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            mesh=None if ranks is None else ranks.mesh,
        )
        tokenizer = _tokenizer(folder)
    return model, tokenizer


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from nybble.formats.gguf_file import GGUFFile, is_gguf
    from nybble.runtime.errors import CheckpointError

    if is_gguf(folder):
        if GGUFFile(folder).field("tokenizer.ggml.model") is None:
            raise CheckpointError(folder, "tokenizer.ggml.model", "no tokenizer in the file")
        where, named, entry = folder.expanduser().resolve().parent, {"gguf_file": folder.name}, "tokenizer.ggml.model"
    else:
        where, named, entry = folder, {}, "tokenizer.json"
    # Without any of these transformers makes an empty tokenizer, and every prompt becomes nothing.
    if not named and not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(folder, "tokenizer.json", f"no tokenizer: none of {', '.join(VOCABULARIES)} is there")
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False, **named)
    except Exception as error:  # transformers fails in many ways where a tokenizer's file is missing or damaged
        reason = f"no tokenizer that transformers can load: {str(error).strip().splitlines()[0]}"
        raise CheckpointError(folder, entry, reason) from error


def _quiet_libraries() -> None:
    """Keep transformers' progress bars and advice out of a command's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def described(model: PreTrainedModel) -> dict[str, str]:
    """Device and dtype of a loaded model, as both commands report them."""
    weight: Any = model.get_input_embeddings().weight  # type: ignore[union-attr]
    return {"device": str(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}
