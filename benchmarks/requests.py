"""One request of a scenario to the runtime: whole, or its first AR steps."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.scenario import RuntimeVariant, Scenario
from specdec_rt import Pipeline
from specdec_rt.ar_schedule import ArSchedule
from specdec_rt.config import DecodeOptions
from specdec_rt.decode.stats import Stats
from specdec_rt.plan import schedule_of
from specdec_rt.types import IntArray

__all__ = ["Request", "labels_of", "request_schedule"]


class _EnoughTokens(Exception):  # noqa: N818  # no error
    """As many tokens as were asked for are made."""


@dataclass(frozen=True)
class Request:
    """Called with a pipeline and a seed. Returns the request's figures, or None where it ends early."""

    options: DecodeOptions
    batch: int
    first_ar_steps: int | None = None
    """end after so many AR steps"""

    @classmethod
    def of(cls, scenario: Scenario, variant: RuntimeVariant, batch: int) -> "Request":
        """A variant's request."""
        return cls(variant.decode_options(scenario), batch, scenario.first_ar_steps)

    def __call__(self, pipeline: Pipeline, seed: int) -> Stats | None:
        labels = labels_of(pipeline, seed, self.batch)
        kept: dict[str, Any] = {"seed": seed, "batch_size": self.batch, "options": self.options}
        if self.first_ar_steps is None:
            return pipeline.generate(labels, **kept).stats
        schedule = request_schedule(pipeline, self.options)
        wanted = self.batch * int(schedule.known[min(self.first_ar_steps, schedule.steps)])

        def stop(done: int, total: int) -> None:  # noqa: ARG001  # as the runtime calls it
            if done >= wanted:
                raise _EnoughTokens

        try:
            pipeline.generate(labels, progress=stop, **kept)
        except _EnoughTokens:
            return None
        raise AssertionError("the request was over before the tokens asked for were made")


def labels_of(pipeline: Pipeline, seed: int, batch: int) -> IntArray:
    """`[B]` labels: classes in turn, and other ones for other seeds."""
    return np.asarray((seed * batch + np.arange(batch)) % pipeline.bundle.manifest.classes)


def request_schedule(pipeline: Pipeline, options: DecodeOptions) -> ArSchedule:
    """How a request with these options spreads an image's tokens over AR steps."""
    manifest = pipeline.bundle.manifest
    return schedule_of(manifest, options.ar_steps or manifest.defaults.ar_steps)
