"""The benchmark for GPUs, on the CPU: the same code with ONNX Runtime and PyTorch there."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import measure, report
from benchmarks.gpu.steps import measure_steps, timed_pipeline
from benchmarks.gpu.timing import Clock, TimedDevice, summary
from benchmarks.gpu.torch_device import TorchBackend, TorchDevice
from specdec_rt import Pipeline, load
from specdec_rt.backends.host import HostDevice
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle
from specdec_rt.decode import redraft

FOLDER = Path(report.__file__).parent
ON_CPU = ["--device", "cpu", "--batches", "1", "--repeats", "2", "--warmup", "1", "--precisions", "fp32"]
STEPS = ["target", "draft", "verify", "completion"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    measure.main(["--out", str(out), "--work", str(out / "work"), *ON_CPU, "--requests", "1"])
    return out


def test_every_step_is_timed_on_the_runtime_and_on_pytorch(measured):
    content = json.loads((measured / "steps.json").read_text())
    assert {"commit", "device", "driver", "versions"} <= content["machine"].keys()
    assert "clock" in content["settings"]
    found = [(row["backend"], row["step"]) for row in content["rows"]]
    assert found == [(backend, step) for backend in ("onnxruntime", "pytorch") for step in STEPS]
    for row in content["rows"]:
        assert (row["model"], row["precision"], row["batch"], row["captured"]) == ("digits", "fp32", 1, False)
        for times in (row["launch"], row["call"]):
            assert times["repeats"] == 2
            assert 0 < times["least_ms"] <= times["median_ms"] <= times["p95_ms"]
        assert row["launch"]["least_ms"] <= row["call"]["p95_ms"]


def test_rests_of_long_chains_are_timed_as_well(monkeypatch):
    monkeypatch.setattr(redraft, "LEAST", 3)
    pipeline, device = timed_pipeline(load_bundle("digits"), OnnxRuntimeBackend(threads=1))
    clock = Clock(repeats=2, warmup=1)
    rows = {row["step"]: row for row in measure_steps(pipeline, device, [2], clock)}
    assert list(rows) == ["target", "draft", "verify", "redraft", "completion"]
    assert rows["redraft"]["rows"] == rows["completion"]["rows"] == 2
    assert rows["redraft"]["launch"]["repeats"] == 2


def test_images_are_counted_in_every_mode(measured):
    rows = json.loads((measured / "throughput.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["target", "exact", "self"]
    assert all(row["images_per_second"] == pytest.approx(1 / row["seconds"][0], rel=0.01) for row in rows)


def test_the_report_shows_what_there_is(measured, tmp_path, monkeypatch, capsys):
    (tmp_path / "parts.tsv").write_text("doctor\t0\t3\ntests\t124\t150\nsteps of mar_huge\tno bundle\t0\n")
    case = '<testcase classname="tests.gpu.test_x" name="'
    (tmp_path / "junit.xml").write_text(
        f'<testsuites><testsuite>{case}one"><skipped message="no driver"/></testcase>{case}two"/>'
        f'{case}three"><properties><property name="relative_error" value="1e-6"/></properties>'
        '<failure message="too far"/></testcase></testsuite></testsuites>'
    )
    words = ["report", measured, "--parts", tmp_path / "parts.tsv", "--junit", tmp_path / "junit.xml"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    report.main()
    printed = capsys.readouterr().out
    assert "doctor.json: nothing to read" in printed
    assert "1 passed, 1 failed, 1 skipped" in printed
    assert "tests: stopped at its limit" in printed
    content = json.loads((measured / "tests.json").read_text())
    assert content["reasons"] == {"no driver": 1}
    figures = {"relative_error": "1e-6"}
    assert content["tests"] == [
        {"test": "test_x::three", "outcome": "failed", "said": "too far", "figures": figures},
    ]


def test_nothing_is_begun_too_late_and_other_models_are_kept(tmp_path):
    words = ["--out", str(tmp_path), "--what", "steps", *ON_CPU, "--limit", "0", "--models"]
    measure.main([*words, "digits,digits-mar"])
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["digits", "digits", "digits-mar", "digits-mar"]
    assert {row["skipped"] for row in rows} == {"out of time"}


def test_an_error_stands_in_its_row(tmp_path, monkeypatch):
    def broken(*_):
        raise MemoryError("the GPU is full")

    monkeypatch.setattr(TorchBackend, "open", broken)
    measure.main(["--out", str(tmp_path), "--work", str(tmp_path), "--what", "steps", *ON_CPU])
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert rows[-1]["error"] == "MemoryError: the GPU is full"
    assert [row["backend"] for row in rows] == ["onnxruntime"] * 4 + ["pytorch"]


@pytest.mark.parametrize("least", [3, 24])
@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_pytorch_does_the_same_work(name, least, monkeypatch):
    """Its tokens are those of the runtime's own backend, in lanes and padded rows as on a GPU."""
    monkeypatch.setattr(redraft, "LEAST", least)
    options = {"mode": "exact", "draft_length": 3} | ({"ar_steps": 6} if name == "digits-mar" else {"prefill": 0.7})
    bundle = load_bundle(name)
    device = TorchDevice("cpu", batch_buckets=(1, 4), graphs=True)
    found = Pipeline(bundle, TorchBackend.open(bundle, device, "fp32")).generate([3, 1, 4], seed=7, **options)
    expected = load(name, backend="onnxruntime").generate([3, 1, 4], seed=7, **options)
    assert np.abs(found.tokens - expected.tokens).max() <= 1e-3


def test_pytorch_in_half_precision_is_close():
    bundle = load_bundle("digits")
    device = TorchDevice("cpu", batch_buckets=(1,), graphs=False)
    engine, names = {}, ("fp32", "fp16")
    for precision in names:
        session = Pipeline(bundle, TorchBackend.open(bundle, device, precision)).session(measure_options())
        head = session.target.head
        rng = np.random.default_rng(0)
        shapes = (2, 3, head.z_dim), (3, head.token_dim), (3, head.chain.length, head.token_dim)
        z, start, noise = (rng.standard_normal(shape, np.float32) for shape in shapes)
        engine[precision] = head.sample(z, np.full((2, 3), 0.5), start, noise).path
    difference = np.linalg.norm(engine["fp16"] - engine["fp32"]) / np.linalg.norm(engine["fp32"])
    assert 1e-6 < difference <= 5e-3


def measure_options():
    from specdec_rt import DecodeOptions

    return DecodeOptions(mode="exact")


def test_a_slow_step_is_repeated_less_often():
    device = TimedDevice(HostDevice())
    launch = device.record([lambda: None])
    found = Clock(repeats=20, warmup=0, seconds=0.0, fewest=5).launches(device, launch, ["step"])
    assert found["step"]["repeats"] == found["call"]["repeats"] == 5


def test_a_summary_is_in_milliseconds():
    found = summary([0.001, 0.002, 0.003, 0.004, 0.1])
    assert (found["median_ms"], found["least_ms"], found["repeats"]) == (3.0, 1.0, 5)
    assert 4 < found["p95_ms"] <= 100


@pytest.mark.parametrize("script", ["prepare.sh", "run_all.sh"])
def test_scripts_parse(script):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    subprocess.run([bash, "-n", FOLDER / script], check=True)
