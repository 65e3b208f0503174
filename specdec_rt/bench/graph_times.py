"""The time of one call of each graph of a bundle, as a function of its sizes, measured here."""

import itertools
import time
from collections.abc import Callable, Mapping

import numpy as np

from specdec_rt.backends.base import BoundCall
from specdec_rt.bench.cost import Interpolated
from specdec_rt.bench.timing import Times
from specdec_rt.build.bundle_graphs import BundleGraph, bundle_graphs
from specdec_rt.decode.chain import modulation_places, paths_per_call
from specdec_rt.manifest import Binding, GraphName
from specdec_rt.pipeline import Pipeline
from specdec_rt.types import Array

__all__ = ["GraphTimes", "bind_graph", "graph_sizes", "time_call"]

QUERIES = 4
"""Tokens that a MAR backbone is asked for: how many changes little."""
SECONDS, FEWEST, MOST = 0.1, 3, 2000
"""For how long, and how often, a call is repeated."""
RING = 16
"""Transitions of a chain, at most, that are measured in turn."""
SWEPT = 2**20
"""Values (4 MiB) that take the place of a graph's weights in a core's own cache, as the calls of other graphs do."""


class GraphTimes:
    """As in `cost.Costs`; calls are measured when they are first asked for, and as decoding makes them.

    Each call comes after one of another graph; only a chain's transitions come one after the other.

    `draft_share` is for a draft that there is not: its backbone takes this share of the target's time.
    """

    def __init__(self, pipeline: Pipeline, *, branches: int, chain: int, draft_share: float | None = None) -> None:
        self._pipeline, self._branches, self._chain = pipeline, branches, chain
        self._share = draft_share
        self._slots = {slot.label: slot for slot in bundle_graphs(pipeline.bundle.manifest)}
        self._functions: dict[str, Interpolated] = {}
        self._swept = np.zeros(SWEPT, np.float32)

    def backbone(self, owner: str, contexts: int, size: int) -> float:
        """As in `cost.Costs`."""
        if owner != "target" and self._share is not None:
            return self._share * self.backbone("target", contexts, size)
        return self._function(f"{owner}.backbone")(contexts, max(size, 1))

    def modulation(self, owner: str, rows: int, steps: int) -> float:
        """As in `cost.Costs`: in parts of as many steps as fit, the last of them smaller."""
        if not rows * steps:
            return 0.0
        places = modulation_places(rows, self._modulation_width(owner), steps)
        whole, rest = divmod(steps, places)
        of = self._function(f"{owner}.modulation")
        return whole * of(rows, places) + (of(rows, rest) if rest else 0.0)

    def steps(self, owner: str, rows: int, calls: int) -> float:
        """As in `cost.Costs`."""
        label = f"{owner}.denoise_step"
        later = self._function(label, again=True)(rows, 1) if calls > 1 else 0.0
        return self._function(label)(rows, 1) + (calls - 1) * later

    def density(self, rows: int) -> float:
        """As in `cost.Costs`."""
        most = paths_per_call(self._branches, self._modulation_width("target"), self._chain)
        whole, rest = divmod(rows, most)
        of = self._function("target.path_means")
        return whole * (of(most, 1) if whole else 0.0) + (of(rest, 1) if rest else 0.0)

    def _modulation_width(self, owner: str) -> int:
        model = self._slots[f"{owner}.modulation"].model
        assert model is not None
        assert model.modulation_width is not None
        return model.modulation_width

    def record(self) -> dict[str, list[dict[str, float]]]:
        """What was measured: images or tokens `x`, positions or known tokens `y`."""
        return {
            label: [{"x": x, "y": y, "seconds": seconds} for (x, y), seconds in sorted(function.points.items())]
            for label, function in self._functions.items()
        }

    def _function(self, label: str, *, again: bool = False) -> Interpolated:
        """`again`: of calls that come after one of the same graph."""
        key = f"{label}, again" if again else label
        if key not in self._functions:
            slot, manifest = self._slots[label], self._pipeline.bundle.manifest
            # In the known tokens of a MAR backbone time is all but linear.
            by_known = manifest.family == "mar" and slot.name is GraphName.BACKBONE
            grid = tuple(sorted({1, -(-manifest.tokens // 2), manifest.tokens})) if by_known else None
            self._functions[key] = Interpolated(lambda x, y: self._measure(slot, x, y, again=again), grid=grid)
        return self._functions[key]

    def _measure(self, slot: BundleGraph, x: int, y: int, *, again: bool) -> float:
        sizes = graph_sizes(self._pipeline, branches=self._branches, chain=self._chain, x=x, y=y)
        calls = 1
        if again:  # each transition reads modulation of its own, which lies where no core's own cache holds all of it
            calls = min(modulation_places(x, self._modulation_width(slot.owner), self._chain), RING)
        ring = itertools.cycle([bind_graph(self._pipeline, slot, sizes) for _ in range(calls)])
        # The mean: requests are sums of calls, slow ones among them.
        return time_call(self._pipeline, lambda: next(ring)(), between=None if again else self._sweep).mean

    def _sweep(self) -> None:
        self._swept += 1


def graph_sizes(pipeline: Pipeline, *, branches: int, chain: int, x: int, y: int) -> dict[str, int]:
    """The letters of the graph's bindings; x counts images or tokens, y positions, known tokens or steps of each."""
    tokens = pipeline.bundle.manifest.tokens
    sizes = {"G": branches, "R": x, "P": x * y, "P_times_G": x * y * branches, "n": chain, "n_plus_1": chain + 1}
    known = min(y, tokens)
    return {**sizes, "B": x * branches, "N": min(y, tokens), "S": tokens, "K": known, "Q": min(QUERIES, tokens)}


def bind_graph(pipeline: Pipeline, slot: BundleGraph, sizes: Mapping[str, int]) -> BoundCall:
    """A call on buffers of these sizes: indices in range, everything else alike."""
    device = pipeline.backend.device
    assert slot.model is not None
    assert slot.name is not None
    engine = pipeline.engine(slot.model, slot.name)

    def staged(binding: Binding) -> Array:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in binding.shape)
        return device.zeros(shape, np.dtype(binding.dtype).type)

    inputs = {binding.name: staged(binding) for binding in slot.graph.inputs}
    for name, array in inputs.items():
        if name in ("visible", "query"):
            array[:] = np.arange(array.shape[-1])
        elif array.dtype != np.int64:
            array[:] = array.dtype.type(True) if array.dtype == np.bool_ else 0.1
    outputs: dict[str, Array] = {}
    for binding in slot.graph.outputs:
        # Where the backend allows it a cache is updated where it lies, as in decoding.
        cache = inputs.get(binding.name.removesuffix("_out")) if engine.in_place else None
        outputs[binding.name] = staged(binding) if cache is None else cache
    device.upload(*inputs.values())()
    return device.record([engine.bind(inputs, outputs)])


def time_call(pipeline: Pipeline, call: BoundCall, *, between: Callable[[], None] | None = None) -> Times:
    """Some repeats, after one that does not count, with something done before each that does not count either."""
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
