"""The command line. Results go to stdout or to files, messages to stderr; exit codes 0, 1 (failure), 2 (bad input)."""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec_rt.build.cache import EngineCache
from specdec_rt.build.recipe import read_recipe
from specdec_rt.bundle import load_bundle
from specdec_rt.cli import bench as bench_command
from specdec_rt.cli import build as build_command
from specdec_rt.cli.doctor import doctor_record, doctor_report
from specdec_rt.cli.engines import (
    engine_record,
    engine_report,
    engines_report,
    find_engine,
    find_engines,
    is_engine_file,
)
from specdec_rt.cli.files import Write, array_writer, check_file, check_folder, png_writer, write_together
from specdec_rt.cli.sheet import SheetLayout, draw_sheet
from specdec_rt.cli.tables import bundle_record, bundle_report, stats_table
from specdec_rt.config import DecodeOptions
from specdec_rt.errors import SpecDecError, UsageError
from specdec_rt.manifest import Manifest
from specdec_rt.pipeline import Progress as Tell
from specdec_rt.pipeline import Result, load, make_options

__all__ = ["app", "main", "parse_labels"]

ALL_LABELS = 10
"""Classes up to which a request without labels means all of them."""
SHEET_PIXELS = 10**8
BAR_AFTER_SECONDS = 1.0

app = typer.Typer(
    help="Continuous speculative decoding for autoregressive image models, without torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unexpected error is for a bug report: it keeps its plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)
messages = Console(stderr=True)

BundleArgument = Annotated[str, typer.Argument(help="A bundle's folder, or an embedded one's name.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
CacheOption = Annotated[Path | None, typer.Option(metavar="DIR", help="The engine cache; the user's own by default.")]


app.command()(build_command.build)
app.command()(bench_command.bench)


def main() -> None:
    """Entry point of `specdec-rt`."""
    try:
        app()
    except SpecDecError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def generate(
    bundle: BundleArgument = "digits",
    *,
    labels: Annotated[str | None, typer.Option(help='Classes, such as "0-9" or "207,360".')] = None,
    count: Annotated[int, typer.Option(help="Images of each label.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same images.")] = 1,
    batch_size: Annotated[int | None, typer.Option(help="Images decoded at a time; changes none of them.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="exact (the target's distribution), paper (approximate), target or draft.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="A draft's name in the bundle, or self.")] = None,
    draft_length: Annotated[
        str | None,
        typer.Option(
            metavar="G|auto",
            help="AR steps drafted per round. auto chooses for each round what is fastest, also no draft at all; "
            "a seed may then draw another image on another run.",
        ),
    ] = None,
    draft_steps: Annotated[int | None, typer.Option(help="Head evaluations per drafted token.")] = None,
    tau: Annotated[float | None, typer.Option(help="Acceptance temperature of mode paper.")] = None,
    prefill: Annotated[float | None, typer.Option(help="Share of the tokens that the target makes alone.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = None,
    guidance_schedule: Annotated[str | None, typer.Option(help="linear or constant.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Factor on the chain's noise.")] = None,
    ar_steps: Annotated[int | None, typer.Option(help="Autoregressive steps per image (MAR).")] = None,
    backend: Annotated[
        str, typer.Option(help="auto (the best that works here), tensorrt-rtx, tensorrt, cuda or onnxruntime.")
    ] = "auto",
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="How engines are built; it names its backend.")
    ] = None,
    cache: CacheOption = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph/--no-cuda-graph", help="Capture the steps of decoding, or run them eagerly.")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="Cores that engines may use; all of them by default.")] = None,
    workers: Annotated[int, typer.Option(help="Decoders that share images and cores, on a CPU.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="A sheet of all images; BUNDLE.png unless another output is asked for.",
        ),
    ] = None,
    out_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="One PNG per image.")] = None,
    tokens: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Arrays tokens, images, labels.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw images: by default, one of each digit into digits.png."""
    options = _options(
        mode=mode,
        draft=draft,
        draft_length=_length(draft_length),
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
    if count < 1:
        raise UsageError(f"count is {count}; expected a whole number of at least 1")
    if out is None and out_dir is None and tokens is None:
        out = Path(f"{Path(manifest.name).name}.png")
    layout = _sheet_layout(manifest, labels=len(chosen), per_label=count)
    if layout is None and (out is not None or out_dir is not None):
        raise UsageError(
            f"bundle {manifest.name!r} makes tokens only: nothing in it makes pixels; "
            "ask for --tokens FILE.npz alone, or export the bundle with its VAE"
        )
    _check_outputs(out, out_dir, tokens, layout)
    with _progress_bar() as tell:
        result = pipeline.generate(
            np.repeat(np.array(chosen, np.int64), count),
            seed=seed,
            options=options,
            batch_size=batch_size,
            progress=tell,
        )
    _write(result, layout, out, out_dir, tokens)
    if as_json:
        typer.echo(json.dumps(result.stats.as_dict(), allow_nan=False))
        return
    messages.print(stats_table(result.stats, len(result.labels) * manifest.tokens))
    for path in (out, out_dir, tokens):
        if path is not None:
            typer.echo(f"wrote {path}", err=True)


@app.command()
def inspect(
    bundle: Annotated[
        str, typer.Argument(help="A bundle's folder, an embedded one's name, or an engine in the cache (KEY.plan).")
    ] = "digits",
    *,
    engines: Annotated[bool, typer.Option("--engines", help="The engines built from the bundle.")] = False,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="Of the engines those of this recipe.")] = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a bundle or an engine holds, what works on it and where it comes from."""
    if not engines and (recipe is not None or cache is not None):
        raise UsageError(f"{'--recipe' if recipe else '--cache'} is about engines; add --engines")
    if is_engine_file(bundle):
        if engines:
            raise UsageError(f"{bundle} is an engine itself; leave out --engines")
        _inspect_engine(Path(bundle), as_json=as_json)
        return
    checked = load_bundle(bundle)
    if engines:
        found = find_engines(checked, EngineCache(cache), None if recipe is None else read_recipe(recipe))
        record: object = [engine_record(entry) for entry in found]
        shown = engines_report(checked.manifest, found)
    else:
        record, shown = bundle_record(checked), bundle_report(checked)
    _show(record, shown, as_json=as_json)


def _inspect_engine(path: Path, *, as_json: bool) -> None:
    entry = find_engine(path)
    _show(engine_record(entry), engine_report(entry), as_json=as_json)


@app.command()
def doctor(*, cache: CacheOption = None, as_json: JsonOption = False) -> None:
    """Tell what is installed, which backends can run here, and why the others cannot."""
    record = doctor_record(cache)
    _show(record, doctor_report(record), as_json=as_json)


def _show(record: object, report: RenderableType, *, as_json: bool) -> None:
    """A result on stdout."""
    if as_json:
        typer.echo(json.dumps(record, allow_nan=False))
    else:
        Console().print(report)


def parse_labels(text: str | None, classes: int) -> list[int]:
    """The labels that `text` lists, in its order: numbers and ranges, as in "1,3-5"; None means all of a few.

    Raises UsageError where `text` is none, or names a label that is not in 0 … classes - 1.
    """
    if text is None:
        if classes > ALL_LABELS:
            raise UsageError(f"no labels were given; the bundle has {classes} classes, choose some: --labels 0-9")
        return list(range(classes))
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        if match is None:
            raise UsageError(f"labels is {text!r}, where {part!r} is no label; expected a list such as 0-9 or 1,3-5")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"labels is {text!r}, where {part!r} runs backwards; write {last}-{first}")
        if last >= classes:
            raise UsageError(f"labels holds {last}; expected 0 to {classes - 1}")
        labels += range(first, last + 1)
    return labels


def _length(text: str | None) -> int | str | None:
    """A draft length as a number where it is one; what else may stand there, the options know."""
    return int(text) if text is not None and re.fullmatch(r"-?[0-9]{1,9}", text) else text


def _options(**given: object) -> DecodeOptions:
    """Options from the flags that were given; the others keep the API's defaults."""
    return make_options(**{name: value for name, value in given.items() if value is not None})


def _sheet_layout(manifest: Manifest, *, labels: int, per_label: int) -> SheetLayout | None:
    """How the images stand on a sheet; None where the bundle makes none."""
    image = manifest.image
    if image is None:
        return None
    return SheetLayout.of(labels=labels, per_label=per_label, height=image.height, width=image.width)


def _check_outputs(out: Path | None, out_dir: Path | None, tokens: Path | None, layout: SheetLayout | None) -> None:
    """Raise an error now that would else come after the work."""
    if out is not None and layout is not None:
        height, width = layout.size
        if height * width > SHEET_PIXELS:
            raise UsageError(
                f"the sheet {out} would have {width} x {height} pixels; expected at most {SHEET_PIXELS:,} in all: "
                "ask for fewer images, or take --out-dir or --tokens instead"
            )
        check_file(out, ".png")
    if out_dir is not None:
        check_folder(out_dir)
    if tokens is not None:
        check_file(tokens, ".npz")


def _write(
    result: Result, layout: SheetLayout | None, out: Path | None, out_dir: Path | None, tokens: Path | None
) -> None:
    contents: dict[Path, Write] = {}
    if result.images is not None and layout is not None:
        if out is not None:
            contents[out] = png_writer(draw_sheet(result.images, layout))
        if out_dir is not None:
            for index, (label, image) in enumerate(zip(result.labels, result.images, strict=True)):
                contents[out_dir / f"{index:05d}-{label}.png"] = png_writer(image)
    if tokens is not None:
        arrays = {"tokens": result.tokens, "labels": result.labels}
        contents[tokens] = array_writer(arrays if result.images is None else {**arrays, "images": result.images})
    write_together(contents, folder=out_dir)


@contextmanager
def _progress_bar() -> Iterator[Tell | None]:
    """Shows tokens committed on stderr, if that is a terminal, once the work has lasted a while."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=messages, transient=True)
    task = bar.add_task("tokens", total=None)
    started = time.monotonic()

    def tell(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if time.monotonic() - started > BAR_AFTER_SECONDS:
            bar.start()

    try:
        yield tell
    finally:
        bar.stop()
