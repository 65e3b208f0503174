"""Results as Markdown: `benchmarks.md` with tables, and the plots beside it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots import Plot, plots_of
from specdec_rt.cli.files import Write, write_together
from specdec_rt.errors import UsageError

__all__ = ["read_results", "write_report"]

REPORT = "benchmarks.md"
ALLOWED_ERROR = 0.15
"""Relative error of the cost model; rows above it are marked."""


def read_results(path: Path) -> dict[str, Any]:
    """Read a file that `run` wrote. Raises UsageError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as JSON ({error}); expected a file of python -m benchmarks run"
        ) from error
    wanted = {"scenario", "settings", "threads", "machine", "rows", "limits", "cost"}
    if not isinstance(found, dict) or set(found) != wanted:
        raise UsageError(f"{path} holds no results of python -m benchmarks run")
    return found


def write_report(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write `out/benchmarks.md` and its plots, all together or not at all. Returns the files."""
    results = [read_results(path) for path in paths]
    names = [result["scenario"] for result in results]
    if len(set(names)) < len(names):
        raise UsageError(f"two of the results are of one scenario: {', '.join(names)}")
    contents: dict[Path, Write] = {}
    sections = ["# Benchmarks\n\nWritten by `python -m benchmarks report`: change nothing by hand."]
    for result in results:
        plots = plots_of(result)
        sections.append(_section(result, plots))
        contents |= {out / plot.name: plot.write for plot in plots}
    text = "\n\n".join(sections) + "\n"
    contents[out / REPORT] = lambda file: _write_text(file, text)
    write_together(contents, folder=out)
    return list(contents)


def _write_text(file: Any, text: str) -> None:  # noqa: ANN401  # a binary stream
    file.write(text.encode())


def _section(result: dict[str, Any], plots: Sequence[Plot]) -> str:
    settings = result["settings"]
    parts = [f"## {settings['title']}", _conditions(result)]
    parts += [f"### Batch {batch}\n\n{_rows_table(rows)}" for batch, rows in _by_batch(result["rows"])]
    parts += _by_turns(result["rows"])
    parts += _ablation(result["rows"])
    parts += [f"![{plot.caption}]({plot.name})" for plot in plots]
    shares = _host_table(result["rows"])
    if shares:
        parts.append(f"### Where the time goes\n\n{shares}")
    if result["cost"] is not None:
        parts.append(f"### Cost model against measurement\n\n{_cost_table(result)}")
    if result["limits"] is not None:
        parts.append(_limits(result["limits"]))
    return "\n\n".join(parts)


def _conditions(result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = (machine["commit"] or "unknown")[:12] + (" with uncommitted changes" if machine["dirty"] else "")
    lines = [
        f"`{machine['command']}` at commit {commit}, {versions}.",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB; "
        f"{result['threads']} threads each, load {machine['load_average']:.1f} before the run. "
        f"{settings['repeats']} processes of up to {settings['samples']} requests each after {settings['warmup']} "
        "to warm up; variants take turns.",
    ]
    if settings["first_ar_steps"] is not None:
        lines.append(f"**Times are of the first {settings['first_ar_steps']} AR steps, not of whole images.**")
    forced = {
        variant["name"]: variant["forced"] for variant in settings["variants"] if variant.get("forced") is not None
    }
    if forced:
        shares = "; ".join(
            f"{name}: {of['acceptance']:.0%} accepted, {of['left']:.0%} of the chain left at a rejection, "
            f"{of['resumed']:.0%} of the resumed suffixes accepted"
            for name, of in forced.items()
        )
        source = settings["forced_source"]
        lines.append(f"**Weights are random: verdicts are forced, as measured elsewhere ({source}).** {shares}.")
    return "\n\n".join(lines)


def _by_batch(rows: Iterable[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    rows = list(rows)
    return [(batch, [row for row in rows if row["batch"] == batch]) for batch in sorted({row["batch"] for row in rows})]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rows_table(rows: list[dict[str, Any]]) -> str:
    known = {row["variant"]: row["p50_seconds"] for row in rows if "p50_seconds" in row}
    target = known.get("target")
    shown = []
    for row in rows:
        if "p50_seconds" not in row:
            why = row["processes"][-1].get("failed", "not measured").splitlines()[0]
            shown.append([row["variant"], "failed", "", "", "", "", "", why[:120].replace("|", "\\|")])
            continue
        stats = row["processes"][0].get("stats", {})
        rate = stats.get("acceptance_rate")
        shown.append(
            [
                row["variant"],
                f"{row['p50_seconds'] * 1e3:.1f}",
                f"{row['p95_seconds'] * 1e3:.1f}",
                f"{row['images_per_second']:.2f}" if "images_per_second" in row else "",
                "" if target is None else f"{target / row['p50_seconds']:.2f}×",
                "" if rate is None else f"{rate:.2f}",
                "yes" if row["exact"] else "**no**",
                row["distribution"],
            ]
        )
    header = ("variant", "p50 ms", "p95 ms", "images/s", "against target", "accepted", "exact", "distribution")
    return _table(header, shown) + _first_requests(rows)


def _ablation(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Tables in which one thing is added at a time: each row against the one before it, and against the first.

    They are for the batch sizes at which the first thing was measured: without it there is nothing to add to.
    """
    rows = [row for row in rows if row["adds"] and "p50_seconds" in row]
    parts = []
    for batch, here in _by_batch(rows):
        if here[0]["adds"] != rows[0]["adds"]:
            continue
        shown = []
        first = before = here[0]["p50_seconds"]
        for row in here:
            seconds = row["p50_seconds"]
            gains = f"{before / seconds:.2f}×", f"{first / seconds:.1f}×"
            shown.append([row["adds"], row["variant"], f"{seconds * 1e3:.1f}", *gains])
            before = seconds
        header = ("one thing at a time", "variant", "p50 ms", "against the row above", "against the first")
        parts.append(f"### Ablation, batch {batch}\n\n{_table(header, shown)}")
    return parts


def _by_turns(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The table of variants whose requests took turns with another's in one process."""
    shown = []
    for row in rows:
        if "beside_ratios" in row:
            low, median, high = np.percentile(row["beside_ratios"], [25, 50, 75])
            shown.append(
                [row["variant"], row["beside"], str(row["batch"]), f"{median:.2f}×", f"{low:.2f}× to {high:.2f}×"]
            )
    if not shown:
        return []
    header = ("variant", "against", "batch", "speed", "quartiles")
    return [f"### By turns, request by request in one process\n\n{_table(header, shown)}"]


def _first_requests(rows: list[dict[str, Any]]) -> str:
    """What compiling costs in the first request."""
    notes = [
        f"{row['variant']}: the first request takes {row['processes'][0]['first_request_seconds']:.1f} s"
        for row in rows
        if "compiled" in row["variant"] and "first_request_seconds" in row["processes"][0]
    ]
    return "\n\n" + "; ".join(notes) + "." if notes else ""


def _host_table(rows: list[dict[str, Any]]) -> str:
    shown = []
    for row in rows:
        found = row["processes"][0].get("profile")
        if not found:
            continue
        graphs = sorted(found["graphs"].items(), key=lambda item: -item[1]["seconds"])
        calls = ", ".join(
            f"{name} {times['seconds'] / found['seconds']:.0%} ({times['calls']} calls)" for name, times in graphs
        )
        shown.append([row["variant"], str(row["batch"]), f"{found['host_share']:.1%}", calls])
    return _table(("variant", "batch", "host", "engine calls"), shown) if shown else ""


def _cost_table(result: dict[str, Any]) -> str:
    rows = [{**row, "error": row["seconds"] / row["measured_seconds"] - 1} for row in result["cost"]["rows"]]
    shown = [
        [
            row["variant"],
            str(row["batch"]),
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['measured_seconds'] * 1e3:.1f}",
            f"{row['error']:+.0%}" + ("" if abs(row["error"]) <= ALLOWED_ERROR else " **off**"),
        ]
        for row in rows
    ]
    inside = sum(abs(row["error"]) <= ALLOWED_ERROR for row in rows)
    text = _table(("variant", "batch", "predicted ms", "measured ms", "error"), shown)
    return f"{text}\n\n{inside} of {len(rows)} within {ALLOWED_ERROR:.0%}."


def _limits(limits: dict[str, Any]) -> str:
    machine = limits["machine"]
    moved = [
        [
            f"{row['bytes'] / 2**20:g} MiB",
            f"{row['copy_bytes_per_second'] / 1e9:.1f}",
            f"{row['read_bytes_per_second'] / 1e9:.1f}",
        ]
        for row in machine["moved"]
    ]
    parts = [
        "### Physical limit",
        f"Matrix products reach {machine['operations_per_second'] / 1e9:.0f} G operations/s "
        f"({machine['matrix']} squared, single precision). What is moved:",
        _table(("array", "copy GB/s (read and written)", "read GB/s"), moved),
    ]
    header = (
        "graph",
        "x",
        "y",
        "weights MB",
        "state MB",
        "M operations",
        "ms",
        "limit ms",
        "bound by",
        "share of limit",
    )
    for batch, graphs in limits["graphs"].items():
        shown = [
            [
                row["graph"],
                str(row["x"]),
                str(row["y"]),
                f"{row['weight_bytes'] / 1e6:.2f}",
                f"{row['state_bytes'] / 1e6:.2f}",
                f"{row['operations'] / 1e6:.0f}",
                f"{row['seconds'] * 1e3:.3f}",
                f"{max(row['bytes_seconds'], row['operations_seconds']) * 1e3:.3f}",
                row["bound"],
                f"{row['share_of_limit']:.0%}",
            ]
            for row in graphs
        ]
        note = (
            f"Batch {batch}, {limits['branches']} guidance branches, γ {limits['draft_length']}; x: images or tokens, "
            "y: positions or known tokens."
        )
        parts += [note, _table(header, shown)]
    return "\n\n".join(parts)
