"""Tasks that run at the same time, each in a thread of its own; if one fails, all end early."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["run_workers"]

T = TypeVar("T")
Progress = Callable[[int], None]
Task = Callable[[Progress], T]
"""Does its work, and calls what it is given with how much of it is newly done."""


class _Stopped(Exception):  # noqa: N818  # no error
    """Another task failed."""


def run_workers(tasks: Sequence[Task[T]], progress: Progress) -> list[T]:
    """What the tasks return.

    `progress` is called by one thread at a time. If a task or `progress` raises, or this thread is interrupted, the
    other tasks end when they next report progress, and that error is raised.
    """
    stopped, turn = threading.Event(), threading.Lock()

    def report(count: int) -> None:
        if stopped.is_set():
            raise _Stopped
        with turn:
            progress(count)

    def run(task: Task[T]) -> T:
        try:
            return task(report)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(len(tasks)) as pool:
        running = [pool.submit(run, task) for task in tasks]
        try:
            found = [each.exception() for each in running]
        except BaseException:
            stopped.set()
            raise
    for error in found:
        if error is not None and not isinstance(error, _Stopped):
            raise error
    return [each.result() for each in running]
