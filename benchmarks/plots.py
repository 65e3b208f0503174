"""The pictures of a report: latency by mode and batch, acceptance by position, where the time goes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["Plot", "plots_of"]

FEWEST_JUDGED = 8
"""Verdicts that a position needs to be shown."""


@dataclass(frozen=True)
class Plot:
    """A picture, to be written as PNG."""

    name: str
    caption: str
    figure: Figure

    def write(self, file: BinaryIO) -> None:
        """Write it as PNG: the same bytes for the same figures."""
        self.figure.savefig(file, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})


def plots_of(result: dict[str, Any]) -> list[Plot]:
    """The plots that the result has figures for."""
    made = [
        _plot(result, "latency", "Latency per image by mode and batch", _latency),
        _plot(result, "acceptance", "Acceptance by position", _acceptance),
        _plot(result, "time", "Where the time goes", _time),
    ]
    return [plot for plot in made if plot is not None]


def _plot(
    result: dict[str, Any], kind: str, caption: str, draw: Callable[[dict[str, Any]], Figure | None]
) -> Plot | None:
    figure = draw(result)
    if figure is None:
        return None
    figure.suptitle(result["settings"]["title"])
    return Plot(f"benchmarks-{result['scenario']}-{kind}.png", caption, figure)


def _measured(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if "p50_seconds" in row]


def _latency(result: dict[str, Any]) -> Figure | None:
    rows = _measured(result)
    if not rows:
        return None
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(10, 1.6 + 0.28 * len(rows) + 0.5 * len(batches)))
    heights = [sum(row["batch"] == batch for row in rows) for batch in batches]
    axes = figure.subplots(len(batches), 1, squeeze=False, height_ratios=heights, gridspec_kw={"hspace": 0.45})
    for (axis,), batch in zip(axes, batches, strict=True):
        here = [row for row in rows if row["batch"] == batch][::-1]
        middle = [row["p50_seconds"] / batch * 1e3 for row in here]
        reach = [max(row["p95_seconds"] - row["p50_seconds"], 0) / batch * 1e3 for row in here]
        colours = ["#999999" if row["engine"] == "torch" else "#1f77b4" if row["exact"] else "#ff7f0e" for row in here]
        axis.barh([row["variant"] for row in here], middle, xerr=[[0.0] * len(here), reach], color=colours)
        axis.bar_label(axis.containers[-1], fmt="%.1f", padding=3, fontsize=7)
        axis.set_title(f"batch {batch}", loc="left", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.12)
    axes[-1][0].set_xlabel("ms per image, median to p95; grey: PyTorch, blue: exact, orange: another distribution")
    return figure


def _acceptance(result: dict[str, Any]) -> Figure | None:
    rows = [row for row in result["rows"] if row.get("observed", {}).get("judged")]
    if not rows:
        return None
    figure = Figure(figsize=(11, 4.2))
    by_step, by_offset = figure.subplots(1, 2, sharey=True)
    for axis, key, label in (
        (by_step, "by_step", "AR step of the image"),
        (by_offset, "by_offset", "AR step of the round"),
    ):
        for row in rows:
            shown = [one for one in row["observed"][key] if one["judged"] >= FEWEST_JUDGED]
            if shown:
                at = [one["at"] for one in shown]
                share = [one["accepted"] / one["judged"] for one in shown]
                axis.plot(at, share, marker=".", linewidth=1, label=row["variant"])
        axis.set_xlabel(label)
        axis.set_ylim(0, 1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_step.set_ylabel("accepted / judged")
    by_offset.legend(fontsize=7)
    return figure


def _time(result: dict[str, Any]) -> Figure | None:
    rows = [(row, parts) for row in _measured(result) if (parts := _time_parts(row)) is not None]
    if not rows:
        return None
    figure = Figure(figsize=(10, 1.6 + 0.28 * len(rows)))
    axis = figure.subplots()
    names = sorted({name for _, parts in rows for name in parts})
    labels = [f"{row['variant']}, batch {row['batch']}" for row, _ in rows][::-1]
    begun = [0.0] * len(rows)
    for name in names:
        shares = [100 * parts.get(name, 0.0) / sum(parts.values()) for _, parts in rows][::-1]
        axis.barh(labels, shares, left=begun, label=name)
        begun = [left + share for left, share in zip(begun, shares, strict=True)]
    axis.set_xlabel("% of the time")
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _time_parts(row: dict[str, Any]) -> dict[str, float] | None:
    """Seconds of a batch by graph, and those of the host; None where only the whole was measured."""
    first = row["processes"][0]
    if first.get("profile"):
        found = first["profile"]
        graphs = {name: times["seconds"] for name, times in found["graphs"].items()}
        return {**graphs, "host": found["host_seconds"]}
    if "parts" in first:
        return {name.removesuffix("_seconds"): seconds for name, seconds in first["parts"].items()}
    return None
