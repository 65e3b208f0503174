"""What `doctor` tells: what is installed, which backends can run here, and why the others cannot."""

import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import specdec_rt
from specdec_rt.backends.availability import AUTO_ORDER, check
from specdec_rt.backends.installed import installed_version, onnxruntime_problem
from specdec_rt.backends.nvidia_driver import find_driver
from specdec_rt.backends.tensorrt_module import probe
from specdec_rt.build.cache import EngineCache
from specdec_rt.cli.tables import pairs, size_text
from specdec_rt.errors import BackendError, OutputError

__all__ = ["doctor_record", "doctor_report"]

PACKAGES: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "cuda-core": ("cuda-core",),
    "cuda-bindings": ("cuda-bindings",),
    "polygraphy": ("polygraphy",),
}
"""Names under which each is packaged."""


def doctor_record(cache_folder: Path | None = None) -> dict[str, Any]:
    """All that is looked at, as plain values for JSON. Nothing of it raises where something is missing.

    `cache_folder` is the engine cache's; None: the user's own.
    """
    found = {backend: check(backend) for backend in AUTO_ORDER}
    return {
        "specdec_rt": specdec_rt.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed_version(*names) for name, names in PACKAGES.items()},
        "problems": [problem for problem in (onnxruntime_problem(),) if problem is not None],
        "driver": _driver(),
        "backends": {
            backend: {"usable": one.usable, "why": one.why, "version": one.version} for backend, one in found.items()
        },
        "auto": next((backend for backend, one in found.items() if one.usable), None),
        "capabilities": {backend: _capabilities(backend) for backend in ("tensorrt-rtx", "tensorrt")},
        "engine_cache": _cache(EngineCache(cache_folder)),
    }


def doctor_report(record: dict[str, Any]) -> RenderableType:
    """A `doctor_record` for a terminal."""
    backends = Table("backend", "runs", "version", "why", title=Text("backends", "bold"), title_justify="left")
    for backend, one in record["backends"].items():
        runs = Text("yes", "green") if one["usable"] else Text("no", "red")
        why = "no driver, see above" if one["why"] == record["driver"]["why_not"] else one["why"]
        backends.add_row(backend, runs, one["version"] or "-", Text(why))
    auto = record["auto"]
    parts: list[RenderableType] = [
        pairs(
            f"specdec-rt {record['specdec_rt']}",
            {
                "python": record["python"],
                "platform": record["platform"],
                **{name: version or "not installed" for name, version in record["packages"].items()},
            },
        ),
        *(Text(f"problem: {problem}", "red") for problem in record["problems"]),
        _driver_table(record["driver"]),
        backends,
        Text("no backend can run" if auto is None else f"backend auto takes {auto}", "bold"),
    ]
    for backend, capabilities in record["capabilities"].items():
        if capabilities is not None:
            rows = {name.replace("_", " "): _words(value) for name, value in capabilities.items()}
            parts.append(pairs(f"what {backend} can do", rows))
    cache = record["engine_cache"]
    engines = cache["problem"] or f"{cache['engines']}, {size_text(cache['size_bytes'])}"
    parts.append(pairs("engine cache", {"folder": cache["folder"], "engines": engines}))
    return Group(*(line for part in parts for line in (part, "")))


def _driver() -> dict[str, Any]:
    try:
        found = find_driver()
    except BackendError as error:
        return {"version": None, "cuda": None, "why_not": str(error), "gpus": []}
    return {
        "version": found.version,
        "cuda": f"{found.cuda[0]}.{found.cuda[1]}",
        "why_not": None,
        "gpus": [asdict(one) for one in found.gpus],
    }


def _driver_table(found: dict[str, Any]) -> Table:
    if found["why_not"] is not None:
        return pairs("driver and GPUs", {"none": found["why_not"]})
    rows = {"driver": f"{found['version']}, runs CUDA up to {found['cuda']}"}
    for ordinal, one in enumerate(found["gpus"]):
        memory = f"{one['memory_bytes'] / 2**30:.1f} GiB"
        rows[f"GPU {ordinal}"] = f"{one['name']}, compute capability {one['compute_capability']}, {memory}"
    return pairs("driver and GPUs", rows)


def _capabilities(backend: str) -> dict[str, Any] | None:
    """What a TensorRT's own names say that it can do, which takes no GPU; None where it cannot be imported."""
    try:
        found = probe(backend)
    except BackendError:
        return None
    plain = asdict(found.capabilities)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "the GPU at hand" if isinstance(value, list) else str(value)


def _cache(cache: EngineCache) -> dict[str, Any]:
    """Engines that this machine's build recorded; others do not count."""
    found: dict[str, Any] = {"folder": str(cache.folder), "engines": 0, "size_bytes": 0, "problem": None}
    try:
        entries = cache.entries()
    except OutputError as error:
        return {**found, "problem": str(error)}
    return {**found, "engines": len(entries), "size_bytes": sum(entry.record.plan_bytes for entry in entries)}
