"""Work that several threads do side by side, and that ends early in all of them where it fails in one."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["run_workers"]

T = TypeVar("T")
Tell = Callable[[int], None]
Task = Callable[[Tell], T]
"""Does its work; what it is given, it tells how much of it is newly done."""


class _Stopped(Exception):  # noqa: N818  # no error
    """Another task failed."""


def run_workers(tasks: Sequence[Task[T]], tell: Tell) -> list[T]:
    """What the tasks return, each from a thread of its own.

    `tell` is called by one thread at a time. Where a task raises, or `tell`, or this thread is interrupted, the
    others end when they next tell something, and that error is raised.
    """
    stopped, turn = threading.Event(), threading.Lock()

    def told(count: int) -> None:
        if stopped.is_set():
            raise _Stopped
        with turn:
            tell(count)

    def run(task: Task[T]) -> T:
        try:
            return task(told)
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
