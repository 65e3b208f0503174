"""Opens the backend that a user asks for: `auto` is resolved, a recipe and its limits are applied."""

import logging
from pathlib import Path

from specdec_rt.backends.availability import AUTO_ORDER, check
from specdec_rt.backends.base import Backend, BackendName, Limits
from specdec_rt.build.builder import EngineBuilder
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.recipe import Recipe, default_recipe
from specdec_rt.bundle import Bundle
from specdec_rt.errors import BackendError, UsageError

__all__ = ["BACKENDS", "open_backend"]

BACKENDS = ("auto", *AUTO_ORDER)

_log = logging.getLogger("specdec_rt")


def open_backend(
    bundle: Bundle,
    backend: str = "auto",
    *,
    recipe: Recipe | None = None,
    cache: EngineCache | None = None,
    threads: int | None = None,
    cuda_graph: bool = True,
) -> Backend:
    """The backend that is asked for, ready to load the graphs of `bundle`.

    A recipe names its backend itself. Without `cuda_graph` nothing is captured, whatever the recipe says.
    Raises UsageError where the arguments contradict each other, BackendError where the backend cannot run here.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if recipe is not None and backend not in ("auto", recipe.backend):
        raise UsageError(
            f"backend is {str(backend)!r}, but the recipe {recipe.path or ''} is for {recipe.backend.value!r}; "
            "leave one out"
        )
    if recipe is None and backend == "auto":
        return _best(bundle, cache, threads, cuda_graph)
    recipe = recipe or default_recipe(backend)
    found = check(recipe.backend)
    if not found.usable:
        raise BackendError(f"backend {found.backend} cannot run here: {found.why}")
    return _open(bundle, recipe, cache, threads, cuda_graph)


def _best(bundle: Bundle, cache: EngineCache | None, threads: int | None, cuda_graph: bool) -> Backend:
    """The first backend that opens; one that could run but does not open is passed over, with a warning."""
    why = ""
    for backend in AUTO_ORDER if threads is None else (BackendName.ONNXRUNTIME,):
        found = check(backend)
        why = found.why
        if not found.usable:
            continue
        try:
            return _open(bundle, default_recipe(backend), cache, threads, cuda_graph)
        except BackendError as error:
            _log.warning("backend %s is not taken: %s", backend, error)
            why = str(error)
    raise BackendError(f"no backend can run here; of the last, {AUTO_ORDER[-1]}: {why}")


def _open(bundle: Bundle, recipe: Recipe, cache: EngineCache | None, threads: int | None, cuda_graph: bool) -> Backend:
    if recipe.backend is BackendName.ONNXRUNTIME:
        return _open_on_cpu(bundle, recipe, threads)
    if threads is not None:
        raise UsageError(
            f"threads is {threads}, but backend {recipe.backend.value!r} does not run on the CPU; "
            "leave out threads and workers"
        )
    graphs = recipe.cuda_graphs and cuda_graph
    if recipe.backend.builds_engines:
        return _open_tensorrt(bundle, recipe, cache or EngineCache(), graphs=graphs)
    return _open_onnxruntime_cuda(bundle, recipe, graphs=graphs)


# Backends are imported when they are opened: they are heavy, and `import specdec_rt` shall stay light.


def _open_on_cpu(bundle: Bundle, recipe: Recipe, threads: int | None) -> Backend:
    from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(recipe.threads if threads is None else threads, _PrecisionFiles(bundle, recipe))


def _open_onnxruntime_cuda(bundle: Bundle, recipe: Recipe, *, graphs: bool) -> Backend:
    from specdec_rt.backends.cuda import CudaDevice
    from specdec_rt.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

    # ONNX Runtime captures its own calls, and must not be captured by others.
    device = CudaDevice(batch_buckets=recipe.batch_buckets, graphs=False)
    return OnnxRuntimeCudaBackend(device, _PrecisionFiles(bundle, recipe), Limits(), graphs)


def _open_tensorrt(bundle: Bundle, recipe: Recipe, cache: EngineCache, *, graphs: bool) -> Backend:
    from specdec_rt.backends.cuda import CudaDevice
    from specdec_rt.backends.tensorrt_engine import TensorRTBackend

    builder = EngineBuilder.open(bundle, recipe, cache)
    graphs_by_path = {bundle.path(graph.graph): graph for graph in bundle_graphs(bundle.manifest)}
    device = CudaDevice(batch_buckets=recipe.batch_buckets, graphs=graphs)
    limits = Limits(batch_size=recipe.largest_batch, draft_length=recipe.draft_length)
    return TensorRTBackend(builder.tensorrt, device, lambda path: builder.engine(graphs_by_path[path])[0], limits)


class _PrecisionFiles:
    """Gives the file to load for a graph: the one that computes in the recipe's precision."""

    def __init__(self, bundle: Bundle, recipe: Recipe) -> None:
        self._files = {
            bundle.path(graph.graph): bundle.path(graph.graph, recipe.graph_precision(graph.recipe_graph))
            for graph in bundle_graphs(bundle.manifest)
        }

    def __call__(self, path: Path) -> Path:
        """`path` is that of the graph in single precision."""
        return self._files[path]
