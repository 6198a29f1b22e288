"""The command line: what each command prints, that --json is one object, that mistakes are one line and a code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nybble.cli import app, console
from nybble.cli import bench as cli_bench
from nybble.ops import OPERATIONS
from nybble.runtime import settings
from nybble.runtime.errors import CheckpointError, CompileError, UnsupportedError

RUNNER = CliRunner()
SOURCE = Path(__file__).resolve().parents[1] / "src"
TEXT = "The quick brown fox jumps over the lazy dog. " * 8


def run(*arguments: object, code: int = 0):
    result = RUNNER.invoke(app, [str(argument) for argument in arguments], prog_name="nybble")
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object):
    result = run(*arguments, "--json")
    assert result.stderr == ""
    return json.loads(result.stdout)


def mistake(*arguments: object, code: int = 2) -> str:
    """The one line on stderr of a command that must fail, with nothing on stdout."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "Traceback" not in line
    return line


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A folder with a tiny GPT-NeoX of random weights and its byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<|end|>": 0, **{letter: i for i, letter in enumerate(alphabet, 1)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=264,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


# --- the shape of it ---------------------------------------------------------------------------------------------


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, nybble.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=SOURCE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_m_nybble_is_the_command_line():
    command = [sys.executable, "-m", "nybble", "--help"]
    done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=True)
    for command in ("generate", "ppl", "info", "bench"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "command", [[], ["bench"], ["bench", "run"], ["bench", "plot"], ["generate"], ["ppl"], ["info"]]
)
def test_help_of_every_command(command):
    assert "Usage:" in run(*command, "--help").stdout


def test_mistakes_in_the_command_itself_are_one_line():
    assert mistake("sing") == "nybble: No such command 'sing'."
    for command, option in (([], "--loud"), (["generate"], "--volume")):  # releases of Typer differ in the punctuation
        line = mistake(*command, option)
        assert line.startswith(f"{' '.join(['nybble', *command])}: No such option")
        assert option in line
    assert mistake("bench", "explain").startswith("nybble bench explain: Missing argument")
    assert mistake("generate", "--max-tokens", "many").startswith("nybble generate: Invalid value for '--max-tokens'")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CheckpointError("a.safetensors", "w.qweight", "is short"), 2, "nybble: a.safetensors: w.qweight: is short"),
        (UnsupportedError("norm: no variant can run this here"), 1, "nybble: norm: no variant can run this here"),
        (CompileError("norm.cu(3): error:\n  expected a ;"), 1, "nybble: norm.cu(3): error: expected a ;"),
        (FileNotFoundError(2, "No such file", "here.txt"), 2, "nybble: here.txt: no such file or folder"),
        (PermissionError(13, "Permission denied", "here.txt"), 1, "nybble: [Errno 13] Permission denied: 'here.txt'"),
        (FloatingPointError("the largest logit is nan"), 1, "nybble: the largest logit is nan"),
        (KeyboardInterrupt(), 130, "nybble: interrupted"),
    ],
)
def test_errors_are_one_line_and_a_code(monkeypatch, error, code, line):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(cli_bench, "cases_module", fails)
    assert mistake("bench", "explain", "norm", code=code) == line


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fails(*arguments, **options):
        return json.loads("not json")  # a ValueError that no check of ours raised

    monkeypatch.setattr(cli_bench, "cases_module", fails)
    with pytest.raises(json.JSONDecodeError):
        run("bench", "explain", "norm")


def test_a_traceback_can_be_asked_for(monkeypatch):
    def fails(*arguments, **options):
        raise UnsupportedError("no variant")

    monkeypatch.setattr(cli_bench, "cases_module", fails)
    with pytest.raises(UnsupportedError):
        run("--traceback", "bench", "explain", "norm")


def test_json_has_no_nan(capsys):
    console.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": None}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


# --- generate ----------------------------------------------------------------------------------------------------


def test_generate_prints_the_prompt_the_text_and_the_speed(model):
    result = run("generate", model, "--prompt", "abc", "--max-tokens", 6)
    assert result.stdout.startswith("abc")
    assert len(result.stdout) > len("abc\n")
    for word in ("prompt", "decode", "tokens/s", "TPOT", "fused calls", "add_dual_layernorm"):
        assert word in result.stderr


def test_generate_as_json(model):
    facts = run_json("generate", model, "--prompt", "abc", "--max-tokens", 6)
    assert facts["prompt"] == "abc"
    assert facts["prompt_tokens"] == 3
    assert len(facts["tokens"]) == 6
    assert facts["decode_tokens"] == 5
    assert facts["stopped_by"] == "length"
    assert facts["tpot_ms"] == pytest.approx(1e3 * facts["decode_seconds"] / 5)
    assert facts["prompt_tokens_per_s"] == pytest.approx(3 / facts["prompt_seconds"])
    assert facts["kernel_calls"]["add_dual_layernorm"] == 6  # the second of two layers, once a pass
    assert facts["dtype"] == "float32"


def test_generate_without_fusing_gives_the_same_greedy_tokens_and_no_calls(model):
    fused, plain = (run_json("generate", model, "--max-tokens", 8, option) for option in ("--fuse", "--no-fuse"))
    assert fused["tokens"] == plain["tokens"]
    assert plain["kernel_calls"] == {}
    assert not plain["fused"]


def test_streaming_and_printing_at_the_end_give_the_same_text(model):
    arguments = ("generate", model, "--prompt", "abc", "--max-tokens", 12)
    assert run(*arguments, "--stream").stdout == run(*arguments, "--no-stream").stdout


def test_samples_are_the_seeds(model):
    def sampled(seed: int) -> list[int]:
        return run_json("generate", model, "--sample", "--seed", seed, "--max-tokens", 12)["tokens"]

    assert sampled(1) == sampled(1) != sampled(2)


def test_top_k_one_is_greedy(model):
    greedy = run_json("generate", model, "--max-tokens", 8)["tokens"]
    assert run_json("generate", model, "--max-tokens", 8, "--sample", "--top-k", 1)["tokens"] == greedy


def test_an_empty_prompt_starts_from_the_beginning_of_a_text(model):
    assert run_json("generate", model, "--prompt", "", "--max-tokens", 2)["prompt_tokens"] == 1


def test_generate_beyond_the_positions_with_a_window(model):
    facts = run_json("generate", model, "--prompt", "abc", "--max-tokens", 80, "--window", 20, "--sinks", 2)
    assert facts["cache"] == "static" and len(facts["tokens"]) == 80
    short = ("generate", model, "--prompt", "abc", "--max-tokens", 10)
    dynamic = run_json(*short)
    assert dynamic["cache"] == "dynamic" and run_json(*short, "--cache", "static")["tokens"] == dynamic["tokens"]
    assert run_json(*short, "--window", 40)["tokens"] == dynamic["tokens"]
    assert "needs a CUDA device" in mistake(*short, "--cache", "graph", code=1)


def test_mistakes_of_generate(model, tmp_path):
    assert "no such folder" in mistake("generate", tmp_path / "nothing")
    assert "config.json: missing" in mistake("generate", tmp_path)
    assert "64 positions" in mistake("generate", model, "--max-tokens", 100)
    assert "--dtype" in mistake("generate", model, "--dtype", "int4")
    assert "--device" in mistake("generate", model, "--device", "abacus")
    assert "--device" in mistake("generate", model, "--device", "meta")
    assert "CUDA devices" in mistake("generate", model, "--device", "cuda:99", code=1)


def test_a_folder_without_a_tokenizer_is_refused_by_name(model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    assert "no tokenizer" in mistake("generate", tmp_path)


# --- ppl ---------------------------------------------------------------------------------------------------------


def test_ppl_shows_fused_and_unfused_side_by_side(model, text):
    output = run("ppl", model, "--text", text).stdout
    unfused, fused = (next(line for line in output.splitlines() if line.startswith(name)) for name in ("unf", "fus"))
    assert unfused.split()[-1] == "0"
    assert int(fused.split()[-1]) > 0
    assert "delta" in output


def test_ppl_as_json(model, text):
    facts = run_json("ppl", model, "--text", text, "--window", 32, "--tokens", 100)
    assert facts["tokens"] == 99
    assert facts["fused"]["ppl"] == pytest.approx(facts["unfused"]["ppl"], rel=1e-4)
    assert 100 < facts["unfused"]["ppl"] < 600  # random weights over 264 tokens
    assert abs(facts["relative_delta"]) < 1e-4
    windows = 6  # of 32, half as far each time
    assert facts["kernel_calls"]["add_dual_layernorm"] == windows
    assert facts["replaced"] > 0


def test_ppl_compares_with_another_model_and_with_plain_layers(model, text):
    demo = run_json("ppl", "--tokens", 200)
    assert demo["dequantised"]["kl_per_token"] == 0 < demo["dequantised"]["ppl"]
    for name in ("unfused", "fused"):
        assert abs(demo[name]["kl_per_token"]) < 1e-6 and demo[name]["same_token"] > 0.99
    facts = run_json("ppl", model, "--reference", model, "--text", text, "--tokens", 100)
    assert "dequantised" not in facts and facts["reference"]["ppl"] == facts["unfused"]["ppl"]


def test_ppl_of_a_stream(model, text):
    facts = run_json("ppl", model, "--streaming", "--text", text, "--tokens", 100, "--sinks", 2, "--window", 10)
    assert (facts["tokens"], facts["sinks"], facts["window"]) == (99, 2, 10)
    assert list(facts["kinds"]) == ["dense", "window", "sinks + window", "recomputed"]
    assert len({kind["ppl"] for kind in facts["kinds"].values()}) == 4
    table = run("ppl", model, "--streaming", "--text", text, "--tokens", 60).stdout
    assert "sinks + window" in table and "recomputed" in table
    assert "--streaming takes no --stride" in mistake("ppl", model, "--text", text, "--streaming", "--stride", 3)


def test_mistakes_of_ppl(model, text, tmp_path):
    assert mistake("ppl", model, "--text", tmp_path / "nothing").endswith("nothing: no such file or folder")
    assert mistake("ppl", model, "--text", tmp_path).endswith("a folder, not a text file")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert mistake("ppl", model, "--text", tmp_path / "latin.txt").endswith("latin.txt: not UTF-8 text")
    (tmp_path / "empty.txt").write_text("")
    assert "at least" in mistake("ppl", model, "--text", tmp_path / "empty.txt")
    assert "window" in mistake("ppl", model, "--text", text, "--window", 1000)


# --- info --------------------------------------------------------------------------------------------------------


def test_info_names_versions_operations_and_the_cache():
    output = run("info").stdout
    for word in ("nybble", "torch", "NVRTC", "cuda-core", "triton", "transformers", "GPU", "cache", *OPERATIONS):
        assert word in output


def test_info_as_json(monkeypatch, tmp_path):
    from nybble.runtime import settings

    (tmp_path / "aa").mkdir()
    (tmp_path / "aa" / "kernel").write_bytes(b"12345")
    monkeypatch.setattr(settings, "CACHE_DIR", tmp_path)
    facts = run_json("info")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cache"] == {"folder": str(tmp_path), "used": settings.USE_CACHE, "entries": 1, "bytes": 5}
    assert list(facts["operations"]) == list(OPERATIONS)
    if not torch.cuda.is_available():
        assert facts["gpus"] == []
        assert {line for lines in facts["operations"].values() for line in lines.values()} == {"cpu: reference"}


# --- bench -------------------------------------------------------------------------------------------------------


def test_bench_list():
    output = run("bench", "list", "--small").stdout
    assert all(op in output for op in OPERATIONS)
    assert "add_dual_layernorm rows=8 hidden=512 float32" in output
    assert "norm" not in run("bench", "list", "w4a16", "--small").stdout


def test_bench_list_as_json_filtered():
    facts = run_json("bench", "list", "norm", "--small", "--filter", "rows=8,rmsnorm")
    (case,) = facts["operations"]["norm"]
    assert case["function"] == "rmsnorm"
    assert case["shape"] == {"rows": 8, "hidden": 512}
    assert case["bytes"] == (2 * 8 * 512 + 512) * 4
    assert mistake("bench", "list", "--filter", "rows=88").endswith("`nybble bench list` shows them")


def test_bench_run_prints_a_table_and_what_is_missing():
    output = run("bench", "run", "norm", "--quick", "--device", "cpu", "--filter", "rmsnorm").stdout
    assert "rmsnorm rows=8 hidden=512 float32" in output
    for word in ("nybble/reference *", "torch/eager", "best peer", "rel err", "torch/compile: compared on CUDA only"):
        assert word in output


def test_bench_run_checks_accuracy_alone(monkeypatch):
    from nybble.ops.w4a4.cases import SMALL

    monkeypatch.setattr("nybble.bench.run.time_calls", lambda *_, **__: pytest.fail("timed"))
    out = run("bench", "run", "flatquant", "--device", "cpu", "--check", "accuracy", "--detailed").stdout
    assert out.count("within tolerance") == 3
    assert out.count("int32 0.002 MB") == 3
    data = run_json("bench", "run", "w4a4", "--device", "cpu", "--check", "accuracy")
    assert [one["wrong"] for one in data["accuracy"]] == [""] * len(SMALL)
    assert data["rows"] == []
    assert "nothing is timed" in mistake("bench", "run", "w4a4", "--device", "cpu", "--check", "accuracy", "--save")


def test_bench_run_checks_accuracy_and_times():
    from nybble.ops.w4a4.cases import SMALL

    data = run_json("bench", "run", "w4a4", "--device", "cpu", "--check", "all", "--quick", "--no-peers")
    assert len(data["accuracy"]) == len(data["rows"]) == len(SMALL)


def test_an_inaccurate_result_is_said_and_exits_1(monkeypatch):
    from nybble.ops.w4a4 import op

    real = op.linear
    monkeypatch.setattr(op, "linear", lambda *given: real(*given) * 1.01)
    result = run("bench", "run", "w4a4", "--device", "cpu", "--check", "accuracy", code=1)
    assert "WRONG" in result.stdout
    assert "WRONG" in result.stderr


def test_pack_then_ppl(model, text, tmp_path):
    facts = run_json("pack", model, tmp_path / "packed", "--dtype", "float32")
    assert facts["modules"] == 8
    assert run_json("ppl", tmp_path / "packed", "--text", text, "--device", "cpu")["unfused"]["ppl"] > 1
    assert "where there is nothing yet" in mistake("pack", model, tmp_path / "packed")
    assert "packed" in run("pack", model, tmp_path / "other" / "packed", "--transform", "none").stdout


def test_bench_run_as_json_saved_twice(tmp_path):
    arguments = ("bench", "run", "norm", "--quick", "--device", "cpu", "--filter", "rmsnorm", "--no-peers")
    first = run_json(*arguments, "--save", "--results", tmp_path, "--commit", "abc")
    assert first["wrong"] == []
    assert first["commit"] == "abc"
    file = tmp_path / "cpu" / "norm.jsonl"
    assert first["saved"] == [str(file)]
    second = run_json(*arguments, "--save", "--results", tmp_path)
    assert [json.loads(line) for line in file.read_text().splitlines()] == first["rows"] + second["rows"]
    (row,) = first["rows"]
    assert (row["op"], row["provider"], row["variant"], row["gpu"]) == ("norm", "nybble", "reference", "cpu")
    unsaved = run_json(*arguments, "--results", tmp_path / "other")
    assert unsaved["saved"] == []
    assert not (tmp_path / "other").exists()


def test_bench_run_warns_of_damaged_lines(tmp_path):
    file = tmp_path / "cpu" / "norm.jsonl"
    file.parent.mkdir()
    file.write_text('{"us": \n')
    arguments = ("bench", "run", "norm", "--quick", "--device", "cpu", "--filter", "rmsnorm", "--no-peers")
    result = run(*arguments, "--save", "--results", tmp_path)
    assert "1 damaged lines, kept as they are" in result.stderr
    assert file.read_text().startswith('{"us": \n{"op"')


def test_bench_run_with_a_wrong_result_says_so_and_exits_1(monkeypatch):
    from nybble.ops.norm.cases import NormCase

    monkeypatch.setattr(NormCase, "run", lambda self, inputs, variant="auto": (inputs["x"] * 3,))
    arguments = ("bench", "run", "norm", "--quick", "--device", "cpu", "--filter", "rmsnorm")
    result = run(*arguments, code=1)
    assert "WRONG" in result.stderr
    facts = json.loads(run(*arguments, "--json", code=1).stdout)
    assert [row["provider"] for row in facts["rows"]] == ["torch"]
    assert len(facts["wrong"]) == 1


QKV = ("bench", "run", "ln_qkv", "--quick", "--device", "cpu", "--no-peers")


def test_bench_run_reports_the_latency_of_single_calls():
    output = run(*QKV, "--target-ms", 1e6).stdout
    assert output.count("fused_ln_qkv_gptq m=4 n=768") == 2
    for word in ("100 calls one by one (wall)", "mean", "min", "max", "std", "P50", "P90", "P95", "P99"):
        assert word in output
    assert "output [3, 1, 4, 256], all finite, relative error" in output
    assert "output [1, 4, 256], [1, 4, 64], [1, 4, 64], all finite" in output
    assert output.count("target 1e+06 ms holds: P99 is") == 2
    assert "latency" not in run(*QKV).stdout


def test_a_missed_target_is_said_and_no_failure():
    output = run(*QKV, "--target-ms", 1e-6).stdout
    assert output.count("target 1e-06 ms MISSED: P99 is") == 2


def test_latency_as_json():
    facts = run_json(*QKV, "--target-ms", 1e6, "--runs", 1001, "--filter", "n=768")
    (one,) = facts["latency"]
    assert (one["runs"], one["how"], one["holds"], one["target_ms"]) == (1001, "wall", True, 1e6)
    assert one["min"] <= one["p50"] <= one["p90"] <= one["p95"] <= one["p99"] <= one["max"]
    assert one["min"] <= one["mean"] <= one["max"]
    assert one["shapes"] == [[3, 1, 4, 256]]
    assert one["finite"]
    assert 0 < one["rel_err"] < 1e-6
    assert run_json(*QKV, "--filter", "n=768")["latency"] == []
    (untargeted,) = run_json(*QKV[:3], *QKV[4:], "--runs", 1000, "--filter", "n=768")["latency"]
    assert (untargeted["holds"], untargeted["target_ms"]) == (None, None)
    assert "--runs" in mistake(*QKV, "--runs", 10)


RMSNORM = ("bench", "run", "norm", "--quick", "--device", "cpu", "--filter", "rmsnorm")


def test_bench_run_draws_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*RMSNORM, "--plot")
    assert result.stderr.splitlines() == ["drew norm.svg"]
    picture = (tmp_path / "norm.svg").read_text(encoding="utf-8")
    for word in ("norm on cpu", "float32, hidden 512", "nybble/reference", "torch/eager"):
        assert f">{word}" in picture
    assert [file.name for file in tmp_path.iterdir()] == ["norm.svg"]


def test_bench_run_draws_where_it_is_told_and_json_says_where(tmp_path):
    path = tmp_path / "new" / "picture.png"
    assert run_json(*RMSNORM, "--plot-to", path)["plots"] == [str(path)]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert run_json(*RMSNORM)["plots"] == []


def test_a_picture_that_cannot_be_written_loses_no_measurement(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "norm.svg"
    facts = json.loads(run(*RMSNORM, "--json", "--plot-to", path, code=1).stdout)
    assert len(facts["rows"]) == 2
    assert facts["plots"] == []
    assert facts["not_drawn"][0].startswith(f"{path}: not drawn: ")
    assert f"{path}: not drawn" in run(*RMSNORM, "--plot-to", path, code=1).stderr


def test_pictures_that_cannot_be_are_refused_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(cli_bench, "_measure", lambda *arguments, **options: pytest.fail("it measured"))
    line = mistake(*RMSNORM, "--plot-to", tmp_path / "norm.pdf")
    assert line == "nybble: plot: path: expected a name that ends in .svg or .png, got 'norm.pdf'"
    several = mistake("bench", "run", "--device", "cpu", "--plot-to", tmp_path / "all.svg")
    assert several.endswith(f"shows one operation, not {', '.join(OPERATIONS)}; name one OP, or use --plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in mistake(*RMSNORM, "--plot", code=1)


@pytest.fixture
def results(tmp_path) -> Path:
    """A results folder with two points of norm in fp32, as measured on a card called fake."""
    (row,) = run_json(*RMSNORM, "--no-peers", "--commit", "abc")["rows"]
    rows = [{**row, "shape": {"rows": n, "hidden": 512}, "floor_us": 0.1, "gpu": "Fake GPU"} for n in (8, 64)]
    file = tmp_path / "results" / "fake" / "norm.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return tmp_path / "results"


def test_bench_plot_draws_the_saved_rows_of_all_that_have_some(results, tmp_path):
    arguments = (
        "bench",
        "plot",
        "--results",
        results,
        "--gpu",
        "fake",
        "--dtype",
        "fp32",
        "--to",
        tmp_path / "pictures",
    )
    path = tmp_path / "pictures" / "norm.svg"
    result = run(*arguments)
    assert (result.stdout, result.stderr) == ("", f"drew {path}: 2 of 2 rows\n")
    first = path.read_bytes()
    assert b">norm on Fake GPU<" in first
    facts = run_json(*arguments)
    assert facts == {
        "plots": [{"op": "norm", "path": str(path), "dtype": "float32", "rest": {"hidden": 512}, "rows": 2}]
    }
    run("bench", "plot", "norm", *arguments[2:], "--dtype", "auto")
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["norm.svg"]


def test_bench_plot_draws_whole_models_beside_the_operations_and_in_the_folder_of_the_documents(
    results, tmp_path, monkeypatch
):
    rows = (Path(__file__).resolve().parents[1] / "results" / "h200" / "decode.jsonl").read_bytes()
    (results / "fake" / "decode.jsonl").write_bytes(rows)
    arguments = ("bench", "plot", "--results", results, "--gpu", "fake", "--dtype", "auto")
    facts = run_json(*arguments, "--to", tmp_path / "pictures")
    assert [Path(one["path"]).name for one in facts["plots"]] == ["norm.svg", "decode.svg"]
    monkeypatch.chdir(tmp_path)
    facts = run_json(*arguments)
    assert [one["path"] for one in facts["plots"]] == ["docs/ops/norm.svg", "docs/decode.svg"]
    (alone,) = run_json(*arguments[:2], "decode", *arguments[2:])["plots"]
    assert (alone["op"], alone["path"], alone["dtype"]) == ("decode", "docs/decode.svg", "float16")
    pictures = [tmp_path / folder / "decode.svg" for folder in ("pictures", "docs")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_bench_plot_warns_of_damaged_lines(results, tmp_path):
    with (results / "fake" / "norm.jsonl").open("a") as file:
        file.write('{"us": \n')
    arguments = ("bench", "plot", "--results", results, "--gpu", "fake", "--dtype", "auto", "--to", tmp_path)
    assert "1 damaged lines, left out" in run(*arguments).stderr
    assert (tmp_path / "norm.svg").exists()


def test_mistakes_of_bench_plot(results, tmp_path):
    options = ("--results", results, "--to", tmp_path / "pictures")
    assert f"there are {', '.join(OPERATIONS)}" in mistake("bench", "plot", "conv", *options)
    assert mistake("bench", "plot", *options, "--gpu", "b200").endswith(
        f"b200: no rows of {', '.join((*OPERATIONS, 'decode'))}"
    )
    assert mistake("bench", "plot", "w4a16", *options, "--gpu", "fake").endswith("w4a16.jsonl: no such file or folder")
    assert "--dtype" in mistake("bench", "plot", *options, "--gpu", "fake", "--dtype", "int8")
    line = mistake("bench", "plot", *options, "--gpu", "fake")
    assert line == "nybble: plot: dtype: expected one the rows of norm have, float32, got float16"
    assert not (tmp_path / "pictures").exists()


def test_bench_explain():
    output = run("bench", "explain", "norm", "--rows", 8, "--hidden", 4096, "--function", "add_rmsnorm").stdout
    assert "add_rmsnorm rows=8 hidden=4096 float16 on NVIDIA H200" in output
    assert "* " in output
    assert "reference" in output


@pytest.mark.parametrize("hardware", ["h200", "a100"])
def test_bench_explain_as_json(hardware):
    facts = run_json("bench", "explain", "w4a16", "--m", 48, "--n", 12288, "--k", 4096, "--hardware", hardware)
    assert facts["shape"] == {"m": 48, "n": 12288, "k": 4096, "group_size": 128}
    assert hardware.upper() in facts["hardware"]
    picked = [candidate for candidate in facts["candidates"] if candidate["picked"]]
    assert [candidate["variant"] for candidate in picked] == [facts["pick"]]
    assert picked[0]["us"] == min(c["us"] for c in facts["candidates"] if c["us"] is not None)


def test_bench_explain_shows_refusals_with_their_reasons():
    facts = run_json("bench", "explain", "w4a16", "--dtype", "float32")
    refused = [candidate for candidate in facts["candidates"] if candidate["refused"]]
    assert refused
    assert all(candidate["reason"] for candidate in refused)
    assert "refused" in run("bench", "explain", "w4a16", "--dtype", "float32").stdout


def test_bench_explain_of_8_bits():
    shape = ("w4a16", "--m", 1, "--n", 12288, "--k", 4096, "--hardware", "h200")
    four, eight = (run_json("bench", "explain", *shape, "--bits", bits) for bits in (4, 8))
    assert (four["options"], eight["options"]) == ({}, {"bits": 8})
    assert eight["bytes"] - four["bytes"] == 12288 * 4096 // 2
    assert "one of (4, 8), got 5" in mistake("bench", "explain", *shape, "--bits", 5)
    assert "of w4a16 only" in mistake("bench", "explain", "norm", "--bits", 8)
    single = run_json("bench", "run", "w4a16", 4, 64, 64, "--bits", 8, "--device", "cpu", "--quick")
    assert "bits=8" in single["case"] and not single["wrong"]


def test_mistakes_of_bench():
    assert f"there are {', '.join(OPERATIONS)}" in mistake("bench", "run", "conv")
    assert f"there are {', '.join(OPERATIONS)}" in mistake("bench", "explain", "conv")
    assert "it has rows, hidden" in mistake("bench", "explain", "norm", "--m", 8)
    assert "add_rmsnorm" in mistake("bench", "explain", "norm", "--function", "batchnorm")
    assert "h200, a100, current" in mistake("bench", "explain", "norm", "--hardware", "b200")
    assert "--dtype" in mistake("bench", "explain", "norm", "--dtype", "int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to explain")
def test_the_current_gpu_cannot_be_explained_where_there_is_none():
    assert "no CUDA device here" in mistake("bench", "explain", "norm", "--hardware", "current", code=1)


@pytest.mark.parametrize("process", [0, 1])
def test_commands_of_one_process(process: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.runtime.settings.PROCESSES", 2)
    monkeypatch.setattr("nybble.runtime.settings.PROCESS", process)
    result = run("ppl", code=2)
    said = "nybble: ppl runs in one process; torchrun is for generate and bench decode\n"
    assert (result.stdout, result.stderr) == ("", "" if process else said)


def test_a_lost_process_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer\nand where")
    assert console._exit_code(gone) is None  # of one process a bug
    monkeypatch.setattr("nybble.runtime.settings.PROCESSES", 2)
    assert console._exit_code(gone) == console._exit_code(torch.distributed.DistBackendError("NCCL")) == 1
    assert console._text(gone).startswith("another process has gone, or did not answer in time: [gloo/")
    assert "and where" not in console._text(gone) and console._exit_code(RuntimeError("a slip")) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, (1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, (0, 1)),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, (0, 1)),
    ],
)
def test_what_torchrun_says(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert settings._process() == expected
