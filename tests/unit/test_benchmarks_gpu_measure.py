"""The benchmark for GPUs, on the CPU: the same code with ONNX Runtime and PyTorch there."""

import json
import logging
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch_threads import one_torch_thread

from benchmarks.gpu import measure
from benchmarks.gpu.backends import Candidate, candidates
from benchmarks.gpu.measure import measured_rows
from benchmarks.gpu.steps import measure_steps, timed_pipeline
from benchmarks.gpu.timing import Clock, Deadline
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle
from specdec_rt.plan import Tuning

FOLDER = Path(measure.__file__).parent
ON_CPU = ["--device", "cpu", "--batches", "1", "--repeats", "2", "--warmup", "1", "--precisions", "fp32"]
STEPS = ["target", "draft", "verify", "finish"]
LATER = Deadline.after(1e9)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a run's results."""
    out = tmp_path_factory.mktemp("out")
    measure.main(["--out", str(out), "--work", str(out / "work"), *ON_CPU, "--requests", "1"])
    return out


def rows_of(folder, what):
    return json.loads((folder / f"{what}.json").read_text())["rows"]


def test_a_file_says_what_its_figures_were_measured_on(measured):
    content = json.loads((measured / "steps.json").read_text())

    assert {"commit", "device", "driver", "versions"} <= content["machine"].keys()
    assert "clock" in content["settings"]


def test_every_step_is_timed_on_the_runtime_and_on_pytorch(measured):
    rows = rows_of(measured, "steps")

    found = [(row["backend"], row["step"]) for row in rows]
    assert found == [(backend, step) for backend in ("onnxruntime", "pytorch") for step in STEPS]
    for row in rows:
        assert (row["model"], row["precision"], row["batch"], row["captured"]) == ("digits", "fp32", 1, False)
        for times in (row["launch"], row["call"]):
            assert times["repeats"] == 2
            assert 0 < times["least_ms"] <= times["median_ms"] <= times["p95_ms"]
        assert row["launch"]["least_ms"] <= row["call"]["p95_ms"]


def test_images_are_counted_in_every_mode(measured):
    rows = rows_of(measured, "throughput")

    assert [row["mode"] for row in rows] == ["target", "exact", "self"]
    assert all(row["images_per_second"] == pytest.approx(1 / row["seconds"][0], rel=0.01) for row in rows)


def test_suffixes_that_are_long_enough_are_also_resumed():
    tuning = Tuning(min_resume_steps=3)
    pipeline, device = timed_pipeline(load_bundle("digits"), OnnxRuntimeBackend(threads=1), tuning)

    rows = {row["step"]: row for row in measure_steps(pipeline, device, [2], Clock(repeats=2, warmup=1))}

    assert list(rows) == ["target", "draft", "verify", "resume", "finish"]
    for step in ("resume", "finish"):
        assert (rows[step]["rows"], rows[step]["chain"], rows[step]["launch"]["repeats"]) == (2, 12, 2)


# --- what goes wrong -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullGpu(Candidate):
    """A candidate that cannot be opened."""

    def open(self, bundle):
        raise MemoryError(f"no room for {bundle.manifest.name}")


@pytest.fixture
def candidate(tmp_path):
    (found,) = candidates("cpu", [1], ["fp32"], tmp_path, pytorch=False)
    return found


def test_an_error_stands_in_the_row_of_what_failed_and_others_are_measured(candidate):
    full = FullGpu(**{**vars(candidate), "backend": "full"})

    rows = list(measured_rows(load_bundle("digits"), [full, candidate], lambda _: iter([{"step": "none"}]), LATER))

    assert [row["backend"] for row in rows] == ["full", "onnxruntime"]
    assert rows[0]["error"] == "MemoryError: no room for digits"
    assert rows[1]["step"] == "none"


def test_what_the_runtime_warns_of_stands_in_the_rows_of_that_backend(candidate):
    def measure_with_a_warning(backend):
        logging.getLogger("specdec_rt").warning("%s cannot be captured", backend.name)
        yield {}

    (row,) = measured_rows(load_bundle("digits"), [candidate], measure_with_a_warning, LATER)

    assert row["warnings"] == ["onnxruntime cannot be captured"]


def test_nothing_begins_when_the_time_is_over(candidate):
    others = [candidate, replace(candidate, precision="fp16")]

    rows = list(measured_rows(load_bundle("digits"), others, pytest.fail, Deadline.after(-1)))

    assert [(row["precision"], row["skipped"]) for row in rows] == [("fp32", "out of time"), ("fp16", "out of time")]


def test_rows_of_other_models_are_kept(tmp_path):
    words = ["--out", str(tmp_path), "--what", "steps", *ON_CPU, "--limit", "0"]
    for model in ("digits", "digits-mar", "digits"):
        measure.main([*words, "--models", model])

    assert [row["model"] for row in rows_of(tmp_path, "steps")] == ["digits-mar"] * 2 + ["digits"] * 2


@pytest.mark.parametrize("script", ["prepare.sh", "run_all.sh"])
def test_scripts_parse(script):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    subprocess.run([bash, "-n", FOLDER / script], check=True)
