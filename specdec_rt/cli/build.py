"""`specdec-rt build`: a bundle's engines, and how building them is told."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from specdec_rt.build.builder import BuildProgress, BuiltGraph, build_bundle
from specdec_rt.build.bundle_graphs import bundle_graphs
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.recipe import read_recipe
from specdec_rt.bundle import load_bundle
from specdec_rt.cli.tables import size_text
from specdec_rt.errors import UsageError

__all__ = ["build"]

COLUMNS = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())


def build(
    bundle: Annotated[str, typer.Argument(help="A bundle's folder, or an embedded one's name.")] = "digits",
    *,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="How to build; those of engines/recipes are a start.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where engines are kept; the user's cache by default.")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Empty the cache first; without a recipe, do only that.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")
    ] = False,
) -> None:
    """Build a bundle's TensorRT engines for this machine, as a recipe says."""
    if recipe is None and not clear:
        raise UsageError("no recipe was given; expected --recipe FILE.toml, such as engines/recipes/rtx.toml")
    engines = EngineCache(cache)
    read = None if recipe is None else read_recipe(recipe)
    checked = load_bundle(bundle)
    cleared = engines.clear() if clear else 0
    if clear:
        typer.echo(f"removed {cleared} engines from {engines.folder}", err=True)
    built: list[BuiltGraph] = []
    if read is not None:
        with _reporter(len(bundle_graphs(checked.manifest))) as reporter:
            built = build_bundle(checked, read, engines, progress=reporter)
    if as_json:
        record = {"bundle": checked.manifest.name, "cache": str(engines.folder), "cleared": cleared}
        typer.echo(json.dumps({**record, "graphs": [asdict(graph) for graph in built]}))
    elif built:
        Console().print(_table(f"{checked.manifest.name}: engines in {engines.folder}", built))


def _table(title: str, built: list[BuiltGraph]) -> Table:
    table = Table(title=Text(title, "bold"), title_justify="left")
    for name in ("graph", "precision", "engine"):
        table.add_column(name)
    for name in ("seconds", "size"):
        table.add_column(name, justify="right")
    for graph in built:
        origin = "from the cache" if graph.cached else "built"
        table.add_row(Text(graph.graph), graph.precision, origin, f"{graph.seconds:.2f}", size_text(graph.plan_bytes))
    seconds, size = sum(graph.seconds for graph in built), sum(graph.plan_bytes for graph in built)
    table.add_section()
    table.add_row("all", "", "", f"{seconds:.2f}", size_text(size))
    return table


@contextmanager
def _reporter(count: int) -> Iterator[BuildProgress]:
    """Bars on a terminal; elsewhere a line for each engine that is built."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    with Progress(*COLUMNS, console=Console(stderr=True), transient=True) as progress:
        yield _Bars(progress, count)


class _Lines:
    """What is built and how long that took, on stderr; of what comes from the cache, nothing."""

    def waiting(self, graph: str) -> None:
        typer.echo(f"{graph}: another process is building into the cache; waiting for it", err=True)

    def building(self, graph: str) -> None:
        pass

    def step(self, phase: str, done: int, total: int) -> bool:  # noqa: ARG002  # as the protocol has it
        return True

    def finished(self, built: BuiltGraph) -> None:
        if not built.cached:
            size = size_text(built.plan_bytes)
            typer.echo(f"{built.graph}: built in {built.seconds:.1f} s, {built.precision}, {size}", err=True)


class _Bars:
    """One bar for all graphs, one for TensorRT's phase of the graph at hand."""

    def __init__(self, progress: Progress, count: int) -> None:
        self._progress = progress
        self._all = progress.add_task("engines", total=count)
        self._phase = progress.add_task("", total=None, visible=False)
        self._graph = ""

    def waiting(self, graph: str) -> None:
        self._progress.update(self._all, description=f"{graph} (waiting for another process)")

    def building(self, graph: str) -> None:
        self._graph = graph
        self._progress.update(self._all, description=graph)

    def step(self, phase: str, done: int, total: int) -> bool:
        described = f"{self._graph}: {phase[:50]}"
        self._progress.update(self._phase, description=described, completed=done, total=total, visible=True)
        return True

    def finished(self, built: BuiltGraph) -> None:  # noqa: ARG002  # as the protocol has it
        self._progress.update(self._all, advance=1, description="engines")
        self._progress.update(self._phase, visible=False)
