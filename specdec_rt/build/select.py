"""From what a user asks for to a backend at work: `auto` resolved, recipe and limits applied, plans trusted."""

import logging
from pathlib import Path

from specdec_rt.backends.availability import AUTO_ORDER, check
from specdec_rt.backends.base import Backend, Limits
from specdec_rt.build.builder import TENSORRT_BACKENDS, EngineBuilder, graph_slots
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
            f"backend is {backend!r}, but the recipe {recipe.path or ''} is for {recipe.backend!r}; leave one out"
        )
    if recipe is None and backend == "auto":
        return _best(bundle, cache, threads, cuda_graph)
    recipe = recipe or default_recipe(backend)
    found = check(recipe.backend)
    if not found.usable:
        raise BackendError(f"backend {found.backend} cannot run here: {found.why}")
    return _open(bundle, recipe, cache, threads, cuda_graph)


def _best(bundle: Bundle, cache: EngineCache | None, threads: int | None, cuda_graph: bool) -> Backend:
    """The first of the backends that works; one that only seemed to is passed over, with a warning."""
    why = ""
    for backend in AUTO_ORDER if threads is None else ("onnxruntime",):
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
    if recipe.backend == "onnxruntime":
        return _on_cpu(bundle, recipe, threads)
    if threads is not None:
        raise UsageError(
            f"threads is {threads}, but backend {recipe.backend!r} does not run on the CPU; "
            "leave out threads and workers"
        )
    return _on_gpu(bundle, recipe, cache or EngineCache(), graphs=recipe.cuda_graphs and cuda_graph)


def _on_cpu(bundle: Bundle, recipe: Recipe, threads: int | None) -> Backend:
    from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend  # heavy: not for `import specdec_rt`

    return OnnxRuntimeBackend(recipe.threads if threads is None else threads, _Files(bundle, recipe))


def _on_gpu(bundle: Bundle, recipe: Recipe, cache: EngineCache, *, graphs: bool) -> Backend:
    from specdec_rt.backends.cuda import CudaDevice

    if recipe.backend in TENSORRT_BACKENDS:
        from specdec_rt.backends.tensorrt_engine import TensorRtBackend

        workshop = EngineBuilder.open(bundle, recipe, cache)
        slots = {bundle.path(slot.graph): slot for slot in graph_slots(bundle.manifest)}
        device = CudaDevice(batch_buckets=recipe.batch_buckets, graphs=graphs)
        limits = Limits(batch_size=recipe.largest_batch, draft_length=recipe.draft_length)
        return TensorRtBackend(workshop.flavour, device, lambda path: workshop.engine(slots[path])[0], limits)
    from specdec_rt.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

    # ONNX Runtime captures its own calls, and must not be captured by others.
    device = CudaDevice(batch_buckets=recipe.batch_buckets, graphs=False)
    return OnnxRuntimeCudaBackend(device, _Files(bundle, recipe), Limits(), graphs)


class _Files:
    """Which file of a graph to load: that of the precision which the recipe asks for."""

    def __init__(self, bundle: Bundle, recipe: Recipe) -> None:
        self._files = {
            bundle.path(slot.graph): bundle.path(slot.graph, recipe.graph_precision(slot.recipe_graph))
            for slot in graph_slots(bundle.manifest)
        }

    def __call__(self, path: Path) -> Path:
        """`path` is that of the graph in single precision."""
        return self._files[path]
