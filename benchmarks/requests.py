"""One request of a scenario to the runtime: whole, or its first AR steps; verdicts found, forced or recorded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
from specdec_rt.decode.draft import Proposal
from specdec_rt.decode.verify import ExactJudgement, judge_exact

from benchmarks.scenario import Forced, RuntimeVariant, Scenario
from specdec_rt import Pipeline
from specdec_rt.acceptance import BlockVerdict
from specdec_rt.ar_schedule import ArSchedule
from specdec_rt.bench.cost import draw_left
from specdec_rt.chain import Chain
from specdec_rt.config import DecodeOptions
from specdec_rt.decode import loop, verify
from specdec_rt.decode.stats import Stats
from specdec_rt.plan import schedule_of
from specdec_rt.types import FloatArray, IntArray

__all__ = ["Request", "forced_verdicts", "labels_of", "request_schedule"]


GOLDEN, SILVER = (5**0.5 - 1) / 2, 2**0.5 - 1
"""Multiples of either are spread evenly over [0, 1) modulo 1."""


class _Enough(Exception):  # noqa: N818  # no error
    """As many tokens as were asked for are made."""


@dataclass(frozen=True)
class Request:
    """Called with a pipeline and a seed; None for figures where it ends early."""

    options: DecodeOptions
    batch: int
    first_ar_steps: int | None = None

    @classmethod
    def of(cls, scenario: Scenario, variant: RuntimeVariant, batch: int) -> "Request":
        """The scenario's."""
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
                raise _Enough

        try:
            pipeline.generate(labels, progress=stop, **kept)
        except _Enough:
            return None
        raise AssertionError("the request was over before the tokens asked for were made")


def labels_of(pipeline: Pipeline, seed: int, batch: int) -> IntArray:
    """`[B]`: classes in turn, other ones for other seeds."""
    return np.asarray((seed * batch + np.arange(batch)) % pipeline.bundle.manifest.classes)


def request_schedule(pipeline: Pipeline, options: DecodeOptions) -> ArSchedule:
    """How a request with these options spreads its tokens."""
    manifest = pipeline.bundle.manifest
    return schedule_of(manifest, options.ar_steps or manifest.defaults.ar_steps)


@contextmanager
def forced_verdicts(forced: Forced | None) -> Iterator[None]:
    """Within it `exact` mode judges as usual, but accepts and rejects as it is told.

    Rejections are spread evenly: every few tokens have their share.
    """
    if forced is None:
        yield
        return

    def judge(acceptance: float, left: float) -> Callable[..., ExactJudgement]:
        judged_rows = 0

        def judged(
            chain: Chain,
            proposal: Proposal,
            target_mean: FloatArray,
            uniform: FloatArray,
            begin: IntArray | int = 0,
        ) -> ExactJudgement:
            nonlocal judged_rows
            found = judge_exact(chain, proposal, target_mean, uniform)
            rows, length = target_mean.shape[:2]
            turn = judged_rows + np.arange(rows)
            judged_rows += rows
            rejected = length - 1 - draw_left(turn * SILVER % 1, length - begin, left)
            steps = np.where(turn * GOLDEN % 1 < acceptance, length, rejected)
            # With the weight of an unbroken path a residual can be drawn wherever a path is cut.
            return replace(found, verdict=BlockVerdict(steps, np.zeros(rows)))

        return judged

    with (
        mock.patch.object(loop, "judge_exact", judge(forced.acceptance, forced.left)),
        mock.patch.object(verify, "judge_rest", judge(forced.resumed, 0.5)),
    ):
        yield
