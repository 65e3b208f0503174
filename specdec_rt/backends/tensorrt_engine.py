"""TensorRT's engines at work: contexts made once for each set of sizes, queued on the device's stream."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specdec_rt.backends.base import BoundCall, Limits
from specdec_rt.backends.cuda import CudaDevice
from specdec_rt.backends.tensorrt import TensorRTModule, deserialise
from specdec_rt.errors import BackendError
from specdec_rt.types import Array

__all__ = ["TensorRtBackend", "TensorRtEngine"]

_DTYPES = {"FLOAT": np.dtype(np.float32), "INT64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_)}

Sizes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TensorRtBackend:
    """Engines of one flavour; `plan_of` gives the trusted plan for a bundle's ONNX file."""

    flavour: TensorRTModule
    device: CudaDevice
    plan_of: Callable[[Path], bytes]
    limits: Limits

    @property
    def name(self) -> str:
        """The flavour's backend."""
        return self.flavour.backend

    def load(self, path: Path) -> "TensorRtEngine":
        """The engine of the graph at `path`. Raises BackendError where TensorRT cannot make or load it."""
        return TensorRtEngine(self.flavour, self.device, deserialise(self.flavour, self.plan_of(path)), path)


class TensorRtEngine:
    """An `ICudaEngine`; as in `base.Engine`."""

    in_place = False  # nothing promises in which order kernels read an input and write an output

    def __init__(self, flavour: TensorRTModule, device: CudaDevice, engine: Any, path: Path) -> None:  # noqa: ANN401  # ICudaEngine
        trt: Any = flavour.module
        self._flavour, self._device, self._engine, self._path = flavour, device, engine, path
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._input_names = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = frozenset(self._input_names)
        self.outputs = frozenset(names) - self.inputs
        self._contexts: dict[Sizes, Any] = {}

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002  # the protocol's
        """As in `base.Engine`; sizes must lie in the engine's profile."""
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
                raise BackendError(f"{self._flavour.title} failed while it ran {self._path}; see the log 'specdec_rt'")

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

    def _context(self, sizes: Sizes) -> Any:  # noqa: ANN401  # IExecutionContext
        """One for each set of input shapes, so that no call has to set them again."""
        if sizes not in self._contexts:
            self._contexts[sizes] = self._make_context(sizes)
        return self._contexts[sizes]

    def _make_context(self, sizes: Sizes) -> Any:  # noqa: ANN401  # IExecutionContext
        trt: Any = self._flavour.module
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._flavour.capabilities.runtime_cache:
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
                f"{self._flavour.title} cannot make a context for {self._path}; is the GPU's memory full?"
            )
        for name, shape in zip(self._input_names, sizes, strict=True):
            if not context.set_input_shape(name, shape):
                raise BackendError(f"{self._flavour.title} refuses shape {shape} for {name} of {self._path}")
        size = context.update_device_memory_size_for_shapes()
        if size:
            # All engines work one after the other on one stream: they share it.
            context.set_device_memory(self._device.scratch(size), size)
        return context
