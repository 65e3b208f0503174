"""One wrapper over three modules: `tensorrt` 10.x and 11.x, and `tensorrt_rtx` 1.x.

Networks are strongly typed: a layer computes in the type that the ONNX file says, and no precision flag exists.
What differs between the modules is asked of the module itself (`Capabilities`), never of its version number.
"""

import functools
import importlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from specdec_rt.errors import BackendError

__all__ = [
    "BuildSettings",
    "Capabilities",
    "Plan",
    "Progress",
    "Shapes",
    "TensorRTModule",
    "build_plan",
    "deserialise",
    "probe",
]

Opaque = Any
"""An object of the vendor's modules, which ship no types."""

Progress = Callable[[str, int, int], bool]
"""Told of every step of a build: phase, steps of it done, steps it has. False cancels the build."""

_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_NEEDED = (
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "IBuilderConfig.builder_optimization_level",
    "Runtime.engine_host_code_allowed",
    "ParserError.node_operator",
)
"""Without these a module is too old for this wrapper."""

_log = logging.getLogger("specdec_rt")


class Shapes(Protocol):
    """Sizes of one input: the smallest, those to be fastest at, and the largest."""

    @property
    def min(self) -> tuple[int, ...]: ...

    @property
    def opt(self) -> tuple[int, ...]: ...

    @property
    def max(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What the module at hand can do, as its own names tell."""

    strongly_typed_only: bool
    """networks cannot be weakly typed any more; elsewhere strong typing is asked for by a flag"""
    compute_capabilities: tuple[str, ...]
    """as "SM89", that engines can be built for without such a GPU; empty: they are built for the GPU at hand"""
    user_allocation: bool
    """engines promise to allocate nothing while they run only when they are built so (for CUDA graphs)"""
    runtime_cache: bool
    """kernels are compiled when an engine first runs, and can be kept"""
    timing_cache: bool
    """building times kernels on the GPU, and the times can be kept"""
    editable_timing_cache: bool
    attention: bool
    """fused attention layers, which must be marked decomposable to work at every size and type"""
    progress_monitor: bool


@dataclass(frozen=True)
class TensorRTModule:
    """One of the modules, imported and looked over."""

    backend: str
    """ "tensorrt" or "tensorrt-rtx" """
    module: ModuleType
    version: str
    capabilities: Capabilities

    @property
    def title(self) -> str:
        """Name and version, as an error says them."""
        return f"{_TITLES[self.backend]} {self.version}"


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How hard a builder tries, and for which machines."""

    builder_level: int = 3
    """0 (quick build) to 5 (quick engine)"""
    workspace_bytes: int = 2**30
    """scratch memory on the GPU that an engine may ask for, at most"""
    compute_capabilities: Sequence[str] = ()
    """as "8.9"; empty: those that the flavour takes by itself"""
    timing_cache: bytes | None = None
    """what an earlier build returned, or b"" to begin one; None: neither used nor made"""
    user_allocation: bool = True
    """the engine is to be captured in CUDA graphs; changes nothing where `Capabilities.user_allocation` is false"""


@dataclass(frozen=True)
class Plan:
    """A serialised engine, and the timing cache with what its build added (None where there is none)."""

    plan: bytes
    timing_cache: bytes | None


def probe(backend: str) -> TensorRTModule:
    """The module of a backend. Raises BackendError saying why it cannot be used, and what to install."""
    title, name = _TITLES[backend], _MODULES[backend]
    install = f'pip install "specdec-rt[{backend}]"'
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise BackendError(f"{title} is not installed: {install}") from error
        raise BackendError(f"{title} is installed but misses {error.name}; install it again: {install}") from error
    except Exception as error:  # its package loads shared libraries, which fail in many ways
        raise BackendError(f"{title} is installed but cannot be imported ({error}); install it again") from error
    version = str(getattr(module, "__version__", "of unknown version"))
    missing = [name for name in _NEEDED if not _has(module, name)]
    if missing:
        raise BackendError(f"{title} {version} is too old, it has no {missing[0]}; expected TensorRT 10 or later")
    return TensorRTModule(backend, module, version, _capabilities(module))


def _has(module: ModuleType, dotted: str) -> bool:
    found: Opaque = module
    for name in dotted.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def _capabilities(module: ModuleType) -> Capabilities:
    ahead = _has(module, "ComputeCapability") and _has(module, "IBuilderConfig.set_compute_capability")
    names = list(module.ComputeCapability.__members__) if ahead else []
    return Capabilities(
        strongly_typed_only=not _has(module, "BuilderFlag.FP16"),
        compute_capabilities=tuple(name for name in names if name.startswith("SM")),
        user_allocation=_has(module, "BuilderFlag.REQUIRE_USER_ALLOCATION"),
        runtime_cache=_has(module, "IRuntimeCache"),
        # A builder that compiles for GPUs it does not see times nothing; its timing cache is a deprecated no-op.
        timing_cache=not ahead and _has(module, "IBuilderConfig.create_timing_cache"),
        editable_timing_cache=not ahead and _has(module, "BuilderFlag.EDITABLE_TIMING_CACHE"),
        attention=_has(module, "IAttentionInputLayer.attention") and _has(module, "IAttention.decomposable"),
        progress_monitor=_has(module, "IProgressMonitor") and _has(module, "IBuilderConfig.progress_monitor"),
    )


def build_plan(
    flavour: TensorRTModule,
    onnx_path: Path,
    profiles: Mapping[str, Shapes],
    *,
    settings: BuildSettings,
    progress: Progress = lambda *_: True,
) -> Plan:
    """Build the graph at `onnx_path` for the sizes in `profiles`, one for each input with a symbolic size.

    Raises BackendError where the graph cannot be parsed or built, a profile is missing or surplus, or `progress`
    returned False. A KeyboardInterrupt ends the build at its next step and is then raised.
    """
    logger = _logger(flavour.module)
    logger.errors.clear()
    cancel = threading.Event()

    def work() -> Plan:
        return _build(flavour, logger, onnx_path, profiles, settings, _Watch(progress, cancel))

    # In a thread of its own: only the main thread is interrupted, and an exception must not cross TensorRT's frames.
    with ThreadPoolExecutor(1, "tensorrt") as pool:
        try:
            future = pool.submit(work)
            while not wait([future], timeout=0.1).done:
                pass
        except BaseException:
            cancel.set()
            raise
        return future.result()


class _Watch:
    """Passes a build's steps on, and holds what they raised until TensorRT's frames are left."""

    def __init__(self, progress: Progress, cancel: threading.Event) -> None:
        self._progress = progress
        self._cancel = cancel
        self._steps: dict[str, int] = {}
        self.error: BaseException | None = None

    def begin(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps
        self._tell(phase, 0)

    def step(self, phase: str, index: int) -> bool:
        self._tell(phase, index + 1)
        return not self.cancelled

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

    def _tell(self, phase: str, done: int) -> None:
        if self.cancelled:
            return
        try:
            if not self._progress(phase, done, self._steps.get(phase, done)):
                self._cancel.set()
        except BaseException as error:  # whatever it is: it is raised again once the build has ended
            self.error = error
            self._cancel.set()


def _build(
    flavour: TensorRTModule,
    logger: Opaque,
    path: Path,
    profiles: Mapping[str, Shapes],
    settings: BuildSettings,
    watch: _Watch,
) -> Plan:
    trt: Opaque = flavour.module
    try:
        builder = trt.Builder(logger)
    except Exception as error:  # what a missing driver raises differs between the modules
        raise BackendError(f"{flavour.title} makes no builder: {_words(logger) or error}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(flavour, logger, network, path)
    if flavour.capabilities.attention:
        _mark_decomposable(trt, network)
    config = builder.create_builder_config()
    _configure(flavour, config, settings)
    cache = None
    if flavour.capabilities.timing_cache and settings.timing_cache is not None:
        cache = _use_timing_cache(config, settings.timing_cache)
    _add_profile(path, builder, network, config, profiles)
    if flavour.capabilities.progress_monitor:
        config.progress_monitor = _monitor_type(flavour.module)(watch)
    plan = None if watch.cancelled else builder.build_serialized_network(network, config)
    if watch.error is not None:
        raise watch.error
    if watch.cancelled:
        raise BackendError(f"building an engine of {path} was cancelled")
    if plan is None:
        raise BackendError(f"{flavour.title} cannot build {path}: {_words(logger)}{_mend(logger, settings)}")
    return Plan(bytes(plan), None if cache is None else bytes(cache.serialize()))


def _mend(logger: Opaque, settings: BuildSettings) -> str:
    if not any(word in _words(logger) for word in ("OutOfMemory", "workspace")):
        return ""
    return (
        f"; its scratch memory may have {settings.workspace_bytes // 2**20} MiB: raise workspace_mib in the recipe, "
        "or build for smaller batches (batch_buckets, draft_length)"
    )


def _parse(flavour: TensorRTModule, logger: Opaque, network: Opaque, path: Path) -> None:
    trt: Opaque = flavour.module
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return
    problems = []
    for index in range(parser.num_errors):
        problem = parser.get_error(index)
        node = f"node {problem.node_name()!r} ({problem.node_operator()}): " if problem.node_operator() else ""
        problems.append(f"{node}{problem.desc().strip()}")
    raise BackendError(f"{flavour.title} cannot read {path}: {'; '.join(problems) or _words(logger)}")


def _mark_decomposable(trt: Opaque, network: Opaque) -> None:
    """Let attention for which there is no fused kernel be built of smaller ones: else the build fails."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            boundary = layer
            boundary.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as its base class
            attention = boundary.attention
            attention.decomposable = True


def _configure(flavour: TensorRTModule, config: Opaque, settings: BuildSettings) -> None:
    trt: Opaque = flavour.module
    config.builder_optimization_level = settings.builder_level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: a graph in fp32 would be multiplied in 10 bits
    if settings.user_allocation and flavour.capabilities.user_allocation:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if not settings.compute_capabilities:
        return
    known = flavour.capabilities.compute_capabilities
    offered = f"some of {', '.join(f'{name[2:-1]}.{name[-1]}' for name in known)}" if known else "none"
    members = [f"SM{wanted.replace('.', '')}" for wanted in settings.compute_capabilities]
    for wanted, member in zip(settings.compute_capabilities, members, strict=True):
        if member not in known:
            raise BackendError(
                f"{flavour.title} builds no engine ahead for compute capability {wanted}; expected {offered}"
            )
    config.num_compute_capabilities = len(members)
    for index, member in enumerate(members):
        config.set_compute_capability(getattr(trt.ComputeCapability, member), index)


def _use_timing_cache(config: Opaque, content: bytes) -> Opaque:
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        # Of another GPU or version: the times say nothing here. A new one replaces it.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _add_profile(path: Path, builder: Opaque, network: Opaque, config: Opaque, profiles: Mapping[str, Shapes]) -> None:
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    symbolic = {name for name, tensor in inputs.items() if any(size < 0 for size in tensor.shape)}
    if symbolic != profiles.keys():
        raise BackendError(
            f"{path} needs profiles of {sorted(symbolic)}, the inputs with a symbolic size; got {sorted(profiles)}"
        )
    if not symbolic:
        return
    profile = builder.create_optimization_profile()
    for name, shapes in profiles.items():
        fits = len(shapes.opt) == len(inputs[name].shape) and all(
            low <= middle <= high and size in (-1, high) and (size < 0 or low == high)
            for size, low, middle, high in zip(inputs[name].shape, shapes.min, shapes.opt, shapes.max, strict=True)
        )
        if not fits:
            raise BackendError(
                f"{path}: the profile of {name}, {shapes.min} to {shapes.max} (best at {shapes.opt}), "
                f"does not fit its shape {tuple(inputs[name].shape)}"
            )
        profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
    config.add_optimization_profile(profile)


def deserialise(flavour: TensorRTModule, plan: bytes) -> Opaque:
    """The engine (`ICudaEngine`) in `plan`, which must come from this machine's own build: see `build.cache`.

    Code for the host inside a plan stays disallowed. Raises BackendError, as on a machine without a driver.
    """
    trt: Opaque = flavour.module
    logger = _logger(flavour.module)
    logger.errors.clear()
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(f"{flavour.title} cannot load an engine: {_words(logger)}; see `specdec-rt doctor`")
    return engine


def _words(logger: Opaque) -> str:
    """What TensorRT itself said was wrong."""
    return "; ".join(logger.errors)


@functools.cache
def _logger(module: ModuleType) -> Opaque:
    """The module's one logger: builders and runtimes of a process must share it, and it must outlive them."""
    trt: Opaque = module
    levels = {trt.ILogger.Severity.WARNING: logging.INFO}  # of interest to who debugs a build only

    class Logger(trt.ILogger):  # type: ignore[misc]  # its base has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)

        def log(self, severity: Opaque, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message.strip())
            _log.log(levels.get(severity, logging.DEBUG), "%s: %s", module.__name__, message)

    return Logger()


@functools.cache
def _monitor_type(module: ModuleType) -> Callable[[_Watch], Opaque]:
    """A class that passes TensorRT's progress to a `_Watch`."""
    trt: Opaque = module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its base has no types
        def __init__(self, watch: _Watch) -> None:
            trt.IProgressMonitor.__init__(self)
            self._watch = watch

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            self._watch.begin(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            pass

    return cast("Callable[[_Watch], Opaque]", Monitor)
