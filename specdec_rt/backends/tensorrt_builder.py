"""From an ONNX file to a serialised TensorRT engine.

Networks are strongly typed: a layer computes in the type that the ONNX file says, and no precision flag exists.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from specdec_rt.backends.tensorrt_module import Opaque, TensorRTModule
from specdec_rt.backends.tensorrt_progress import BuildWatch, PhaseProgress, progress_monitor
from specdec_rt.errors import BackendError

__all__ = ["BuildSettings", "SerializedEngine", "ShapeProfile", "build_engine", "configure"]


@dataclass(frozen=True)
class ShapeProfile:
    """Shapes of one input: the smallest, the one that the engine is tuned for, the largest."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How long a build may search for fast kernels, and which machines its engine is for."""

    builder_level: int = 3
    """0 (quick build) to 5 (quick engine)"""
    workspace_bytes: int = 2**30
    """scratch memory on the GPU that the engine may ask for, at most"""
    compute_capabilities: Sequence[str] = ()
    """as "8.9"; empty: those that the library targets by itself"""
    timing_cache: bytes | None = None
    """what an earlier build returned, or b"" to begin one; None: neither used nor made"""
    user_allocation: bool = True
    """the engine will be captured in CUDA graphs; no effect where `Capabilities.user_allocation` is false"""


@dataclass(frozen=True)
class SerializedEngine:
    """A built engine as bytes, which TensorRT calls a plan."""

    plan: bytes
    timing_cache: bytes | None
    """the one that was given, with what this build added; None where there is none"""


@dataclass(frozen=True)
class _Task:
    """What is to be built."""

    tensorrt: TensorRTModule
    path: Path
    """of the ONNX file"""
    profiles: Mapping[str, ShapeProfile]
    settings: BuildSettings


def build_engine(
    tensorrt: TensorRTModule,
    onnx_path: Path,
    profiles: Mapping[str, ShapeProfile],
    *,
    settings: BuildSettings,
    progress: PhaseProgress = lambda *_: True,
) -> SerializedEngine:
    """Build the graph at `onnx_path` for the shapes in `profiles`, one for each input with a symbolic size.

    Raises BackendError where the graph cannot be parsed or built, where a profile is missing or surplus, and where
    `progress` returned False. A KeyboardInterrupt ends the build at its next step and is then raised.
    """
    task, cancel = _Task(tensorrt, onnx_path, profiles, settings), threading.Event()
    tensorrt.forget_errors()
    # In a thread of its own: only the main thread is interrupted, and an exception must not cross TensorRT's frames.
    with ThreadPoolExecutor(1, "tensorrt") as pool:
        try:
            future = pool.submit(_build, task, BuildWatch(progress, cancel))
            while not wait([future], timeout=0.1).done:
                pass
        except BaseException:
            cancel.set()
            raise
        return future.result()


def _build(task: _Task, watch: BuildWatch) -> SerializedEngine:
    tensorrt, settings, trt = task.tensorrt, task.settings, task.tensorrt.module
    builder = _make_builder(tensorrt)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(tensorrt, network, task.path)
    if tensorrt.capabilities.attention:
        _mark_decomposable(trt, network)
    config = builder.create_builder_config()
    configure(tensorrt, config, settings)
    cache = None
    if tensorrt.capabilities.timing_cache and settings.timing_cache is not None:
        cache = _use_timing_cache(config, settings.timing_cache)
    _add_profile(task, builder, network, config)
    if tensorrt.capabilities.progress_monitor:
        config.progress_monitor = progress_monitor(trt, watch)
    plan = None if watch.cancelled else builder.build_serialized_network(network, config)
    if watch.error is not None:
        raise watch.error
    if watch.cancelled:
        raise BackendError(f"building an engine of {task.path} was cancelled")
    if plan is None:
        raise BackendError(f"{tensorrt.title} cannot build {task.path}: {tensorrt.errors}{_advice(task)}")
    return SerializedEngine(bytes(plan), None if cache is None else bytes(cache.serialize()))


def _make_builder(tensorrt: TensorRTModule) -> Opaque:
    trt: Opaque = tensorrt.module
    try:
        return trt.Builder(tensorrt.logger)
    except Exception as error:  # what a missing driver raises differs between the modules
        raise BackendError(f"{tensorrt.title} makes no builder: {tensorrt.errors or error}") from error


def _advice(task: _Task) -> str:
    """How to mend a build that ran out of scratch memory."""
    if not any(word in task.tensorrt.errors for word in ("OutOfMemory", "workspace")):
        return ""
    return (
        f"; its scratch memory may have {task.settings.workspace_bytes // 2**20} MiB: raise workspace_mib in the "
        "recipe, or build for smaller batches (batch_buckets, draft_length)"
    )


def _parse(tensorrt: TensorRTModule, network: Opaque, path: Path) -> None:
    trt: Opaque = tensorrt.module
    parser = trt.OnnxParser(network, tensorrt.logger)
    if parser.parse_from_file(str(path)):
        return
    problems = []
    for index in range(parser.num_errors):
        problem = parser.get_error(index)
        node = f"node {problem.node_name()!r} ({problem.node_operator()}): " if problem.node_operator() else ""
        problems.append(f"{node}{problem.desc().strip()}")
    raise BackendError(f"{tensorrt.title} cannot read {path}: {'; '.join(problems) or tensorrt.errors}")


def _mark_decomposable(trt: Opaque, network: Opaque) -> None:
    """Let attention that has no fused kernel be built of smaller kernels; else the build fails."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            boundary = layer
            boundary.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as its base class
            attention = boundary.attention
            attention.decomposable = True


def configure(tensorrt: TensorRTModule, config: Opaque, settings: BuildSettings) -> None:
    """Write `settings` into an `IBuilderConfig`."""
    trt: Opaque = tensorrt.module
    config.builder_optimization_level = settings.builder_level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: a graph in fp32 would be multiplied in 10 bits
    if settings.user_allocation and tensorrt.capabilities.user_allocation:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if settings.compute_capabilities:
        members = _compute_capabilities(tensorrt, settings.compute_capabilities)
        config.num_compute_capabilities = len(members)
        for index, member in enumerate(members):
            config.set_compute_capability(getattr(trt.ComputeCapability, member), index)


def _compute_capabilities(tensorrt: TensorRTModule, wanted: Sequence[str]) -> list[str]:
    """Compute capabilities by TensorRT's names. Raises BackendError for one that it cannot build for."""
    known = tensorrt.capabilities.compute_capabilities
    members = [f"SM{capability.replace('.', '')}" for capability in wanted]
    for capability, member in zip(wanted, members, strict=True):
        if member not in known:
            offered = f"some of {', '.join(f'{name[2:-1]}.{name[-1]}' for name in known)}" if known else "none"
            raise BackendError(
                f"{tensorrt.title} builds no engine ahead for compute capability {capability}; expected {offered}"
            )
    return members


def _use_timing_cache(config: Opaque, content: bytes) -> Opaque:
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        # Of another GPU or version: its times mean nothing here, and a new cache takes its place.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _add_profile(task: _Task, builder: Opaque, network: Opaque, config: Opaque) -> None:
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    symbolic = {name for name, tensor in inputs.items() if any(size < 0 for size in tensor.shape)}
    if symbolic != task.profiles.keys():
        raise BackendError(
            f"{task.path} needs profiles of {sorted(symbolic)}, the inputs with a symbolic size; "
            f"got {sorted(task.profiles)}"
        )
    if not symbolic:
        return
    profile = builder.create_optimization_profile()
    for name, shapes in task.profiles.items():
        declared = tuple(inputs[name].shape)
        if not _fits(declared, shapes):
            raise BackendError(
                f"{task.path}: the profile of {name}, {shapes.min} to {shapes.max} (best at {shapes.opt}), "
                f"does not fit its shape {declared}"
            )
        profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
    config.add_optimization_profile(profile)


def _fits(declared: tuple[int, ...], shapes: ShapeProfile) -> bool:
    """Whether the shapes ascend, and equal the input's declared sizes where those are fixed (not -1)."""
    if len(shapes.opt) != len(declared):
        return False
    return all(
        low <= middle <= high and size in (-1, high) and (size < 0 or low == high)
        for size, low, middle, high in zip(declared, shapes.min, shapes.opt, shapes.max, strict=True)
    )
