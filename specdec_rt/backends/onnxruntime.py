"""ONNX Runtime on the CPU: IO binding over NumPy buffers, nothing copied."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

from specdec_rt.backends.base import BackendName, BoundCall, Limits
from specdec_rt.backends.host import HostDevice
from specdec_rt.errors import BackendError
from specdec_rt.manifest import WEIGHTS_KEY
from specdec_rt.types import Array

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeEngine", "check_buffers", "declared_values"]

CACHED_WEIGHTS = 2**19
"""So many weights stay in a core's own cache (2 MiB): calls of such graphs end before a second core could help."""
SINGLE_THREAD_PRODUCTS = 2**23
"""Multiplications of a call that one core does at least as fast as two; see benchmarks/NOTES.md."""

_DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}

Declared = Mapping[str, onnxruntime.NodeArg]
"""What a graph says of its inputs or outputs, by name."""


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """Makes engines that run on `threads` cores (None: all that this process may use)."""

    threads: int | None = None
    file_of: Callable[[Path], Path] = Path
    """gives the file to load for a bundle's ONNX file: that of the precision to compute in"""
    name: str = BackendName.ONNXRUNTIME.value
    device: HostDevice = field(default_factory=HostDevice)
    limits: Limits = field(default_factory=Limits)

    def load(self, path: Path) -> "OnnxRuntimeEngine":
        """Make an engine of the ONNX file at `path`. Raises BackendError where ONNX Runtime cannot."""
        path = self.file_of(path)
        threads = self.threads or _allowed_cores()
        session = _load(path, threads)
        weights = int(session.get_modelmeta().custom_metadata_map.get(WEIGHTS_KEY, CACHED_WEIGHTS + 1))
        if threads == 1 or weights > CACHED_WEIGHTS:
            return OnnxRuntimeEngine(path, session)
        few_rows = SINGLE_THREAD_PRODUCTS // max(weights, 1)
        return OnnxRuntimeEngine(path, session, single_thread_session=_load(path, 1), few_rows=few_rows)


def _load(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # its warnings are of no use to the user of a bundle
    # Every engine has threads of its own, and decoding alternates between engines: threads that went on
    # spinning after their call would fight over the cores with those of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a family of unrelated types
        raise BackendError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from error


class OnnxRuntimeEngine:
    """A session on all cores and, for calls of few rows, one on a single core; an `Engine` of `base`."""

    in_place = True

    def __init__(
        self,
        path: Path,
        session: onnxruntime.InferenceSession,
        *,
        single_thread_session: onnxruntime.InferenceSession | None = None,
        few_rows: int = 0,
    ) -> None:
        self._path, self._session, self._few_rows = path, session, few_rows
        self._single_thread_session = single_thread_session
        self._inputs, self._outputs = declared_values(session)
        self.inputs, self.outputs = frozenset(self._inputs), frozenset(self._outputs)

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], *, once: bool = False) -> BoundCall:  # noqa: ARG002  # the protocol's
        """A call on these buffers. Raises BackendError where one does not fit its binding."""
        check_buffers(self._path, "inputs", self._inputs, inputs)
        check_buffers(self._path, "outputs", self._outputs, outputs)
        session = self.session_for(outputs)
        binding = session.io_binding()
        # On the CPU an OrtValue shares its array's memory, and only the Python object keeps the array alive.
        arrays = {id(array): array for array in (*inputs.values(), *outputs.values())}
        values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(array) for key, array in arrays.items()}
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, values[id(array)])
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, values[id(array)])
        return _OnnxRuntimeCall(self._path, session, binding, tuple(values.values()), tuple(arrays.values()))

    def session_for(self, outputs: Mapping[str, Array]) -> onnxruntime.InferenceSession:
        """The session that runs a call with these outputs: how many rows there are, the first of them says."""
        first = outputs[next(iter(self._outputs))]
        if self._single_thread_session is not None and first.size // first.shape[-1] <= self._few_rows:
            return self._single_thread_session
        return self._session


@dataclass(frozen=True, slots=True)
class _OnnxRuntimeCall:
    """A call on fixed buffers, which live as long as it does."""

    path: Path
    session: onnxruntime.InferenceSession
    binding: onnxruntime.IOBinding
    values: tuple[onnxruntime.OrtValue, ...]
    arrays: tuple[Array, ...]

    def __call__(self) -> None:
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as error:  # ONNX Runtime raises a family of unrelated types
            raise BackendError(f"ONNX Runtime failed while it ran {self.path}: {error}") from error


def _allowed_cores() -> int:
    """How many cores this process is bound to; 0, ONNX Runtime's own choice, where it may use all."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    allowed = len(os.sched_getaffinity(0))
    return allowed if allowed < (os.cpu_count() or 1) else 0


def declared_values(session: onnxruntime.InferenceSession) -> tuple[Declared, Declared]:
    """A session's inputs and outputs by name."""
    return (
        {value.name: value for value in session.get_inputs()},
        {value.name: value for value in session.get_outputs()},
    )


def check_buffers(path: Path, kind: str, declared: Declared, given: Mapping[str, Array]) -> None:
    """Raise BackendError where buffers differ in name, type or shape from what the graph at `path` declares."""
    if declared.keys() != given.keys():
        raise BackendError(f"{path} has the {kind} {sorted(declared)}, was bound to {sorted(given)}")
    for name, array in given.items():
        value = declared[name]
        sizes = [size if isinstance(size, int) else None for size in value.shape]
        fits = len(sizes) == array.ndim and all(
            size in (None, found) for size, found in zip(sizes, array.shape, strict=True)
        )
        if not fits or _DTYPES.get(value.type) != array.dtype or not array.flags.c_contiguous:
            raise BackendError(
                f"{path}: {name} is {value.type} {value.shape}; was bound to {array.dtype} {array.shape}"
                f"{'' if array.flags.c_contiguous else ', not contiguous'}"
            )
