"""What each verb does with a small model, on our engine and on others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vivace import choice
from vivace.base.knobs import knobs
from vivace.cli.bench import Wanted, gather_inputs, measure
from vivace.cli.contestants import Job
from vivace.measure.bench import Settings
from vivace.measure.compare import Tolerance

SHAPES = "x:2x8,ids:2x3"


@pytest.mark.parametrize("provider", ["native,onnxruntime", "onnxruntime"])
def test_run_compares(cli, model: Path, provider: str) -> None:  # type: ignore[no-untyped-def]
    result = cli("run", model, "--shapes", SHAPES, "--provider", provider, "--against", "onnxruntime", "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["schema_version"] == 1
    assert data["outputs"]["y"]["shape"] == [2, 4]
    assert data["outputs"]["n"]["dtype"] == "int64"
    assert [d["n_over"] for d in data["differences"]] == [0, 0]


def test_run_with_files(cli, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "rest.npz", ids=np.arange(6).reshape(3, 2))
    saved = tmp_path / "out.npz"
    result = cli(
        "run", model, "--provider", "onnxruntime", "-o", saved,
        "--input", f"x={tmp_path / 'x.npy'}", "--input", tmp_path / "rest.npz",
    )  # fmt: skip
    assert result.code == 0, result.err
    with np.load(saved) as outputs:
        np.testing.assert_array_equal(outputs["n"], [1, 5, 9])
        np.testing.assert_allclose(outputs["y"].sum(1), 1, rtol=1e-6)
    assert "output" in result.out


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        (["--input", "z={x}"], "no input 'z'"),
        (["--input", "x={wide}"], "does not fit"),
        (["--input", "x={double}"], "float64"),
        (["--input", "x={broken}"], "cannot read an array"),
        (["--input", "x={x}", "--shapes", "ids:3x2"], "other inputs make it 2"),
        (["--shapes", "x:2x9"], "does not fit"),
        (["--shapes", "q:2"], "no input 'q'"),
        (["--shapes", "x:2x8", "--shapes", "x:3x8"], "given twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_run_refuses_inputs(cli, model: Path, tmp_path: Path, extra: list[str], part: str) -> None:  # type: ignore[no-untyped-def]
    files = {"x": np.zeros((2, 8), np.float32), "wide": np.zeros((2, 9), np.float32), "double": np.zeros((2, 8))}
    paths = {name: tmp_path / f"{name}.npy" for name in (*files, "broken")}
    for name, array in files.items():
        np.save(paths[name], array)
    paths["broken"].write_bytes(b"\x93NUMPY garbage")
    result = cli("run", model, "--provider", "onnxruntime", *(text.format(**paths) for text in extra))
    assert result.code == 2
    assert part in result.err


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"hello", "no file of NumPy's"),
        (b"", "No data left"),
        (b"PK\x03\x04 cut off", "not a zip file"),
        (None, "No such file"),
    ],
    ids=["text", "empty", "cut off", "missing"],
)
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_files_of_arrays_that_are_none(  # type: ignore[no-untyped-def]
    cli, model: Path, tmp_path: Path, name: str, content: bytes | None, part: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = cli("run", model, "--provider", "onnxruntime", "--input", path if name == "x.npz" else f"x={path}")
    assert result.code == 2
    assert str(path) in result.err and f"Expected a {path.suffix} file." in result.err and part in result.err
    assert "pickle" not in result.err


@pytest.mark.parametrize("size", [1 << 40, 10**20])
def test_absurd_shapes_are_refused(cli, model: Path, size: int) -> None:  # type: ignore[no-untyped-def]
    result = cli("run", model, "--provider", "onnxruntime", "--shapes", f"x:{size}x8")
    assert result.code == 2
    assert f"input 'x': an array of {size}x8 is too large. Expected at most" in result.err


def test_one_document_where_a_gate_fails(cli, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    np.savez(tmp_path / "in.npz", x=np.full((2, 8), 1e30, np.float32), ids=np.ones((2, 3), np.int64))
    result = cli("run", model, "--input", tmp_path / "in.npz", "--against", "onnxruntime", "--atol", -1, "--json")
    assert result.code == 1 and "differ" in result.err
    assert json.loads(result.out)["differences"]


def test_gate_of_run(cli, model: Path) -> None:  # type: ignore[no-untyped-def]
    from vivace.cli import run_model

    different = {"y": np.ones(2, np.float32)}
    from vivace.measure.compare import compare

    with pytest.raises(Exception, match="differ") as raised:
        run_model._judge(compare(different, {"y": np.zeros(2, np.float32)}), "onnxruntime", as_json=True)
    assert getattr(raised.value, "exit_code", None) == 1


def test_inspect(cli, model: Path) -> None:  # type: ignore[no-untyped-def]
    result = cli("inspect", model, "--shapes", SHAPES, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["inputs"] == ["x: f32[N,8]", "ids: i64[N,M]"]
    assert data["onnx_ops"] == {"MatMul": 1, "Add": 1, "Relu": 1, "Softmax": 1, "ReduceSum": 1}
    assert data["n_parameters"] == 8 * 4 + 4
    assert data["opsets"] == {"": 17}
    product = next(layer for layer in data["layers"] if layer["op"] == "matmul")
    assert (product["name"], product["flops"], product["weight_bytes"]) == ("product", 2 * 2 * 8 * 4, 8 * 4 * 4)
    assert data["elsewhere"] == []
    text = cli("inspect", model, "--shapes", SHAPES).out
    assert "every node would run natively" in text


def test_inspect_draws(cli, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    page = tmp_path / "graph.html"
    assert cli("inspect", model, "--html", page).code == 0
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "matmul" in text


def test_bench_measures_and_checks(model: Path) -> None:
    arrays, job = gather_inputs(Job(model, 1, shapes={"x": (2, 8), "ids": (2, 3)}), (), 0)
    settings = Settings(budget_seconds=0.0, least_rounds=8, turn_seconds=0.0, least_calls=2)
    wanted = Wanted(("native,onnxruntime", "onnxruntime"), settings, Tolerance(), memory=True, limit=False)
    report = measure(job, arrays, wanted)
    ours, theirs = report.bench.engines
    assert ours.agrees and theirs.agrees
    assert ours.calls.shape == theirs.calls.shape == (8, 2)
    assert theirs.ratio is not None and theirs.ratio.low is not None
    assert report.cold["vivace"].peak_bytes > report.cold["vivace"].base_bytes > 1 << 20
    data = json.loads(json.dumps(report.to_dict()))
    assert [engine["name"] for engine in data["engines"]] == ["vivace", "onnxruntime"]
    assert data["engines"][0]["percentiles"]["p99"]["high"] is None  # 16 samples prove nothing about a tail
    assert data["best_ratio"] > 0


def test_bench_refuses_unknown_engines(cli, model: Path) -> None:  # type: ignore[no-untyped-def]
    result = cli("bench", model, "--shapes", SHAPES, "--against", "tensorflow")
    assert result.code == 2
    assert "one of onnxruntime, openvino" in result.err


def test_bench_prints(cli, model: Path) -> None:  # type: ignore[no-untyped-def]
    result = cli(
        "bench", model, "--shapes", SHAPES, "--budget", 0, "--no-memory", "--no-limit", "--provider", "onnxruntime",
        "--against", "", "--threads", 1,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "onnxruntime" in result.out and "measured 8 rounds" in result.out


def test_bench_gate(cli, model: Path) -> None:  # type: ignore[no-untyped-def]
    result = cli(
        "bench", model, "--shapes", SHAPES, "--budget", 0, "--no-memory", "--no-limit", "--max-ratio", 0, "-t", 1,
    )  # fmt: skip
    assert result.code == 1
    assert "expected at most 0" in result.err.lower()


def test_sys(cli) -> None:  # type: ignore[no-untyped-def]
    result = cli("sys", "--no-peaks", "--json")
    assert result.code == 0
    data = json.loads(result.out)
    assert data["machine"]["cores"] >= 1
    assert {engine["name"] for engine in data["engines"]} == {"onnxruntime", "openvino"}
    assert "CPU" in cli("sys", "--no-peaks").out


def test_opt_runs_chosen_passes(cli, model: Path) -> None:  # type: ignore[no-untyped-def]
    result = cli("opt", model, "-p", "remove_dead,simplify", "--time")
    assert result.code == 0, result.err
    assert "# remove_dead:" in result.out and "# simplify:" in result.out
    assert "matmul" in result.out
    data = json.loads(cli("opt", model, "-p", "remove_dead,simplify", "--json", "--print-between").out)
    assert [item["pass"] for item in data["passes"]] == ["remove_dead", "simplify"]
    assert data["passes"][-1]["graph"] == data["graph"] and "matmul" in data["graph"]


def test_optimize(cli, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "smaller.onnx"
    result = cli("optimize", model, out, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["nodes_after"] <= data["nodes_before"] == 5
    assert data["largest_error"] is not None and data["largest_error"] < 1e-5
    assert cli("run", out, "--shapes", SHAPES, "--provider", "native", "--against", "onnxruntime").code == 0
    dry = tmp_path / "dry.onnx"
    result = cli("optimize", model, dry, "--dry-run")
    assert result.code == 0 and "wrote nothing" in result.out
    assert not dry.exists()
    assert cli("optimize", model).code == 2
    explained = cli("optimize", model, "--dry-run", "--explain", "fuse_attention")
    assert "fuse_attention fired 0 times and nearly fired nowhere" in explained.out
    unknown = cli("optimize", model, "--dry-run", "--disable", "fuse_atention")
    assert unknown.code == 2 and "Try: fuse_attention" in unknown.err
    no_rule = cli("optimize", model, "--dry-run", "--explain", "simplify")
    assert no_rule.code == 2 and "Expected a rule" in no_rule.err


@pytest.mark.parametrize("verb", ["compile", "reduce"])
def test_no_model_is_replaced_by_what_is_made_of_it(cli, model: Path, verb: str) -> None:  # type: ignore[no-untyped-def]
    before = model.read_bytes()
    refused = cli(verb, model, "-o", model)
    assert refused.code == 2 and "is the model itself. Expected another file" in refused.err
    assert model.read_bytes() == before


def test_compile_then_run_and_inspect(cli, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    engine = tmp_path / "small.vivace"
    result = cli("compile", model, "-o", engine, "--threads", 1)
    assert result.code == 0, result.err
    assert " native, 0 in other engines" in result.out
    assert engine.stat().st_size > 1000
    found = cli("run", engine, "--shapes", SHAPES, "--json", "--threads", 1)
    assert found.code == 0, found.err
    assert json.loads(found.out)["outputs"]["y"]["shape"] == [2, 4]
    seen = cli("inspect", engine, "--json")
    assert seen.code == 0, seen.err
    assert {place["provider"] for place in json.loads(seen.out)["placement"]} == {"native"}
    shown = cli("inspect", engine)
    assert shown.code == 0 and "5 ONNX nodes run natively (--layers shows" in shown.out and "->" not in shown.out
    assert "-> " in cli("inspect", engine, "--layers").out
    assert cli("run", engine, "--provider", "onnxruntime").code == 2
    for without_effect in (["--precision", "bf16"], ["--target", "sse"], ["--level", "0"], ["--tune", "fast"]):
        refused = cli("run", engine, *without_effect)
        assert refused.code == 2 and f"{without_effect[0]}: a saved engine stays as it was compiled" in refused.err
    unnamed = tmp_path / "small"  # an engine is known by its first bytes too
    unnamed.write_bytes(engine.read_bytes())
    assert cli("run", unnamed, "--shapes", SHAPES, "--threads", 1).code == 0
    alone = cli("bench", engine, "--shapes", SHAPES, "--budget", 0, "--no-memory", "-t", 1)
    assert alone.code == 0 and "measured 8 rounds" in alone.out and "onnxruntime" not in alone.out, alone.err
    refused = cli("bench", engine, "--against", "onnxruntime")
    assert refused.code == 2 and "--against: a saved engine has no other engine to compare with" in refused.err
    for verb in (["compile"], ["optimize", "--dry-run"], ["opt"], ["reduce"]):
        refused = cli(*verb, unnamed)
        assert refused.code == 2 and "small: is a saved engine. Expected an ONNX model." in refused.err, verb
    engine.write_bytes(engine.read_bytes()[:500])
    broken = cli("run", engine)
    assert broken.code == 2 and "small.vivace" in broken.err


@pytest.mark.parametrize("verb", ["run", "bench", "reduce"])
def test_precision_by_layer_belongs_to_compile(cli, model: Path, verb: str) -> None:  # type: ignore[no-untyped-def]
    refused = cli(verb, model, "--precision", "auto")
    assert refused.code == 2 and "vivace compile" in refused.err and "max_drop" not in refused.err
    refused = cli(verb, model, "--precision", "fp16")
    assert refused.code == 2 and refused.err.endswith("Expected f32, bf16, f16.\n")


def test_precision_by_layer(cli, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    engine, samples = tmp_path / "small.vivace", tmp_path / "samples.npz"
    np.savez(samples, x=np.ones((3, 8), np.float32), ids=np.ones((3, 2), np.int64))
    auto = ("compile", model, "-o", engine, "--threads", 1, "--precision", "auto")
    refused = cli(*auto)
    assert refused.code == 2 and "max_drop" in refused.err
    refused = cli(*auto, "--max-drop", 0.01, "--calibration", tmp_path / "none.npz")
    assert refused.code == 2 and "none.npz" in refused.err
    with knobs.scope(emulate=True):
        made = cli(*auto, "--max-drop", 0.01, "--metric", "top1", "--calibration", samples)
    assert made.code == 0 and "layers are narrow; top1 error" in made.out and "on 1 given inputs" in made.out
    shown = cli("inspect", engine)
    assert shown.code == 0 and "precision by layer" in shown.out and "1 given inputs" in shown.out
    assert "product" in shown.out.split("precision by layer")[1].split("softmax")[0]


@pytest.mark.parametrize("verb", ["run", "bench", "inspect", "compile", "opt", "reduce"])
@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
def test_damaged_models(cli, model: Path, tmp_path: Path, verb: str, content: bytes | None) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.onnx"
    path.write_bytes(model.read_bytes()[:100] if content is None else content)
    result = cli(verb, path)
    assert result.code == 2
    assert result.err.startswith("error: bad.onnx: ") and result.err.count("\n") == 1
    assert [item.name for item in tmp_path.iterdir()] == ["bad.onnx"]


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize(
    "arguments",
    ["optimize MODEL out.onnx", "inspect MODEL --html out.html", "compile MODEL -o out.vivace"],
    ids=["optimize", "inspect", "compile"],
)
def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, arguments: str) -> None:
    script = (
        "import resource, signal, sys, vivace.cli.app as app\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "sys.exit(app.run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *arguments.replace("MODEL", str(model)).split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: out.") and "File too large" in last and "Try: " in last
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_refused_before_the_work(  # type: ignore[no-untyped-def]
    cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere, device = tmp_path / "no" / "out", Path("/dev/null")
    for arguments in (
        ("compile", model, "-o"), ("run", model, "-o"), ("optimize", model), ("inspect", model, "--html"),
        ("bench", model, "--html"), ("demo", "-o"),
    ):  # fmt: skip
        for place in (nowhere, device):
            result = cli(*arguments, place)
            assert result.code == 2, arguments
            assert str(place.parent if place is nowhere else place) in result.err
    assert device.is_char_device()
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)  # as for one who may write nowhere
    result = cli("compile", model, "-o", tmp_path / "x.vivace")
    assert result.code == 2 and f"{tmp_path}: the folder may not be written" in result.err


def test_compile_says_who_was_chosen(  # type: ignore[no-untyped-def]
    cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_SETTINGS", replace(choice._SETTINGS, budget_seconds=0.05))
    auto = ("compile", model, "-o", tmp_path / "m.vivace", "--provider", "auto", "--threads", 1)
    made = cli(*auto)
    assert made.code == 0 and "  provider auto chose " in made.out and "native 0." in made.out
    assert {"native", "onnxruntime"} <= json.loads(cli(*auto, "--json").out)["auto_ms"].keys()
