"""What `inspect` tells of built engines. Their records say it all: no engine is deserialised for it."""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specdec_rt.backends.tensorrt_builder import ShapeProfile
from specdec_rt.build.builder import EngineBuilder
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.engine_record import CachedEngine, engine_key
from specdec_rt.build.recipe import Recipe
from specdec_rt.bundle import Bundle
from specdec_rt.cli.tables import pairs, size_text
from specdec_rt.errors import UsageError
from specdec_rt.manifest import Binding, Manifest

__all__ = ["engine_record", "engine_report", "engines_report", "find_engine", "find_engines", "is_engine_file"]

_RECORD = re.compile(r"[0-9a-f]{64}\.json")


def is_engine_file(path: str | Path) -> bool:
    """Whether a file lies at `path` that by its name is an engine, or an engine's record."""
    return Path(path).is_file() and (Path(path).suffix == ".plan" or _RECORD.fullmatch(Path(path).name) is not None)


def find_engine(path: Path) -> CachedEngine:
    """The engine whose plan or record lies at `path`. Raises UsageError where this machine's build left no such."""
    record = path.with_suffix(".json")
    if _RECORD.fullmatch(record.name) and record.is_file():  # the folder is a cache: no other is touched
        for entry in EngineCache(path.absolute().parent).entries():
            if entry.key == path.stem:
                return entry
    raise UsageError(
        f"{path} is no engine that this machine's build recorded: its record is missing, altered, of another release "
        "or another machine's; build it here: specdec-rt build"
    )


def find_engines(bundle: Bundle, cache: EngineCache, recipe: Recipe | None = None) -> list[CachedEngine]:
    """The engines of a bundle's graphs that are in the cache, in the order of the graphs.

    With a recipe, those that it makes on this machine, at most one for each graph. Raises what `build` does of a
    recipe that does not fit.
    """
    slots = bundle_graphs(bundle.manifest)
    order = {slot.label: index for index, slot in enumerate(slots)}
    hashes = set(bundle.manifest.files.values())
    found = [entry for entry in cache.entries() if entry.record.fields.get("graph") in hashes]
    if recipe is not None:
        builder = EngineBuilder.open(bundle, recipe, cache)
        keys = {engine_key(builder.key_fields(slot)) for slot in slots}
        found = [entry for entry in found if entry.key in keys]
    return sorted(found, key=lambda entry: order.get(entry.record.graph, len(order)))


def engine_record(entry: CachedEngine) -> dict[str, Any]:
    """What is known of an engine, as plain values for JSON."""
    return {"key": entry.key, "path": str(entry.path), **entry.record.model_dump(mode="json")}


def engine_report(entry: CachedEngine) -> RenderableType:
    """What is known of an engine, for a terminal."""
    record = entry.record
    rows = {
        "precision": record.precision,
        "library": f"{record.backend} {record.library}",
        "GPU": record.gpu or "none was at hand when it was built",
        "size": size_text(record.plan_bytes),
        "built": f"{record.created}, in {record.build_seconds:.1f} s",
        "key": entry.key,
        "SHA-256": record.plan_sha256,
        "folder": str(entry.path.parent),
    }
    title = f"{record.bundle}: {record.graph}"
    table = Table("", "binding", "smallest", "tuned for", "largest")
    for kind, bindings in (("in", record.inputs), ("out", record.outputs)):
        for names, sizes in _bindings(bindings, record.profiles):
            table.add_row(kind, Text(names), *sizes)
    return Group(pairs(title, rows), table)


def engines_report(manifest: Manifest, entries: Sequence[CachedEngine]) -> RenderableType:
    """Engines of a bundle, and which of its graphs have none."""
    built = {entry.record.graph for entry in entries}
    missing = [slot.label for slot in bundle_graphs(manifest) if slot.label not in built]
    parts = [engine_report(entry) for entry in entries]
    if missing:
        parts.append(Text(f"no engine in the cache: {', '.join(missing)}"))
    return Group(*(line for part in parts for line in (part, "")))


def _bindings(bindings: Sequence[Binding], profiles: dict[str, ShapeProfile]) -> list[tuple[str, list[str]]]:
    """Names, and the sizes of the profile; a run of three or more alike (a model's caches) is one."""
    found = []
    alike = groupby(bindings, lambda binding: (binding.dtype, binding.shape, profiles.get(binding.name)))
    for (dtype, shape, profile), group in alike:
        names = [binding.name for binding in group]
        shown = [f"{names[0]} … {names[-1]} ({len(names)})"] if len(names) > 2 else names
        kind = "" if dtype == "float32" else f" {dtype}"
        sizes = [] if profile is None else [_shape(given) for given in (profile.min, profile.opt, profile.max)]
        found += [(f"{name} {_shape(shape)}{kind}", sizes) for name in shown]
    return found


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{','.join(map(str, shape))}]"
