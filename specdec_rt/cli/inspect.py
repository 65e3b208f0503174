"""`specdec-rt inspect`: what bundles and built engines hold.

An engine's record says it all: no engine is deserialised to show it.
"""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec_rt.build.builder import EngineBuilder
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.engine_record import CachedEngine, engine_key
from specdec_rt.build.recipe import Recipe, read_recipe
from specdec_rt.bundle import Bundle, load_bundle
from specdec_rt.chain import compile_chain
from specdec_rt.cli.options import CacheOption, JsonOption
from specdec_rt.cli.tables import bundle_report, engine_report, engines_report
from specdec_rt.cli.terminal import print_result
from specdec_rt.config import Mode
from specdec_rt.errors import UsageError
from specdec_rt.manifest import Manifest, Model

__all__ = ["bundle_record", "engine_record", "find_engine", "find_engines", "inspect_command"]

_RECORD_NAME = re.compile(r"[0-9a-f]{64}\.json")


def inspect_command(
    bundle: Annotated[
        str,
        typer.Argument(
            help="The bundle: its folder, or the name of an embedded one. Or an engine in the cache (KEY.plan)."
        ),
    ] = "digits",
    *,
    engines: Annotated[
        bool, typer.Option("--engines", help="Show the engines that were built from the bundle.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Show only engines that this recipe makes on this machine.")
    ] = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a bundle or an engine holds, which modes work on it and where it comes from."""
    if not engines and (recipe is not None or cache is not None):
        raise UsageError(f"{'--recipe' if recipe else '--cache'} applies to engines only; add --engines")
    if _is_engine_file(Path(bundle)):
        if engines:
            raise UsageError(f"{bundle} is an engine itself; leave out --engines")
        entry = find_engine(Path(bundle))
        print_result(engine_record(entry), engine_report(entry), as_json=as_json)
    elif engines:
        checked = load_bundle(bundle)
        entries = find_engines(checked, EngineCache(cache), None if recipe is None else read_recipe(recipe))
        report = engines_report(checked.manifest, entries)
        print_result([engine_record(entry) for entry in entries], report, as_json=as_json)
    else:
        checked = load_bundle(bundle)
        report = bundle_report(checked, _mode_refusals(checked.manifest))
        print_result(bundle_record(checked), report, as_json=as_json)


# --- bundles -------------------------------------------------------------------------------------------


def bundle_record(bundle: Bundle) -> dict[str, object]:
    """What a bundle holds, as plain values for JSON."""
    manifest = bundle.manifest
    plain = manifest.model_dump(mode="json")
    sizes = {name: (bundle.folder / name).stat().st_size for name in manifest.files}
    models = {"target": manifest.target, **{f"drafts.{name}": model for name, model in manifest.drafts.items()}}
    return {
        "name": manifest.name,
        "folder": str(bundle.folder),
        "size_bytes": sum(sizes.values()),
        "schema_version": manifest.schema_version,
        "family": manifest.family,
        "precision": manifest.precision,
        "tokens": manifest.tokens,
        "token_dim": manifest.token_dim,
        "classes": manifest.classes,
        "image": plain["image"],
        "chain": {**plain["chain"], "transitions": compile_chain(manifest.chain).length},
        "modes": {
            mode: {"works": refusal is None, "why_not": refusal} for mode, refusal in _mode_refusals(manifest).items()
        },
        "defaults": plain["defaults"],
        "models": {name: _model_record(model, sizes) for name, model in models.items()},
        "decoder": plain["decoder"],
        "provenance": plain["provenance"],
    }


def _model_record(model: Model, sizes: dict[str, int]) -> dict[str, object]:
    plain = model.model_dump(mode="json")
    for graph in plain["graphs"].values():
        graph["size_bytes"] = sizes[graph["file"]]
    return plain


def _mode_refusals(manifest: Manifest) -> dict[Mode, str | None]:
    """Why each mode cannot work on the bundle; None where it can."""
    without_draft = None if manifest.drafts else "the bundle has no draft model; export it again with one"
    exact = compile_chain(manifest.chain).refusal()
    return {"exact": exact, "paper": without_draft, "target": None, "draft": without_draft}


# --- engines -------------------------------------------------------------------------------------------


def _is_engine_file(path: Path) -> bool:
    """Whether the file at `path` is by its name an engine, or an engine's record."""
    return path.is_file() and (path.suffix == ".plan" or _RECORD_NAME.fullmatch(path.name) is not None)


def find_engine(path: Path) -> CachedEngine:
    """The engine whose plan or record lies at `path`. Raises UsageError for one that was not built on this machine."""
    record = path.with_suffix(".json")
    if _RECORD_NAME.fullmatch(record.name) and record.is_file():  # the folder is a cache: no other is touched
        for entry in EngineCache(path.absolute().parent).entries():
            if entry.key == path.stem:
                return entry
    raise UsageError(
        f"{path} is not an engine that was built and recorded on this machine: its record is missing, was altered, or "
        "was written by another release or another machine; build the engine here: specdec-rt build"
    )


def find_engines(bundle: Bundle, cache: EngineCache, recipe: Recipe | None = None) -> list[CachedEngine]:
    """The cached engines of a bundle's graphs, in the order of the graphs.

    With a recipe, only those that it makes on this machine, at most one for each graph; this raises what `build`
    raises for a recipe that does not fit.
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
    """What an engine's record says, as plain values for JSON."""
    return {"key": entry.key, "path": str(entry.path), **entry.record.model_dump(mode="json")}
