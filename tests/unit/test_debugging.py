"""The commands of docs/debugging.md that need no GPU, and the comparison of backends that stands behind them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import copy_bundle

pytest.importorskip("polygraphy")

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh ?(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
ENGINE = """
from benchmarks.gpu.compare import graph_inputs, tensorrt_network
from polygraphy.backend.trt import EngineBytesFromNetwork
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.bundle import load_bundle

bundle = load_bundle("digits-mar")
found = next(one for one in bundle_graphs(bundle.manifest) if one.label == "adapter.backbone")
network, config = tensorrt_network(bundle.path(found.graph), graph_inputs(bundle, found.graph))
print(len(bytes(EngineBytesFromNetwork(network, config)())))
"""


def process(*command, **variables):
    """A command in the repository, the interpreter's own scripts first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_page_has_blocks_of_every_kind():
    assert {kind for kind, _ in BLOCKS} == {"", "rtx", "fp16", "gpu"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """What the page calls B and M: copies, as onnx refuses weights that something else has linked."""
    folder = tmp_path_factory.mktemp("bundles")
    return {name: str(copy_bundle(folder / bundle, bundle)) for name, bundle in (("B", "digits"), ("M", "digits-mar"))}


@pytest.fixture
def check(bundles, tmp_path):
    """Runs a block of the page."""

    def check(block):
        done = process("bash", "-euc", block, W=str(tmp_path), **bundles)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[E]" not in done.stdout

    return check


@pytest.mark.parametrize("block", [pytest.param(block, id=block.split()[1]) for kind, block in BLOCKS if not kind])
def test_commands_that_run_anywhere(block, check):
    check(block)


@pytest.mark.parametrize("block", [pytest.param(block, id=block.split()[2]) for kind, block in BLOCKS if kind == "rtx"])
def test_commands_of_tensorrt_rtx(block, check):
    pytest.importorskip("tensorrt_rtx")
    check(block)


def test_commands_that_compare_precisions(check, bundles):
    if not (Path(bundles["B"]) / "target.denoise_step.fp16.onnx").is_file():
        pytest.skip("the embedded bundle has no fp16 variants")
    before = next(block for kind, block in reversed(BLOCKS) if not kind)
    check(before + next(block for kind, block in BLOCKS if kind == "fp16"))


def test_comparison_on_the_cpu(tmp_path):
    out = tmp_path / "differences.json"
    done = process(
        sys.executable, "-m", "benchmarks.gpu.compare", "digits", "--against", "onnxruntime", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    graphs = {one["graph"] for one in record["differences"]}
    assert {"target.backbone", "target.denoise_step", "adapter.backbone", "small.path_means"} <= graphs
    assert all(one["passed"] and one["largest"] < 1e-4 for one in record["differences"])
    assert any(one["largest"] > 0 for one in record["differences"])  # else it ran one session twice
    assert all(one["reference_std"] > 0.1 for one in record["differences"])


def test_comparison_without_a_gpu_says_so():
    done = process(sys.executable, "-m", "benchmarks.gpu.compare", "--against", "tensorrt", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "driver" in done.stderr


def test_the_comparison_builds_engines_without_a_gpu():
    pytest.importorskip("tensorrt_rtx")
    done = process(sys.executable, "-c", ENGINE, POLYGRAPHY_USE_TENSORRT_RTX="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1]) > 10**5
