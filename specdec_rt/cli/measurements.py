"""Measurements of `bench`: requests of each mode and batch size, repeated on a clock."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import typer
from rich.table import Table

from specdec_rt.bench.timing import profile, repeat
from specdec_rt.chain import compile_chain
from specdec_rt.cli.tables import DISTRIBUTION, numeric_columns, rate_text
from specdec_rt.config import SELF_DRAFT, DecodeOptions
from specdec_rt.decode.stats import Stats
from specdec_rt.errors import UsageError
from specdec_rt.pipeline import Pipeline

__all__ = ["MODES", "default_modes", "measure", "measurement_table"]

MODES: dict[str, DecodeOptions] = {
    "target": DecodeOptions(mode="target"),
    "exact": DecodeOptions(mode="exact"),
    SELF_DRAFT: DecodeOptions(mode="exact", draft=SELF_DRAFT),
    "paper": DecodeOptions(mode="paper"),
    "draft": DecodeOptions(mode="draft"),
}
"""What --modes accepts: the decoding modes with the bundle's draft, and `self`, mode `exact` with the target's own."""

CAPTION = (
    "accepted: share of the verified draft tokens. host share: share of the time outside engine calls. "
    "exact: whether images have exactly the target's distribution."
)

Row = dict[str, Any]
"""A measurement, as plain values for JSON."""


@dataclass(frozen=True)
class _Request:
    """A batch of images, whose labels take turns from one seed to the next."""

    options: DecodeOptions
    batch: int

    def __call__(self, pipeline: Pipeline, seed: int) -> Stats:
        labels = (seed * self.batch + np.arange(self.batch)) % pipeline.bundle.manifest.classes
        return pipeline.generate(labels, seed=seed, batch_size=self.batch, options=self.options).stats


def measure(
    pipeline: Pipeline,
    modes: list[str],
    batches: list[int],
    *,
    requests: int,
    warmup: int,
    seed: int = 1,
    ar_steps: int | None = None,
) -> list[Row]:
    """A row for each batch size and mode; progress goes to stderr. Raises UsageError for a mode that cannot work."""
    options = {mode: _options(mode, ar_steps) for mode in modes}
    for each in options.values():
        pipeline.setup(each)  # raises what a request would raise, before any time is spent
    rows = []
    for batch in batches:
        for mode, each in options.items():
            row = _measure_request(pipeline, _Request(each, batch), requests=requests, warmup=warmup, seed=seed)
            rows.append({"mode": mode, **row})
            typer.echo(f"{mode}, batch {batch}: {row['p50_seconds'] * 1e3:.1f} ms", err=True)
    return rows


def _measure_request(pipeline: Pipeline, request: _Request, *, requests: int, warmup: int, seed: int) -> Row:
    figures: list[Stats] = []
    times = repeat(lambda key: figures.append(request(pipeline, key)), seed=seed, warmup=warmup, samples=requests)
    profiled = profile(pipeline, request, seed=seed)
    timed = figures[warmup:]
    accepted = sum(stats.accepted for stats in timed)
    verified = accepted + sum(stats.rejected for stats in timed)
    return {
        "batch": request.batch,
        "exact": timed[0].mode in ("target", "exact"),
        "distribution": DISTRIBUTION[timed[0].mode],
        "seconds": list(times.seconds),
        "p50_seconds": times.p50,
        "p95_seconds": times.p95,
        "images_per_second": request.batch / times.p50,
        "acceptance_rate": accepted / verified if verified else None,
        "profile": None if profiled is None else profiled[0].as_dict(),
    }


def _options(mode: str, ar_steps: int | None) -> DecodeOptions:
    if mode not in MODES:
        raise UsageError(f"modes holds {mode!r}; expected some of {', '.join(MODES)}")
    return replace(MODES[mode], ar_steps=ar_steps)


def default_modes(pipeline: Pipeline) -> list[str]:
    """The modes with the target's distribution that work on the bundle."""
    manifest = pipeline.bundle.manifest
    if compile_chain(manifest.chain).refusal() is not None:
        return ["target"]
    return ["target", *(["exact"] if manifest.defaults.draft != SELF_DRAFT else []), SELF_DRAFT]


def measurement_table(rows: list[Row]) -> Table:
    """Measurements for a reader."""
    columns = numeric_columns("batch", "p50 ms", "p95 ms", "images/s", "accepted", "host share")
    table = Table("mode", *columns, "exact", caption=CAPTION, caption_justify="left")
    for row in rows:
        profiled = row["profile"]
        table.add_row(
            row["mode"],
            str(row["batch"]),
            f"{row['p50_seconds'] * 1e3:.1f}",
            f"{row['p95_seconds'] * 1e3:.1f}",
            f"{row['images_per_second']:.3g}",
            rate_text(row["acceptance_rate"]),
            "" if profiled is None else f"{profiled['host_share']:.0%}",
            "yes" if row["exact"] else "no",
        )
    return table
