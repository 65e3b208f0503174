"""How long recorded steps take: a host clock around launch and wait, with nothing else queued on the device."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from specdec_rt.backends.base import BoundCall, Device

__all__ = ["CLOCK", "Clock", "Deadline", "TimedDevice", "summary"]

CLOCK = "host clock from launch until the stream is idle"


@dataclass
class Deadline:
    """When to begin nothing new."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """So many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def passed(self) -> bool:
        """Whether it is too late."""
        return time.monotonic() >= self.at


class TimedDevice:
    """A device whose recorded steps are timed one by one; everything else is the device's own."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.seconds: list[float] = []
        """of each launch, in the order of the launches"""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever the device has
        return getattr(self._device, name)

    def record(self, calls: Sequence[BoundCall]) -> BoundCall:
        """As in `base.Device`; a launch is waited for."""
        step, wait = self._device.record(calls), self._device.wait

        def launch() -> None:
            started = time.perf_counter()
            step()
            wait()
            self.seconds.append(time.perf_counter() - started)

        return launch


@dataclass(frozen=True)
class Clock:
    """Repeats a step: `warmup` times unseen (in which graphs are captured), then `repeats` times.

    A step that takes long is repeated less often, so that all take at most `seconds`, but never less than
    `fewest` times.
    """

    repeats: int = 20
    warmup: int = 3
    seconds: float = 15.0
    fewest: int = 5

    def launches(self, device: TimedDevice, step: Callable[[], object], names: Sequence[str]) -> dict[str, Any]:
        """Times of the launches that `step` makes, by `names` in their order, and of the whole step ("call").

        The whole contains what the host does before and after the launches.
        """
        calls: list[float] = []
        launches: list[list[float]] = []
        for _ in range(self.warmup):
            step()
        for _ in range(self.repeats):
            device.seconds.clear()
            started = time.perf_counter()
            step()
            calls.append(time.perf_counter() - started)
            launches.append(list(device.seconds))
            if len(calls) >= self.fewest and sum(calls) > self.seconds:
                break
        assert all(len(row) == len(names) for row in launches), "not the launches that were expected"
        parts = {name: summary(row) for name, row in zip(names, zip(*launches, strict=True), strict=True)}
        return {**parts, "call": summary(calls)}

    def settings(self) -> dict[str, Any]:
        """For the record of a run."""
        return {"clock": CLOCK, **asdict(self)}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, 95th percentile and least, in milliseconds, and of how many."""
    milliseconds = np.asarray(seconds) * 1e3
    return {
        "median_ms": round(float(np.median(milliseconds)), 4),
        "p95_ms": round(float(np.percentile(milliseconds, 95)), 4),
        "least_ms": round(float(milliseconds.min()), 4),
        "repeats": len(milliseconds),
    }
