"""A bundle's graphs made into engines as a recipe says: from the cache, or built and then kept there."""

import json
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

from specdec_rt.backends import availability
from specdec_rt.backends.availability import Gpu
from specdec_rt.backends.tensorrt import BuildSettings, TensorRTModule, build_plan, probe
from specdec_rt.build.cache import EngineCache, EngineRecord, engine_key
from specdec_rt.build.profile import Profile, graph_profile
from specdec_rt.build.recipe import Recipe, RecipeGraph
from specdec_rt.bundle import Bundle
from specdec_rt.errors import UsageError
from specdec_rt.manifest import Graph, GraphName, Manifest, Model, Precision

__all__ = [
    "TENSORRT_BACKENDS",
    "BuiltGraph",
    "EngineBuilder",
    "GraphSlot",
    "Reporter",
    "build_bundle",
    "graph_slots",
]

TENSORRT_BACKENDS = ("tensorrt", "tensorrt-rtx")
"""Those whose graphs are built before they run."""
WRAPPER_REVISION = 1
"""Raised whenever this release builds another engine of the same recipe."""

_log = logging.getLogger("specdec_rt")


@dataclass(frozen=True)
class GraphSlot:
    """A graph of a bundle, and where it belongs."""

    owner: str
    """ "target", a draft's name, or "decoder" """
    model: Model | None
    """None for the decoder"""
    name: GraphName | None
    graph: Graph

    @property
    def label(self) -> str:
        """As in "target.backbone"."""
        return self.owner if self.name is None else f"{self.owner}.{self.name}"

    @property
    def recipe_graph(self) -> RecipeGraph:
        """What recipes call it."""
        return "decoder" if self.name is None else self.name.value


def graph_slots(manifest: Manifest) -> list[GraphSlot]:
    """Every graph of a bundle: the target's, the drafts', the decoder."""
    models = {"target": manifest.target, **manifest.drafts}
    slots = [
        GraphSlot(owner, model, name, graph) for owner, model in models.items() for name, graph in model.graphs.items()
    ]
    if manifest.decoder is not None:
        slots.append(GraphSlot("decoder", None, None, manifest.decoder.graph))
    return slots


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


class Reporter(Protocol):
    """Who is told how building goes."""

    def waiting(self, graph: str) -> None:
        """Another process builds into the same cache; `graph` comes after it."""

    def building(self, graph: str) -> None:
        """`graph` is not in the cache: its engine is being built."""

    def step(self, phase: str, done: int, total: int) -> bool:
        """A step of the build is done. False cancels it."""
        ...

    def finished(self, built: BuiltGraph) -> None:
        """A graph's engine is at hand."""


class _Silent:
    def waiting(self, graph: str) -> None:
        pass

    def building(self, graph: str) -> None:
        _log.warning("building the engine of %s, once: it is kept", graph)  # it takes a while, and nobody asked for it

    def step(self, phase: str, done: int, total: int) -> bool:  # noqa: ARG002  # as the protocol has it
        return True

    def finished(self, built: BuiltGraph) -> None:
        pass


@dataclass(frozen=True)
class EngineBuilder:
    """A bundle, a recipe, a library, a GPU and a cache: all that decides which engine a graph gets."""

    bundle: Bundle
    recipe: Recipe
    cache: EngineCache
    flavour: TensorRTModule
    gpu: Gpu | None
    """None: without one. TensorRT-RTX builds for GPUs that are not there; such an engine is not taken for one
    that was built with a GPU, nor the other way round"""

    @classmethod
    def open(cls, bundle: Bundle, recipe: Recipe, cache: EngineCache) -> "EngineBuilder":
        """Find the library and the GPU. Raises UsageError for a backend that builds nothing, BackendError."""
        if recipe.backend not in TENSORRT_BACKENDS:
            raise UsageError(
                f"the recipe {recipe.path or ''} is for backend {recipe.backend!r}, which runs the bundle's graphs as "
                f"they are: there is nothing to build; expected a recipe for {' or '.join(TENSORRT_BACKENDS)}"
            )
        flavour = probe(recipe.backend)
        if not flavour.capabilities.compute_capabilities:
            return cls(bundle, recipe, cache, flavour, availability.driver().gpus[0])  # it tells why there is none
        return cls(bundle, recipe, cache, flavour, availability.gpu())

    def profiles(self, slot: GraphSlot) -> dict[str, Profile]:
        """The sizes that the graph's engine is built for, by input. Raises RecipeError."""
        return graph_profile(self.bundle.manifest, slot.model, slot.name, self.recipe)

    def precision(self, slot: GraphSlot) -> Precision:
        """In which precision the graph's engine computes."""
        return self.recipe.graph_precision(slot.recipe_graph)

    def key_fields(self, slot: GraphSlot) -> dict[str, Any]:
        """Everything that decides the graph's engine. Raises BundleError where the precision is missing."""
        path = self.bundle.path(slot.graph, self.precision(slot))
        content, files = path.read_bytes(), self.bundle.manifest.files
        # The graph names the files that hold its weights; the bundle's hashes were checked when it was loaded.
        weights = {name: digest for name, digest in files.items() if name != path.name and name.encode() in content}
        fields = {
            "revision": WRAPPER_REVISION,
            "graph": files[path.name],
            "weights": weights,
            "recipe": self.recipe.engine_fields(slot.recipe_graph),
            "profiles": {name: asdict(profile) for name, profile in self.profiles(slot).items()},
            **self._machine,
        }
        return cast("dict[str, Any]", json.loads(json.dumps(fields)))  # as a record will have them

    @property
    def _machine(self) -> dict[str, Any]:
        gpu = self.gpu
        return {
            "backend": self.flavour.backend,
            "library": self.flavour.version,
            "gpu": None if gpu is None else f"{gpu.name} (compute capability {gpu.compute_capability})",
            "driver": None if gpu is None else gpu.driver_version,
            "platform": f"{platform.system()} {platform.machine()}",
        }

    def engine(self, slot: GraphSlot, reporter: Reporter | None = None) -> tuple[bytes, BuiltGraph]:
        """The graph's plan, from the cache or built now, and how that went.

        Raises BackendError where it cannot be built, BundleError, RecipeError, OutputError.
        """
        reporter = reporter or _Silent()
        started = time.monotonic()
        fields = self.key_fields(slot)
        key = engine_key(fields)
        plan = self.cache.read(key)
        cached = plan is not None
        if plan is None:
            with self.cache.building(lambda: reporter.waiting(slot.label)):
                plan = self.cache.read(key)  # another process may have built it meanwhile
                cached = plan is not None
                if plan is None:
                    self._tell_mismatch(slot, fields)
                    reporter.building(slot.label)
                    plan = self._build(slot, key, fields, reporter)
        built = BuiltGraph(slot.label, self.precision(slot), cached, time.monotonic() - started, len(plan), key)
        reporter.finished(built)
        return plan, built

    def _build(self, slot: GraphSlot, key: str, fields: dict[str, Any], reporter: Reporter) -> bytes:
        recipe, started = self.recipe, time.monotonic()
        profiles = self.profiles(slot)
        timed = self.flavour.capabilities.timing_cache and recipe.timing_cache
        timing_key = engine_key(self._machine)
        settings = BuildSettings(
            builder_level=recipe.builder_level,
            workspace_bytes=recipe.workspace_mib * 2**20,
            compute_capabilities=recipe.compute_capabilities,
            timing_cache=self.cache.read_timing(timing_key) if timed else None,
            user_allocation=recipe.cuda_graphs,
        )
        path = self.bundle.path(slot.graph, self.precision(slot))
        made = build_plan(self.flavour, path, profiles, settings=settings, progress=reporter.step)
        if made.timing_cache is not None:
            self.cache.store_timing(timing_key, made.timing_cache)
        record = EngineRecord(
            bundle=self.bundle.manifest.name,
            graph=slot.label,
            precision=self.precision(slot),
            backend=self.flavour.backend,
            library=self.flavour.version,
            gpu=fields["gpu"],
            inputs=slot.graph.inputs,
            outputs=slot.graph.outputs,
            profiles=profiles,
            fields=fields,
            build_seconds=round(time.monotonic() - started, 3),
        )
        self.cache.store(key, made.plan, record)
        return made.plan

    def _tell_mismatch(self, slot: GraphSlot, fields: Mapping[str, Any]) -> None:
        """Warn where only the machine or its libraries stand between the graph and an engine in the cache."""
        own = set(self._machine)
        for entry in self.cache.entries():
            other = entry.record.fields
            changed = [name for name in fields if other.get(name) != fields[name]]
            if changed and own.issuperset(changed):
                what = ", ".join(f"{name} {other[name] or 'none'}, here {fields[name] or 'none'}" for name in changed)
                _log.warning("%s: the engine in the cache is for %s; it is built anew", slot.label, what)
                return


def build_bundle(
    bundle: Bundle, recipe: Recipe, cache: EngineCache, *, reporter: Reporter | None = None
) -> list[BuiltGraph]:
    """Have every graph's engine in the cache. What was built before an error or an interrupt stays there."""
    workshop = EngineBuilder.open(bundle, recipe, cache)
    slots = graph_slots(bundle.manifest)
    for slot in slots:  # what is wrong with the recipe or the bundle shows before anything is built
        workshop.key_fields(slot)
    return [workshop.engine(slot, reporter)[1] for slot in slots]
