"""The terminal: results on stdout, progress on stderr."""

import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["ProgressBar", "on_terminal", "print_json", "print_result", "stderr_console"]

DELAY_SECONDS = 1.0
"""Work that ends sooner shows no bar."""


def stderr_console() -> Console:
    """A console for messages."""
    return Console(stderr=True)


def on_terminal(console: Console) -> bool:
    """Whether someone watches. Rich's own answer is also yes for a log file in colour (FORCE_COLOR)."""
    return console.file.isatty()


def print_json(record: object) -> None:
    """Print plain values as one line of JSON on stdout."""
    typer.echo(json.dumps(record, allow_nan=False))


def print_result(record: object, report: RenderableType, *, as_json: bool) -> None:
    """Print a result on stdout: `record` as one line of JSON, or `report` for a reader."""
    if as_json:
        print_json(record)
    else:
        Console().print(report)


class ProgressBar:
    """A bar that shows how many tokens are committed: on a terminal only, and once the work has taken a while."""

    def __init__(
        self,
        console: Console,
        *,
        clock: Callable[[], float] = time.monotonic,
        delay_seconds: float = DELAY_SECONDS,
    ) -> None:
        columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, get_time=clock, transient=True)
        self._task = self._bar.add_task("tokens", total=None)
        self._watched = on_terminal(console)
        self._clock, self._delay = clock, delay_seconds
        self._started = clock()
        self._shown = False

    def __enter__(self) -> Self:
        self._started = self._clock()
        return self

    def update(self, done: int, total: int) -> None:
        """Note that `done` of `total` tokens are committed."""
        self._bar.update(self._task, completed=done, total=total)
        if self._watched and not self._shown and self._clock() - self._started > self._delay:
            self._shown = True
            self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._bar.stop()
