"""Every graph of a bundle on two backends with the same inputs. Polygraphy runs and compares them.

    python -m benchmarks.gpu.compare [BUNDLE] [--against BACKEND] [--precision fp32|fp16|bf16] [--out FILE.json]

The reference is always ONNX Runtime on the CPU in single precision. `--against tensorrt-rtx`, `tensorrt` and `cuda`
need a GPU; `--against onnxruntime` compares with ONNX Runtime on the CPU, its optimisations switched off.
Polygraphy builds engines of its own, for the sizes of the inputs. So a difference that is found here comes from the
library or from the graph, never from the runtime.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from specdec_rt.backends.base import BackendName
from specdec_rt.backends.nvidia_driver import find_driver
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.bundle import Bundle, load_bundle
from specdec_rt.chain import compile_chain
from specdec_rt.errors import BackendError, BundleError
from specdec_rt.manifest import Binding, Graph, Precision
from specdec_rt.types import Array

TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 0.2}
"""Values of outputs, which are about 1, may differ by so much: absolutely or relatively."""
ROWS = 8
IMAGES = 2
STEPS = 2
"""Tokens of each image that a causal backbone is given in one call."""
GUIDANCE = 1.5

Feed = dict[str, Array]


@dataclass(frozen=True)
class Difference:
    """How far one output is from the reference's."""

    graph: str
    output: str
    largest: float
    mean: float
    reference_std: float
    passed: bool


def graph_inputs(bundle: Bundle, graph: Graph, seed: int = 0) -> Feed:
    """Inputs that decoding could give the graph: indices in range, the bundle's chain, other values about 1."""
    rng = np.random.default_rng(seed)
    return {binding.name: _values(bundle, binding, rng) for binding in graph.inputs}


def _values(bundle: Bundle, binding: Binding, rng: np.random.Generator) -> Array:
    manifest = bundle.manifest
    chain = compile_chain(manifest.chain)
    tokens, n = manifest.tokens, chain.length
    known = max(tokens // 2, 1)
    sizes = {"B": IMAGES, "N": STEPS, "S": tokens, "G": 2, "R": ROWS, "P": ROWS, "K": known, "Q": tokens - known}
    sizes |= {"n": n, "n_plus_1": n + 1}
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in binding.shape)
    match binding.name:
        case "label":
            return rng.integers(0, manifest.classes + 1, shape)  # the last is the dropped label
        case "position":
            return rng.integers(0, tokens - STEPS + 1, shape)
        case "visible":
            return np.broadcast_to(np.arange(known), shape).copy()
        case "query":
            return np.broadcast_to(np.arange(known, tokens), shape).copy()
        case "visible_mask":
            return np.broadcast_to(np.arange(known) < max(known - 1, 1), shape).copy()
        case "timestep":
            return np.asarray(chain.timestep, np.int64)
        case "row":
            return np.arange(ROWS)[::-1].copy()
        case "step":
            return np.arange(ROWS) % n
        case "coefficients":
            return chain.coefficients.astype(np.float32)
        case "guidance":
            return np.broadcast_to(np.array([[GUIDANCE], [1 - GUIDANCE]], np.float32), shape).copy()
        case _:
            return rng.standard_normal(shape, np.float32)


def compare_graph(
    name: str, reference: Path, other: Path, inputs: Feed, against: str, tolerance: float
) -> list[Difference]:
    """Compare the graph at `other` on `against` with the one at `reference` on ONNX Runtime's CPU provider."""
    from polygraphy.comparator import Comparator, SimpleCompareFunc

    runners = [_onnxruntime(reference, "cpu"), _RUNNERS[against](other, inputs)]
    results = Comparator.run(runners, data_loader=[inputs])
    compare = SimpleCompareFunc(atol=tolerance, rtol=tolerance)
    accuracy = Comparator.compare_accuracy(results, compare_func=compare)
    expected = next(iter(results.values()))[0]
    ((compared,),) = [list(one.values()) for one in accuracy]
    return [
        Difference(
            name,
            output,
            found.max_absdiff,
            found.mean_absdiff,
            float(np.std(np.asarray(expected[output]))),
            bool(found),
        )
        for output, found in compared[0].items()
    ]


def _onnxruntime(path: Path, provider: str, *, optimised: bool = True) -> Any:  # noqa: ANN401  # Polygraphy has no types
    import onnxruntime
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    if provider == "cuda":
        onnxruntime.preload_dlls()
    levels = onnxruntime.GraphOptimizationLevel
    level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    session = SessionFromOnnx(str(path), providers=[provider], graph_optimization_level=level)
    return OnnxrtRunner(session, name=f"{provider}, optimised" if optimised else provider)


def _tensorrt(path: Path, inputs: Feed) -> Any:  # noqa: ANN401  # Polygraphy has no types
    from polygraphy.backend.trt import EngineFromNetwork, TrtRunner

    return TrtRunner(EngineFromNetwork(*tensorrt_network(path, inputs)))


def tensorrt_network(path: Path, inputs: Feed) -> tuple[Any, Any]:
    """Polygraphy's loader of the graph as a strongly typed network, and the configuration for the inputs' sizes."""
    from polygraphy.backend.trt import CreateConfig, NetworkFromOnnxPath, Profile, SetDecomposableAttentions

    profile = Profile()
    for name, array in inputs.items():
        profile.add(name, array.shape, array.shape, array.shape)
    network = SetDecomposableAttentions(NetworkFromOnnxPath(str(path), strongly_typed=True))
    return network, CreateConfig(profiles=[profile])  # Polygraphy leaves TF32 off unless it is asked for


_RUNNERS: dict[str, Callable[[Path, Feed], Any]] = {
    BackendName.TENSORRT_RTX.value: _tensorrt,
    BackendName.TENSORRT.value: _tensorrt,
    BackendName.CUDA.value: lambda path, _: _onnxruntime(path, "cuda"),
    BackendName.ONNXRUNTIME.value: lambda path, _: _onnxruntime(path, "cpu", optimised=False),
}


def compare_bundle(bundle: Bundle, against: str, precision: Precision = "fp32") -> list[Difference]:
    """Compare all outputs of all graphs that the bundle has in this precision."""
    found: list[Difference] = []
    for slot in bundle_graphs(bundle.manifest):
        try:
            paths = bundle.path(slot.graph), bundle.path(slot.graph, precision)
        except BundleError:
            continue  # it has no such variant
        found += compare_graph(slot.label, *paths, graph_inputs(bundle, slot.graph), against, TOLERANCE[precision])
    return found


def _table(differences: list[Difference], title: str) -> Table:
    """A row for each graph: its output with the largest difference."""
    table = Table("graph", "its worst output", "difference", "output's std", "passed", title=title)
    worst: dict[str, Difference] = {}
    for one in differences:
        if one.graph not in worst or one.largest > worst[one.graph].largest:
            worst[one.graph] = one
    for one in worst.values():
        passed = "yes" if one.passed else "NO"
        table.add_row(one.graph, one.output, f"{one.largest:.1e}", f"{one.reference_std:.2f}", passed)
    return table


def main() -> int:
    """Compare a bundle's graphs. Returns 0 if all outputs are within the tolerance, else, or if there are none, 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.compare", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", default="digits")
    parser.add_argument("--against", choices=list(_RUNNERS), default=BackendName.TENSORRT_RTX.value)
    parser.add_argument("--precision", choices=TOLERANCE, default="fp32")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    if given.against == BackendName.ONNXRUNTIME and given.precision == "bf16":
        parser.error("ONNX Runtime has no bf16 on the CPU; choose another backend or precision")
    if given.against != BackendName.ONNXRUNTIME:
        try:
            find_driver()
        except BackendError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code
    # Polygraphy asks once, when it is imported, which of the two modules it is to use.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if given.against == BackendName.TENSORRT_RTX else "0"
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    differences = compare_bundle(load_bundle(given.bundle), given.against, given.precision)
    Console().print(_table(differences, f"{given.bundle} in {given.precision} on {given.against}"))
    if given.out is not None:
        record = {"bundle": given.bundle, "against": given.against, "precision": given.precision}
        given.out.write_text(
            json.dumps({**record, "differences": [asdict(one) for one in differences]}, indent=1) + "\n"
        )
    return 0 if differences and all(one.passed for one in differences) else 1


if __name__ == "__main__":
    sys.exit(main())
