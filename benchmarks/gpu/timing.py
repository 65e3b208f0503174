"""How long launches take: by the host's clock, from the launch until the device is idle, with nothing else queued."""

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
        """The deadline so many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.at


class TimedDevice:
    """A device whose launches are timed one by one. All else is the device's own."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.seconds: list[float] = []
        """of each launch, in their order"""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever the device has
        return getattr(self._device, name)

    def record(self, calls: Sequence[BoundCall]) -> BoundCall:
        """All calls as one launch, which is waited for."""
        recorded, wait = self._device.record(calls), self._device.wait

        def launch() -> None:
            started = time.perf_counter()
            recorded()
            wait()
            self.seconds.append(time.perf_counter() - started)

        return launch


@dataclass(frozen=True)
class Clock:
    """Repeats a step: `warmup` times untimed (graphs are captured then), and `repeats` times on the clock.

    A step that takes long is repeated less often: once all repeats have taken `seconds` none begins, but there are
    always `fewest` of them.
    """

    repeats: int = 20
    warmup: int = 3
    seconds: float = 15.0
    fewest: int = 5

    def launches(self, device: TimedDevice, step: Callable[[], object], names: Sequence[str]) -> dict[str, Any]:
        """Times of the launches that `step` makes, by `names` in their order, and of the whole step ("call").

        Where it makes more launches than there are names, the last name is for all that are left. The whole step
        contains what the host does before and after the launches.
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
            assert len(device.seconds) >= len(names), "fewer launches than were expected"
            last = len(names) - 1
            launches.append([*device.seconds[:last], sum(device.seconds[last:])])
            if len(calls) >= self.fewest and sum(calls) > self.seconds:
                break
        parts = {name: summary(row) for name, row in zip(names, zip(*launches, strict=True), strict=True)}
        return {**parts, "call": summary(calls)}

    def settings(self) -> dict[str, Any]:
        """The clock's settings, for the record of a run."""
        return {"clock": CLOCK, **asdict(self)}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, 95th percentile and least of some times, in milliseconds, and how many there are."""
    milliseconds = np.asarray(seconds) * 1e3
    return {
        "median_ms": round(float(np.median(milliseconds)), 4),
        "p95_ms": round(float(np.percentile(milliseconds, 95)), 4),
        "least_ms": round(float(milliseconds.min()), 4),
        "repeats": len(milliseconds),
    }
