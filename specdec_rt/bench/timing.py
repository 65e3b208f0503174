"""What a request's time goes into: a backend whose calls are timed graph by graph, and requests repeated on a clock."""

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
"""Whose calls return when their work is done; the others queue it, and capture it."""


@dataclass(frozen=True)
class Times:
    """Seconds of one request each, oldest first."""

    seconds: tuple[float, ...]

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
        """The 95th percentile, between the two nearest."""
        return float(np.percentile(self.seconds, 95))


def repeat(
    request: Callable[[int], object], *, seed: int, warmup: int, samples: int, limit_seconds: float = float("inf")
) -> Times:
    """Time `request(seed)`, `request(seed + 1)`, … after `warmup` others, whose seeds come after those.

    No further request is begun once the timed ones have taken `limit_seconds`; one always is.
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
    """Of one graph."""

    calls: int = 0
    seconds: float = 0.0


class TimedBackend:
    """A backend of `TIMED_BACKENDS`, each call of whose engines is timed; everything else is the backend's own."""

    def __init__(self, backend: Backend) -> None:
        assert backend.name in TIMED_BACKENDS
        self._backend = backend
        self.graphs: dict[str, CallTimes] = {}
        """by the stem of the graph's file, as in "target.backbone" """

    @property
    def name(self) -> str:
        """As in `engine.Backend`."""
        return self._backend.name

    @property
    def device(self) -> Device:
        """As in `engine.Backend`."""
        return self._backend.device

    @property
    def limits(self) -> Limits:
        """As in `engine.Backend`."""
        return self._backend.limits

    def load(self, path: Path) -> Engine:
        """As in `engine.Backend`."""
        times = self.graphs.setdefault(path.stem, CallTimes())
        return cast("Engine", _TimedEngine(self._backend.load(path), times))

    def clear(self) -> None:
        """Begin anew."""
        for times in self.graphs.values():
            times.calls, times.seconds = 0, 0.0


class _TimedEngine:
    """An engine whose calls are timed; everything else is its own."""

    def __init__(self, engine: Engine, times: CallTimes) -> None:
        self._engine, self._times = engine, times

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever the engine has
        return getattr(self._engine, name)

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], **named: Any) -> BoundCall:  # noqa: ANN401  # passed on
        """As in `base.Engine`."""
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
    """of those that were called"""

    @property
    def host_seconds(self) -> float:
        """Everything outside engine calls."""
        return self.seconds - sum(times.seconds for times in self.graphs.values())

    @property
    def host_share(self) -> float:
        """Of the whole."""
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
    """`request(pipeline, seed)` on timed engines, after `warmup` others; None where the backend's calls only queue.

    Engines are loaded anew: those of `pipeline` stay as they are.
    """
    if pipeline.backend.name not in TIMED_BACKENDS:
        return None
    backend = TimedBackend(pipeline.backend)
    timed = Pipeline(pipeline.bundle, backend)
    for extra in range(warmup):
        request(timed, seed + 1 + extra)
    backend.clear()
    started = time.perf_counter()
    result = request(timed, seed)
    seconds = time.perf_counter() - started
    return Profile(seconds, {name: times for name, times in backend.graphs.items() if times.calls}), result
