"""The progress of a TensorRT build: passed on to the caller, who may cancel the build."""

import functools
import threading
from collections.abc import Callable
from types import ModuleType
from typing import cast

from specdec_rt.backends.tensorrt_module import Opaque

__all__ = ["BuildWatch", "PhaseProgress", "progress_monitor"]

PhaseProgress = Callable[[str, int, int], bool]
"""Called after every step of a build: phase, steps of it done, steps it has. Returning False cancels the build."""


class BuildWatch:
    """Passes a build's steps on to `progress`, and keeps what it raises until TensorRT's frames are left."""

    def __init__(self, progress: PhaseProgress, cancel: threading.Event) -> None:
        self._progress = progress
        self._cancel = cancel
        self._steps: dict[str, int] = {}
        self.error: BaseException | None = None

    def begin(self, phase: str, steps: int) -> None:
        """A phase of so many steps begins."""
        self._steps[phase] = steps
        self._report(phase, 0)

    def step(self, phase: str, index: int) -> bool:
        """Step `index` of a phase is done. Returns whether the build goes on."""
        self._report(phase, index + 1)
        return not self.cancelled

    @property
    def cancelled(self) -> bool:
        """Whether the build is to end."""
        return self._cancel.is_set()

    def _report(self, phase: str, done: int) -> None:
        if self.cancelled:
            return
        try:
            if not self._progress(phase, done, self._steps.get(phase, done)):
                self._cancel.set()
        except BaseException as error:  # whatever it is: it is raised again once the build has ended
            self.error = error
            self._cancel.set()


def progress_monitor(module: ModuleType, watch: BuildWatch) -> Opaque:
    """An `IProgressMonitor` that tells `watch` about every step."""
    return _monitor_type(module)(watch)


@functools.cache
def _monitor_type(module: ModuleType) -> Callable[[BuildWatch], Opaque]:
    trt: Opaque = module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its base has no types
        def __init__(self, watch: BuildWatch) -> None:
            trt.IProgressMonitor.__init__(self)
            self._watch = watch

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            self._watch.begin(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            pass

    return cast("Callable[[BuildWatch], Opaque]", Monitor)
