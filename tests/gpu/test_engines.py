"""Every graph of the embedded bundles on the GPU's backends, against ONNX Runtime on the CPU in single precision."""

import numpy as np
import pytest

from benchmarks.gpu.compare import graph_inputs
from export.agreement import PRECISION_TOLERANCE, TOLERANCE
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.bundle import load_bundle
from specdec_rt.errors import BackendError

pytestmark = pytest.mark.gpu

LIMIT = {"fp32": TOLERANCE, **PRECISION_TOLERANCE}
"""Relative L2 error, that which exporting allows."""
BUNDLES = {name: load_bundle(name) for name in ("digits", "digits-mar")}
GRAPHS = [(name, slot) for name, bundle in BUNDLES.items() for slot in bundle_graphs(bundle.manifest)]


@pytest.fixture(scope="module")
def backends(opened):
    """Gives the backend of a bundle, in a precision, always the same one."""
    made = {}

    def one(name, backend, precision):
        if (name, backend, precision) not in made:
            made[name, backend, precision] = opened(BUNDLES[name], backend, precision=precision)
        return made[name, backend, precision]

    return one


def run(backend, bundle, graph, inputs, *, in_place=False):
    """The graph's outputs by name; its first call's, and those of its second, which may be a replay.

    In place, outputs of caches lie where their inputs do, as in decoding.
    """
    device, engine = backend.device, backend.load(bundle.path(graph))
    sizes = {
        size: found
        for binding in graph.inputs
        for size, found in zip(binding.shape, inputs[binding.name].shape, strict=True)
    }
    staged = {name: device.zeros(array.shape, array.dtype.type) for name, array in inputs.items()}
    outputs = {}
    for binding in graph.outputs:
        cache = binding.name.removesuffix("_out")
        shape = tuple(sizes.get(size, size) for size in binding.shape)
        outputs[binding.name] = staged[cache] if in_place and cache in staged else device.zeros(shape, np.float32)
    for name, array in inputs.items():
        staged[name][...] = array
    up, call, down = device.upload(*staged.values()), engine.bind(staged, outputs), device.download(*outputs.values())
    found = []
    for _ in range(2):
        up()
        call()
        down()
        device.wait()
        found.append({name: array.copy() for name, array in outputs.items()})
        for name, array in inputs.items():
            staged[name][...] = array
    return found


def error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("name", "slot"), GRAPHS, ids=[f"{name}-{slot.label}" for name, slot in GRAPHS])
def test_a_graph_agrees_with_the_cpu(backends, backend, name, slot, precision, record_property):
    bundle = BUNDLES[name]
    inputs = graph_inputs(bundle, slot.graph)
    expected, _ = run(OnnxRuntimeBackend(), bundle, slot.graph, inputs)
    try:
        first, second = run(backends(name, backend, precision), bundle, slot.graph, inputs)
    except BackendError as refused:
        if (backend, precision) != ("cuda", "bf16"):
            raise
        pytest.skip(f"ONNX Runtime has not every operation in bf16: {refused}")
    errors = {output: error(first[output], expected[output]) for output in expected}
    record_property("relative_error", max(errors.values()))
    assert max(errors.values()) <= LIMIT[precision], errors
    for output in expected:
        np.testing.assert_array_equal(second[output], first[output])


@pytest.mark.parametrize("owner", ["target", "adapter", "small"])
def test_caches_are_updated_in_place(backends, backend, owner):
    """Keys and values that land where the old ones lie are those that land elsewhere."""
    bundle = BUNDLES["digits"]
    slot = next(slot for _, slot in GRAPHS if slot.label == f"{owner}.backbone")
    if not backends("digits", backend, "fp32").load(bundle.path(slot.graph)).in_place:
        pytest.skip(f"{backend} does not promise it, and is not asked to")
    inputs = graph_inputs(bundle, slot.graph)
    apart, _ = run(backends("digits", backend, "fp32"), bundle, slot.graph, inputs)
    for found in run(backends("digits", backend, "fp32"), bundle, slot.graph, inputs, in_place=True):
        for output, expected in apart.items():
            assert error(found[output], expected) <= 1e-6, output
