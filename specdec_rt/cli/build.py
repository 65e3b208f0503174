"""`specdec-rt build`: the engines of a bundle, built as a recipe says, and how building them is shown."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
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
from specdec_rt.cli.options import BundleArgument, CacheOption, JsonOption, RecipeOption
from specdec_rt.cli.tables import numeric_columns, size_text
from specdec_rt.cli.terminal import on_terminal, print_json, stderr_console
from specdec_rt.errors import UsageError

__all__ = ["BuildBars", "BuildLog", "build_command", "build_reporter"]

LONGEST_PHASE = 50
"""Characters of a phase's name that fit beside a bar."""


def build_command(
    bundle: BundleArgument = "digits",
    *,
    recipe: RecipeOption = None,
    cache: CacheOption = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Empty the cache first. Without a recipe, do nothing else.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build a bundle's TensorRT engines for this machine, as a recipe says."""
    if recipe is None and not clear:
        raise UsageError("no recipe was given; expected --recipe FILE.toml, such as engines/recipes/rtx.toml")
    engines = EngineCache(cache)
    instructions = None if recipe is None else read_recipe(recipe)
    checked = load_bundle(bundle)
    cleared = engines.clear() if clear else 0
    if clear:
        typer.echo(f"removed {cleared} engines from {engines.folder}", err=True)
    built: list[BuiltGraph] = []
    if instructions is not None:
        with build_reporter(len(bundle_graphs(checked.manifest)), stderr_console()) as reporter:
            built = build_bundle(checked, instructions, engines, progress=reporter)
    if as_json:
        record = {"bundle": checked.manifest.name, "cache": str(engines.folder), "cleared": cleared}
        print_json({**record, "graphs": [asdict(graph) for graph in built]})
    elif built:
        Console().print(_engines_table(f"{checked.manifest.name}: engines in {engines.folder}", built))


def _engines_table(title: str, built: list[BuiltGraph]) -> Table:
    columns = numeric_columns("seconds", "size")
    table = Table("graph", "precision", "engine", *columns, title=Text(title, "bold"), title_justify="left")
    for graph in built:
        origin = "from the cache" if graph.cached else "built"
        table.add_row(Text(graph.graph), graph.precision, origin, f"{graph.seconds:.2f}", size_text(graph.plan_bytes))
    seconds, size = sum(graph.seconds for graph in built), sum(graph.plan_bytes for graph in built)
    table.add_section()
    table.add_row("all", "", "", f"{seconds:.2f}", size_text(size))
    return table


@contextmanager
def build_reporter(graphs: int, console: Console) -> Iterator[BuildProgress]:
    """Shows how the engines of so many graphs are built: bars on a terminal, elsewhere a line for each engine."""
    if not on_terminal(console):
        yield BuildLog(console)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        yield BuildBars(bars, graphs)


class BuildLog:
    """A line for each engine that is built; none for engines that come from the cache."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def waiting(self, graph: str) -> None:
        """Another process builds into the same cache."""
        self._print(f"{graph}: another process is building into the cache; waiting for it")

    def building(self, graph: str) -> None:
        """The line comes when the engine is built."""

    def step(self, phase: str, done: int, total: int) -> bool:  # noqa: ARG002  # as the protocol has it
        """Go on."""
        return True

    def finished(self, built: BuiltGraph) -> None:
        """An engine is there."""
        if not built.cached:
            size = size_text(built.plan_bytes)
            self._print(f"{built.graph}: built in {built.seconds:.1f} s, {built.precision}, {size}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class BuildBars:
    """Two bars: one for all graphs, one for the phase of the build that is under way."""

    def __init__(self, bars: Progress, graphs: int) -> None:
        self._bars = bars
        self._all = bars.add_task("engines", total=graphs)
        self._phase = bars.add_task("", total=None, visible=False)
        self._graph = ""

    def waiting(self, graph: str) -> None:
        """Another process builds into the same cache."""
        self._bars.update(self._all, description=f"{graph} (waiting for another process)")

    def building(self, graph: str) -> None:
        """The build of a graph's engine begins."""
        self._graph = graph
        self._bars.update(self._all, description=graph)

    def step(self, phase: str, done: int, total: int) -> bool:
        """Show the phase that TensorRT is in, and go on."""
        description = f"{self._graph}: {phase[:LONGEST_PHASE]}"
        self._bars.update(self._phase, description=description, completed=done, total=total, visible=True)
        return True

    def finished(self, built: BuiltGraph) -> None:  # noqa: ARG002  # as the protocol has it
        """An engine is there."""
        self._bars.update(self._all, advance=1, description="engines")
        self._bars.update(self._phase, visible=False)
