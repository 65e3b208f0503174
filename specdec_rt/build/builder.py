"""A bundle's graphs made into engines as a recipe says: from the cache, or built and then kept there."""

import json
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

from specdec_rt.backends.base import BackendName
from specdec_rt.backends.nvidia_driver import Gpu, find_driver, find_gpu
from specdec_rt.backends.tensorrt_builder import BuildSettings, SerializedEngine, ShapeProfile, build_engine
from specdec_rt.backends.tensorrt_module import TensorRTModule, probe
from specdec_rt.build.bundle_graphs import BundleGraph, bundle_graphs
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.engine_record import EngineRecord, engine_key
from specdec_rt.build.profile import graph_profile
from specdec_rt.build.recipe import Recipe
from specdec_rt.bundle import Bundle
from specdec_rt.errors import UsageError
from specdec_rt.manifest import Precision

__all__ = ["BuildProgress", "BuiltGraph", "EngineBuilder", "build_bundle"]

WRAPPER_REVISION = 1
"""Raised whenever this release builds another engine of the same recipe."""

_log = logging.getLogger("specdec_rt")


@dataclass(frozen=True)
class BuiltGraph:
    """What became of one graph."""

    graph: str
    """as in "target.backbone" """
    precision: Precision
    cached: bool
    seconds: float
    plan_bytes: int
    key: str


class BuildProgress(Protocol):
    """Shows how building goes."""

    def waiting(self, graph: str) -> None:
        """Another process builds into the same cache; `graph` comes after it."""

    def building(self, graph: str) -> None:
        """`graph` is not in the cache: its engine is being built."""

    def step(self, phase: str, done: int, total: int) -> bool:
        """A step of the build is done. False cancels it."""
        ...

    def finished(self, built: BuiltGraph) -> None:
        """A graph's engine is at hand."""


class _LoggedProgress:
    """Logs only that something is built: nobody asked for it, and it takes a while."""

    def waiting(self, graph: str) -> None:
        pass

    def building(self, graph: str) -> None:
        _log.warning("building the engine of %s, once: it is kept", graph)

    def step(self, phase: str, done: int, total: int) -> bool:  # noqa: ARG002  # as the protocol has it
        return True

    def finished(self, built: BuiltGraph) -> None:
        pass


@dataclass(frozen=True)
class EngineBuilder:
    """A bundle, a recipe, TensorRT, a GPU and a cache: all that decides which engine a graph gets."""

    bundle: Bundle
    recipe: Recipe
    cache: EngineCache
    tensorrt: TensorRTModule
    gpu: Gpu | None
    """None: no GPU is at hand. TensorRT-RTX builds all the same, but such an engine and one that was built with a
    GPU never take each other's place"""

    @classmethod
    def open(cls, bundle: Bundle, recipe: Recipe, cache: EngineCache) -> "EngineBuilder":
        """Find the recipe's TensorRT and the GPU.

        Raises UsageError for a backend that builds nothing, BackendError where TensorRT or a GPU is missing.
        """
        if not recipe.backend.builds_engines:
            able = " or ".join(sorted(name for name in BackendName if name.builds_engines))
            raise UsageError(
                f"the recipe {recipe.path or ''} is for backend {recipe.backend.value!r}, which runs the bundle's "
                f"graphs as they are: there is nothing to build; expected a recipe for {able}"
            )
        tensorrt = probe(recipe.backend)
        needs_gpu = not tensorrt.capabilities.compute_capabilities
        gpu = find_driver().gpus[0] if needs_gpu else find_gpu()  # the first raises an error that says what is missing
        return cls(bundle, recipe, cache, tensorrt, gpu)

    def profiles(self, graph: BundleGraph) -> dict[str, ShapeProfile]:
        """The shapes that the graph's engine is built for, by input. Raises RecipeError."""
        return graph_profile(self.bundle.manifest, graph.model, graph.name, self.recipe)

    def precision(self, graph: BundleGraph) -> Precision:
        """In which precision the graph's engine computes."""
        return self.recipe.graph_precision(graph.recipe_graph)

    def key_fields(self, graph: BundleGraph) -> dict[str, Any]:
        """Everything that decides the graph's engine. Raises BundleError where the precision is missing."""
        path = self.bundle.path(graph.graph, self.precision(graph))
        content, files = path.read_bytes(), self.bundle.manifest.files
        # The graph names the files that hold its weights; the bundle's hashes were checked when it was loaded.
        weights = {name: digest for name, digest in files.items() if name != path.name and name.encode() in content}
        fields = {
            "revision": WRAPPER_REVISION,
            "graph": files[path.name],
            "weights": weights,
            "recipe": self.recipe.engine_fields(graph.recipe_graph),
            "profiles": {name: asdict(profile) for name, profile in self.profiles(graph).items()},
            **self._machine,
        }
        return cast("dict[str, Any]", json.loads(json.dumps(fields)))  # as a record will have them

    @property
    def _machine(self) -> dict[str, Any]:
        gpu = self.gpu
        return {
            "backend": self.tensorrt.backend,
            "library": self.tensorrt.version,
            "gpu": None if gpu is None else f"{gpu.name} (compute capability {gpu.compute_capability})",
            "driver": None if gpu is None else gpu.driver_version,
            "platform": f"{platform.system()} {platform.machine()}",
        }

    def engine(self, graph: BundleGraph, progress: BuildProgress | None = None) -> tuple[bytes, BuiltGraph]:
        """The graph's plan, from the cache or built now, and how that went.

        Raises BackendError where it cannot be built, BundleError, RecipeError, OutputError.
        """
        progress = progress or _LoggedProgress()
        started = time.monotonic()
        fields = self.key_fields(graph)
        key = engine_key(fields)
        plan = self.cache.read(key)
        cached = plan is not None
        if plan is None:
            with self.cache.building(lambda: progress.waiting(graph.label)):
                plan = self.cache.read(key)  # another process may have built it meanwhile
                cached = plan is not None
                if plan is None:
                    self._warn_of_mismatch(graph, fields)
                    progress.building(graph.label)
                    plan = self._build_and_store(graph, key, fields, progress)
        built = BuiltGraph(graph.label, self.precision(graph), cached, time.monotonic() - started, len(plan), key)
        progress.finished(built)
        return plan, built

    def _build_and_store(self, graph: BundleGraph, key: str, fields: dict[str, Any], progress: BuildProgress) -> bytes:
        started, profiles = time.monotonic(), self.profiles(graph)
        made = self._build(graph, profiles, progress)
        record = EngineRecord(
            bundle=self.bundle.manifest.name,
            graph=graph.label,
            precision=self.precision(graph),
            backend=self.tensorrt.backend.value,
            library=self.tensorrt.version,
            gpu=fields["gpu"],
            inputs=graph.graph.inputs,
            outputs=graph.graph.outputs,
            profiles=profiles,
            fields=fields,
            build_seconds=round(time.monotonic() - started, 3),
        )
        self.cache.store(key, made.plan, record)
        return made.plan

    def _build(
        self, graph: BundleGraph, profiles: Mapping[str, ShapeProfile], progress: BuildProgress
    ) -> SerializedEngine:
        recipe, timing_key = self.recipe, engine_key(self._machine)
        timed = self.tensorrt.capabilities.timing_cache and recipe.timing_cache
        settings = BuildSettings(
            builder_level=recipe.builder_level,
            workspace_bytes=recipe.workspace_mib * 2**20,
            compute_capabilities=recipe.compute_capabilities,
            timing_cache=self.cache.read_timing(timing_key) if timed else None,
            user_allocation=recipe.cuda_graphs,
        )
        path = self.bundle.path(graph.graph, self.precision(graph))
        made = build_engine(self.tensorrt, path, profiles, settings=settings, progress=progress.step)
        if made.timing_cache is not None:
            self.cache.store_timing(timing_key, made.timing_cache)
        return made

    def _warn_of_mismatch(self, graph: BundleGraph, fields: Mapping[str, Any]) -> None:
        """Warn where an engine in the cache differs in nothing but the machine or its libraries."""
        own = set(self._machine)
        for entry in self.cache.entries():
            other = entry.record.fields
            changed = [name for name in fields if other.get(name) != fields[name]]
            if changed and own.issuperset(changed):
                what = ", ".join(f"{name} {other[name] or 'none'}, here {fields[name] or 'none'}" for name in changed)
                _log.warning("%s: the engine in the cache is for %s; it is built anew", graph.label, what)
                return


def build_bundle(
    bundle: Bundle, recipe: Recipe, cache: EngineCache, *, progress: BuildProgress | None = None
) -> list[BuiltGraph]:
    """Have every graph's engine in the cache. What was built before an error or an interrupt stays there."""
    builder = EngineBuilder.open(bundle, recipe, cache)
    graphs = bundle_graphs(bundle.manifest)
    for graph in graphs:  # what is wrong with the recipe or the bundle shows before anything is built
        builder.key_fields(graph)
    return [builder.engine(graph, progress)[1] for graph in graphs]
