"""TensorRT's engines bound to buffers; a GPU and an `ICudaEngine` that are not here are replaced by fakes."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cuda import FakeCuda

from specdec_rt.backends.base import BackendName
from specdec_rt.backends.cuda import CudaDevice
from specdec_rt.backends.tensorrt_engine import TensorRTEngine
from specdec_rt.backends.tensorrt_module import Capabilities, TensorRTModule
from specdec_rt.errors import BackendError

NAMES = SimpleNamespace(
    TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
)
"""What of TensorRT's own names an engine needs."""
CAPABILITIES = Capabilities(
    strongly_typed_only=True,
    compute_capabilities=(),
    user_allocation=False,
    runtime_cache=False,
    timing_cache=True,
    editable_timing_cache=True,
    attention=True,
    progress_monitor=True,
)
TENSORRT = TensorRTModule(BackendName.TENSORRT, NAMES, "11.4", CAPABILITIES)
SCRATCH_BYTES = 1000


class Context:
    """An `IExecutionContext` that notes what it is told."""

    def __init__(self, strategy):
        self.strategy, self.shapes, self.addresses, self.memory, self.streams = strategy, {}, {}, None, []
        self.works = True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self):
        return SCRATCH_BYTES

    def set_device_memory(self, address, size):
        self.memory = address, size

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        self.streams.append(stream)
        return self.works


class CudaEngine:
    """An `ICudaEngine` from x `[R, 3]` to y `[R, 3]`, built for one to eight rows."""

    num_io_tensors = 2

    def __init__(self):
        self.contexts = []

    def get_tensor_name(self, index):
        return "xy"[index]

    def get_tensor_mode(self, name):
        return {"x": "input", "y": "output"}[name]

    def get_tensor_dtype(self, name):  # noqa: ARG002  # as TensorRT has it
        return "DataType.FLOAT"

    def get_tensor_shape(self, name):  # noqa: ARG002
        return (-1, 3)

    def get_tensor_profile_shape(self, name, profile):
        assert (name, profile) == ("x", 0)
        return [(1, 3), (4, 3), (8, 3)]

    def create_runtime_config(self):
        config = SimpleNamespace()
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "allocation", strategy)
        return config

    def create_execution_context(self, strategy):
        self.contexts.append(Context(strategy))
        return self.contexts[-1]


@pytest.fixture
def device(monkeypatch):
    FakeCuda().install(monkeypatch)
    return CudaDevice(batch_buckets=(1,), graphs=True)


@pytest.fixture
def library():
    return CudaEngine()


@pytest.fixture
def engine(device, library):
    return TensorRTEngine(TENSORRT, device, library, Path("x.onnx"))


def bind(engine, device, rows, dtype=np.float32):
    x, y = (device.zeros((rows, 3), dtype) for _ in range(2))
    return engine.bind({"x": x}, {"y": y}), x, y


def test_inputs_and_outputs_are_the_librarys(engine):
    assert (engine.inputs, engine.outputs) == ({"x"}, {"y"})
    assert not engine.in_place


def test_a_call_runs_on_the_devices_buffers_and_stream(engine, device, library):
    call, x, y = bind(engine, device, 5)
    call()
    (context,) = library.contexts
    assert context.addresses == {"x": device.address(x), "y": device.address(y)}
    assert context.streams == [device.stream.handle]


def test_each_set_of_shapes_has_one_context(engine, device, library):
    calls = [bind(engine, device, rows) for rows in (5, 5, 6)]
    assert [context.shapes for context in library.contexts] == [{"x": (5, 3)}, {"x": (6, 3)}]
    for call, *_ in calls:
        call()
    assert [len(context.streams) for context in library.contexts] == [2, 1]


def test_engines_share_their_scratch_memory(engine, device, library):
    other = TensorRTEngine(TENSORRT, device, library, Path("other.onnx"))
    bind(engine, device, 5)
    bind(other, device, 6)
    first, second = library.contexts
    assert first.strategy == "user managed"
    assert first.memory == second.memory == (device.scratch(SCRATCH_BYTES), SCRATCH_BYTES)


def test_kernels_that_are_compiled_when_first_run_are_not_compiled_in_the_background(device, library):
    """A captured graph would keep the kernel that was there first."""
    rtx = replace(TENSORRT, capabilities=replace(CAPABILITIES, runtime_cache=True))
    bind(TensorRTEngine(rtx, device, library, Path("x.onnx")), device, 5)
    config = library.contexts[0].strategy
    assert config.allocation == "user managed"
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager"


@pytest.mark.parametrize(
    ("rows", "dtype", "said"),
    [
        (9, np.float32, "x has shape (9, 3), but its engine was built for (1, 3) to (8, 3); build it with a recipe"),
        (5, np.int64, "x is float32 (-1, 3); was bound to int64 (5, 3)"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(engine, device, rows, dtype, said):
    with pytest.raises(BackendError, match=re.escape(said)):
        bind(engine, device, rows, dtype)


def test_a_missing_buffer_is_refused(engine, device):
    with pytest.raises(BackendError, match=r"x\.onnx has the outputs \['y'\], was bound to \[\]"):
        engine.bind({"x": device.zeros((5, 3), np.float32)}, {})


def test_a_call_that_fails_says_so(engine, device, library):
    call, *_ = bind(engine, device, 5)
    library.contexts[0].works = False
    with pytest.raises(BackendError, match=r"TensorRT 11\.4 failed while it ran x\.onnx"):
        call()
