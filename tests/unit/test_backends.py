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
