"""The time of one call of each graph of a bundle, as a function of its sizes, measured here."""

import itertools
import time
from collections.abc import Callable, Mapping

import numpy as np

from specdec_rt.backends.base import BoundCall
from specdec_rt.bench.interpolation import Interpolated
from specdec_rt.bench.timing import Times
from specdec_rt.build.bundle_graphs import BundleGraph, bundle_graphs
from specdec_rt.capacity import Capacity
from specdec_rt.manifest import Binding, GraphName, Manifest
from specdec_rt.pipeline import Pipeline
from specdec_rt.types import Array

__all__ = ["GraphClock", "GraphTimes", "Measure", "bind_graph", "graph_sizes", "time_call"]

Measure = Callable[[BundleGraph, int, int, bool], float]
"""`(graph, x, y, again)` → seconds of a call; x and y as in `graph_sizes`, `again`: right after a call of the same."""

QUERIES = 4
"""Tokens that a MAR backbone is asked for. How many they are changes little."""
SECONDS, FEWEST, MOST = 0.1, 3, 2000
"""For how long, and how often, a call is repeated."""
RING = 16
"""Transitions of a chain, at most, that are measured in turn."""
SWEPT = 2**20
"""Values (4 MiB) that take the place of a graph's weights in a core's own cache, as the calls of other graphs do."""


class GraphTimes:
    """`CallCosts` from single calls, which `measure` times when they are first needed.

    With `draft_share` the draft does not exist: its backbone takes this share of the target's time.
    """

    def __init__(
        self,
        manifest: Manifest,
        measure: Measure,
        *,
        branches: int,
        chain: int,
        capacity: Capacity,
        draft_share: float | None = None,
    ) -> None:
        self._manifest, self._measure, self._capacity = manifest, measure, capacity
        self._branches, self._chain, self._draft_share = branches, chain, draft_share
        self._graphs = {graph.label: graph for graph in bundle_graphs(manifest)}
        self._functions: dict[str, Interpolated] = {}

    def backbone(self, model: str, contexts: int, size: int) -> float:
        """One call."""
        if model != "target" and self._draft_share is not None:
            return self._draft_share * self.backbone("target", contexts, size)
        return self._function(f"{model}.backbone")(contexts, max(size, 1))

    def modulation(self, model: str, rows: int, steps: int) -> float:
        """One call for as many steps at a time as fit. The last may be smaller."""
        if not rows * steps:
            return 0.0
        most = self._capacity.modulation_steps(rows, _modulation_width(self._graphs[f"{model}.modulation"]), steps)
        whole, rest = divmod(steps, most)
        seconds = self._function(f"{model}.modulation")
        return whole * seconds(rows, most) + (seconds(rows, rest) if rest else 0.0)

    def denoise_steps(self, model: str, rows: int, calls: int) -> float:
        """The first call comes after one of another graph, the others after one of their own."""
        if not rows * calls:
            return 0.0
        label = f"{model}.denoise_step"
        later = self._function(label, again=True)(rows, 1) if calls > 1 else 0.0
        return self._function(label)(rows, 1) + (calls - 1) * later

    def path_means(self, rows: int, transitions: int) -> float:
        """One call for as many tokens at a time as fit, in proportion to the share of the chain's transitions."""
        width = _modulation_width(self._graphs["target.modulation"])
        most = self._capacity.paths_per_call(self._branches, width, self._chain)
        whole, rest = divmod(rows, most)
        seconds = self._function("target.path_means")
        whole_chains = whole * (seconds(most, 1) if whole else 0.0) + (seconds(rest, 1) if rest else 0.0)
        return transitions / self._chain * whole_chains

    def record(self) -> dict[str, list[dict[str, float]]]:
        """What was measured, as plain values for JSON: x and y as in `graph_sizes`."""
        return {
            label: [{"x": x, "y": y, "seconds": seconds} for (x, y), seconds in sorted(function.points.items())]
            for label, function in self._functions.items()
        }

    def _function(self, label: str, *, again: bool = False) -> Interpolated:
        """Seconds of a graph's call by x and y."""
        key = f"{label}, again" if again else label
        if key not in self._functions:
            graph, tokens = self._graphs[label], self._manifest.tokens
            # In the known tokens of a MAR backbone time is all but linear.
            by_known = self._manifest.family == "mar" and graph.name is GraphName.BACKBONE
            grid = tuple(sorted({1, -(-tokens // 2), tokens})) if by_known else None
            self._functions[key] = Interpolated(lambda x, y: self._measure(graph, x, y, again), y_grid=grid)
        return self._functions[key]


class GraphClock:
    """A `Measure` that makes the calls of a pipeline's graphs as decoding makes them.

    Each comes after something else had the caches. Only a chain's transitions come one after the other.
    """

    def __init__(self, pipeline: Pipeline, *, branches: int, chain: int, capacity: Capacity) -> None:
        self._pipeline, self._branches, self._chain, self._capacity = pipeline, branches, chain, capacity
        self._swept = np.zeros(SWEPT, np.float32)

    def __call__(self, graph: BundleGraph, x: int, y: int, again: bool) -> float:
        sizes = graph_sizes(self._pipeline, branches=self._branches, chain=self._chain, x=x, y=y)
        calls = 1
        if again:  # each transition reads modulation of its own; no core's own cache holds all of it
            calls = min(self._capacity.modulation_steps(x, _modulation_width(graph), self._chain), RING)
        ring = itertools.cycle([bind_graph(self._pipeline, graph, sizes) for _ in range(calls)])
        # The mean: requests are sums of calls, slow ones among them.
        return time_call(self._pipeline, lambda: next(ring)(), between=None if again else self._sweep).mean

    def _sweep(self) -> None:
        """Take the place of everything else in a core's own cache."""
        self._swept += 1


def _modulation_width(graph: BundleGraph) -> int:
    """M of the model that a graph belongs to."""
    assert graph.model is not None
    assert graph.model.modulation_width is not None
    return graph.model.modulation_width


def graph_sizes(pipeline: Pipeline, *, branches: int, chain: int, x: int, y: int) -> dict[str, int]:
    """Sizes for the letters in a graph's bindings.

    x counts images (of a backbone) or tokens; y counts each one's positions (causal backbone), known tokens (MAR
    backbone) or steps (`modulation`).
    """
    tokens = pipeline.bundle.manifest.tokens
    sizes = {"G": branches, "R": x, "P": x * y, "P_times_G": x * y * branches, "n": chain, "n_plus_1": chain + 1}
    known = min(y, tokens)
    return {**sizes, "B": x * branches, "N": min(y, tokens), "S": tokens, "K": known, "Q": min(QUERIES, tokens)}


def bind_graph(pipeline: Pipeline, graph: BundleGraph, sizes: Mapping[str, int]) -> BoundCall:
    """A call on buffers of these sizes: indices are in range, all other values are alike."""
    device = pipeline.backend.device
    assert graph.model is not None
    assert graph.name is not None
    engine = pipeline.models.engine(graph.model, graph.name)

    def buffer(binding: Binding) -> Array:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in binding.shape)
        return device.zeros(shape, np.dtype(binding.dtype).type)

    inputs = {binding.name: buffer(binding) for binding in graph.graph.inputs}
    for name, array in inputs.items():
        if name in ("visible", "query"):
            array[:] = np.arange(array.shape[-1])
        elif array.dtype != np.int64:
            array[:] = array.dtype.type(True) if array.dtype == np.bool_ else 0.1
    outputs: dict[str, Array] = {}
    for binding in graph.graph.outputs:
        # Where the backend allows it a cache is updated where it lies, as in decoding.
        cache = inputs.get(binding.name.removesuffix("_out")) if engine.in_place else None
        outputs[binding.name] = buffer(binding) if cache is None else cache
    device.upload(*inputs.values())()
    return device.record([engine.bind(inputs, outputs)])


def time_call(pipeline: Pipeline, call: BoundCall, *, between: Callable[[], None] | None = None) -> Times:
    """Times of some repeats after one that does not count. `between` runs before each of them, untimed."""
    wait = pipeline.backend.device.wait
    call()
    wait()
    seconds: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(seconds) < FEWEST or (time.perf_counter() < until and len(seconds) < MOST):
        if between is not None:
            between()
        started = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - started)
    return Times(tuple(seconds))
