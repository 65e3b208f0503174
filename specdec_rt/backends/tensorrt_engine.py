"""TensorRT's engines at work: one execution context for each set of input shapes, queued on the device's stream."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specdec_rt.backends.base import BoundCall, Limits
from specdec_rt.backends.cuda import CudaDevice
from specdec_rt.backends.tensorrt_module import Opaque, TensorRTModule
from specdec_rt.errors import BackendError
from specdec_rt.types import Array

__all__ = ["TensorRTBackend", "TensorRTEngine", "load_engine"]

_DTYPES = {"FLOAT": np.dtype(np.float32), "INT64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_)}

Sizes = tuple[tuple[int, ...], ...]
"""The shape of every input."""


@dataclass(frozen=True)
class TensorRTBackend:
    """Runs engines of one TensorRT module on the GPU of `device`."""

    tensorrt: TensorRTModule
    device: CudaDevice
    plan_of: Callable[[Path], bytes]
    """gives the trusted serialised engine for a bundle's ONNX file"""
    limits: Limits

    @property
    def name(self) -> str:
        """The backend whose module it is."""
        return self.tensorrt.backend.value

    def load(self, path: Path) -> "TensorRTEngine":
        """The engine of the graph at `path`. Raises BackendError where TensorRT cannot make or load it."""
        return TensorRTEngine(self.tensorrt, self.device, load_engine(self.tensorrt, self.plan_of(path)), path)


def load_engine(tensorrt: TensorRTModule, plan: bytes) -> Opaque:
    """The engine (`ICudaEngine`) in `plan`, which this machine must have built itself: see `build.cache`.

    Code for the host inside a plan stays disallowed. Raises BackendError, as on a machine without a driver.
    """
    trt: Opaque = tensorrt.module
    tensorrt.forget_errors()
    runtime = trt.Runtime(tensorrt.logger)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(f"{tensorrt.title} cannot load an engine: {tensorrt.errors}; see `specdec-rt doctor`")
    return engine


class TensorRTEngine:
    """An `ICudaEngine`, bound to buffers of `device`; an `Engine` of `base`."""

    in_place = False  # nothing promises in which order kernels read an input and write an output

    def __init__(self, tensorrt: TensorRTModule, device: CudaDevice, engine: Opaque, path: Path) -> None:
        trt: Opaque = tensorrt.module
        self._tensorrt, self._device, self._engine, self._path = tensorrt, device, engine, path
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._input_names = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = frozenset(self._input_names)
        self.outputs = frozenset(names) - self.inputs
        self._contexts: dict[Sizes, Opaque] = {}

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002  # the protocol's
        """A call on these buffers. Raises BackendError where one does not fit, or its size is not in the profile."""
        for kind, declared, given in (("inputs", self.inputs, inputs), ("outputs", self.outputs, outputs)):
            if declared != given.keys():
                raise BackendError(f"{self._path} has the {kind} {sorted(declared)}, was bound to {sorted(given)}")
        for name, array in (*inputs.items(), *outputs.items()):
            self._check(name, array)
        context = self._context(tuple(inputs[name].shape for name in self._input_names))
        addresses = [(name, self._device.address(array)) for name, array in (*inputs.items(), *outputs.items())]
        stream = int(self._device.stream.handle)
        kept = (*inputs.values(), *outputs.values())

        def call() -> None:
            assert kept is not None  # buffers live as long as what is bound to them
            for name, address in addresses:
                context.set_tensor_address(name, address)
            if not context.execute_async_v3(stream):
                raise BackendError(f"{self._tensorrt.title} failed while it ran {self._path}; see the log 'specdec_rt'")

        return call

    def _check(self, name: str, array: Array) -> None:
        dtype = _DTYPES.get(str(self._engine.get_tensor_dtype(name)).rpartition(".")[2])
        shape = tuple(self._engine.get_tensor_shape(name))
        fits = len(shape) == array.ndim and all(
            size in (-1, found) for size, found in zip(shape, array.shape, strict=True)
        )
        if not fits or dtype != array.dtype:
            raise BackendError(f"{self._path}: {name} is {dtype} {shape}; was bound to {array.dtype} {array.shape}")
        if name in self.inputs and -1 in shape:
            least, _, most = (tuple(sizes) for sizes in self._engine.get_tensor_profile_shape(name, 0))
            if any(not low <= size <= high for low, size, high in zip(least, array.shape, most, strict=True)):
                raise BackendError(
                    f"{self._path}: {name} has shape {array.shape}, but its engine was built for {least} to {most}; "
                    "build it with a recipe whose batch_buckets, draft_length or profiles reach so far"
                )

    def _context(self, sizes: Sizes) -> Opaque:
        """The execution context for these input shapes. Each set has its own, so no call has to set shapes again."""
        if sizes not in self._contexts:
            context = self._make_context()
            self._set_shapes(context, sizes)
            self._contexts[sizes] = context
        return self._contexts[sizes]

    def _make_context(self) -> Opaque:
        trt: Opaque = self._tensorrt.module
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._tensorrt.capabilities.runtime_cache:
            runtime_config = self._engine.create_runtime_config()
            runtime_config.set_execution_context_allocation_strategy(managed)
            # A kernel that is specialised later, in the background, would come too late for a captured graph.
            strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            runtime_config.dynamic_shapes_kernel_specialization_strategy = strategy
            context = self._engine.create_execution_context(runtime_config)
        else:
            context = self._engine.create_execution_context(managed)
        if context is None:
            raise BackendError(
                f"{self._tensorrt.title} cannot make a context for {self._path}; is the GPU's memory full?"
            )
        return context

    def _set_shapes(self, context: Opaque, sizes: Sizes) -> None:
        """Fix a context's input shapes, and give it the scratch memory that they need."""
        for name, shape in zip(self._input_names, sizes, strict=True):
            if not context.set_input_shape(name, shape):
                raise BackendError(f"{self._tensorrt.title} refuses shape {shape} for {name} of {self._path}")
        size = context.update_device_memory_size_for_shapes()
        if size:
            # All engines work one after the other on one stream: they share it.
            context.set_device_memory(self._device.scratch(size), size)
