"""ONNX Runtime behind the Engine protocol."""

import gc
import weakref

import numpy as np
import pytest

from specdec_rt import load
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.errors import BackendError


@pytest.fixture(scope="module")
def bundle():
    return load().bundle


@pytest.fixture(scope="module")
def engine(bundle):
    return OnnxRuntimeBackend(threads=1).load(bundle.path(bundle.manifest.target.graphs["time_embedding"]))


def buffers(rows):
    return {"timestep": np.arange(rows)}, {"time_table": np.empty((rows, 256), np.float32)}


def test_a_call_reads_and_writes_its_buffers_in_place(engine):
    inputs, outputs = buffers(3)
    call = engine.bind(inputs, outputs)
    call()
    before = outputs["time_table"].copy()
    inputs["timestep"][:] = inputs["timestep"][::-1].copy()
    call()
    np.testing.assert_allclose(outputs["time_table"], before[::-1], rtol=1e-5, atol=1e-6)


def test_buffers_live_as_long_as_their_call(engine):
    inputs, outputs = buffers(3)
    call = engine.bind(inputs, outputs)
    kept = [weakref.ref(inputs["timestep"]), weakref.ref(outputs["time_table"])]
    del inputs, outputs
    gc.collect()
    assert all(reference() is not None for reference in kept)
    del call
    gc.collect()
    assert all(reference() is None for reference in kept)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"timestep": np.zeros(3, np.float32)}, "was bound to float32"),
        ({"timestep": np.zeros((3, 1), np.int64)}, r"was bound to int64 \(3, 1\)"),
        ({"timestep": np.arange(6)[::2]}, "not contiguous"),
        ({"time": np.arange(3)}, r"has the inputs \['timestep'\], was bound to \['time'\]"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(engine, inputs, said):
    with pytest.raises(BackendError, match=said):
        engine.bind(inputs, buffers(3)[1])


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"cannot load .*noise\.onnx"):
        OnnxRuntimeBackend().load(path)


def test_a_small_graph_takes_few_rows_to_one_core(bundle):
    """And many to all cores; what comes out is the same."""
    graphs = bundle.manifest.drafts["small"].graphs
    step = OnnxRuntimeBackend(threads=2).load(bundle.path(graphs["modulation"]))
    rng = np.random.default_rng(0)
    made = {}
    for pairs in (2, 400):
        inputs = {
            "z": rng.standard_normal((2, 1, 96), np.float32),
            "row": np.zeros(pairs, np.int64),
            "time_table": rng.standard_normal((23, 128), np.float32),
            "step": np.arange(pairs) % 23,
        }
        made[pairs] = np.empty((2 * pairs, 1024), np.float32)
        rng = np.random.default_rng(0)
        made[pairs, "session"] = step.bind(inputs, {"modulation": made[pairs]})
        made[pairs, "session"]()

    assert made[2, "session"].session is not made[400, "session"].session
    np.testing.assert_allclose(made[2], made[400][:4], rtol=1e-5, atol=1e-6)


def test_a_large_graph_takes_few_rows_to_all_cores(bundle):
    large = OnnxRuntimeBackend(threads=2).load(bundle.path(bundle.manifest.target.graphs["backbone"]))
    few, many = ({"z": np.zeros((1, rows, 96), np.float32)} for rows in (1, 1000))
    assert large.session_for(few) is large.session_for(many)


def test_one_thread_needs_one_session(bundle):
    small = OnnxRuntimeBackend(threads=1).load(bundle.path(bundle.manifest.drafts["small"].graphs["modulation"]))
    few, many = ({"modulation": np.zeros((rows, 1024), np.float32)} for rows in (1, 1000))
    assert small.session_for(few) is small.session_for(many)
