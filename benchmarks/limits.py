"""The physical limit: what each graph must move and compute, compared with what this machine can.

A call reads every weight that it multiplies with once, reads its inputs and writes its outputs (of a key-value cache,
only what is new). What lies in between stays in the processor's caches, and is not counted. Operations are torch's own
count of the products of the same modules: a multiplication and an addition are two.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from export.causal import CausalPair, read_pair
from export.graphs import CausalBackboneGraph, DenoiseStepGraph, MarBackboneGraph, ModulationGraph, PathMeansGraph
from export.mar_models import MarPair, read_mar_pair
from export.models.causal import CausalModel
from export.models.mar import Mar, MarBackbone
from specdec_rt.bench.graph_times import bind_graph, graph_sizes, time_call
from specdec_rt.build.bundle_graphs import BundleGraph, bundle_graphs
from specdec_rt.chain import compile_chain
from specdec_rt.manifest import Binding, GraphName
from specdec_rt.pipeline import Pipeline

__all__ = ["graph_limits", "graph_work", "machine_limits"]

SIZES = tuple(2**power for power in (18, 20, 22, 24, 26, 28, 30))
"""Bytes of the arrays that are moved: from one that fits a cache to one larger than any cache."""
MATRIX = 2048
SECONDS = 0.3
ITEM_BYTES: Mapping[str, int] = {"float32": 4, "int64": 8, "bool": 1}


def machine_limits(sizes: tuple[int, ...] = SIZES, matrix: int = MATRIX) -> dict[str, Any]:
    """Bytes per second that are copied (read and written), or read for a product; operations per second."""
    moved = [_moved(size) for size in sizes]
    square = torch.ones(matrix, matrix)
    seconds = _best(lambda: square @ square)
    return {"moved": moved, "operations_per_second": 2 * matrix**3 / seconds, "matrix": matrix}


def _moved(size: int) -> dict[str, float]:
    source = torch.ones(size // 4)
    destination, rows, vector = torch.empty_like(source), source.view(-1, 1024), torch.ones(1024)
    copied, read = _best(lambda: destination.copy_(source)), _best(lambda: rows @ vector)
    return {"bytes": size, "copy_bytes_per_second": 2 * size / copied, "read_bytes_per_second": size / read}


def _best(work: Callable[[], Tensor]) -> float:
    """The shortest time of some repeats: a limit is what can be reached."""
    work()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < SECONDS:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def bandwidth(machine: Mapping[str, Any], size: int) -> float:
    """Bytes per second at which `size` bytes can be read, interpolated between the two nearest measured sizes."""
    at = [math.log(row["bytes"]) for row in machine["moved"]]
    rates = [max(row["copy_bytes_per_second"], row["read_bytes_per_second"]) for row in machine["moved"]]
    return float(np.interp(math.log(max(size, 1)), at, rates))


def graph_limits(
    pipeline: Pipeline, machine: Mapping[str, Any], *, batch: int, branches: int, draft_length: int
) -> list[dict[str, Any]]:
    """Each graph with sizes as in a round, against the limits of the machine.

    Backbones get one token per image, the target's γ as well. Heads get one row per image, `path_means` γ rows.
    """
    manifest = pipeline.bundle.manifest
    pair = read_pair(pipeline.bundle.folder) if manifest.family == "causal" else read_mar_pair(pipeline.bundle.folder)
    chain = compile_chain(manifest.chain).length
    rows = []
    for slot in bundle_graphs(manifest):
        if slot.name in (None, GraphName.TIME_EMBEDDING):
            continue  # called once an image, or once for all
        for x, y in _shapes(slot, manifest.family, batch, draft_length, manifest.tokens, chain):
            sizes = graph_sizes(pipeline, branches=branches, chain=chain, x=x, y=y)
            work = graph_work(pair, slot, sizes)
            seconds = time_call(pipeline, bind_graph(pipeline, slot, sizes)).p50
            by_bytes = work["bytes"] / bandwidth(machine, work["bytes"])
            by_operations = work["operations"] / machine["operations_per_second"]
            rows.append(
                {
                    "graph": slot.label,
                    "x": x,
                    "y": y,
                    **work,
                    "seconds": seconds,
                    "bytes_seconds": by_bytes,
                    "operations_seconds": by_operations,
                    "bound": "bytes" if by_bytes > by_operations else "operations",
                    "share_of_limit": max(by_bytes, by_operations) / seconds,
                }
            )
    return rows


def _shapes(
    slot: BundleGraph, family: str, batch: int, draft_length: int, tokens: int, chain: int
) -> list[tuple[int, int]]:
    if slot.name is GraphName.BACKBONE:
        verify = (batch, draft_length) if family == "causal" else (batch * draft_length, tokens // 2)
        single = (batch, 1 if family == "causal" else tokens // 2)
        return [single, verify] if slot.owner == "target" and verify != single else [single]
    if slot.name is GraphName.MODULATION:
        return [(batch, chain)]
    return [(batch * draft_length if slot.name is GraphName.PATH_MEANS else batch, 1)]


def graph_work(pair: CausalPair | MarPair, slot: BundleGraph, sizes: Mapping[str, int]) -> dict[str, Any]:
    """`weight_bytes`, `state_bytes`, `bytes` and `operations` of one call in single precision."""
    module = _module(pair, slot)
    weights = 4 * sum(
        parameter.numel()
        for name, part in module.named_modules()
        if not isinstance(part, nn.Embedding) and _multiplies(slot.name, name)
        for parameter in part.parameters(recurse=False)
    )
    bindings = [(binding, False) for binding in slot.graph.inputs] + [(binding, True) for binding in slot.graph.outputs]
    state = sum(_state_bytes(binding, sizes, written=written) for binding, written in bindings)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*_arguments(slot, sizes))
    operations = counter.get_total_flops()
    return {"weight_bytes": weights, "state_bytes": state, "bytes": weights + state, "operations": operations}


def _multiplies(graph: GraphName | None, part: str) -> bool:
    """Whether the graph multiplies with the weights of this part of its module. A head's graphs share one module."""
    of_condition = "adaLN_modulation" in part or "cond_embed" in part
    of_head = graph in (GraphName.MODULATION, GraphName.DENOISE_STEP, GraphName.PATH_MEANS)
    return "time_embed" not in part and (not of_head or of_condition == (graph is GraphName.MODULATION))


def _state_bytes(binding: Binding, sizes: Mapping[str, int], *, written: bool) -> int:
    cache = written and binding.name.endswith("_out")
    shape = [sizes["N" if cache and size == "S" else size] if isinstance(size, str) else size for size in binding.shape]
    return math.prod(shape) * ITEM_BYTES[binding.dtype]


def _module(pair: CausalPair | MarPair, slot: BundleGraph) -> nn.Module:
    model = pair.target if slot.owner == "target" else pair.drafts[slot.owner]
    if slot.name is GraphName.BACKBONE:
        if isinstance(model, MarBackbone):
            return MarBackboneGraph(_without_head(model))
        return CausalBackboneGraph(model.backbone if isinstance(model, CausalModel) else model)
    assert isinstance(model, Mar | CausalModel)
    if slot.name is GraphName.MODULATION:
        return ModulationGraph(model.head)
    kind = DenoiseStepGraph if slot.name is GraphName.DENOISE_STEP else PathMeansGraph
    return kind(model.head, learned_variance=pair.chain.variance == "learned")


def _without_head(model: MarBackbone) -> MarBackbone:
    """The backbone alone: it does not read the weights of its head."""
    if not isinstance(model, Mar):
        return model
    alone = MarBackbone.__new__(MarBackbone)
    alone.__dict__ = {**model.__dict__, "_modules": {k: v for k, v in model._modules.items() if k != "diffloss"}}
    return alone


def _arguments(slot: BundleGraph, sizes: Mapping[str, int]) -> list[Any]:
    given: list[Any] = []
    caches: list[Tensor] = []
    for binding in slot.graph.inputs:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in binding.shape)
        tensor = torch.zeros(
            shape, dtype={"float32": torch.float32, "int64": torch.int64}.get(binding.dtype, torch.bool)
        )
        if binding.name in ("visible", "query"):
            tensor = torch.arange(shape[-1]).expand(shape)
        if binding.name.startswith(("key_", "value_")):
            caches.append(tensor)
        else:
            given.append(tensor | True if tensor.dtype == torch.bool else tensor)
    return [*given, caches] if caches else given
