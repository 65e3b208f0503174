"""Which TensorRT is here: `tensorrt` 10.x or 11.x, or `tensorrt_rtx` 1.x, and what it can do.

The modules share nearly all names. What differs is asked of the module itself (`Capabilities`), never of its
version number.
"""

import functools
import importlib
import logging
from collections import deque
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from specdec_rt.backends.base import BackendName
from specdec_rt.errors import BackendError

__all__ = ["REQUIRED_NAMES", "Capabilities", "Opaque", "TensorRTModule", "capabilities_of", "has_name", "probe"]

Opaque = Any
"""An object of the vendor's modules, which ship no types."""

TITLES = {BackendName.TENSORRT: "TensorRT", BackendName.TENSORRT_RTX: "TensorRT-RTX"}
MODULES = {BackendName.TENSORRT: "tensorrt", BackendName.TENSORRT_RTX: "tensorrt_rtx"}
REQUIRED_NAMES = (
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "IBuilderConfig.builder_optimization_level",
    "Runtime.engine_host_code_allowed",
    "ParserError.node_operator",
)
"""A module without one of these is too old."""

_log = logging.getLogger("specdec_rt")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a module can do, as its own names say."""

    strongly_typed_only: bool
    """every network is strongly typed; elsewhere a flag asks for it"""
    compute_capabilities: tuple[str, ...]
    """GPUs, as in "SM89", that engines can be built for without having one; empty: only the GPU at hand"""
    user_allocation: bool
    """CUDA graphs need engines that allocate nothing while they run, and a flag has to ask for such engines"""
    runtime_cache: bool
    """kernels are compiled when an engine first runs, and can be kept"""
    timing_cache: bool
    """a build times kernels on the GPU, and the times can be kept for the next build"""
    editable_timing_cache: bool
    attention: bool
    """there are fused attention layers; they work at every size and type only if they are marked decomposable"""
    progress_monitor: bool


@dataclass(frozen=True)
class TensorRTModule:
    """One of the modules, imported and found fit for use."""

    backend: BackendName
    module: ModuleType
    version: str
    capabilities: Capabilities

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{TITLES[self.backend]} {self.version}"

    @property
    def logger(self) -> Opaque:
        """The process's one logger for this module, an `ILogger`."""
        return _logger(self.module)

    @property
    def errors(self) -> str:
        """What TensorRT itself has said was wrong since `forget_errors`."""
        return "; ".join(self.logger.errors)

    def forget_errors(self) -> None:
        """Begin anew with what `errors` tells."""
        self.logger.errors.clear()


def probe(backend: str) -> TensorRTModule:
    """The module of a backend. Raises BackendError that says why it cannot be used, and what to install."""
    name = BackendName(backend)
    module = _import(name)
    version = str(getattr(module, "__version__", "of unknown version"))
    missing = [required for required in REQUIRED_NAMES if not has_name(module, required)]
    if missing:
        raise BackendError(
            f"{TITLES[name]} {version} is too old, it has no {missing[0]}; expected TensorRT 10 or later"
        )
    return TensorRTModule(name, module, version, capabilities_of(module))


def _import(backend: BackendName) -> ModuleType:
    title, name, install = TITLES[backend], MODULES[backend], f'pip install "specdec-rt[{backend}]"'
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise BackendError(f"{title} is not installed: {install}") from error
        raise BackendError(f"{title} is installed but misses {error.name}; install it again: {install}") from error
    except Exception as error:  # its package loads shared libraries, which fail in many ways
        raise BackendError(f"{title} is installed but cannot be imported ({error}); install it again") from error


def has_name(module: Opaque, dotted: str) -> bool:
    """Whether a module has a name such as "BuilderFlag.FP16"."""
    found = module
    for name in dotted.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def capabilities_of(module: Opaque) -> Capabilities:
    """What a module's names say that it can do."""
    ahead = has_name(module, "ComputeCapability") and has_name(module, "IBuilderConfig.set_compute_capability")
    names = list(module.ComputeCapability.__members__) if ahead else []
    return Capabilities(
        strongly_typed_only=not has_name(module, "BuilderFlag.FP16"),
        compute_capabilities=tuple(name for name in names if name.startswith("SM")),
        user_allocation=has_name(module, "BuilderFlag.REQUIRE_USER_ALLOCATION"),
        runtime_cache=has_name(module, "IRuntimeCache"),
        # A builder that compiles for GPUs it does not see times nothing; its timing cache is a deprecated no-op.
        timing_cache=not ahead and has_name(module, "IBuilderConfig.create_timing_cache"),
        editable_timing_cache=not ahead and has_name(module, "BuilderFlag.EDITABLE_TIMING_CACHE"),
        attention=has_name(module, "IAttentionInputLayer.attention") and has_name(module, "IAttention.decomposable"),
        progress_monitor=has_name(module, "IProgressMonitor") and has_name(module, "IBuilderConfig.progress_monitor"),
    )


@functools.cache
def _logger(module: ModuleType) -> Opaque:
    """All builders and runtimes of a process must share one logger, which must outlive them."""
    trt: Opaque = module
    levels = {trt.ILogger.Severity.WARNING: logging.INFO}  # interesting only to those who debug a build

    class Logger(trt.ILogger):  # type: ignore[misc]  # its base has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)

        def log(self, severity: Opaque, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message.strip())
            _log.log(levels.get(severity, logging.DEBUG), "%s: %s", module.__name__, message)

    return Logger()
