"""`specdec-rt doctor`: what is installed, which backends can run here, and why the others cannot."""

import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

import specdec_rt
from specdec_rt.backends.availability import AUTO_ORDER, check
from specdec_rt.backends.installed import installed_version, onnxruntime_problem
from specdec_rt.backends.nvidia_driver import find_driver
from specdec_rt.backends.tensorrt_module import probe
from specdec_rt.build.cache import EngineCache
from specdec_rt.cli.options import CacheOption, JsonOption
from specdec_rt.cli.tables import key_value_table, paragraphs, size_text
from specdec_rt.cli.terminal import print_result
from specdec_rt.errors import BackendError, OutputError

__all__ = ["PACKAGES", "doctor_command", "doctor_record", "doctor_report"]

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
"""The libraries that matter here, each with the names under which it is packaged."""


def doctor_command(*, cache: CacheOption = None, as_json: JsonOption = False) -> None:
    """Show what is installed, which backends can run here, and why the others cannot."""
    record = doctor_record(cache)
    print_result(record, doctor_report(record), as_json=as_json)


# --- what is there -------------------------------------------------------------------------------------


def doctor_record(cache_folder: Path | None = None) -> dict[str, Any]:
    """All that is examined, as plain values for JSON. What is missing is part of the answer and raises nothing.

    `cache_folder` is the engine cache's; None: the user's own.
    """
    found = {backend: check(backend) for backend in AUTO_ORDER}
    return {
        "specdec_rt": specdec_rt.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed_version(*names) for name, names in PACKAGES.items()},
        "problems": [problem for problem in (onnxruntime_problem(),) if problem is not None],
        "driver": _driver_record(),
        "backends": {
            backend: {"usable": one.usable, "why": one.why, "version": one.version} for backend, one in found.items()
        },
        "auto": next((backend for backend, one in found.items() if one.usable), None),
        "capabilities": {backend: _capabilities(backend) for backend in ("tensorrt-rtx", "tensorrt")},
        "engine_cache": _cache_record(EngineCache(cache_folder)),
    }


def _driver_record() -> dict[str, Any]:
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


def _capabilities(backend: str) -> dict[str, Any] | None:
    """What a TensorRT library can do, which is known without a GPU; None where it cannot be imported."""
    try:
        found = probe(backend)
    except BackendError:
        return None
    plain = asdict(found.capabilities)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _cache_record(cache: EngineCache) -> dict[str, Any]:
    """The engines that were built and recorded on this machine; others do not count."""
    found: dict[str, Any] = {"folder": str(cache.folder), "engines": 0, "size_bytes": 0, "problem": None}
    try:
        entries = cache.entries()
    except OutputError as error:
        return {**found, "problem": str(error)}
    return {**found, "engines": len(entries), "size_bytes": sum(entry.record.plan_bytes for entry in entries)}


# --- how it is shown -----------------------------------------------------------------------------------


def doctor_report(record: dict[str, Any]) -> RenderableType:
    """A `doctor_record` for a reader."""
    auto = record["auto"]
    return paragraphs(
        [
            _installed_table(record),
            *(Text(f"problem: {problem}", "red") for problem in record["problems"]),
            _driver_table(record["driver"]),
            _backends_table(record["backends"], record["driver"]["why_not"]),
            Text("no backend can run" if auto is None else f"backend auto takes {auto}", "bold"),
            *_capability_tables(record["capabilities"]),
            _cache_table(record["engine_cache"]),
        ]
    )


def _installed_table(record: dict[str, Any]) -> Table:
    versions = {name: version or "not installed" for name, version in record["packages"].items()}
    rows = {"python": record["python"], "platform": record["platform"], **versions}
    return key_value_table(f"specdec-rt {record['specdec_rt']}", rows)


def _driver_table(found: dict[str, Any]) -> Table:
    if found["why_not"] is not None:
        return key_value_table("driver and GPUs", {"none": found["why_not"]})
    rows = {"driver": f"{found['version']}, runs CUDA up to {found['cuda']}"}
    for ordinal, one in enumerate(found["gpus"]):
        memory = f"{one['memory_bytes'] / 2**30:.1f} GiB"
        rows[f"GPU {ordinal}"] = f"{one['name']}, compute capability {one['compute_capability']}, {memory}"
    return key_value_table("driver and GPUs", rows)


def _backends_table(backends: dict[str, Any], no_driver: str | None) -> Table:
    """`no_driver` is why there is none, which the table of the driver has said already."""
    table = Table("backend", "runs", "version", "why", title=Text("backends", "bold"), title_justify="left")
    for backend, one in backends.items():
        runs = Text("yes", "green") if one["usable"] else Text("no", "red")
        why = "no driver, see above" if one["why"] == no_driver else one["why"]
        table.add_row(backend, runs, one["version"] or "-", Text(why))
    return table


def _capability_tables(capabilities: dict[str, Any]) -> list[Table]:
    return [
        key_value_table(
            f"what {backend} can do", {name.replace("_", " "): _value_text(value) for name, value in found.items()}
        )
        for backend, found in capabilities.items()
        if found is not None
    ]


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "those of the GPU at hand" if isinstance(value, list) else str(value)


def _cache_table(cache: dict[str, Any]) -> Table:
    engines = cache["problem"] or f"{cache['engines']}, {size_text(cache['size_bytes'])}"
    return key_value_table("engine cache", {"folder": cache["folder"], "engines": engines})
