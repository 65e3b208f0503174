"""ONNX Runtime's CUDA provider: IO binding over the device's buffers, on its stream, its own graphs where it can."""

import itertools
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from specdec_rt.backends.base import BackendName, BoundCall, Limits
from specdec_rt.backends.cuda import CudaDevice
from specdec_rt.backends.installed import preload_libraries
from specdec_rt.backends.onnxruntime import check_buffers, declared_values
from specdec_rt.errors import BackendError
from specdec_rt.types import Array

__all__ = ["OnnxRuntimeCudaBackend", "OnnxRuntimeCudaEngine"]

_log = logging.getLogger("specdec_rt")
PROVIDER = "CUDAExecutionProvider"
NOT_CAPTURED = -1
"""ONNX Runtime's graph id of a call that it shall not capture."""


@dataclass(frozen=True)
class OnnxRuntimeCudaBackend:
    """Makes engines that run on the GPU of `device`."""

    device: CudaDevice
    file_of: Callable[[Path], Path]
    """gives the file to load for a bundle's ONNX file: that of the precision to compute in"""
    limits: Limits
    graphs: bool
    """whether each call is captured by ONNX Runtime itself"""
    name: str = BackendName.CUDA.value

    def load(self, path: Path) -> "OnnxRuntimeCudaEngine":
        """Make an engine of the ONNX file at `path`. Raises BackendError where ONNX Runtime cannot."""
        path = self.file_of(path)
        preload_libraries(onnxruntime)
        try:
            return OnnxRuntimeCudaEngine(path, self._session(path, graphs=self.graphs), self.device, self.graphs)
        except Exception as error:  # ONNX Runtime raises a family of unrelated types
            if not self.graphs:
                raise BackendError(
                    f"ONNX Runtime {onnxruntime.__version__} cannot load {path} on CUDA: {error}"
                ) from error
            _log.warning("%s runs without CUDA graphs: %s", path.name, error)
            return OnnxRuntimeCudaEngine(path, self._session(path, graphs=False), self.device, graphs=False)

    def _session(self, path: Path, *, graphs: bool) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # its warnings are of no use to the user of a bundle
        settings = {
            "device_id": "0",
            "user_compute_stream": str(int(self.device.stream.handle)),
            "enable_cuda_graph": "1" if graphs else "0",
            "use_tf32": "0",  # a graph computes in the precision that its file says
        }
        session = onnxruntime.InferenceSession(str(path), options, providers=[(PROVIDER, settings)])
        if PROVIDER not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} fell back to the CPU for {path}; see `specdec-rt doctor`"
            )
        return session


class OnnxRuntimeCudaEngine:
    """One session, bound to buffers of `device`; an `Engine` of `base`."""

    in_place = True

    def __init__(self, path: Path, session: onnxruntime.InferenceSession, device: CudaDevice, graphs: bool) -> None:
        self._path, self._session, self._device, self._graphs = path, session, device, graphs
        self._inputs, self._outputs = declared_values(session)
        self.inputs, self.outputs = frozenset(self._inputs), frozenset(self._outputs)
        self._graph_ids = itertools.count(1)

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:
        """A call on these buffers, captured unless it runs but `once`. Raises BackendError where one does not fit."""
        check_buffers(self._path, "inputs", self._inputs, inputs)
        check_buffers(self._path, "outputs", self._outputs, outputs)
        # Buffers are part of what is captured: every bound call has a graph of its own.
        graph_id = next(self._graph_ids) if self._graphs and not once else NOT_CAPTURED
        binding, options = self._binding(inputs, outputs), self._run_options(graph_id)
        kept = (*inputs.values(), *outputs.values())
        path, session = self._path, self._session

        def call() -> None:
            assert kept is not None  # buffers live as long as what is bound to them
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:  # ONNX Runtime raises a family of unrelated types
                advice = "" if graph_id == NOT_CAPTURED else "; run without graphs (--no-cuda-graph)"
                raise BackendError(f"ONNX Runtime failed while it ran {path} on CUDA: {error}{advice}") from error

        if graph_id != NOT_CAPTURED and hasattr(session, "release_captured_graph"):
            weakref.finalize(call, session.release_captured_graph, graph_id).atexit = False
        return call

    def _binding(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> onnxruntime.IOBinding:
        binding, address = self._session.io_binding(), self._device.address
        for name, array in inputs.items():
            binding.bind_input(name, "cuda", 0, array.dtype.type, array.shape, address(array))
        for name, array in outputs.items():
            binding.bind_output(name, "cuda", 0, array.dtype.type, array.shape, address(array))
        return binding

    def _run_options(self, graph_id: int) -> onnxruntime.RunOptions:
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the stream keeps the order
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options
