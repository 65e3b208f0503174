"""Predictions of `bench --predict`: what speculation would make of the time of each graph."""

from dataclasses import replace
from itertools import product
from typing import Any

from rich.table import Table

from specdec_rt.bench.cost import Acceptance
from specdec_rt.bench.predict import Predictor
from specdec_rt.cli.tables import numeric_columns, rate_text
from specdec_rt.config import SELF_DRAFT, DecodeOptions
from specdec_rt.errors import UsageError
from specdec_rt.pipeline import Pipeline

__all__ = ["predict", "prediction_table"]

CAPTION = "accepted: share of the verified draft tokens. speed-up: against the target alone."

Row = dict[str, Any]
"""A prediction, as plain values for JSON."""


def predict(
    pipeline: Pipeline,
    batches: list[int],
    rates: list[float],
    lengths: list[int],
    *,
    draft: str | None = None,
    draft_steps: int | None = None,
    draft_cost: float | None = None,
    ar_steps: int | None = None,
) -> dict[str, Any]:
    """Predictions for all batch sizes, draft lengths and acceptance rates, and the times that they are made of."""
    _check(rates, draft, draft_cost)
    name = None if draft_cost is not None else draft or pipeline.bundle.manifest.defaults.draft
    predictor = Predictor(pipeline, draft_share=draft_cost)
    target = DecodeOptions(mode="target", ar_steps=ar_steps)
    speculative = DecodeOptions(mode="exact", draft=name, draft_steps=draft_steps, ar_steps=ar_steps)
    rows: list[Row] = []
    for batch in batches:
        alone = predictor.predict(target, batch, Acceptance(0.0)).seconds
        rows.append(_row("target", batch, None, None, seconds=alone, target_seconds=alone))
        for length, rate in product([1] if name == SELF_DRAFT else lengths, rates):
            options = replace(speculative, draft_length=length)
            seconds = predictor.predict(options, batch, Acceptance(rate)).seconds
            rows.append(_row(name or "yet to be trained", batch, length, rate, seconds=seconds, target_seconds=alone))
    return {"rows": rows, **predictor.record()}


def _check(rates: list[float], draft: str | None, draft_cost: float | None) -> None:
    if draft_cost is not None and (draft is not None or not 0 < draft_cost <= 1):
        raise UsageError(f"draft_cost is {draft_cost}; expected a share above 0 and up to 1, and no --draft beside it")
    for rate in rates:
        if not 0 <= rate <= 1:
            raise UsageError(f"acceptance holds {rate}; expected rates from 0 to 1")


def _row(
    draft: str, batch: int, length: int | None, rate: float | None, *, seconds: float, target_seconds: float
) -> Row:
    return {
        "draft": draft,
        "batch": batch,
        "draft_length": length,
        "acceptance_rate": rate,
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "against_target": target_seconds / seconds,
    }


def prediction_table(rows: list[Row]) -> Table:
    """Predictions for a reader."""
    columns = numeric_columns("batch", "draft length", "accepted", "images/s", "speed-up")
    table = Table("draft", *columns, caption=CAPTION, caption_justify="left")
    for row in rows:
        length = row["draft_length"]
        table.add_row(
            row["draft"],
            str(row["batch"]),
            "" if length is None else str(length),
            rate_text(row["acceptance_rate"]),
            f"{row['images_per_second']:.3g}",
            f"{row['against_target']:.2f}×",
        )
    return table
