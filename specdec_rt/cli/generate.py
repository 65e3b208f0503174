"""`specdec-rt generate`: images of the labels that are asked for, as files."""

import re
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from specdec_rt.cli.options import (
    MACHINE,
    OUTPUT,
    ArStepsOption,
    BackendOption,
    BundleArgument,
    CacheOption,
    JsonOption,
    RecipeOption,
    ThreadsOption,
    WorkersOption,
)
from specdec_rt.cli.outputs import Outputs
from specdec_rt.cli.tables import stats_table
from specdec_rt.cli.terminal import ProgressBar, print_json, stderr_console
from specdec_rt.config import DecodeOptions, check_whole_number
from specdec_rt.errors import UsageError
from specdec_rt.pipeline import Result, load, make_options

__all__ = ["generate_command", "parse_labels"]

MOST_DEFAULT_LABELS = 10
"""A request without labels means all classes of a bundle that has no more than these."""


def generate_command(
    bundle: BundleArgument = "digits",
    *,
    labels: Annotated[
        str | None,
        typer.Option(help='Class labels, as numbers and ranges: "0-9" or "207,360". By default all, if they are few.'),
    ] = None,
    count: Annotated[int, typer.Option(help="Images to generate for each label.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers: the same seed gives the same images.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(help="Images decoded at the same time; this does not change them.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="exact (speculative decoding, with exactly the target's distribution), paper (speculative decoding "
            "as published, approximate), target (the target alone) or draft (the draft alone)."
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|self", help="The draft: a draft model of the bundle, or self, the target's own head."
        ),
    ] = None,
    draft_length: Annotated[
        str | None,
        typer.Option(
            metavar="G|auto",
            help="AR steps drafted in each round. auto chooses the fastest length for every round, and may leave the "
            "draft out; the same seed may then give other images in another run.",
        ),
    ] = None,
    draft_steps: Annotated[
        int | None, typer.Option(help="Denoising steps at which the draft evaluates its head, for each token.")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="Acceptance temperature of mode paper; 1 is the published criterion.")
    ] = None,
    prefill: Annotated[
        float | None,
        typer.Option(help="Share of the tokens, from 0 to 1, that the target makes alone, before drafting begins."),
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; 1 is no guidance.")] = None,
    guidance_schedule: Annotated[
        str | None, typer.Option(help="How the guidance scale runs over the AR steps: linear or constant.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Factor on the standard deviation of the denoising noise.")
    ] = None,
    ar_steps: ArStepsOption = None,
    backend: BackendOption = "auto",
    recipe: RecipeOption = None,
    cache: CacheOption = None,
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            rich_help_panel=MACHINE,
            help="On a GPU, capture the steps of decoding as CUDA graphs and replay them.",
        ),
    ] = True,
    threads: ThreadsOption = None,
    workers: WorkersOption = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=OUTPUT,
            metavar="FILE.png",
            help="Write a sheet of all images; BUNDLE.png if no other output is asked for.",
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option(rich_help_panel=OUTPUT, metavar="DIR", help="Write one PNG for each image into this folder."),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(rich_help_panel=OUTPUT, metavar="FILE.npz", help="Write the arrays tokens, images and labels."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Generate images: by default one of each digit, into digits.png.

    Decoding options that are left out take the bundle's defaults (see specdec-rt inspect).
    """
    options = _decode_options(
        mode=mode,
        draft=draft,
        draft_length=_number_or_word(draft_length),
        draft_steps=draft_steps,
        tau=tau,
        prefill=prefill,
        guidance=guidance,
        guidance_schedule=guidance_schedule,
        temperature=temperature,
        ar_steps=ar_steps,
    )
    pipeline = load(
        bundle, backend=backend, recipe=recipe, cache=cache, threads=threads, workers=workers, cuda_graph=cuda_graph
    )
    manifest = pipeline.bundle.manifest
    chosen = parse_labels(labels, manifest.classes)
    check_whole_number("count", count, 1)
    outputs = Outputs.resolve(out, out_dir, tokens, manifest=manifest, labels=len(chosen), images_per_label=count)
    outputs.check()
    with ProgressBar(stderr_console()) as bar:
        result = pipeline.generate(
            np.repeat(np.array(chosen, np.int64), count),
            seed=seed,
            options=options,
            batch_size=batch_size,
            progress=bar.update,
        )
    outputs.write(result)
    _report(result, outputs, as_json=as_json)


def parse_labels(text: str | None, classes: int) -> list[int]:
    """The labels that `text` lists, in its order: numbers and ranges, as in "1,3-5". None means all, if they are few.

    Raises UsageError for text that is not such a list, and for a label outside 0 … classes - 1.
    """
    if text is None:
        if classes > MOST_DEFAULT_LABELS:
            raise UsageError(f"no labels were given; the bundle has {classes} classes, choose some: --labels 0-9")
        return list(range(classes))
    return [label for part in text.split(",") for label in _label_range(part, text, classes)]


def _label_range(part: str, text: str, classes: int) -> range:
    match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
    if match is None:
        raise UsageError(f"labels is {text!r}, but {part!r} is not a label; expected a list such as 0-9 or 1,3-5")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise UsageError(f"labels is {text!r}, but {part!r} runs backwards; write {last}-{first}")
    if last >= classes:
        raise UsageError(f"labels holds {last}; expected 0 to {classes - 1}")
    return range(first, last + 1)


def _number_or_word(text: str | None) -> int | str | None:
    """An option's number where the text is one; DecodeOptions knows which words may stand there instead."""
    return int(text) if text is not None and re.fullmatch(r"-?[0-9]{1,9}", text) else text


def _decode_options(**given: object) -> DecodeOptions:
    """DecodeOptions with the options that were given; the others keep the API's defaults."""
    return make_options(**{name: value for name, value in given.items() if value is not None})


def _report(result: Result, outputs: Outputs, *, as_json: bool) -> None:
    """Print the figures: as JSON on stdout alone, or as a table on stderr with the files that were written."""
    if as_json:
        print_json(result.stats.as_dict())
        return
    tokens = result.tokens.shape[0] * result.tokens.shape[1]
    stderr_console().print(stats_table(result.stats, tokens))
    for path in outputs.paths:
        typer.echo(f"wrote {path}", err=True)
