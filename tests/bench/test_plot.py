"""Pictures show every provider's newest points, are the same for the same rows, and in the documents up to date."""

from __future__ import annotations

import itertools
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from nybble.bench import plot, report
from nybble.ops import OPERATIONS
from nybble.runtime.errors import UnsupportedError

ROOT = Path(__file__).resolve().parents[2]


def row(rows: int = 1, provider: str = "nybble", variant: str = "cuda", us: float = 2.0, **changes):
    hidden = changes.pop("hidden", 2560)
    given = {
        "op": "norm",
        "function": "add_rmsnorm",
        "shape": {"rows": rows, "hidden": hidden},
        "dtype": "float16",
        "provider": provider,
        "variant": variant,
        "us": us,
        "us_p10": us,
        "us_p90": us,
        "host_us": 10.0,
        "floor_us": 0.5,
        "rel_err": 1e-4,
        "commit": "abc1234",
        "gpu": "NVIDIA H200",
        "driver": "580.1",
        "torch": "2.13.0",
        "when": "2026-01-02T03:04:05+00:00",
    }
    assert list(given) == list(report.KEYS)
    return {**given, **changes}


PROVIDERS = (("nybble", "cuda"), ("nybble", "triton"), ("torch", "compile"), ("torch", "eager"), ("liger", "triton"))
ROWS = [
    row(rows, provider, variant, us=10.0 * number + rows, function=function)
    for function in ("add_rmsnorm", "add_layernorm")
    for rows in (1, 8, 512)
    for number, (provider, variant) in enumerate(PROVIDERS, start=1)
]


def figure(rows=ROWS, **options):
    return plot.figure("norm", plot.shown("norm", rows, **options))


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    """Label -> points. matplotlib's own names for lines without one begin with an underscore."""
    found = axes.get_lines()
    return {
        one.get_label(): [(float(x), float(y)) for x, y in one.get_xydata()]
        for one in found
        if one.get_label()[0] != "_"
    }


def legend(drawing) -> list[str]:
    (only,) = drawing.legends
    return [text.get_text() for text in only.get_texts()]


def words(drawing) -> str:
    return "\n".join(text.get_text() for text in drawing.texts)


# --- what is drawn -----------------------------------------------------------------------------------------------


def test_the_points_of_every_provider_are_in_the_drawing():
    times, more_times, fractions, more_fractions = figure().axes
    expected = {
        f"{provider}/{variant}": [(float(rows), 10.0 * number + rows) for rows in (1, 8, 512)]
        for number, (provider, variant) in enumerate(PROVIDERS, start=1)
    }
    floor = {"floor": [(1.0, 0.5), (8.0, 0.5), (512.0, 0.5)]}
    assert lines(times) == lines(more_times) == expected | floor
    percent = {name: [(x, pytest.approx(50 / us)) for x, us in points] for name, points in expected.items()}
    assert lines(fractions) == lines(more_fractions) == percent
    assert [axes.get_title() for axes in (times, more_times)] == ["add_rmsnorm", "add_layernorm"]
    assert {axes.get_xscale() for axes in (times, more_times, fractions, more_fractions)} == {"log"}
    assert (times.get_yscale(), fractions.get_yscale()) == ("log", "linear")
    low, high = times.get_ylim()
    assert low < 11
    assert high > 562


def test_one_legend_and_a_title_that_says_where_the_numbers_are_from():
    drawing = figure()
    own, peers = ["nybble/cuda", "nybble/triton"], ["liger/triton", "torch/compile", "torch/eager"]
    assert legend(drawing) == [*own, *peers, "floor"]
    for word in ("norm on NVIDIA H200", "float16", "hidden 2560", "torch 2.13.0", "commit abc1234"):
        assert word in words(drawing)


def test_rows_of_two_commits_name_both():
    assert "commit abc1234 and def5678" in words(figure([*ROWS, row(us=1.0, commit="def5678", when="2027")]))


def test_the_number_at_the_end_is_the_fraction_of_the_best_of_nybble():
    rows = [
        row(us=0.5),
        row(512, us=1.0),
        row(variant="triton", us=0.5),
        row(512, variant="triton", us=0.625),
        row(512, "torch", "eager", us=0.5),
    ]
    (text,) = figure(rows).axes[1].texts
    assert text.get_text() == "80 %"


def test_a_provider_has_one_colour_and_its_variants_differ():
    def drawn(rows):
        return {line.get_label(): line for line in figure(rows).axes[0].get_lines()}

    every, few = drawn(ROWS), drawn([row(), row(provider="torch", variant="eager")])
    for name, other in itertools.combinations((name for name in every if name != "floor"), 2):
        same = name.partition("/")[0] == other.partition("/")[0]
        assert (every[name].get_color() == every[other].get_color()) == same
        assert not same or every[name].get_marker() != every[other].get_marker()
    for name in ("nybble/cuda", "torch/eager"):
        assert every[name].get_color() == few[name].get_color()
    for op in OPERATIONS:
        from nybble.bench.peers import peers_of

        own = ["nybble", *dict.fromkeys(peer.name for peer in peers_of(op))]
        colours = [plot.COLOURS[name] for name in own]
        assert len(set(colours)) == len(colours)


def test_a_provider_nobody_has_thought_of_is_drawn_too():
    assert "new/fast" in lines(figure([*ROWS, row(provider="new", variant="fast")]).axes[0])


def test_a_time_that_is_not_from_a_graph_says_so():
    rows = [row(), row(provider="torch", variant="eager", how="events")]
    assert legend(figure(rows)) == ["nybble/cuda", "torch/eager (eager)", "floor"]


def test_without_floors_there_are_times_only():
    drawing = figure([row(floor_us=None, gpu="cpu", driver=None)])
    assert len(drawing.axes) == 1
    assert legend(drawing) == ["nybble/cuda"]


# --- whole models ------------------------------------------------------------------------------------------------

CELLS = (("eager", False, 20.0), ("graph", False, 5.0), ("eager", True, 8.0), ("graph", True, 2.0))


def model_row(batch: int = 1, cell: str = "graph", fused: bool = True, ms: float = 2.0, **changes):
    given = {
        "op": "decode",
        "model": "llama3-8b",
        "layers": 32,
        "dtype": "float16",
        "cell": cell,
        "fused": fused,
        "without": [],
        "batch": batch,
        "context": 512,
        "tpot_ms_p50": ms,
        "roof_ms": 1.0,
        "processes": 1,
        "commit": "abc1234",
        "gpu": "NVIDIA H200",
        "torch": "2.13.0",
        "when": "2026-01-02T03:04:05+00:00",
    }
    assert list(given) == list(plot.MODEL_KEYS)
    return {**given, **changes}


MODEL_ROWS = [
    model_row(batch, cell, fused, ms * batch**0.5, model=model, roof_ms=1 + batch / 8)
    for model in ("llama3-8b", "gpt2-xl")
    for batch in (1, 8, 32)
    for cell, fused, ms in CELLS
]
EVERY = ["carry", "qkv", "gate_up", "prologue", "epilogue", "attention"]
WITHOUT = [model_row(without=without, ms=2.5 + i / 8) for i, without in enumerate([[f] for f in EVERY] + [EVERY])]


def models(rows=MODEL_ROWS, **options):
    return plot.figure("decode", plot.shown("decode", rows, **options))


def test_the_cells_of_every_model_are_in_the_drawing_with_the_roof():
    first, second = models().axes
    labels = ("eager, unfused", "CUDA graph, unfused", "eager, fused", "CUDA graph, fused")
    expected = {
        label: [(float(batch), ms * batch**0.5) for batch in (1, 8, 32)]
        for label, (_, _, ms) in zip(labels, CELLS, strict=True)
    }
    assert lines(first) == lines(second) == expected | {"roof": [(1.0, 1.125), (8.0, 2.0), (32.0, 5.0)]}
    assert legend(models()) == [*labels, "roof"]
    assert [axes.get_title() for axes in (first, second)] == ["llama3-8b, 32 layers", "gpt2-xl, 32 layers"]
    assert (first.get_xscale(), first.get_yscale(), first.get_ylabel()) == ("log", "log", "TPOT, ms")
    low, high = first.get_ylim()
    assert low < 1.125
    assert high > 20 * 32**0.5
    assert [text.get_text() for text in first.texts] == ["11.31"]
    for word in ("decode on NVIDIA H200", "float16", "context 512", "torch 2.13.0", "commit abc1234"):
        assert word in words(models())


def test_the_four_cells_look_different():
    look = {(line.get_color(), str(line.get_linestyle())) for line in models().axes[0].get_lines()}
    assert len(look) == 5


def test_a_bar_for_each_fusion_left_out_below_the_models_that_have_them():
    drawing = models(MODEL_ROWS + WITHOUT[::-1])
    assert len(drawing.axes) == 3
    bars = drawing.axes[2]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["nothing", *EVERY, "all"]
    times = [2.0, *(2.5 + i / 8 for i in range(len(WITHOUT)))]
    drawn = sorted((bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in bars.patches)
    assert drawn == [(pytest.approx(i), ms) for i, ms in enumerate(times)]
    assert [text.get_text() for text in bars.texts] == [f"{ms:.2f}" for ms in times]
    assert bars.get_title() == "fused without, batch 1"
    assert bars.get_xlim()[1] > max(times)
    bottom, top = bars.get_ylim()
    assert bottom > top  # nothing left out is the uppermost
    assert lines(drawing.axes[0]) == lines(models().axes[0])
    few = models([*MODEL_ROWS, model_row(8, without=["qkv"]), model_row(32, without=["qkv"])]).axes[2]
    assert few.get_title() == "fused without, batch 8"
    assert [label.get_text() for label in few.get_yticklabels()] == ["nothing", "qkv"]


def test_of_whole_models_the_newest_rows_of_one_process_and_of_all_layers_count():
    old, new = model_row(ms=9.0), model_row(ms=3.0, when="2026-02-01T00:00:00+00:00")
    trials = [model_row(ms=0.5, layers=2, when="2027"), model_row(ms=1.5, processes=2, when="2027")]
    more = [model_row(8), model_row(32)]
    for rows in ([old, new, *more, *trials], [*trials, new, *more[::-1], old]):
        assert plot.shown("decode", rows).rows == [new, *more]
    long = [model_row(batch, context=4096) for batch in (1, 8)]
    assert plot.shown("decode", MODEL_ROWS + long).rest == {"context": 512}
    assert plot.shown("decode", MODEL_ROWS + long, shape={"context": 4096}).rows == long
    assert plot.shown("decode", [*long, *more]).rest == {"context": 4096}
    mixed = [model_row(dtype="bfloat16"), model_row()]
    assert plot.shown("decode", mixed).rows == mixed[1:]
    assert plot.shown("decode", mixed, dtype="bfloat16").rows == mixed[:1]


def test_whole_models_without_a_roof_and_with_one_cell():
    drawing = models([model_row(roof_ms=0.0, gpu="cpu")])
    assert legend(drawing) == ["CUDA graph, fused"]
    assert lines(drawing.axes[0]) == {"CUDA graph, fused": [(1.0, 2.0)]}


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([], {}, "there are no rows of decode to draw"),
        ([row()], {}, "there are no rows of decode to draw"),
        ([{"op": "decode", "dtype": "float16"}], {}, "none named model"),
        (MODEL_ROWS, {"shape": {"context": 1}}, "shape: expected a context that float16 rows of decode"),
        ([model_row(processes=2)], {}, "shape: expected a context that float16 rows of decode by one process have"),
    ],
)
def test_whole_models_that_cannot_be_drawn_are_refused(tmp_path, rows, options, text):
    with pytest.raises(ValueError) as error:
        plot.draw("decode", rows, tmp_path / "decode.svg", **options)
    assert text in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_whole_models_give_the_same_bytes_whatever_the_order_within_a_model(tmp_path):
    rows = MODEL_ROWS + WITHOUT
    plot.draw("decode", rows, tmp_path / "first.svg")
    plot.draw(
        "decode", sorted(rows, key=lambda one: (one["model"] == "gpt2-xl", -one["batch"])), tmp_path / "second.svg"
    )
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


# --- which rows --------------------------------------------------------------------------------------------------


def test_the_newest_row_of_a_case_counts():
    old, new, late = row(us=9.0), row(us=3.0, when="2026-02-01T00:00:00+00:00"), row(8, us=5.0)
    for rows in ([old, new, late], [new, old, late], [late, new, old]):
        assert lines(figure(rows).axes[0])["nybble/cuda"] == [(1.0, 3.0), (8.0, 5.0)]
    again = [row(us=9.0), row(us=4.0)]  # of one run: the later in the file
    assert lines(figure(again).axes[0])["nybble/cuda"] == [(1.0, 4.0)]


def test_the_shape_is_the_one_with_the_most_places_and_of_equals_the_largest():
    few = [row(rows, hidden=8192) for rows in (1, 8)]
    assert plot.shown("norm", ROWS + few).rest == {"hidden": 2560}
    assert plot.shown("norm", [*ROWS, *few, row(512, hidden=8192)]).rest == {"hidden": 8192}
    assert plot.shown("norm", ROWS + few, shape={"hidden": 8192}).rows == few


def test_options_are_another_case():
    biased = [row(rows, options={"bias": True}, us=7.0) for rows in (1, 8, 512)]
    assert plot.shown("norm", biased + ROWS).rest == {"hidden": 2560}
    assert "bias True" in words(figure([*biased, row(4096, options={"bias": True})]))


def test_the_dtype_is_float16_or_the_one_asked_for_or_what_there_is():
    others = [row(dtype="bfloat16"), row(dtype="float32")]
    assert plot.shown("norm", others + ROWS).dtype == "float16"
    assert plot.shown("norm", others + ROWS, dtype="float32").rows == others[1:]
    assert plot.shown("norm", others).dtype == "bfloat16"


def test_rows_of_other_operations_do_not_count():
    assert len(plot.shown("norm", [row(), row(provider="torch", op="w4a16")]).rows) == 1


def test_every_operation_has_a_dimension_to_be_drawn_against():
    import importlib

    assert list(plot.AXIS) == list(OPERATIONS)
    for op, x in plot.AXIS.items():
        assert x in importlib.import_module(f"nybble.ops.{op}.cases").BENCH[0].shape()


def test_an_operation_without_an_entry_is_drawn_against_its_first_dimension():
    rows = [row(op="conv", shape={"width": width, "channels": 3}) for width in (8, 16)]
    assert plot.shown("conv", rows)[:3] == ("width", "float16", {"channels": 3})


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([], {}, "there are no rows of norm to draw"),
        ([row(op="w4a16")], {}, "there are no rows of norm to draw"),
        (ROWS, {"dtype": "float32"}, "dtype: expected one the rows of norm have, float16, got float32"),
        (
            ROWS,
            {"shape": {"hidden": 1}},
            "shape: expected dimensions that float16 rows of norm have, got {'hidden': 1}",
        ),
        ([{"op": "norm", "us": 1}], {}, "none named function"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_no_file(tmp_path, rows, options, text):
    with pytest.raises(ValueError) as error:
        plot.draw("norm", rows, tmp_path / "norm.svg", **options)
    assert text in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["norm.pdf", "norm", "svg"])
def test_other_formats_are_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=rf"expected a name that ends in \.svg or \.png, got '{name}'"):
        plot.draw("norm", ROWS, tmp_path / name)


def test_without_matplotlib_the_refusal_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match="pip install matplotlib"):
        plot.check(Path("norm.svg"))


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norm.svg", "norm.PNG"])
def test_the_same_rows_give_the_same_bytes_whatever_the_users_settings(tmp_path, name):
    import matplotlib

    first, second = tmp_path / "first" / name, tmp_path / "second" / name
    plot.draw("norm", ROWS, first)
    with matplotlib.rc_context(
        {"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9, "axes.facecolor": "red"}
    ):
        plot.draw("norm", ROWS[::-1], second)  # and whatever their order, but for that of the functions
        reordered = second.read_bytes()
        plot.draw("norm", ROWS, second)
    assert first.read_bytes() == second.read_bytes() != reordered
    assert [file.name for file in first.parent.iterdir()] == [name]


def texts(path: Path) -> list[str]:
    tree = ElementTree.parse(path)
    return ["".join(text.itertext()) for text in tree.iter("{http://www.w3.org/2000/svg}text")]


def description(path: Path) -> str | None:
    return ElementTree.parse(path).findtext(".//{http://purl.org/dc/elements/1.1/}description")


def test_an_svg_has_its_words_as_text_its_rows_digest_and_no_date(tmp_path):
    path = tmp_path / "norm.svg"
    what = plot.draw("norm", ROWS, path)
    assert {"norm on NVIDIA H200", "nybble/cuda", "torch/eager", "floor", "time, us"} <= set(texts(path))
    assert description(path) == plot.digest(what)
    assert plot.digest(what) != plot.digest(plot.shown("norm", [*ROWS, row(us=2.5)]))
    assert "<dc:date>" not in path.read_text(encoding="utf-8")


def test_a_picture_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "norm.svg"
    plot.draw("norm", ROWS, path)
    old = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("nybble.runtime.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        plot.draw("norm", ROWS[:1], path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["norm.svg"]


# --- the documents' pictures -------------------------------------------------------------------------------------


def saved(op: str):
    lines = (ROOT / "results" / "h200" / f"{op}.jsonl").read_text(encoding="utf-8").splitlines()
    return report.read_lines(lines)[0]


PICTURES = [*sorted((ROOT / "docs" / "ops").glob("*.svg")), *sorted((ROOT / "docs").glob("*.svg"))]
SAVED = [op for op in (*OPERATIONS, plot.MODELS) if (ROOT / "results" / "h200" / f"{op}.jsonl").exists()]


def test_norm_and_whole_models_have_their_pictures():
    assert {"norm.svg", "decode.svg"} <= {path.name for path in PICTURES}


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_the_pictures_of_the_documents_are_those_of_the_saved_rows(path):
    """By rows and words, not by bytes: another matplotlib may draw the same picture in other strokes."""
    what = plot.shown(path.stem, saved(path.stem), dtype="float16")
    assert description(path) == plot.digest(what), "`make plots` draws it anew"
    drawing = plot.figure(path.stem, what)
    expected = {*legend(drawing), *words(drawing).splitlines(), *(axes.get_title() for axes in drawing.axes)} - {""}
    expected |= {text.get_text() for axes in drawing.axes for text in axes.texts}
    assert expected <= set(texts(path)), "`make plots` draws it anew"


@pytest.mark.parametrize("op", SAVED)
@pytest.mark.parametrize("more", [False, True], ids=["saved", "crowded"])
def test_no_words_collide_or_leave_the_picture(op, more):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows = saved(op)
    if more and op == plot.MODELS:  # another model that has it all, and two commits
        one = [row for row in rows if row["model"] == rows[0]["model"]]
        rows = rows + [{**row, "model": "qwen2.5-coder-14b", "commit": "abc1234+dirty"} for row in one]
    elif more:  # as many providers as may ever be installed, and two commits
        own = [row for row in rows if row["provider"] == "nybble"]
        names = [
            ("nybble", "other"),
            ("quack", "cute"),
            ("flash-attn", "triton"),
            ("vllm", "marlin"),
            ("vllm", "machete"),
        ]
        rows = rows + [{**row, "provider": p, "variant": v, "commit": "abc1234+dirty"} for p, v in names for row in own]
    drawing = plot.figure(op, plot.shown(op, rows))
    FigureCanvasAgg(drawing).draw()
    boxes = {text.get_text(): text.get_window_extent() for text in drawing.texts}
    boxes["the legend"] = drawing.legends[0].get_window_extent()
    for number, axes in enumerate(drawing.axes):
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *axes.get_xticklabels()):
            if text.get_text() and text.get_visible():
                boxes[f"{number} {text.get_text()} at {text.get_position()}"] = text.get_window_extent()
    for name, box in boxes.items():
        assert drawing.bbox.x0 <= box.x0, name
        assert box.x1 <= drawing.bbox.x1, name
        assert drawing.bbox.y0 <= box.y0, name
        assert box.y1 <= drawing.bbox.y1, name
    for (name, box), (other, other_box) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(other_box), (name, other)


def test_products_have_a_panel_of_what_they_compute_a_second() -> None:
    """flatquant's m and n are no product's: without a k there is none."""
    rows = [row(op="w4a16", shape={"m": m, "n": 4096, "k": 4096, "group_size": 128}, us=10.0) for m in (1, 16)]
    times, roof, speed = plot.figure("w4a16", plot.shown("w4a16", rows)).axes
    assert [axes.get_ylabel() for axes in (times, roof, speed)] == ["time, us", "fraction of the roof", "TFLOP/s"]
    assert lines(speed)["nybble/cuda"] == [
        (1.0, pytest.approx(2 * 4096**2 / 1e7)),
        (16.0, pytest.approx(32 * 4096**2 / 1e7)),
    ]
    assert speed.get_ylim()[1] > 32 * 4096**2 / 1e7
