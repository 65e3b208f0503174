"""Requests repeated on a clock, and where the time of one goes: a backend whose calls are timed graph by graph."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from specdec_rt.backends.base import Backend, BoundCall, Device, Engine, Limits
from specdec_rt.pipeline import Pipeline
from specdec_rt.types import Array

__all__ = ["CallTimes", "Profile", "TimedBackend", "Times", "profile", "repeat"]

T = TypeVar("T")

TIMED_BACKENDS = ("onnxruntime",)
"""Backends whose calls return when their work is done. Those of the others only queue it."""


@dataclass(frozen=True)
class Times:
    """How long requests took."""

    seconds: tuple[float, ...]
    """of each request, the oldest first"""

    @property
    def p50(self) -> float:
        """The median."""
        return float(np.median(self.seconds))

    @property
    def mean(self) -> float:
        """The mean."""
        return float(np.mean(self.seconds))

    @property
    def p95(self) -> float:
        """The 95th percentile, interpolated between the two nearest."""
        return float(np.percentile(self.seconds, 95))


def repeat(
    request: Callable[[int], object], *, seed: int, warmup: int, samples: int, limit_seconds: float = float("inf")
) -> Times:
    """Time `request(seed)`, `request(seed + 1)`, …, after `warmup` untimed ones, whose seeds come after those.

    One request is always timed. No further one begins once they have taken `limit_seconds`.
    """
    for extra in range(warmup):
        request(seed + samples + extra)
    seconds: list[float] = []
    while len(seconds) < samples and (not seconds or sum(seconds) < limit_seconds):
        started = time.perf_counter()
        request(seed + len(seconds))
        seconds.append(time.perf_counter() - started)
    return Times(tuple(seconds))


@dataclass
class CallTimes:
    """Calls of one graph, and what they took together."""

    calls: int = 0
    seconds: float = 0.0


class TimedBackend:
    """A backend out of `TIMED_BACKENDS` that times each call of its engines. All else is the backend's own."""

    def __init__(self, backend: Backend) -> None:
        assert backend.name in TIMED_BACKENDS
        self._backend = backend
        self.graphs: dict[str, CallTimes] = {}
        """by the name of the graph's file, such as "target.backbone" """

    @property
    def name(self) -> str:
        """The backend's."""
        return self._backend.name

    @property
    def device(self) -> Device:
        """The backend's."""
        return self._backend.device

    @property
    def limits(self) -> Limits:
        """The backend's."""
        return self._backend.limits

    def load(self, path: Path) -> Engine:
        """The backend's engine of a graph, with a clock around its calls."""
        times = self.graphs.setdefault(path.stem, CallTimes())
        return cast("Engine", _TimedEngine(self._backend.load(path), times))

    def clear(self) -> None:
        """Set all times to 0."""
        for times in self.graphs.values():
            times.calls, times.seconds = 0, 0.0


class _TimedEngine:
    """An engine with a clock around its calls. All else is the engine's own."""

    def __init__(self, engine: Engine, times: CallTimes) -> None:
        self._engine, self._times = engine, times

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever the engine has
        return getattr(self._engine, name)

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], **named: Any) -> BoundCall:  # noqa: ANN401  # passed on
        """The engine's call, timed."""
        call, times, now = self._engine.bind(inputs, outputs, **named), self._times, time.perf_counter

        def timed() -> None:
            started = now()
            call()
            times.seconds += now() - started
            times.calls += 1

        return timed


@dataclass(frozen=True)
class Profile:
    """Where the time of one request went."""

    seconds: float
    graphs: Mapping[str, CallTimes]
    """only those that were called"""

    @property
    def host_seconds(self) -> float:
        """The time outside engine calls."""
        return self.seconds - sum(times.seconds for times in self.graphs.values())

    @property
    def host_share(self) -> float:
        """The share of the time that is spent outside engine calls."""
        return self.host_seconds / self.seconds

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "seconds": self.seconds,
            "host_seconds": self.host_seconds,
            "host_share": self.host_share,
            "graphs": {name: asdict(times) for name, times in self.graphs.items()},
        }


def profile(
    pipeline: Pipeline, request: Callable[[Pipeline, int], T], *, seed: int, warmup: int = 1
) -> tuple[Profile, T] | None:
    """Make `request(pipeline, seed)` on timed engines, after `warmup` untimed requests; its profile, and its result.

    None where the backend's calls only queue their work. Engines are loaded anew: those of `pipeline` stay as they are.
    """
    if pipeline.backend.name not in TIMED_BACKENDS:
        return None
    backend = TimedBackend(pipeline.backend)
    timed = pipeline.with_backend(backend)
    for extra in range(warmup):
        request(timed, seed + 1 + extra)
    backend.clear()
    started = time.perf_counter()
    result = request(timed, seed)
    seconds = time.perf_counter() - started
    return Profile(seconds, {name: times for name, times in backend.graphs.items() if times.calls}), result
