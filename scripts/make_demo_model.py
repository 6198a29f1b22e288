#!/usr/bin/env python3
"""Make Nybble's demo model: a small GPT-NeoX trained on text that ships with Python, as 4-bit GPTQ.

Stages, each reading what the one before left in ``--work``::

    corpus     standard-library source, docstrings and pydoc topics   -> train.jsonl, heldout.txt
    tokenizer  byte-level BPE                                          -> float/tokenizer.json
    train      bf16 autocast, AdamW, cosine schedule                   -> float/ (safetensors, fp32)
    quantize   GPTQModel, 4 bit, group 128, symmetric, no act-order    -> gptq/
    export     fp16, model card, licence                               -> src/nybble/assets/demo/
    evaluate   held-out perplexity and greedy continuations            -> evaluation.json

``corpus``, ``tokenizer``, ``train`` and ``evaluate`` need torch, transformers and tokenizers. ``quantize`` also needs
GPTQModel (a development tool, never a dependency of the library). Example::

    python scripts/make_demo_model.py corpus tokenizer train --work build/demo
    python scripts/make_demo_model.py quantize evaluate export --work build/demo

The corpus depends on the Python version that runs the script; the model card records it. Everything else is seeded, but
floating-point sums on another CPU or with another number of threads give slightly different weights. ``train`` saves
``checkpoint.pt`` as it goes and resumes from it, with other ``--steps`` too if time turns out short.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import GPTNeoXForCausalLM

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "src" / "nybble" / "assets" / "demo"
END_OF_TEXT = "<|endoftext|>"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
PROMPTS = ("def read_config(path):\n", "The with statement", "class Stack:\n")

# Left out: tests, generated tables, build records of one machine, modules that carry a further licence of their own.
SKIPPED_FOLDERS = {
    *("test", "tests", "idlelib", "encodings", "site-packages", "msilib", "pydoc_data", "pgen2", "__pycache__"),
}
SKIPPED_FILES = {
    *("html/entities.py", "stringprep.py", "locale.py", "this.py", "sre_constants.py", "keyword.py", "symbol.py"),
    *("asynchat.py", "asyncore.py", "http/cookies.py", "trace.py", "uu.py", "xmlrpc/client.py"),
    *("optparse.py", "tarfile.py"),
}
# Never trained on. Any long paragraph they share with another text is cut out of that other text too.
HELDOUT_FILES = ("graphlib.py", "shelve.py", "sched.py", "fnmatch.py", "reprlib.py", "queue.py", "bisect.py", "cmd.py")
HELDOUT_TOPICS = (
    *("slicings", "context-managers", "dynamic-features", "exprlists"),
    *("assert", "del", "typesmapping", "debugger"),
)


class Document(NamedTuple):
    """One text of the corpus."""

    name: str
    text: str


# --------------------------------------------------------------------------------------------------------------- corpus


def topics() -> Iterator[Document]:
    """The language reference pages behind ``help('with')``."""
    from pydoc_data.topics import topics as pages

    for name, text in sorted(pages.items()):
        yield Document(f"topic:{name}", text.strip() + "\n")


def source_files() -> Iterator[Document]:
    """The standard library's own source."""
    for path in sorted(STDLIB.rglob("*.py")):
        relative = path.relative_to(STDLIB)
        folders = set(relative.parts[:-1])
        if folders & SKIPPED_FOLDERS or any(part.startswith("config-") for part in folders):
            continue
        if relative.as_posix() in SKIPPED_FILES or relative.name.startswith(("_sysconfigdata", "test_")):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        longest_line = max((len(line) for line in text.splitlines()), default=0)
        if len(text) > 200 and longest_line < 400:
            yield Document(relative.as_posix(), text)


def extension_docstrings() -> Iterator[Document]:
    """Docstrings of the modules written in C, which have no source to read."""
    import importlib

    compiled = {path.name.split(".")[0] for path in (STDLIB / "lib-dynload").glob("*.so")}
    for name in sorted(compiled | set(sys.builtin_module_names)):
        if name.startswith(("_test", "_xx", "xx")) or name == "__main__":
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        text = "\n\n".join(described(module, name.removeprefix("_")))
        if len(text) > 300:
            yield Document(f"docstrings:{name}", text + "\n")


def described(owner: object, prefix: str) -> Iterator[str]:
    """Name, signature and docstring of `owner` and, two levels down, of what it defines."""
    if doc := inspect.getdoc(owner):
        signature = re.sub(r"\$(self|module|type)(, /)?(, )?", "", getattr(owner, "__text_signature__", None) or "")
        yield f"{prefix}{signature}\n" + "\n".join("    " + line if line else "" for line in doc.splitlines())
    if prefix.count(".") >= 2:
        return
    for name, member in sorted(vars(owner).items() if hasattr(owner, "__dict__") else ()):
        inherited = getattr(object, name, None)
        if callable(member) and not (inherited is not None and inspect.getdoc(member) == inspect.getdoc(inherited)):
            yield from described(member, f"{prefix}.{name}")


def paragraphs(text: str) -> list[str]:
    """Blocks of `text` between blank lines."""
    return re.split(r"\n[ \t]*\n", text)


def make_corpus(work: Path) -> None:
    """Write ``train.jsonl`` and ``heldout.txt``; no paragraph of 80 characters or more stands in both."""
    documents = [*topics(), *source_files(), *extension_docstrings()]
    heldout_names = {*HELDOUT_FILES, *(f"topic:{name}" for name in HELDOUT_TOPICS)}
    heldout = [d for d in documents if d.name in heldout_names]
    missing = heldout_names - {d.name for d in heldout}
    if missing:
        raise SystemExit(f"this Python ({platform.python_version()}) lacks the held-out texts {sorted(missing)}")

    seen = {block.strip() for d in heldout for block in paragraphs(d.text) if len(block.strip()) >= 80}
    held_blocks = frozenset(seen)
    train: list[Document] = []
    for document in documents:
        if document.name in heldout_names:
            continue
        kept = []
        for block in paragraphs(document.text):
            key = block.strip()
            if key in held_blocks or (len(key) >= 200 and key in seen):  # repeated between topics: learn it once
                continue
            if len(key) >= 200:
                seen.add(key)
            kept.append(block)
        text = "\n\n".join(kept)
        if len(text) > 200:
            train.append(Document(document.name, text))

    work.mkdir(parents=True, exist_ok=True)
    (work / "train.jsonl").write_text("".join(json.dumps(d._asdict()) + "\n" for d in train), encoding="utf-8")
    (work / "heldout.txt").write_text(END_OF_TEXT.join(d.text for d in heldout), encoding="utf-8")
    (work / "corpus.json").write_text(json.dumps({"python": platform.python_version()}) + "\n", encoding="utf-8")
    size = sum(len(d.text.encode()) for d in train)
    print(f"corpus: {len(train)} texts, {size:,} bytes; held out: {(work / 'heldout.txt').stat().st_size:,} bytes")


def read_corpus(work: Path) -> list[Document]:
    """The training texts, in a fixed shuffled order."""
    documents = [Document(**json.loads(line)) for line in (work / "train.jsonl").open(encoding="utf-8")]
    random.Random(0).shuffle(documents)
    return documents


# ------------------------------------------------------------------------------------------------------------ tokenizer


def make_tokenizer(work: Path, vocabulary: int, positions: int) -> None:
    """Train a byte-level BPE and save it so that ``AutoTokenizer.from_pretrained`` reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in read_corpus(work)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
    )
    fast.save_pretrained(work / "float")
    print(f"tokenizer: {len(fast)} tokens")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The trained tokenizer, as the `tokenizers` library's own object."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode_all(work: Path, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, an end-of-text token before each."""
    import torch

    tokenizer = load_tokenizer(work / "float")
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += [end, *encoding.ids]
    return torch.tensor(ids, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------------------- training


def new_model(args: argparse.Namespace) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with parallel residual and a quarter of each head rotated (the default), as Pythia has it."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden,
        hidden_dropout=args.dropout,
        attention_dropout=args.dropout,
        max_position_embeddings=args.positions,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def windows(tokens: torch.Tensor, step: int, batch: int, length: int, seed: int) -> torch.Tensor:
    """The batch of `step`: ``[batch, length + 1]``, drawn from shuffled windows that shift every epoch.

    It depends on the arguments alone, so a run that was interrupted goes on exactly where it stopped.
    """
    import torch

    per_epoch = (len(tokens) - 1) // length - 1
    rows = []
    for draw in range(step * batch, (step + 1) * batch):
        epoch, position = divmod(draw, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        offset = int(torch.randint(length, (), generator=generator))
        order = torch.randperm(per_epoch, generator=generator)
        start = offset + int(order[position]) * length
        rows.append(tokens[start : start + length + 1])
    return torch.stack(rows)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 %, then a cosine down to 2 % of `peak`."""
    warm_up = max(1, steps // 50)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(work: Path, args: argparse.Namespace) -> None:
    """Train from ``train.jsonl``; checkpoints to ``checkpoint.pt`` and resumes from it."""
    import torch
    from torch.nn import functional

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokens = encode_all(work, [d.text for d in read_corpus(work)])
    heldout = encode_all(work, (work / "heldout.txt").read_text(encoding="utf-8").split(END_OF_TEXT))
    device: str = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = new_model(args)
    model.to(device).train()
    heldout = heldout.to(device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    checkpoint, first = work / "checkpoint.pt", 0
    if checkpoint.exists() and not args.restart:
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    size = sum(p.numel() for p in model.parameters())
    per_step = args.batch * args.length
    epochs = args.steps * per_step / len(tokens)
    print(f"train: {size:,} parameters, {len(tokens):,} tokens, {args.steps:,} steps, {epochs:.1f} epochs", flush=True)

    started, last_loss, loss_sum, counted = time.monotonic(), math.nan, 0.0, 0
    for step in range(first, args.steps):
        longer = 1 if step < 0.85 * args.steps else args.positions // args.length  # the last steps see every position
        rows = windows(tokens, step, args.batch // longer, args.length * longer, args.seed).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_sum, counted = loss_sum + loss.item(), counted + 1
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            rate = (done - first) * per_step / (time.monotonic() - started)
            print(f"step {done:5d}  loss {loss_sum / counted:.4f}  {rate:,.0f} tokens/s", flush=True)
            last_loss, loss_sum, counted = loss_sum / counted, 0.0, 0
        if done % args.save_every == 0 or done == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            ppl = perplexity(model, heldout)
            print(f"step {done:5d}  held-out perplexity {ppl:.3f}", flush=True)
            model.train()

    model.save_pretrained(work / "float")
    record = {
        "parameters": size,
        "corpus_tokens": len(tokens),
        "steps": args.steps,
        "tokens_per_step": per_step,
        "length": args.length,
        "final_training_loss": round(last_loss, 4),
        "seed": args.seed,
    }
    (work / "training.json").write_text(json.dumps(record, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ evaluate and quantise


def perplexity(model: torch.nn.Module, tokens: torch.Tensor, length: int = 256) -> float:
    """exp of the mean negative log-likelihood over non-overlapping windows of `length` predicted tokens."""
    import torch
    from torch.nn import functional

    model.eval()
    count = (len(tokens) - 1) // length
    total = 0.0
    with torch.no_grad():
        for first in range(0, count, 8):
            starts = range(first * length, min(first + 8, count) * length, length)
            rows = torch.stack([tokens[s : s + length + 1] for s in starts])
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
            total += functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (count * length))


def greedy(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, new_tokens: int = 64) -> str:
    """The most likely continuation of `prompt`."""
    import torch

    ids = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.no_grad():
        for _ in range(new_tokens):
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
    return tokenizer.decode(ids[0].tolist())


def quantize(work: Path) -> None:
    """Quantise ``float/`` with GPTQModel, calibrated on the training text."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    tokens = encode_all(work, [d.text for d in read_corpus(work)])
    starts = range(0, len(tokens) - 256, (len(tokens) - 256) // 256)
    rows = [tokens[s : s + 256].tolist() for s in list(starts)[:256]]
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    recipe = QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False, offload_to_disk=False)
    with contextlib.chdir(work):  # it writes logs/ where it runs
        model = GPTQModel.load(str(work / "float"), recipe, dtype=torch.float16)
        model.quantize(calibration, batch_size=8)
        shutil.rmtree(work / "gptq", ignore_errors=True)
        model.save(str(work / "gptq"))


def dequantized(folder: Path) -> GPTNeoXForCausalLM:
    """The checkpoint in `folder` as a plain fp32 model: ``W[k, n] = scale * (q - zero)``, unpacked here."""
    import torch
    from safetensors.torch import load_file
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    state = load_file(folder / "model.safetensors")
    config = GPTNeoXConfig.from_pretrained(folder)
    delattr(config, "quantization_config")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    for name in [key.removesuffix(".qweight") for key in state if key.endswith(".qweight")]:
        packed, packed_zeros = state.pop(f"{name}.qweight"), state.pop(f"{name}.qzeros")
        scales, group_of = state.pop(f"{name}.scales").float(), state.pop(f"{name}.g_idx").long()
        q = ((packed[:, None, :] >> shifts[None, :, None]) & 15).flatten(0, 1)
        zeros = (((packed_zeros + 0x11111111)[:, :, None] >> shifts) & 15).flatten(1)
        state[f"{name}.weight"] = (scales[group_of] * (q - zeros[group_of])).t().contiguous()
    model = GPTNeoXForCausalLM(config).float().eval()
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model


def evaluate(work: Path) -> None:
    """Compare the float model with the quantised one on text that neither saw."""
    from transformers import GPTNeoXForCausalLM

    heldout = encode_all(work, (work / "heldout.txt").read_text(encoding="utf-8").split(END_OF_TEXT))
    tokenizer = load_tokenizer(work / "float")
    result: dict[str, Any] = {"heldout_tokens": len(heldout), "context": 256}
    both = {"float32": GPTNeoXForCausalLM.from_pretrained(work / "float").float(), "gptq": dequantized(work / "gptq")}
    for kind, model in both.items():
        result[kind] = {
            "perplexity": perplexity(model, heldout),
            "continuations": {prompt: greedy(model, tokenizer, prompt) for prompt in PROMPTS},
        }
        print(f"{kind}: held-out perplexity {result[kind]['perplexity']:.4f}")
        print("\n---\n".join(result[kind]["continuations"].values()), flush=True)
    (work / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------------------- export

CARD = """---
license: psf
language: en
library_name: nybble
---
# Nybble demo model

A GPT-NeoX of {parameters:,} parameters ({layers} layers, hidden size {hidden}, {heads} heads, parallel residual,
a quarter of each head rotated, vocabulary {vocabulary}, {positions} positions) that writes text like Python's
documentation and library source. It was trained from nothing on the text that ships with Python {python}, then
quantised with {quantizer} to 4-bit GPTQ (group size {group_size}, symmetric, no act-order, format `{format}`).
It exists so that tests, benchmarks and examples have a real checkpoint and a meaningful perplexity with nothing to
download. It knows nothing beyond its corpus, often states falsehoods, and is of no use for programming.

| | float32 | this checkpoint |
|---|---|---|
| perplexity on `heldout.txt` | {float_ppl:.3f} | {gptq_ppl:.3f} |

Perplexity: `heldout.txt` split at `{end}`, that token put before each text, {heldout_tokens:,} tokens in all,
cut into windows that predict {context} tokens each without overlap; exp of the mean negative log-likelihood, per token.
The second column is computed in fp32 with dequantised weights.

## Training
- Corpus: {corpus_tokens:,} tokens: the pages of `pydoc_data.topics`, the source of the standard library, and the
  docstrings of its C modules. Left out: tests, generated tables, and modules that carry a further licence of their own.
- `heldout.txt` was never trained on, nor was any paragraph of 80 characters or more that it shares with another text.
  It holds {heldout_names}.
- {steps:,} steps of {tokens_per_step:,} tokens, AdamW, bf16 autocast, cosine schedule, seed {seed};
  training loss {final_training_loss} at the end. Rows of {length} tokens, of {positions} in the last 15 % of the steps.
- Calibration: 256 rows of training text.
- Everything is made by `scripts/make_demo_model.py`.

## Greedy continuations of the quantised model
{samples}

## Licence
The training text and `heldout.txt` are part of Python, copyright (c) 2001-2023 Python Software Foundation, all rights
reserved, under the PSF License Agreement in `LICENSE.python.txt`. Changes made: excerpts were chosen and joined in
`heldout.txt`, and a statistical model was computed from the rest. The weights are offered under the same terms. The
Python Software Foundation does not endorse this model.
"""


def export(work: Path) -> None:
    """Copy what the package ships to ``src/nybble/assets/demo`` and write its model card."""
    licence = STDLIB / "LICENSE.txt"
    if not licence.exists():
        raise SystemExit(f"{licence} is missing: the licence of the training text must travel with the model")
    config = json.loads((work / "gptq" / "config.json").read_text())
    recipe = config["quantization_config"]
    # The Python the text came from: training may have run under another one.
    training = json.loads((work / "training.json").read_text()) | json.loads((work / "corpus.json").read_text())
    evaluation = json.loads((work / "evaluation.json").read_text())
    names = [f"`{name}`" for name in HELDOUT_FILES] + [f"topic `{name}`" for name in HELDOUT_TOPICS]
    samples = evaluation["gptq"]["continuations"].values()
    card = CARD.format(
        **training,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        quantizer=recipe["meta"]["quantizer"][0].replace("gptqmodel:", "GPTQModel "),
        group_size=recipe["group_size"],
        format=recipe["checkpoint_format"],
        float_ppl=evaluation["float32"]["perplexity"],
        gptq_ppl=evaluation["gptq"]["perplexity"],
        heldout_tokens=evaluation["heldout_tokens"],
        context=evaluation["context"],
        end=END_OF_TEXT,
        heldout_names=", ".join(names),
        samples="\n".join(f"```\n{sample.rstrip()}\n```" for sample in samples),
    )
    ASSETS.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "quantize_config.json", "model.safetensors"):
        shutil.copyfile(work / "gptq" / name, ASSETS / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / "float" / name, ASSETS / name)
    shutil.copyfile(work / "heldout.txt", ASSETS / "heldout.txt")
    shutil.copyfile(licence, ASSETS / "LICENSE.python.txt")
    (ASSETS / "README.md").write_text(card, encoding="utf-8")
    for path in sorted(ASSETS.iterdir()):
        print(f"{path.stat().st_size:>10,}  {path.name}")


STAGES = ("corpus", "tokenizer", "train", "quantize", "evaluate", "export")


def main() -> None:
    """Run the stages named on the command line, in the order of the list above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo", help="folder between the stages")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--length", type=int, default=256, help="tokens in a training row")
    parser.add_argument("--batch", type=int, default=64, help="rows in a step")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1, help="while training; the saved model has it too, unused")
    parser.add_argument("--device", default="", help="for train; default: cuda where there is one, else cpu")
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--restart", action="store_true", help="ignore an earlier checkpoint")
    args = parser.parse_args()
    for stage in (s for s in STAGES if s in args.stages):
        work: Path = args.work.resolve()
        if stage == "corpus":
            make_corpus(work)
        elif stage == "tokenizer":
            make_tokenizer(work, args.vocabulary, args.positions)
        elif stage == "train":
            train(work, args)
        elif stage == "quantize":
            quantize(work)
        elif stage == "evaluate":
            evaluate(work)
        else:
            export(work)


if __name__ == "__main__":
    main()
