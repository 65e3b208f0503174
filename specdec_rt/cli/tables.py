"""What a person reads: the figures of a request, and what a bundle holds."""

from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specdec_rt.bundle import Bundle
from specdec_rt.chain import Chain, compile_chain
from specdec_rt.config import Mode
from specdec_rt.decode.stats import Stats
from specdec_rt.manifest import Binding, Manifest, Model

__all__ = ["bundle_record", "bundle_report", "pairs", "size_text", "stats_table"]

DISTRIBUTION: dict[Mode, str] = {
    "exact": "exactly the target's distribution",
    "paper": "close to the target's distribution, not equal to it",
    "target": "the target alone",
    "draft": "the draft alone, not the target's distribution",
}


def stats_table(stats: Stats, tokens: int) -> Table:
    """The figures of a request that made `tokens` tokens, all images together."""
    rows = {"tokens": f"{tokens:,} in {stats.images:,} image{'' if stats.images == 1 else 's'}"}
    if stats.acceptance_rate is not None:
        rows["draft tokens proposed"] = f"{stats.drafted:,}"
        rows["draft tokens accepted"] = f"{stats.accepted:,} ({stats.acceptance_rate:.1%} of those judged)"
        rows["tokens per round"] = f"{stats.tokens_per_round:.2f}"
    if 0 in stats.draft_lengths:  # chosen on the way
        rows["AR steps drafted"] = ", ".join(f"{length} ({count:,} ×)" for length, count in stats.draft_lengths.items())
    for name in ("target_backbone_calls", "draft_backbone_calls", "sequential_head_calls"):
        calls = getattr(stats, name)
        rows[name.replace("_", " ")] = f"{calls:,} ({calls / tokens:.2f} per token)"
    rows["backend"] = stats.backend
    rows["time"] = f"{stats.seconds:.2f} s ({stats.images_per_second:.2f} images per second)"
    return pairs(f"mode {stats.mode}: {DISTRIBUTION[stats.mode]}", rows)


def bundle_record(bundle: Bundle) -> dict[str, object]:
    """What `inspect` shows, as plain values for JSON."""
    manifest = bundle.manifest
    plain = manifest.model_dump(mode="json")
    chain = compile_chain(manifest.chain)
    sizes = {name: (bundle.folder / name).stat().st_size for name in manifest.files}
    owners = {"target": manifest.target, **{f"drafts.{name}": model for name, model in manifest.drafts.items()}}
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
        "chain": {**plain["chain"], "transitions": chain.length},
        "modes": {
            mode: {"works": refusal is None, "why_not": refusal} for mode, refusal in _modes(manifest, chain).items()
        },
        "defaults": plain["defaults"],
        "models": {owner: _model_record(model, sizes) for owner, model in owners.items()},
        "decoder": plain["decoder"],
        "provenance": plain["provenance"],
    }


def bundle_report(bundle: Bundle) -> RenderableType:
    """What `inspect` shows, for a terminal."""
    manifest = bundle.manifest
    chain = compile_chain(manifest.chain)
    rows = {
        "family": manifest.family,
        "precision": f"weights in {manifest.precision}",
        "tokens": f"{manifest.tokens} of {manifest.token_dim} values",
        "classes": f"{manifest.classes} (0 to {manifest.classes - 1})",
        "image": _image(manifest),
        "chain": f"{chain.length} transitions\n{_lines(manifest.model_dump()['chain'])}",
        "defaults": _lines(manifest.defaults.model_dump()),
    }
    for mode, refusal in _modes(manifest, chain).items():
        rows[f"mode {mode}"] = f"no: {refusal}" if refusal else DISTRIBUTION[mode]
    rows["size"] = size_text(sum((bundle.folder / name).stat().st_size for name in manifest.files))
    models = [_model_table("target", manifest.target, bundle)]
    models += [_model_table(f"draft {name}", model, bundle) for name, model in manifest.drafts.items()]
    provenance = {name: _lines(value) for name, value in manifest.provenance.items()}
    parts = [pairs(f"{manifest.name} ({bundle.folder})", rows), *models, pairs("provenance", provenance)]
    return Group(*(line for part in parts for line in (part, "")))


def _image(manifest: Manifest) -> str:
    layout = manifest.image
    if layout is None:
        return "none: it makes tokens only"
    made = ""
    if manifest.decoder is not None:
        precisions = ", ".join(("fp32", *manifest.decoder.graph.variants))
        made = f", by a decoder of {manifest.decoder.parameters:,} parameters that computes in {precisions}"
    return f"{layout.height} x {layout.width} x {layout.channels}, patches of {layout.patch}{made}"


def _modes(manifest: Manifest, chain: Chain) -> dict[Mode, str | None]:
    """Why each mode cannot work on the bundle; None where it can."""
    undrafted = None if manifest.drafts else "the bundle has no draft model; export it again with one"
    return {"exact": chain.refusal(), "paper": undrafted, "target": None, "draft": undrafted}


def _model_record(model: Model, sizes: dict[str, int]) -> dict[str, object]:
    plain = model.model_dump(mode="json")
    for graph in plain["graphs"].values():
        graph["size_bytes"] = sizes[graph["file"]]
    return plain


def _model_table(name: str, model: Model, bundle: Bundle) -> Table:
    head = "its own head" if model.head == "own" else "the target's head"
    title = Text(f"{name}: {model.parameters:,} parameters, {head}", "bold")
    columns = ("graph", "computes in", "size", "inputs", "outputs")
    table = Table(*columns, title=title, title_justify="left", show_lines=True)
    for graph_name, graph in model.graphs.items():
        size = size_text(bundle.path(graph).stat().st_size)
        precisions = "\n".join(("fp32", *graph.variants))
        table.add_row(graph_name, precisions, size, _bindings(graph.inputs), _bindings(graph.outputs))
    return table


def _bindings(bindings: tuple[Binding, ...]) -> Text:
    """One binding a line; a run of three or more of one shape (a model's caches) in a single line."""
    lines = []
    for (dtype, shape), group in groupby(bindings, lambda binding: (binding.dtype, binding.shape)):
        names = [binding.name for binding in group]
        if len(names) > 2:
            names = [f"{names[0]} … {names[-1]} ({len(names)})"]
        kind = "" if dtype == "float32" else f" {dtype}"
        lines += [f"{name} [{','.join(map(str, shape))}]{kind}" for name in names]
    return Text("\n".join(lines))


def pairs(title: str, rows: dict[str, str]) -> Table:
    """Names and values. All is `Text`: a bundle's words must not be read as markup."""
    table = Table(show_header=False, title=Text(title, "bold"), title_justify="left")
    for name, value in rows.items():
        table.add_row(Text(name, "cyan"), Text(value))
    return table


def _lines(value: Any, indent: str = "") -> str:  # noqa: ANN401  # whatever JSON holds
    """JSON for the eye: a name and its value a line, four digits of a number."""
    if isinstance(value, dict):
        lines = []
        for name, item in value.items():
            inner = _lines(item, indent + "  ")
            lines.append(f"{indent}{name}:\n{inner}" if isinstance(item, dict) else f"{indent}{name}: {inner}")
        return "\n".join(lines)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size_text(size_bytes: int) -> str:
    """A file's size for the eye."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"
