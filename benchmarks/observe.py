"""Acceptance by position: every verdict of some requests, with the AR step and the place in the round it belongs to."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from specdec_rt.decode.chain import Trajectory
from specdec_rt.decode.draft import Proposal
from specdec_rt.decode.loop import Decoder
from specdec_rt.decode.verify import ExactJudgement, PaperJudgement

from benchmarks.requests import Request
from specdec_rt import Pipeline
from specdec_rt import pipeline as pipeline_module
from specdec_rt.decode import verify
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import FloatArray, IntArray

__all__ = ["Observed", "observe"]


@dataclass
class Observed:
    """Counts `[judged, accepted]`; drafts after a round's first rejection are not judged."""

    by_step: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    """by AR step of the image"""
    by_offset: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    """by place in the round"""
    left: list[float] = field(default_factory=list)
    """share of the chain that was left, of every rejected token (`exact` mode)"""
    rests: list[bool] = field(default_factory=list)
    """whether it was accepted, of every rest of a chain that was drafted again"""

    def count(self, image: IntArray, step: IntArray, judgement: ExactJudgement | PaperJudgement) -> None:
        """A round's rows `[R]`: whose they are, and their AR steps."""
        accepted = judgement.accepted
        for one in np.unique(image):
            rows = image == one
            first = int(step[rows].min())
            failed = step[rows & ~accepted]
            rows &= step <= (failed.min() if len(failed) else np.inf)
            for row in np.flatnonzero(rows):
                for counts in (self.by_step[int(step[row])], self.by_offset[int(step[row]) - first]):
                    counts[0] += 1
                    counts[1] += int(accepted[row])
            if isinstance(judgement, ExactJudgement):
                length = judgement.target_mean.shape[1]
                cut = judgement.verdict.accepted_steps[rows & ~accepted]
                self.left += ((length - 1 - cut) / length).tolist()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""

        def rows(counts: dict[int, list[int]]) -> list[dict[str, int]]:
            return [{"at": at, "judged": judged, "accepted": kept} for at, (judged, kept) in sorted(counts.items())]

        judged, kept = np.array([*self.by_offset.values()] or [[0, 0]]).sum(axis=0).tolist()
        return {
            "judged": judged,
            "acceptance_rate": kept / judged if judged else None,
            "left": float(np.mean(self.left)) if self.left else None,
            "resumed": float(np.mean(self.rests)) if self.rests else None,
            "by_step": rows(self.by_step),
            "by_offset": rows(self.by_offset),
        }


def observe(pipeline: Pipeline, request: Request, *, seed: int, requests: int) -> Observed:
    """The verdicts of some requests."""
    observed = Observed()
    for each in range(requests):
        with _recorded(observed):
            request(pipeline, seed + each)
    return observed


@contextmanager
def _recorded(observed: Observed) -> Iterator[None]:
    """Within it, decoders tell what became of the rows that they judged."""

    class Watched(Decoder):
        def _judge(
            self, span: PositionBatch, proposal: Proposal, verified: FloatArray | Trajectory
        ) -> ExactJudgement | PaperJudgement:
            judgement = super()._judge(span, proposal, verified)
            observed.count(span.owner, span.ar_step, judgement)
            return judgement

    def rest(*arguments: Any) -> ExactJudgement:  # noqa: ANN401  # passed on
        judgement = judge_rest(*arguments)
        observed.rests += judgement.accepted.tolist()
        return judgement

    judge_rest = verify.judge_rest
    with (
        mock.patch.object(pipeline_module, "Decoder", Watched),
        mock.patch.object(verify, "judge_rest", rest),
    ):
        yield
