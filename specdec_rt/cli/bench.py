"""`specdec-rt bench`: what images cost on this machine, or what speculation would make of them."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from specdec_rt.bench.cost import Acceptance
from specdec_rt.bench.predict import Predictor
from specdec_rt.bench.timing import profile, repeat
from specdec_rt.chain import compile_chain
from specdec_rt.cli.tables import DISTRIBUTION
from specdec_rt.config import SELF_DRAFT, DecodeOptions, check_whole_number
from specdec_rt.decode.stats import Stats
from specdec_rt.errors import UsageError
from specdec_rt.pipeline import Pipeline, load

__all__ = ["bench", "measure", "predict"]

MODES = ("target", "exact", "self", "paper", "draft")


def bench(
    bundle: Annotated[str, typer.Argument(help="A bundle's folder, or an embedded one's name.")] = "digits",
    *,
    modes: Annotated[
        str | None, typer.Option(help="Of target, exact, self, paper, draft; by default the first three that work.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Images decoded at a time.")] = "1,16",
    requests: Annotated[int, typer.Option(help="Timed requests of each mode and batch.")] = 5,
    warmup: Annotated[int, typer.Option(help="Requests before them.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the first timed request; the next ones count up.")] = 1,
    ar_steps: Annotated[int | None, typer.Option(help="Autoregressive steps per image (MAR).")] = None,
    predicted: Annotated[
        bool, typer.Option("--predict", help="Time graphs alone; predict what speculation would pay.")
    ] = False,
    acceptance: Annotated[str, typer.Option(help="Shares of accepted drafts to predict for.")] = "0.3,0.5,0.7,0.8,0.9",
    draft_lengths: Annotated[str, typer.Option(help="Draft lengths to predict for.")] = "1,2,4,8",
    draft: Annotated[str | None, typer.Option(help="The draft to predict with; the bundle's default.")] = None,
    draft_steps: Annotated[int | None, typer.Option(help="Head evaluations per drafted token to predict for.")] = None,
    draft_cost: Annotated[
        float | None,
        typer.Option(help="Predict for a draft yet to be trained: its backbone's time as a share of the target's."),
    ] = None,
    backend: Annotated[str, typer.Option(help="As of generate.")] = "auto",
    recipe: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="How engines are built.")] = None,
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="The engine cache.")] = None,
    threads: Annotated[int | None, typer.Option(help="Cores that engines may use; all of them by default.")] = None,
    workers: Annotated[int, typer.Option(help="Decoders that share images and cores, on a CPU.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Measure modes and batch sizes here, or predict them from the time of each graph."""
    sizes = [check_whole_number("batches", size, 1) for size in _numbers("batches", batches, int)]
    check_whole_number("requests", requests, 1)
    check_whole_number("warmup", warmup, 0)
    for option, value in (("draft", draft), ("draft-steps", draft_steps), ("draft-cost", draft_cost)):
        if value is not None and not predicted:
            raise UsageError(f"--{option} is about predictions; add --predict")
    pipeline = load(bundle, backend=backend, recipe=recipe, cache=cache, threads=threads, workers=workers)
    shared = {
        "bundle": pipeline.bundle.manifest.name,
        "backend": pipeline.backend.name,
        "threads": threads,
        "workers": workers,
    }
    if predicted:
        rates = [float(rate) for rate in _numbers("acceptance", acceptance, float)]
        lengths = [check_whole_number("draft_lengths", one, 1) for one in _numbers("draft_lengths", draft_lengths, int)]
        found = predict(
            pipeline,
            sizes,
            rates,
            lengths,
            draft=draft,
            draft_steps=draft_steps,
            draft_cost=draft_cost,
            ar_steps=ar_steps,
        )
        shown = _predicted_table(found["rows"])
    else:
        chosen = _modes(pipeline) if modes is None else modes.split(",")
        found = {
            "rows": measure(pipeline, chosen, sizes, requests=requests, warmup=warmup, seed=seed, ar_steps=ar_steps)
        }
        shown = _measured_table(found["rows"])
    if as_json:
        typer.echo(json.dumps({**shared, **found}, allow_nan=False))
        return
    Console().print(Text(f"{shared['bundle']} on {shared['backend']}", "bold"))
    Console().print(shown)


def measure(
    pipeline: Pipeline,
    modes: list[str],
    batches: list[int],
    *,
    requests: int,
    warmup: int,
    seed: int = 1,
    ar_steps: int | None = None,
) -> list[dict[str, Any]]:
    """A row for each batch size and mode; progress goes to stderr. Raises UsageError for a mode that cannot work."""
    classes = pipeline.bundle.manifest.classes
    options = {mode: _options(mode, ar_steps) for mode in modes}
    for each in options.values():
        pipeline.setup(each)  # raises what a request would raise, before any time is spent
    rows = []
    for batch in batches:
        for mode, each in options.items():
            figures: list[Stats] = []

            def request(of: Pipeline, key: int, batch: int = batch, each: DecodeOptions = each) -> Stats:
                labels = (key * batch + np.arange(batch)) % classes
                return of.generate(labels, seed=key, batch_size=batch, options=each).stats

            times = repeat(
                lambda key: figures.append(request(pipeline, key)),  # noqa: B023  # called before the loop goes on
                seed=seed,
                warmup=warmup,
                samples=requests,
            )
            found = profile(pipeline, request, seed=seed)
            timed = figures[-requests:]
            judged = sum(stats.accepted + stats.rejected for stats in timed)
            rows.append(
                {
                    "mode": mode,
                    "batch": batch,
                    "exact": timed[0].mode in ("target", "exact"),
                    "distribution": DISTRIBUTION[timed[0].mode],
                    "seconds": list(times.seconds),
                    "p50_seconds": times.p50,
                    "p95_seconds": times.p95,
                    "images_per_second": batch / times.p50,
                    "acceptance_rate": sum(stats.accepted for stats in timed) / judged if judged else None,
                    "profile": None if found is None else found[0].as_dict(),
                }
            )
            sys.stderr.write(f"{mode}, batch {batch}: {times.p50 * 1e3:.1f} ms\n")
    return rows


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
    """Predictions over batch sizes, draft lengths and acceptance, and the times that they are made of."""
    if draft_cost is not None and (draft is not None or not 0 < draft_cost <= 1):
        raise UsageError(f"draft_cost is {draft_cost}; expected a share above 0 and up to 1, and no --draft beside it")
    for rate in rates:
        if not 0 <= rate <= 1:
            raise UsageError(f"acceptance holds {rate}; expected shares from 0 to 1")
    name = None if draft_cost is not None else draft or pipeline.bundle.manifest.defaults.draft
    predictor = Predictor(pipeline, draft_share=draft_cost)
    target = DecodeOptions(mode="target", ar_steps=ar_steps)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        alone = predictor.predict(target, batch, Acceptance(0.0)).seconds
        rows.append(_prediction("target", batch, None, None, alone, alone))
        for length in [1] if name == SELF_DRAFT else lengths:
            options = DecodeOptions(
                mode="exact", draft=name, draft_length=length, draft_steps=draft_steps, ar_steps=ar_steps
            )
            for rate in rates:
                seconds = predictor.predict(options, batch, Acceptance(rate)).seconds
                rows.append(_prediction(name or "yet to be trained", batch, length, rate, seconds, alone))
    return {"rows": rows, **predictor.record()}


def _prediction(
    draft: str, batch: int, length: int | None, rate: float | None, seconds: float, alone: float
) -> dict[str, Any]:
    return {
        "draft": draft,
        "batch": batch,
        "draft_length": length,
        "acceptance_rate": rate,
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "against_target": alone / seconds,
    }


def _options(mode: str, ar_steps: int | None) -> DecodeOptions:
    if mode not in MODES:
        raise UsageError(f"modes holds {mode!r}; expected some of {', '.join(MODES)}")
    if mode == SELF_DRAFT:
        return DecodeOptions(mode="exact", draft=SELF_DRAFT, ar_steps=ar_steps)
    return DecodeOptions(mode=mode, ar_steps=ar_steps)  # type: ignore[arg-type]  # one of MODES


def _modes(pipeline: Pipeline) -> list[str]:
    """Those of the lossless ones that the bundle can do."""
    manifest = pipeline.bundle.manifest
    if compile_chain(manifest.chain).refusal() is not None:
        return ["target"]
    return ["target", *(["exact"] if manifest.defaults.draft != SELF_DRAFT else []), SELF_DRAFT]


def _numbers(name: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{name} is {text!r}; expected numbers such as 1,16") from error


def _measured_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("mode", *_right("batch", "p50 ms", "p95 ms", "images/s", "accepted", "host share"), "exact")
    for row in rows:
        rate, found = row["acceptance_rate"], row["profile"]
        table.add_row(
            row["mode"],
            str(row["batch"]),
            f"{row['p50_seconds'] * 1e3:.1f}",
            f"{row['p95_seconds'] * 1e3:.1f}",
            f"{row['images_per_second']:.3g}",
            "" if rate is None else f"{rate:.2f}",
            "" if found is None else f"{found['host_share']:.0%}",
            "yes" if row["exact"] else "no",
        )
    return table


def _predicted_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("draft", *_right("batch", "draft length", "accepted", "images/s", "against target"))
    for row in rows:
        length, rate = row["draft_length"], row["acceptance_rate"]
        table.add_row(
            row["draft"],
            str(row["batch"]),
            "" if length is None else str(length),
            "" if rate is None else f"{rate:.2f}",
            f"{row['images_per_second']:.3g}",
            f"{row['against_target']:.2f}×",
        )
    return table


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]
