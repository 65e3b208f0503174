"""A CUDA driver and a GPU in host memory, as far as `backends` uses them.

It takes the place of the outside world (the cuda-bindings and cuda-core packages), never of code of this project.
Device memory is apart from pinned memory. Work on a stream is queued and done when somebody waits, so a test sees a
host that writes too early or reads too soon. What a capture forbids raises an error. Kernels are the shipped source,
compiled for the host by `tests/unit/test_cuda.py`, or these plain versions of it.
"""

import ctypes
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from specdec_rt.backends.base import Limits
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend


def at(address, shape, dtype=np.float32, strides=None):
    """Memory as an array; strides in values."""
    steps = None if strides is None else [step * np.dtype(dtype).itemsize for step in strides]
    reach = np.prod(shape) if steps is None else sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True)) + 1
    raw = (ctypes.c_char * (max(int(reach), 1) * np.dtype(dtype).itemsize)).from_address(address)
    return np.ndarray(shape, dtype, buffer=memoryview(raw), strides=steps)


def copy_view(to, of, count, *numbers):
    shape = (count // int(np.prod(numbers[:3])), *numbers[:3])
    at(to, shape, strides=numbers[3:7])[...] = at(of, shape, strides=numbers[7:])


def gather_rows(to, of, index, count, width):
    rows = at(index, (count // width,), np.int64)
    at(to, (len(rows), width))[...] = at(of, (int(rows.max()) + 1, width))[rows]


def scatter_rows(to, of, index, count, width):
    rows = at(index, (count // width,), np.int64)
    at(to, (int(rows.max()) + 1, width))[rows] = at(of, (len(rows), width))


def combine(to, p, q, r, s, count, *factors):
    terms = zip(factors, (p, q, r, s), strict=True)
    at(to, (count,))[:] = sum(factor * np.float64(at(array, (count,))) for factor, array in terms)


def recur_rows(path, mean, noise, state, next_state, first_mean, begins, ends, factors, count, dim, length):
    rows = count // dim
    paths, means = at(path, (rows, length + 1, dim)), at(mean, (rows, length, dim))
    table = at(factors, (length, 5), np.float64)
    for row, (begin, end) in enumerate(zip(at(begins, (rows,), np.int64), at(ends, (rows,), np.int64), strict=True)):
        if begin >= end:
            continue
        first = np.float64(at(first_mean, (rows, dim))[row])
        held = table[begin, 3] * paths[row, begin] + table[begin, 4] * first
        means[row, begin], paths[row, begin + 1] = first, at(next_state, (rows, dim))[row]
        for step in range(begin + 1, end):
            around = table[step, 0] * paths[row, step] + table[step, 1] * held
            means[row, step] = around
            paths[row, step + 1] = around + table[step, 2] * at(noise, (rows, length, dim))[row, step]
        at(state, (rows, dim))[row] = paths[row, end]


PLAIN_KERNELS = {
    "copy_view": copy_view,
    "gather_rows": gather_rows,
    "scatter_rows": scatter_rows,
    "combine": combine,
    "recur_rows": recur_rows,
}


class Stream:
    handle = 7

    def __init__(self):
        self.queue, self.captured, self.launches = [], None, 0

    def push(self, work):
        (self.queue if self.captured is None else self.captured).append(work)

    def sync(self):
        assert self.captured is None, "a stream must not be waited for while it is captured"
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def create_graph_builder(self):
        return GraphBuilder(self)


class GraphBuilder:
    def __init__(self, stream):
        self.stream, self.work = stream, None

    def begin_building(self):
        self.stream.captured = []

    def end_building(self):
        self.work, self.stream.captured = self.stream.captured, None
        return self

    def complete(self):
        return self

    def close(self):
        self.stream.captured = None

    def upload(self, stream):
        assert stream is self.stream

    def launch(self, stream):
        stream.launches += 1
        for work in self.work:
            stream.push(work)


class Memory:
    def __init__(self, driver, size):
        assert driver.stream.captured is None, "nothing is allocated while a stream is captured"
        self.driver, self.size, self._bytes = driver, size, (ctypes.c_char * (size + 256))()
        self.handle = -(-ctypes.addressof(self._bytes) // 256) * 256  # as the driver aligns it
        ctypes.memset(self.handle, 0xFF, size)  # NaN in every float
        driver.allocated += 1

    def fill(self, value, *, stream):
        stream.push(lambda: ctypes.memset(self.handle, value, self.size))

    def close(self, stream=None):  # noqa: ARG002  # the driver's
        self.driver.allocated -= 1


class FakeCuda:
    """The driver; `install` puts it in the place of the real modules. With `broken`, its GPU shows but cannot be used.

    It runs CUDA 13.0 and shows one GPU of compute capability 8.9.
    """

    def __init__(self, kernels=PLAIN_KERNELS, *, broken=None):
        self.stream, self.allocated, self.kernels, self.broken = Stream(), 0, kernels, broken
        self.threads = set()

    def install(self, monkeypatch):
        core = SimpleNamespace(
            Device=self.device,
            LegacyPinnedMemoryResource=lambda: SimpleNamespace(allocate=lambda size: Memory(self, size)),
            ProgramOptions=SimpleNamespace,
            Program=lambda source, **_: SimpleNamespace(compile=lambda _: self),  # noqa: ARG005
            LaunchConfig=SimpleNamespace,
            launch=self.launch,
        )
        modules = {
            "cuda": ModuleType("cuda"),
            "cuda.core": core,
            "cuda.bindings": ModuleType("bindings"),
            "cuda.pathfinder": SimpleNamespace(load_nvidia_dynamic_lib=lambda name: name),  # NVRTC is there
        }
        modules["cuda"].core = core
        modules["cuda.bindings"].driver, modules["cuda.bindings"].nvml = self.driver_api(), None
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    def driver_api(self):
        """What `cuda.bindings.driver` answers: a status, then the value."""
        attributes = ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR")
        return SimpleNamespace(
            CUstream=int,
            CUresult=SimpleNamespace(CUDA_SUCCESS=0),
            CUdevice_attribute=SimpleNamespace(**dict(zip(attributes, (8, 9), strict=True))),
            cuInit=lambda _: (0,),
            cuDriverGetVersion=lambda: (0, 13000),
            cuDeviceGetCount=lambda: (0, 1),
            cuDeviceGet=lambda ordinal: (0, ordinal),
            cuDeviceGetAttribute=lambda attribute, _: (0, attribute),
            cuDeviceGetName=lambda *_: (0, b"Fake GPU\0"),
            cuDeviceTotalMem=lambda _: (0, 2**34),
            cuMemcpyAsync=self.copy,
        )

    def device(self, ordinal):  # noqa: ARG002  # the driver's
        if self.broken is not None:
            raise RuntimeError(self.broken)
        return SimpleNamespace(
            set_current=lambda: self.threads.add(threading.get_ident()),
            create_stream=lambda: self.stream,
            arch="89",
            allocate=lambda size, stream: Memory(self, size),  # noqa: ARG005
        )

    def copy(self, to, of, size, stream):
        assert stream == self.stream.handle
        self.stream.push(lambda: ctypes.memmove(to, of, size))
        return (0,)

    def get_kernel(self, name):
        return self.kernels[name]

    def launch(self, stream, config, kernel, *arguments):
        assert config.grid * config.block >= 1
        for argument in arguments:
            assert type(argument) in (np.uint64, np.int64, np.float64), "a kernel reads eight bytes for each argument"
        stream.push(lambda: kernel(*(argument.item() for argument in arguments)))


@dataclass(frozen=True)
class FakeBackend:
    """ONNX Runtime's engines on the CPU, bound to the fake GPU's memory and queued on its stream."""

    device: object
    in_place: bool = True
    limits: Limits = field(default_factory=Limits)
    name: str = "fake"

    def load(self, path: Path):
        return FakeEngine(self.device, OnnxRuntimeBackend(threads=1).load(path), self.in_place)


class FakeEngine:
    def __init__(self, device, engine, in_place):
        self.device, self.engine, self.in_place = device, engine, in_place
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def bind(self, inputs, outputs, *, once=False):  # noqa: ARG002  # the protocol's
        if not self.in_place:
            assert not {id(array) for array in inputs.values()} & {id(array) for array in outputs.values()}
        buffers = {}
        for array in (*inputs.values(), *outputs.values()):
            raw = (ctypes.c_char * max(array.nbytes, 1)).from_address(self.device.address(array))
            buffers.setdefault(id(array), np.ndarray(array.shape, array.dtype, buffer=memoryview(raw)))
        call = self.engine.bind(
            {name: buffers[id(array)] for name, array in inputs.items()},
            {name: buffers[id(array)] for name, array in outputs.items()},
        )
        kept = (inputs, outputs)
        return lambda: self.device.stream.push(lambda: call() if kept else None)
