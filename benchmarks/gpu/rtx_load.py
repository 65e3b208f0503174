"""Whether TensorRT-RTX engines load on this GPU, whatever `doctor` says of its compute capability.

    python -m benchmarks.gpu.rtx_load --out FILE.json [--bundle digits]

Every graph of the bundle's target is built: for this GPU's compute capability where the library names it, and for
those that the library takes by itself. Then it is deserialised, and `time_embedding` is run and held against ONNX
Runtime on the CPU. What fails is recorded in the library's words.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.machine import machine_record, write_json
from specdec_rt.backends.base import BackendName, run_once
from specdec_rt.backends.nvidia_driver import find_driver
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.backends.tensorrt_builder import BuildSettings, build_engine
from specdec_rt.backends.tensorrt_engine import load_engine
from specdec_rt.backends.tensorrt_module import TensorRTModule, probe
from specdec_rt.build.bundle_graphs import BundleGraph, bundle_graphs
from specdec_rt.build.profile import graph_profile
from specdec_rt.build.recipe import default_recipe
from specdec_rt.bundle import Bundle, load_bundle
from specdec_rt.chain import compile_chain
from specdec_rt.errors import BackendError
from specdec_rt.manifest import GraphName
from specdec_rt.types import Array

__all__ = ["main"]

BACKEND = BackendName.TENSORRT_RTX


def main() -> None:
    """Try, and write down what happened; each graph as it comes, as a library may end the process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.rtx_load", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bundle", default="digits")
    given = parser.parse_args()
    bundle = load_bundle(given.bundle)
    record: dict[str, Any] = {"machine": machine_record(), "bundle": given.bundle, "attempts": []}
    try:
        tensorrt = probe(BACKEND)
    except BackendError as error:
        write_json(given.out, {**record, "error": str(error)})
        return
    record |= {"library": tensorrt.title, "targets": tensorrt.capabilities.compute_capabilities}
    for attempt in attempts(tensorrt, bundle):
        record["attempts"].append(attempt)
        write_json(given.out, record)
    write_json(given.out, {**record, "loads": any(one["loaded"] for one in record["attempts"])})


def attempts(tensorrt: TensorRTModule, bundle: Bundle) -> Iterator[dict[str, Any]]:
    """What became of each graph, for each choice of compute capabilities."""
    for capabilities in _choices(tensorrt):
        for slot in bundle_graphs(bundle.manifest):
            if slot.owner == "target":
                yield _attempt(tensorrt, bundle, slot, capabilities)


def _choices(tensorrt: TensorRTModule) -> list[tuple[str, ...]]:
    try:
        own = find_driver().gpus[0].compute_capability
    except BackendError:
        return [()]
    named = f"SM{own.replace('.', '')}" in tensorrt.capabilities.compute_capabilities
    return [(own,), ()] if named else [()]


def _attempt(
    tensorrt: TensorRTModule, bundle: Bundle, slot: BundleGraph, capabilities: tuple[str, ...]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "graph": slot.label,
        "built_for": ", ".join(capabilities) or "the library's own choice",
        "plan_bytes": None,
        "loaded": False,
        "relative_error": None,
        "error": None,
    }
    began = time.perf_counter()
    try:
        profiles = graph_profile(bundle.manifest, slot.model, slot.name, default_recipe(BACKEND))
        settings = BuildSettings(compute_capabilities=capabilities)
        plan = build_engine(tensorrt, bundle.path(slot.graph), profiles, settings=settings).plan
        found |= {"plan_bytes": len(plan), "build_seconds": round(time.perf_counter() - began, 2)}
        load_engine(tensorrt, plan)  # built a moment ago, by this process
        found["loaded"] = True
        if slot.name is GraphName.TIME_EMBEDDING:
            found["relative_error"] = _run(tensorrt, bundle, slot, plan)
    except Exception as error:  # whatever the library raises is the answer
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def _run(tensorrt: TensorRTModule, bundle: Bundle, slot: BundleGraph, plan: bytes) -> float:
    """How far `time_embedding` is from ONNX Runtime's on the CPU, relative L2."""
    from specdec_rt.backends.cuda import CudaDevice  # imports nothing of CUDA before a device is made
    from specdec_rt.backends.tensorrt_engine import TensorRTEngine

    path, device = bundle.path(slot.graph), CudaDevice(batch_buckets=(1,), graphs=False)
    assert slot.model is not None
    timestep = compile_chain(bundle.manifest.chain).timestep
    shape = (len(timestep), slot.model.head_width or 0)
    cpu = OnnxRuntimeBackend(threads=1)

    def table(on: Any, engine: Any) -> Array:  # noqa: ANN401  # a device and one of its engines
        return run_once(on, engine, {"timestep": timestep}, {"time_table": shape})["time_table"]

    expected = table(cpu.device, cpu.load(path))
    found = table(device, TensorRTEngine(tensorrt, device, load_engine(tensorrt, plan), path))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()
