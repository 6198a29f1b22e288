"""Pictures of result rows: time against size, and the fraction of the roof each provider reaches; of whole models,
time per token against batch.

The same rows give the same bytes, and an SVG says in its description which rows it shows (:func:`digest`), so a test
can tell whether a committed picture is that of the committed rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nybble.bench.report import KEYS
from nybble.runtime.errors import UnsupportedError, wrong_value
from nybble.runtime.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXIS = {
    "norm": "rows", "w4a16": "m", "ln_qkv": "m", "q4_0": "m", "flatquant": "tokens", "w4a4": "m",
    "decode_attention": "slots",
}  # fmt: skip
"""The dimension an operation is drawn against; for one that is not here, the first of its shape."""

MODELS = "decode"
"""What rows of whole models, those of ``nybble bench decode``, have as their operation."""

MODEL_KEYS = (
    "op", "model", "layers", "dtype", "cell", "fused", "without", "batch", "context", "tpot_ms_p50", "roof_ms",
    "processes", "commit", "gpu", "torch", "when",
)  # fmt: skip
"""The keys a row of a whole model must have to be drawn."""

SUFFIXES = (".svg", ".png")

# Nybble's own is the one strong colour. All differ in lightness as well as in hue.
COLOURS = {
    "nybble": "#0047ab",
    "nybble-pair": "#6fa8a0",
    "nybble-w4a16": "#d08a2e",
    "torch": "#7d7d7d",
    "liger": "#d08a2e",
    "quack": "#6fa8a0",
    "flash-attn": "#a6788c",
    "gemlite": "#6fa8a0",
    "vllm": "#a6788c",
}
SPARE_COLOURS = ("#8a9a5b", "#c7a76c", "#9a86b8", "#b0b0b0")
# The variants of one provider share its colour and differ in marker and line, by their place in the alphabet.
VARIANTS = (("o", "-", True), ("s", (0, (4, 1.5)), False), ("^", (0, (1, 1)), False), ("D", (0, (5, 1, 1, 1)), False))
# Of a whole model: a colour for what runs, a line for how it is called.
CELLS: dict[tuple[str, bool], tuple[str, str, int]] = {
    ("eager", False): ("eager, unfused", COLOURS["torch"], 1),
    ("graph", False): ("CUDA graph, unfused", COLOURS["torch"], 0),
    ("eager", True): ("eager, fused", COLOURS["nybble"], 1),
    ("graph", True): ("CUDA graph, fused", COLOURS["nybble"], 0),
}
LEFT_OUT_COLOUR = "#9db7dd"
FLOOR = {"color": "black", "linewidth": 0.9, "linestyle": (0, (6, 3)), "zorder": 1.5}

RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read, searched and compared
    "svg.hashsalt": "nybble",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 200,
}

# Inches; of the widths, the least a panel has and all have together.
LEFT, RIGHT, BOTTOM, GAP = 0.7, 0.12, 0.5, 0.18
PANEL_WIDTH, PANELS_WIDTH, HEIGHTS = 2.12, 5.6, (2.0, 1.5, 1.5)
TITLE, LINE, OVER_PANELS, LEGEND_ENTRY = 0.34, 0.17, 0.4, 1.35
# Of whole models: names of fusions stand at the left, and two titles and two axes between the panels.
MODELS_LEFT, MODELS_HEIGHT, MODELS_GAP, BAR = 0.95, 2.4, 0.85, 0.19


Value = Callable[[dict[str, Any]], float | None]
"""What a panel shows of a row."""


class Shown(NamedTuple):
    """What one picture is made of.

    Attributes:
        x: the dimension along the x-axis.
        dtype: of every row.
        rest: the other dimensions, and the options of the case: the same in every row.
        rows: the newest of each function, provider, variant and x, in a fixed order; of whole models, the newest of
            each model, cell, set of fusions left out, and batch.
    """

    x: str
    dtype: str
    rest: dict[str, Any]
    rows: list[dict[str, Any]]


def shown(
    op: str, rows: Sequence[dict[str, Any]], *, dtype: str | None = None, shape: dict[str, int] | None = None
) -> Shown:
    """The rows a picture shows.

    Args:
        op: the operation, or :data:`MODELS`.
        rows: result rows; those of other operations don't count.
        dtype: ``None`` takes float16, or where no row has it, the first there is.
        shape: dimensions to keep to; ``None`` takes those measured at the most places along the x-axis, of equals the
            largest.

    Raises:
        ValueError: no row is left, or one lacks a key.
    """
    own = [row for row in rows if row.get("op") == op]
    if not own:
        raise ValueError(f"plot: there are no rows of {op} to draw")
    keys = MODEL_KEYS if op == MODELS else KEYS
    for row in own:
        if missing := [key for key in keys if key not in row]:
            raise wrong_value("plot", f"a row of {op}", f"the keys {', '.join(keys)}", f"none named {missing[0]}")
    dtypes = list(dict.fromkeys(row["dtype"] for row in own))
    if dtype is None:
        dtype = "float16" if "float16" in dtypes else dtypes[0]
    if dtype not in dtypes:
        raise wrong_value("plot", "dtype", f"one the rows of {op} have, {', '.join(dtypes)}", dtype)
    if op == MODELS:
        return _shown_models([row for row in own if row["dtype"] == dtype], shape or {})
    x = AXIS.get(op) or next(iter(own[0]["shape"]))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in own:
        rest = _rest(row, x)
        if row["dtype"] == dtype and all(rest.get(name) == value for name, value in (shape or {}).items()):
            groups.setdefault(_text(rest), []).append(row)
    if not groups:
        raise wrong_value("plot", "shape", f"dimensions that {dtype} rows of {op} have", shape)

    def worth(group: list[dict[str, Any]]) -> tuple[int, int, bool]:
        places = len({row["shape"][x] for row in group})
        return places, math.prod(v for name, v in group[0]["shape"].items() if name != x), "options" not in group[0]

    group = max(groups.values(), key=worth)
    newest: dict[tuple[str, str, str, int], dict[str, Any]] = {}
    for row in group:
        place = (row["function"], row["provider"], row["variant"], row["shape"][x])
        if place not in newest or row["when"] >= newest[place]["when"]:
            newest[place] = row
    functions = list(dict.fromkeys(place[0] for place in newest))
    order = sorted(newest, key=lambda place: (functions.index(place[0]), place[1] != "nybble", *place[1:]))
    return Shown(x, group[0]["dtype"], _rest(group[0], x), [newest[place] for place in order])


def _shown_models(rows: Sequence[dict[str, Any]], shape: dict[str, int]) -> Shown:
    """Of rows of one dtype those of one process, at the context measured in the most cells. A model with fewer layers
    than it has elsewhere is a trial."""
    from nybble.models.decoder import FUSIONS

    models = list(dict.fromkeys(row["model"] for row in rows))
    layers = {name: max(row["layers"] for row in rows if row["model"] == name) for name in models}
    groups: dict[int, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in rows:
        rest = {"context": row["context"]}
        if row["processes"] != 1 or row["layers"] != layers[row["model"]] or {**rest, **shape} != rest:
            continue
        # What is left out, in the order of FUSIONS whatever that of the row.
        without = sorted((FUSIONS.index(one) if one in FUSIONS else len(FUSIONS), one) for one in row["without"])
        place = (models.index(row["model"]), len(without), *without, row["cell"], row["fused"], row["batch"])
        newest = groups.setdefault(row["context"], {})
        if place not in newest or row["when"] >= newest[place]["when"]:
            newest[place] = row
    if not groups:
        dtype = rows[0]["dtype"]
        raise wrong_value("plot", "shape", f"a context that {dtype} rows of {MODELS} by one process have", shape)
    context = max(groups, key=lambda context: (len(groups[context]), context))
    newest = groups[context]
    return Shown("batch", rows[0]["dtype"], {"context": context}, [newest[place] for place in sorted(newest)])


def _rest(row: dict[str, Any], x: str) -> dict[str, Any]:
    return {name: value for name, value in row["shape"].items() if name != x} | row.get("options", {})


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def digest(what: Shown) -> str:
    """What an SVG of these rows has in its description."""
    return f"rows sha256 {hashlib.sha256(_text(what._asdict()).encode()).hexdigest()}"


def check(path: Path) -> None:
    """Whether a picture of that name can be written at all; to be asked before a long measurement.

    Raises:
        ValueError: the suffix is none of :data:`SUFFIXES`.
        UnsupportedError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise wrong_value("plot", "path", f"a name that ends in {' or '.join(SUFFIXES)}", f"{path.name!r}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"plot: matplotlib can't be imported ({error}); `pip install matplotlib`") from None


def draw(
    op: str,
    rows: Sequence[dict[str, Any]],
    path: Path,
    *,
    dtype: str | None = None,
    shape: dict[str, int] | None = None,
) -> Shown:
    """Write the picture of an operation's rows, whole or not at all; the suffix says which format.

    Arguments and errors are those of :func:`shown` and :func:`check`.

    Returns:
        What it shows.
    """
    check(path)
    what = shown(op, rows, dtype=dtype, shape=shape)
    kind = path.suffix.lower()[1:]
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    image = io.BytesIO()
    with _style():
        figure(op, what).savefig(image, format=kind, metadata={**metadata, "Description": digest(what)})
    write_whole(path, image.getvalue())
    return what


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever the user's configuration says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def figure(op: str, what: Shown) -> Figure:
    """A column of panels for each function. Above: time and, dashed, the floor. Below: the fraction of the roof, which
    is floor over time; left out where no row has a floor, as on a CPU. Last, for products, TFLOP/s. For whole models:
    :func:`_models`."""
    from matplotlib.figure import Figure

    if op == MODELS:
        return _models(what)

    with _style():
        functions = list(dict.fromkeys(row["function"] for row in what.rows))
        roof = any(row["floor_us"] for row in what.rows)
        panel = max(PANEL_WIDTH, (PANELS_WIDTH + GAP) / len(functions) - GAP)
        width = LEFT + len(functions) * panel + (len(functions) - 1) * GAP + RIGHT
        values: list[Value] = [_us, *([_percent] if roof else []), *([_tflops] if _tflops(what.rows[0]) else [])]
        heights = HEIGHTS[: len(values)]

        styles = _styles(what.rows)
        labels = [*(style.label for style in styles.values()), *(["floor"] if roof else [])]
        header = _header(op, what, labels, width, LEFT)
        height = header.height + sum(heights) + GAP * (len(heights) - 1) + BOTTOM

        drawing = Figure(figsize=(width, height))
        panels = drawing.subplots(
            len(heights), len(functions), sharex=True, sharey="row", squeeze=False, height_ratios=heights
        )
        drawing.subplots_adjust(
            left=LEFT / width,
            right=1 - RIGHT / width,
            bottom=BOTTOM / height,
            top=1 - header.height / height,
            wspace=GAP / panel,
            hspace=GAP / (sum(heights) / len(heights)),
        )

        for column, function in enumerate(functions):
            own = [row for row in what.rows if row["function"] == function]
            panels[0, column].set_title(function)
            for line, axes in enumerate(panels[:, column]):
                _fill(axes, own, what.x, styles, values[line])
                axes.tick_params(length=0, labelleft=column == 0)
            panels[-1, column].set_xlabel(what.x)
        for axes, value in zip(panels[:, 0], values, strict=True):
            axes.set_ylabel(LABELS[value])
            axes.yaxis.set_label_coords(-0.52 / panel, 0.5)
        _scale_times(panels[0, 0], [row["us"] for row in what.rows])
        _scale_x(panels[0, 0], [row["shape"][what.x] for row in what.rows], panel)
        if roof:
            _scale_roof(panels[1, 0], max(_percent(row) or 0 for row in what.rows))
        if _tflops in values:
            panels[-1, 0].set_ylim(0, 1.12 * max(_tflops(row) or 0 for row in what.rows))

        _write(drawing, header, panels[0])
    return drawing


class Header(NamedTuple):
    """What stands over the panels: a title, lines about the rows, the legend. Inches."""

    title: str
    about: list[str]
    labels: list[str]
    columns: int
    left: float
    height: float


def _header(op: str, what: Shown, labels: list[str], width: float, left: float) -> Header:
    room = width - left - RIGHT
    about = textwrap.wrap(_about(what), int(room * 72 / 5.1), break_long_words=False)
    entry = max(LEGEND_ENTRY, 0.6 + max(map(len, labels)) * 5.1 / 72)
    columns = max(1, int(room / entry))
    height = TITLE + LINE * (len(about) - (-len(labels) // columns)) + OVER_PANELS
    return Header(f"{op} on {_listed({row['gpu'] for row in what.rows})}", about, labels, columns, left, height)


def _write(drawing: Figure, header: Header, panels: Iterable[Axes]) -> None:
    """The header's words, and the legend of the lines in these panels."""
    width, height = drawing.get_size_inches()

    def top(inches: float) -> tuple[float, float]:
        return header.left / width, 1 - inches / height

    drawing.text(*top(0.12), header.title, va="top", fontsize=11, fontweight="bold")
    drawing.text(*top(TITLE), "\n".join(header.about), va="top", color="#444444", linespacing=1.25)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in header.labels if name in handles]
    drawing.legend(
        [handles[name] for name in names],
        names,
        loc="upper left",
        bbox_to_anchor=top(TITLE + LINE * len(header.about) + 0.05),
        ncols=min(header.columns, len(names)),
        borderpad=0,
        borderaxespad=0,
        handlelength=2.6,
        columnspacing=1.4,
    )


class Style(NamedTuple):
    label: str
    colour: str
    marker: str
    line: Any
    filled: bool


def _styles(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Style]:
    """How each provider and variant is drawn, Nybble's first."""
    pairs = sorted({(row["provider"], row["variant"]) for row in rows}, key=lambda pair: (pair[0] != "nybble", pair))
    eager = {(row["provider"], row["variant"]) for row in rows if row.get("how") == "events"}
    unknown = [name for name in dict.fromkeys(provider for provider, _ in pairs) if name not in COLOURS]
    spare = {name: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, name in enumerate(unknown)}
    styles = {}
    for pair in pairs:
        provider, variant = pair
        place = [v for p, v in pairs if p == provider].index(variant)
        label = f"{provider}/{variant}" + (" (eager)" if pair in eager else "")
        styles[pair] = Style(label, COLOURS.get(provider) or spare[provider], *VARIANTS[place % len(VARIANTS)])
    return styles


def _about(what: Shown) -> str:
    """The line under the title: what all the rows have in common."""
    rest = [f"{name} {value}" for name, value in what.rest.items()]
    versions = _listed({row["torch"] for row in what.rows})
    commits = _listed({row["commit"] for row in what.rows})
    return ", ".join([what.dtype, *rest, f"torch {versions}", f"commit {commits}"])


def _listed(values: set[str]) -> str:
    return " and ".join(sorted(values))


def _us(row: dict[str, Any]) -> float | None:
    return row["us"]


def _percent(row: dict[str, Any]) -> float | None:
    return 100 * row["floor_us"] / row["us"] if row["floor_us"] else None


def _tflops(row: dict[str, Any]) -> float | None:
    """Of a product of M x K by K x N; a multiplication and an addition are two."""
    sides = [row["shape"].get(side) for side in ("m", "n", "k")]
    return 2 * math.prod(sides) / row["us"] / 1e6 if None not in sides else None


LABELS: dict[Value, str] = {_us: "time, us", _percent: "fraction of the roof", _tflops: "TFLOP/s"}


def _fill(
    axes: Axes, rows: Sequence[dict[str, Any]], x: str, styles: dict[tuple[str, str], Style], value_of: Value
) -> None:
    """The lines of one panel, and at the end of Nybble's best one the fraction it reaches."""
    ends = []
    for pair, style in styles.items():
        own = [row for row in rows if (row["provider"], row["variant"]) == pair]
        points = [(row["shape"][x], value_of(row)) for row in own]
        points = [(at, value) for at, value in points if value is not None]
        if not points:
            continue
        axes.plot(
            *zip(*points, strict=True),
            label=style.label,
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
            markerfacecolor=style.colour if style.filled else "white",
            # a broad line with the peers' thin ones over it: two that coincide are both seen
            linewidth=2.6 if pair[0] == "nybble" else 1.1,
            markersize=6 if pair[0] == "nybble" else 3.5,
            zorder=2 if pair[0] == "nybble" else 3,
        )
        if pair[0] == "nybble":
            ends.append(points[-1])
    if value_of is _us:
        floors = sorted({row["shape"][x]: row["floor_us"] for row in rows if row["floor_us"]}.items())
        if floors:
            axes.plot(*zip(*floors, strict=True), label="floor", **FLOOR)
        return
    if value_of is _percent:
        axes.axhline(100, **FLOOR)
    if ends and value_of is _percent:
        at, value = max(ends)
        _number(axes, f"{value:.0f} %", (at, value), color=COLOURS["nybble"], fontweight="bold")


def _models(what: Shown) -> Figure:
    """A column of panels for each model. Above: time per token against batch in the four cells and, dashed, the roof.
    Below, where there are rows of it: the same from a CUDA graph at the smallest batch, each fusion left out in turn.
    """
    from matplotlib.figure import Figure

    with _style():
        models = list(dict.fromkeys(row["model"] for row in what.rows))
        columns = {name: [row for row in what.rows if row["model"] == name] for name in models}
        bars = {name: _left_out(rows) for name, rows in columns.items()}
        names = list(dict.fromkeys(text for some in bars.values() for text in some))
        names = [text for text in names if text != "all"] + (["all"] if "all" in names else [])
        panel = max(PANEL_WIDTH, (PANELS_WIDTH + GAP) / len(models) - GAP)
        width = MODELS_LEFT + len(models) * panel + (len(models) - 1) * GAP + RIGHT
        roof = any(row["roof_ms"] for row in what.rows)
        labels = [label for label, *_ in CELLS.values()] + (["roof"] if roof else [])
        header = _header(MODELS, what, labels, width, MODELS_LEFT)
        heights = [MODELS_HEIGHT, *([BAR * (len(names) + 0.5)] if names else [])]
        height = header.height + sum(heights) + MODELS_GAP * (len(heights) - 1) + BOTTOM

        drawing = Figure(figsize=(width, height))
        panels = drawing.subplots(
            len(heights), len(models), sharex="row", sharey="row", squeeze=False, height_ratios=heights
        )
        drawing.subplots_adjust(
            left=MODELS_LEFT / width,
            right=1 - RIGHT / width,
            bottom=BOTTOM / height,
            top=1 - header.height / height,
            wspace=GAP / panel,
            hspace=MODELS_GAP / (sum(heights) / len(heights)),
        )
        for axes, (name, rows) in zip(panels[0], columns.items(), strict=True):
            axes.set_title(f"{name}, {rows[0]['layers']} layers")
            axes.set_xlabel(what.x)
            _fill_model(axes, rows)
            axes.tick_params(length=0, labelleft=axes is panels[0, 0])
        panels[0, 0].set_ylabel("TPOT, ms")
        panels[0, 0].yaxis.set_label_coords(-0.52 / panel, 0.5)
        times = [row["tpot_ms_p50"] for row in what.rows if not row["without"]]
        _scale_times(panels[0, 0], times + [row["roof_ms"] for row in what.rows if row["roof_ms"]])
        _scale_x(panels[0, 0], [row["batch"] for row in what.rows], panel)

        if names:
            first = next(axes for axes, some in zip(panels[1], bars.values(), strict=True) if some)
            for axes, name in zip(panels[1], models, strict=True):
                if not bars[name]:
                    axes.remove()
                    continue
                batch = next(iter(bars[name].values()))["batch"]
                axes.set_title(f"fused without, batch {batch}")
                axes.set_xlabel("TPOT, ms")
                _fill_left_out(axes, bars[name], names)
                axes.tick_params(length=0, labelleft=axes is first)
                axes.grid(visible=False, axis="y")
            first.set_yticks(range(len(names)), names)
            first.set_ylim(len(names) - 0.25, -0.75)
            _scale_bars(first, max(row["tpot_ms_p50"] for some in bars.values() for row in some.values()))
        _write(drawing, header, panels[0])
    return drawing


def _left_out(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is left out -> its row, of a model's rows from a graph at the smallest batch that has any; ``nothing`` is
    the fused model itself, ``all`` stands for several."""
    fused = [row for row in rows if row["fused"] and row["cell"] == "graph"]
    batch = min((row["batch"] for row in fused if row["without"]), default=None)
    some = [row for row in fused if row["batch"] == batch]
    return {"nothing" if not row["without"] else _fusions(row["without"]): row for row in some}


def _fusions(without: Sequence[str]) -> str:
    from nybble.models.decoder import FUSIONS

    return "all" if set(without) >= set(FUSIONS) else ", ".join(without)


def _fill_model(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """The lines of one model, and at the end of the fastest cell its milliseconds."""
    for (cell, fused), (label, colour, variant) in CELLS.items():
        own = [row for row in rows if (row["cell"], row["fused"]) == (cell, fused) and not row["without"]]
        points = [(row["batch"], row["tpot_ms_p50"]) for row in own]
        if not points:
            continue
        marker, line, filled = VARIANTS[variant]
        axes.plot(
            *zip(*points, strict=True),
            label=label,
            color=colour,
            marker=marker,
            linestyle=line,
            markerfacecolor=colour if filled else "white",
            linewidth=2.6 if (cell, fused) == ("graph", True) else 1.4,
            zorder=2,
        )
        if (cell, fused) == ("graph", True):
            at, value = points[-1]
            _number(axes, f"{value:.2f}", (at, value), color=colour, fontweight="bold")
    roofs = sorted({row["batch"]: row["roof_ms"] for row in rows if row["roof_ms"] and not row["without"]}.items())
    if roofs:
        axes.plot(*zip(*roofs, strict=True), label="roof", marker="_" if len(roofs) == 1 else "", **FLOOR)


def _fill_left_out(axes: Axes, bars: dict[str, dict[str, Any]], names: Sequence[str]) -> None:
    """A bar for each of ``names`` that there is a row of, its milliseconds at its end, and the roof."""
    for text, row in bars.items():
        at, value, whole = names.index(text), row["tpot_ms_p50"], text == "nothing"
        axes.barh(at, value, height=0.66, color=COLOURS["nybble"] if whole else LEFT_OUT_COLOUR, zorder=2)
        emphasis = {"color": COLOURS["nybble"], "fontweight": "bold"} if whole else {}
        _number(axes, f"{value:.2f}", (value, at), **emphasis)
    roof = next(iter(bars.values()))["roof_ms"]
    if roof:
        axes.axvline(roof, **{**FLOOR, "zorder": 3})


def _number(axes: Axes, text: str, at: tuple[float, float], **look: Any) -> None:
    """At the right of a point, on white."""
    axes.annotate(
        text,
        at,
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        zorder=4,
        **look,
    )


def _scale_x(axes: Axes, values: Sequence[int], panel: float) -> None:
    """Powers of two, at most six of them labelled, and room for a number at the right of a panel of so many inches."""
    low, high = min(values), max(values)
    left, right = 0.15, 0.48
    inch = (high / low if high > low else 4) ** (1 / (panel - left - right))
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / inch**left, high * inch**right)
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    step = max(1, math.ceil((last - first) / 5))
    _tick(axes.xaxis, [2**power for power in range(first, last + 1, step)], "{:g}")


def _scale_times(axes: Axes, values: Sequence[float]) -> None:
    """From the fastest provider to the slowest: the floor of a tiny case is far below and leaves the panel."""
    low, high = min(values) / 1.5, max(values) * 1.4
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    _tick(
        axes.yaxis,
        [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high],
        "{:g}",
    )


def _scale_bars(axes: Axes, largest: float) -> None:
    """From zero, with room for a number at the end of the longest, and at most five steps of 1, 2 or 5."""
    high = 1.25 * largest
    power = 10.0 ** math.floor(math.log10(high))
    step = next(size * power for size in (0.2, 0.5, 1, 2) if high / (size * power) < 6)
    axes.set_xlim(0, high)
    _tick(axes.xaxis, [i * step for i in range(math.floor(high / step) + 1)], "{:g}")


def _scale_roof(axes: Axes, largest: float) -> None:
    high = max(100.0, largest)
    axes.set_ylim(0, 1.12 * high)
    _tick(axes.yaxis, range(0, math.floor(high) + 1, 25), "{:g} %")


def _tick(axis: Any, values: Sequence[float], form: str) -> None:
    axis.set_ticks(values, [form.format(value) for value in values])
    axis.set_ticks([], minor=True)
