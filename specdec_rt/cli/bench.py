"""`specdec-rt bench`: how long images take on this machine, or what speculation would make of it."""

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from specdec_rt.cli.measurements import MODES, default_modes, measure, measurement_table
from specdec_rt.cli.options import (
    ArStepsOption,
    BackendOption,
    BundleArgument,
    CacheOption,
    JsonOption,
    RecipeOption,
    ThreadsOption,
    WorkersOption,
)
from specdec_rt.cli.predictions import predict, prediction_table
from specdec_rt.cli.terminal import print_json
from specdec_rt.config import check_whole_number
from specdec_rt.errors import UsageError
from specdec_rt.pipeline import load

__all__ = ["bench_command"]

PREDICTION = "Prediction"
"""A heading in the help."""

Number = TypeVar("Number", int, float)


def bench_command(
    bundle: BundleArgument = "digits",
    *,
    modes: Annotated[
        str | None,
        typer.Option(
            help=f"A list of modes to measure, out of {', '.join(MODES)}; self is mode exact with the target as its "
            "own draft. By default those of target, exact and self that work on the bundle."
        ),
    ] = None,
    batches: Annotated[str, typer.Option(help="A list of batch sizes: images decoded at the same time.")] = "1,16",
    requests: Annotated[int, typer.Option(help="Timed requests for each mode and batch size.")] = 5,
    warmup: Annotated[int, typer.Option(help="Requests before the timed ones, which warm the machine up.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the first timed request; every further one adds 1.")] = 1,
    ar_steps: ArStepsOption = None,
    predicted: Annotated[
        bool,
        typer.Option(
            "--predict",
            rich_help_panel=PREDICTION,
            help="Time each graph alone, and predict from that how fast speculative decoding would be.",
        ),
    ] = False,
    acceptance: Annotated[
        str, typer.Option(rich_help_panel=PREDICTION, help="A list of acceptance rates to predict for.")
    ] = "0.3,0.5,0.7,0.8,0.9",
    draft_lengths: Annotated[
        str, typer.Option(rich_help_panel=PREDICTION, help="A list of draft lengths to predict for.")
    ] = "1,2,4,8",
    draft: Annotated[
        str | None,
        typer.Option(rich_help_panel=PREDICTION, metavar="NAME|self", help="The draft; by default the bundle's own."),
    ] = None,
    draft_steps: Annotated[
        int | None,
        typer.Option(rich_help_panel=PREDICTION, help="Denoising steps at which the draft evaluates its head."),
    ] = None,
    draft_cost: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=PREDICTION,
            help="Predict for a draft that is yet to be trained; the number is the time of its backbone, as a share "
            "of the time of the target's.",
        ),
    ] = None,
    backend: BackendOption = "auto",
    recipe: RecipeOption = None,
    cache: CacheOption = None,
    threads: ThreadsOption = None,
    workers: WorkersOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Measure modes and batch sizes on this machine, or predict them from the time of each graph."""
    sizes = _whole_numbers("batches", batches)
    check_whole_number("requests", requests, 1)
    check_whole_number("warmup", warmup, 0)
    for option, value in (("draft", draft), ("draft-steps", draft_steps), ("draft-cost", draft_cost)):
        if value is not None and not predicted:
            raise UsageError(f"--{option} is for predictions only; add --predict")
    pipeline = load(bundle, backend=backend, recipe=recipe, cache=cache, threads=threads, workers=workers)
    if predicted:
        found = predict(
            pipeline,
            sizes,
            _numbers("acceptance", acceptance, float),
            _whole_numbers("draft_lengths", draft_lengths),
            draft=draft,
            draft_steps=draft_steps,
            draft_cost=draft_cost,
            ar_steps=ar_steps,
        )
        table = prediction_table(found["rows"])
    else:
        chosen = default_modes(pipeline) if modes is None else modes.split(",")
        rows = measure(pipeline, chosen, sizes, requests=requests, warmup=warmup, seed=seed, ar_steps=ar_steps)
        found, table = {"rows": rows}, measurement_table(rows)
    name, used = pipeline.bundle.manifest.name, pipeline.backend.name
    if as_json:
        print_json({"bundle": name, "backend": used, "threads": threads, "workers": workers, **found})
    else:
        Console().print(Text(f"{name} on {used}", "bold"))
        Console().print(table)


def _whole_numbers(name: str, text: str) -> list[int]:
    """The list of numbers, each at least 1, that the option `name` was given."""
    return [check_whole_number(name, number, 1) for number in _numbers(name, text, int)]


def _numbers(name: str, text: str, parse: Callable[[str], Number]) -> list[Number]:
    try:
        return [parse(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{name} is {text!r}; expected a list of numbers such as 1,16") from error
