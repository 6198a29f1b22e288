"""How fast a model decodes: time per token, eager or from a CUDA graph, as transformers runs it or fused.

Models are folders, or random weights in the true shapes of known models, made on the device: 4-bit layers are packed
words drawn at random, so that nothing has to be quantised or loaded.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nybble.bench.latency import percentile
from nybble.bench.timing import no_collection, one_line
from nybble.formats.tiles import TILE, PackedWeight, packed_groups, tiles
from nybble.models.architectures import HEAD
from nybble.models.cache import RingCache
from nybble.models.decode import Decoder, Sampling, device_of, now, slots_for, without_attention_plans
from nybble.models.decoder import FUSIONS
from nybble.models.layers import W4A16Linear
from nybble.models.load import recompute_buffers, tie
from nybble.models.parallel import connect, divide, shrink
from nybble.models.patch import fuse
from nybble.models.ranks import WHOLE, Ranks, ranks_of
from nybble.runtime.errors import wrong_value

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-8b": (
        "Llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "pythia-2.8b": (
        "GPTNeoX",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 50304,
            "max_position_embeddings": 4096,
        },
    ),
    "gpt2-xl": (
        "GPT2",
        {"n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257, "n_positions": 4096},
    ),
}
"""Name -> the family and its configuration. Positions reach as far as the bench does, which costs no time."""

CLASSES = {"Llama": "LlamaForCausalLM", "GPTNeoX": "GPTNeoXForCausalLM", "GPT2": "GPT2LMHeadModel"}
PROMPTS = (128, 2048)
CELLS = ("eager", "graph")
WARM_UP, PROMPT_RUNS = 8, 5


def random_model(
    shape: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    layers: int | None = None,
    group_size: int = 128,
    bits: int = 4,
    ranks: Ranks | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """A model of a known shape with random weights.

    Args:
        shape: one of :data:`SHAPES`.
        device, dtype: of everything; scales are of ``dtype`` too.
        layers: fewer than the shape has.
        group_size: of the 4-bit layers.
        bits: 4, or 16 for ordinary linear layers.
        ranks: processes that share the model; this one makes its part.
        changes: to the configuration.

    Raises:
        ValueError: no such shape, or a number of bits that is neither.
    """
    if shape not in SHAPES:
        raise wrong_value("bench decode", "shape", f"one of {list(SHAPES)}", repr(shape))
    if bits not in (4, 16):
        raise wrong_value("bench decode", "bits", "4 or 16", bits)
    family, settings = SHAPES[shape]
    settings = settings | changes
    if layers is not None:
        settings = settings | {"n_layer" if family == "GPT2" else "num_hidden_layers": layers}
    config = getattr(transformers, f"{family}Config")(**settings, dtype=dtype)
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, CLASSES[family])(config)
    # What every process has must be the same for all of them; parts need not.
    generator = torch.Generator(device).manual_seed(0)
    own = torch.Generator(device).manual_seed(1 + (ranks.rank if ranks is not None else 0))
    model.tie_weights()
    shares = {} if ranks is None else divide(model, ranks)
    shrink(model, shares)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if bits == 4 and isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            layer = _random_linear(module, device, dtype, group_size, own)
            if not shares.get(name, WHOLE).bias:
                layer.bias = None
            model.set_submodule(name, layer)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    source = own if isinstance(module, (nn.Linear, Conv1D)) else generator
                    value = _random(module, name, tuple(parameter.shape), device, dtype, source)
                    made[id(parameter)] = nn.Parameter(value, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
    tie(model, shares.get(HEAD, WHOLE).outputs)
    if ranks is not None:
        connect(model, shares, ranks)
    recompute_buffers(model, device)
    return model.eval().requires_grad_(False)


def _random(
    module: nn.Module, name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: Any
) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape, device=device, dtype=dtype).add_(0.0 if name == "bias" else 1.0)
    spread = 0.02 if isinstance(module, nn.Embedding) else 0.5 * shape[-1] ** -0.5
    return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, spread, generator=generator)


def _random_linear(
    module: nn.Linear | Conv1D, device: torch.device, dtype: torch.dtype, group_size: int, generator: Any
) -> W4A16Linear:
    k, n = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
    words = torch.randint(
        -(1 << 31), 1 << 31, (tiles(n), tiles(k), 512), generator=generator, device=device, dtype=torch.int64
    )
    groups = packed_groups(k, group_size)
    # nibbles are uniform, with a deviation of 4.6 about a zero point of 8
    scales = torch.rand(tiles(n), groups, TILE, generator=generator, device=device) + 0.5
    weight = PackedWeight(
        words.to(torch.int32), (scales * (0.5 * k**-0.5 / 4.6)).to(dtype), None, None, k, n, min(group_size, k)
    )
    bias = None if module.bias is None else torch.zeros(n, device=device, dtype=dtype)
    return W4A16Linear(weight, bias)


class Result(NamedTuple):
    """One cell.

    Attributes:
        cell: ``"eager"`` (a growing cache, a call a token) or ``"graph"`` (static cache, CUDA graph; on a CPU the same
            steps, called). fused: whether the model is. without: fusions left out.
        batch, context: texts at once, and tokens in each before the first step.
        tpot_ms_p50, tpot_ms_p99: between two tokens. tokens_per_s: of all texts together, at P50.
        ttft_ms: prompt length -> milliseconds to the first token.
        peak_bytes: memory allocated on the device at most, the model included; 0 on a CPU.
        token_bytes: what a step can't but read: weights and the filled part of the cache.
        roof_ms: that at the device's read bandwidth; 0 on a CPU. of_roof: roof over P50.
        processes: that share the model, each with a device of its own; bytes and roof are those of one.
        wrong: why there is no time, ``""`` when there is.
    """

    cell: str
    fused: bool
    without: tuple[str, ...]
    batch: int
    context: int
    tpot_ms_p50: float
    tpot_ms_p99: float
    tokens_per_s: float
    ttft_ms: dict[int, float]
    peak_bytes: int
    token_bytes: int
    roof_ms: float
    of_roof: float
    processes: int = 1
    wrong: str = ""


def token_bytes(model: PreTrainedModel, batch: int, context: int) -> int:
    """Bytes that a decode step must read: every weight but the embeddings, once, and keys and values of the context.

    Of a model that processes share, what one of them reads.
    """
    heads = model.get_output_embeddings()
    skipped = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    if heads is not None:
        skipped -= {id(p) for p in heads.parameters()}  # a tied head is read whole
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in skipped)
    config: Any = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    ranks = ranks_of(model)
    kv_heads //= 1 if ranks is None else ranks.size
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * kv_heads * width * model.dtype.itemsize * context * batch
    return weights + cache


def measure(
    model: PreTrainedModel,
    *,
    batches: Sequence[int] = (1, 8, 32),
    context: int = 512,
    steps: int = 128,
    prompts: Sequence[int] = PROMPTS,
    read_tbps: float = 0.0,
    ablation: bool = False,
    cells: Sequence[str] = CELLS,
) -> Iterator[Result]:
    """The four cells for each batch, then with ``ablation`` the graph with each fusion left out, at the first batch.

    Args:
        model: in eval mode; it is fused and undone. Of one that processes share, all of them call this.
        batches: texts at once. context: tokens before the first timed step. steps: timed ones.
        prompts: lengths whose time to the first token is measured, by the first batch.
        read_tbps: of the device, for the roof; 0 for none.
        ablation: measure every fusion's share. cells: of :data:`CELLS`.
    """
    plans: list[tuple[str, bool, tuple[str, ...], int]] = []
    for batch in batches:
        plans += [(cell, fused, (), batch) for fused in (False, True) for cell in cells]
    if ablation:
        plans += [("graph", True, (name,), batches[0]) for name in FUSIONS]
        plans += [("graph", True, FUSIONS, batches[0])]
    for cell, fused, without, batch in plans:
        with _fused(model, fused, without):
            lengths = prompts if batch == batches[0] and not without else ()
            yield _cell(model, cell, fused, without, batch, context, steps, lengths, read_tbps)


@contextmanager
def _fused(model: PreTrainedModel, wanted: bool, without: tuple[str, ...]) -> Iterator[None]:
    report = fuse(model, without=without) if wanted else None
    try:
        yield
    finally:
        if report is not None:
            report.undo()


def _cell(
    model: PreTrainedModel,
    cell: str,
    fused: bool,
    without: tuple[str, ...],
    batch: int,
    context: int,
    steps: int,
    prompts: Sequence[int],
    read_tbps: float,
) -> Result:
    device, vocabulary = device_of(model), model.config.vocab_size
    cuda = device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.randint(vocabulary, (batch, context), generator=torch.Generator().manual_seed(1)).to(device)
    read = token_bytes(model, batch, context + steps // 2)
    roof = read / read_tbps / 1e9 if read_tbps else 0.0
    ttft: dict[int, float] = {}
    wrong, samples = "", [math.nan]
    try:
        with torch.inference_mode(), without_attention_plans(), no_collection():
            samples = sorted((_graph_steps if cell == "graph" else _eager_steps)(model, ids, steps))
            ttft = {length: _first_token(model, length, batch, cell) for length in prompts}
    except Exception as error:  # a cell that can't run is a line of the table
        wrong = one_line(error)
    p50, p99 = percentile(samples, 50), percentile(samples, 99)
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    rate = 1e3 * batch / p50
    ranks = ranks_of(model)
    return Result(
        cell, fused, without, batch, context, p50, p99, rate, ttft, peak, read, roof, roof / p50 if roof else 0.0,
        1 if ranks is None else ranks.size, wrong,
    )  # fmt: skip


def _timed(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Milliseconds between the ends of successive steps; the host waits for none of them."""
    for _ in range(WARM_UP):
        step()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize(device)
    step()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def _eager_steps(model: PreTrainedModel, ids: Tensor, steps: int) -> list[float]:
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1].argmax(-1, keepdim=True)

    def step() -> None:
        nonlocal token
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)

    return _timed(step, steps, ids.device)


def _decoder(model: PreTrainedModel, batch: int, tokens: int) -> Decoder:
    cache = RingCache(model.config.num_hidden_layers, slots_for(tokens, None))
    return Decoder(model, cache, batch=batch, capacity=tokens, sampling=Sampling())


def _graph_steps(model: PreTrainedModel, ids: Tensor, steps: int) -> list[float]:
    decoder = _decoder(model, ids.shape[0], ids.shape[1] + steps + WARM_UP + 2)
    decoder.prefill(ids)
    if ids.is_cuda:
        decoder.capture()
    return _timed(decoder.step, steps, ids.device)


def _first_token(model: PreTrainedModel, length: int, batch: int, cell: str) -> float:
    """Median milliseconds from a prompt on the device to its first token."""
    device = device_of(model)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(2)).to(device)
    decoder = _decoder(model, batch, length + 1) if cell == "graph" else None
    samples = []
    for run in range(PROMPT_RUNS + 1):
        started = now(device)
        if decoder is not None:
            decoder.prefill(ids)
        else:
            cache = DynamicCache(config=model.config)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        if run:
            samples.append(1e3 * (now(device) - started))
    return percentile(sorted(samples), 50)


def name_of(result: Result) -> str:
    """The cell in a few words."""
    kind = "fused" if result.fused else "unfused"
    left_out = "all" if set(result.without) == set(FUSIONS) else ", ".join(result.without)
    return f"{result.cell}, {kind}" + (f" without {left_out}" if left_out else "")


def row(result: Result, model: str, layers: int, dtype: torch.dtype, at: Any) -> dict[str, Any]:
    """What is kept of a cell."""
    values = result._asdict() | {"ttft_ms": {str(k): v for k, v in result.ttft_ms.items()}}
    values.pop("wrong")
    return {
        "op": "decode",
        "model": model,
        "layers": layers,
        "dtype": str(dtype).removeprefix("torch."),
        **{key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()},
        **at._asdict(),
    }
