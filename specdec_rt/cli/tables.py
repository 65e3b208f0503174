"""Tables for a reader: the figures of a request, bundles and engines."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from specdec_rt.backends.tensorrt_builder import ShapeProfile
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.build.engine_record import CachedEngine
from specdec_rt.bundle import Bundle
from specdec_rt.chain import compile_chain
from specdec_rt.config import Mode
from specdec_rt.decode.stats import Stats
from specdec_rt.manifest import Binding, Manifest, Model

__all__ = [
    "DISTRIBUTION",
    "bundle_report",
    "engine_report",
    "engines_report",
    "key_value_table",
    "numeric_columns",
    "paragraphs",
    "rate_text",
    "size_text",
    "stats_table",
]

DISTRIBUTION: dict[Mode, str] = {
    "exact": "exactly the target's distribution",
    "paper": "close to the target's distribution, not equal to it",
    "target": "the target alone",
    "draft": "the draft alone, not the target's distribution",
}
"""What the images of each mode are distributed as."""


# --- building blocks -----------------------------------------------------------------------------------


def key_value_table(title: str, rows: Mapping[str, str]) -> Table:
    """A name and a value in each row. All is `Text`: a bundle's words must not be read as markup."""
    table = Table(show_header=False, title=Text(title, "bold"), title_justify="left")
    for name, value in rows.items():
        table.add_row(Text(name, "cyan"), Text(value))
    return table


def paragraphs(parts: Sequence[RenderableType]) -> Group:
    """The parts one below the other, an empty line after each."""
    return Group(*(line for part in parts for line in (part, "")))


def numeric_columns(*names: str) -> list[Column]:
    """Columns of numbers, which are set flush right."""
    return [Column(name, justify="right") for name in names]


def size_text(size_bytes: int) -> str:
    """A file's size for a reader, as in "1.5 MB"."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def rate_text(rate: float | None) -> str:
    """An acceptance rate for a reader; empty where nothing was drafted."""
    return "" if rate is None else f"{rate:.2f}"


# --- a request -----------------------------------------------------------------------------------------


def stats_table(stats: Stats, tokens: int) -> Table:
    """The figures of a request that generated `tokens` tokens, in all images together."""
    rows = {"tokens": f"{tokens:,} in {stats.images:,} image{'' if stats.images == 1 else 's'}"}
    if stats.acceptance_rate is not None:
        rows["draft tokens proposed"] = f"{stats.drafted:,}"
        rows["draft tokens accepted"] = f"{stats.accepted:,} ({stats.acceptance_rate:.1%} of those verified)"
        rows["tokens per round"] = f"{stats.tokens_per_round:.2f}"
    if 0 in stats.draft_lengths:  # only a draft length that is chosen for every round can be 0
        rows["draft length"] = _draft_lengths_text(stats.draft_lengths)
    for name in ("target_backbone_calls", "draft_backbone_calls", "sequential_head_calls"):
        calls = getattr(stats, name)
        rows[name.replace("_", " ")] = f"{calls:,} ({calls / tokens:.2f} per token)"
    rows["backend"] = stats.backend
    rows["time"] = f"{stats.seconds:.2f} s ({stats.images_per_second:.2f} images per second)"
    return key_value_table(f"mode {stats.mode}: {DISTRIBUTION[stats.mode]}", rows)


def _draft_lengths_text(rounds: Mapping[int, int]) -> str:
    """Rounds by their draft length; at 0 the AR steps that were left to the target alone."""
    return ", ".join(
        f"{length} in {count:,} rounds" if length else f"no draft in {count:,} AR steps"
        for length, count in rounds.items()
    )


# --- a bundle ------------------------------------------------------------------------------------------


def bundle_report(bundle: Bundle, refusals: Mapping[Mode, str | None]) -> RenderableType:
    """What a bundle holds; `refusals` says why a mode cannot work on it, None where it can."""
    manifest = bundle.manifest
    models = [_model_table("target", manifest.target, bundle)]
    models += [_model_table(f"draft {name}", model, bundle) for name, model in manifest.drafts.items()]
    provenance = {name: _indented(value) for name, value in manifest.provenance.items()}
    summary = key_value_table(f"{manifest.name} ({bundle.folder})", _bundle_rows(bundle, refusals))
    return paragraphs([summary, *models, key_value_table("provenance", provenance)])


def _bundle_rows(bundle: Bundle, refusals: Mapping[Mode, str | None]) -> dict[str, str]:
    manifest = bundle.manifest
    modes = {
        f"mode {mode}": DISTRIBUTION[mode] if refusal is None else f"no: {refusal}"
        for mode, refusal in refusals.items()
    }
    return {
        "family": manifest.family,
        "precision": f"weights in {manifest.precision}",
        "tokens": f"{manifest.tokens} of {manifest.token_dim} values",
        "classes": f"{manifest.classes} (0 to {manifest.classes - 1})",
        "image": _image_text(manifest),
        "chain": f"{compile_chain(manifest.chain).length} transitions\n{_indented(manifest.model_dump()['chain'])}",
        "defaults": _indented(manifest.defaults.model_dump()),
        **modes,
        "size": size_text(sum((bundle.folder / name).stat().st_size for name in manifest.files)),
    }


def _image_text(manifest: Manifest) -> str:
    layout = manifest.image
    if layout is None:
        return "none: it makes tokens only"
    text = f"{layout.height} x {layout.width} x {layout.channels}, patches of {layout.patch}"
    if manifest.decoder is None:
        return text
    precisions = ", ".join(("fp32", *manifest.decoder.graph.variants))
    return f"{text}, by a decoder of {manifest.decoder.parameters:,} parameters that computes in {precisions}"


def _model_table(name: str, model: Model, bundle: Bundle) -> Table:
    head = "its own head" if model.head == "own" else "the target's head"
    title = Text(f"{name}: {model.parameters:,} parameters, {head}", "bold")
    columns = ("graph", "computes in", "size", "inputs", "outputs")
    table = Table(*columns, title=title, title_justify="left", show_lines=True)
    for graph_name, graph in model.graphs.items():
        size = size_text(bundle.path(graph).stat().st_size)
        precisions = "\n".join(("fp32", *graph.variants))
        inputs, outputs = (
            Text("\n".join(text for text, _ in _binding_rows(bindings, {})))
            for bindings in (graph.inputs, graph.outputs)
        )
        table.add_row(graph_name, precisions, size, inputs, outputs)
    return table


def _indented(value: Any, indent: str = "") -> str:  # noqa: ANN401  # whatever JSON holds
    """JSON for a reader: a name and its value in each line, numbers to four digits."""
    if isinstance(value, dict):
        lines = []
        for name, item in value.items():
            inner = _indented(item, indent + "  ")
            lines.append(f"{indent}{name}:\n{inner}" if isinstance(item, dict) else f"{indent}{name}: {inner}")
        return "\n".join(lines)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- engines -------------------------------------------------------------------------------------------


def engines_report(manifest: Manifest, entries: Sequence[CachedEngine]) -> RenderableType:
    """A bundle's engines, and which of its graphs have none."""
    built = {entry.record.graph for entry in entries}
    missing = [slot.label for slot in bundle_graphs(manifest) if slot.label not in built]
    parts = [engine_report(entry) for entry in entries]
    if missing:
        parts.append(Text(f"no engine in the cache: {', '.join(missing)}"))
    return paragraphs(parts)


def engine_report(entry: CachedEngine) -> RenderableType:
    """What an engine's record says."""
    record = entry.record
    rows = {
        "precision": record.precision,
        "library": f"{record.backend} {record.library}",
        "GPU": record.gpu or "built on a machine without one",
        "size": size_text(record.plan_bytes),
        "built": f"{record.created}, in {record.build_seconds:.1f} s",
        "key": entry.key,
        "SHA-256": record.plan_sha256,
        "folder": str(entry.path.parent),
    }
    table = Table("", "binding", "smallest", "tuned for", "largest")
    for direction, bindings in (("in", record.inputs), ("out", record.outputs)):
        for text, profile in _binding_rows(bindings, record.profiles):
            sizes = () if profile is None else (profile.min, profile.opt, profile.max)
            table.add_row(direction, Text(text), *map(_shape_text, sizes))
    return Group(key_value_table(f"{record.bundle}: {record.graph}", rows), table)


def _binding_rows(
    bindings: Sequence[Binding], profiles: Mapping[str, ShapeProfile]
) -> Iterator[tuple[str, ShapeProfile | None]]:
    """Each binding and its profile; three or more that are alike (a model's caches) make one row."""
    alike = groupby(bindings, lambda binding: (binding.dtype, binding.shape, profiles.get(binding.name)))
    for (dtype, shape, profile), group in alike:
        names = [binding.name for binding in group]
        if len(names) > 2:
            names = [f"{names[0]} … {names[-1]} ({len(names)})"]
        kind = "" if dtype == "float32" else f" {dtype}"
        for name in names:
            yield f"{name} {_shape_text(shape)}{kind}", profile


def _shape_text(shape: Sequence[int | str]) -> str:
    return f"[{','.join(map(str, shape))}]"
