"""Acceptance by position: every verdict of some requests, with its AR step and its place in the round."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.requests import Request
from specdec_rt import Pipeline
from specdec_rt.backends.base import Backend
from specdec_rt.bundle import Bundle
from specdec_rt.decode.exact import ExactVerdict, ExactVerifier
from specdec_rt.decode.paper import PaperVerdict, PaperVerifier
from specdec_rt.decode.round import Speculation, Verdict
from specdec_rt.decode.session import Session
from specdec_rt.noise import TokenNoise
from specdec_rt.plan import Plan, Tuning
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["ObservedVerdicts", "observe"]


def observe(
    bundle: Bundle, backend: Backend, request: Request, *, seed: int, requests: int, tuning: Tuning | None = None
) -> "ObservedVerdicts":
    """The verdicts of some requests, whose seeds are `seed` and the numbers after it."""
    observed = ObservedVerdicts()
    pipeline = Pipeline(
        bundle,
        backend,
        tuning=tuning,
        exact_verifier=observed.exact_verifier,
        paper_verifier=observed.paper_verifier,
    )
    for each in range(requests):
        request(pipeline, seed + each)
    return observed


@dataclass
class ObservedVerdicts:
    """Verdicts that were counted: `[judged, accepted]`. Drafts after a round's first rejection are not judged.

    A pipeline that is given `exact_verifier` and `paper_verifier` counts its verdicts here.
    """

    by_step: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    """by AR step of the image"""
    by_offset: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    """by AR step of the round"""
    left: list[float] = field(default_factory=list)
    """of every rejected token, the share of its chain that was left (mode `exact`)"""
    resumed: list[bool] = field(default_factory=list)
    """of every chain suffix that was judged in resumed speculation, whether it was accepted"""

    def exact_verifier(self, session: Session, plan: Plan) -> ExactVerifier:
        """A verifier of mode `exact` whose verdicts are counted here."""
        return _ObservedExactVerifier(session, plan, self)

    def paper_verifier(self, session: Session, plan: Plan) -> PaperVerifier:
        """A verifier of mode `paper` whose verdicts are counted here."""
        return _ObservedPaperVerifier(session, plan, self)

    def count(self, image: IntArray, ar_step: IntArray, accepted: BoolArray) -> BoolArray:
        """Count the R verdicts of a round. Returns which tokens were judged and rejected.

        `image [R]` and `ar_step [R]` say which tokens they are.
        """
        rejected = np.zeros_like(accepted)
        for one in np.unique(image):
            of_image = image == one
            first = int(ar_step[of_image].min())
            failed = ar_step[of_image & ~accepted]
            judged = of_image & (ar_step <= (failed.min() if len(failed) else np.inf))
            rejected |= judged & ~accepted
            for row in np.flatnonzero(judged):
                for counts in (self.by_step[int(ar_step[row])], self.by_offset[int(ar_step[row]) - first]):
                    counts[0] += 1
                    counts[1] += int(accepted[row])
        return rejected

    @property
    def judged(self) -> int:
        """Drafts of rounds that were judged."""
        return sum(judged for judged, _ in self.by_offset.values())

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / judged drafts; None where none were judged."""
        accepted = sum(accepted for _, accepted in self.by_offset.values())
        return accepted / self.judged if self.judged else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""

        def rows(counts: dict[int, list[int]]) -> list[dict[str, int]]:
            return [{"at": at, "judged": judged, "accepted": kept} for at, (judged, kept) in sorted(counts.items())]

        return {
            "judged": self.judged,
            "acceptance_rate": self.acceptance_rate,
            "left": float(np.mean(self.left)) if self.left else None,
            "resumed": float(np.mean(self.resumed)) if self.resumed else None,
            "by_step": rows(self.by_step),
            "by_offset": rows(self.by_offset),
        }


class _ObservedExactVerifier(ExactVerifier):
    def __init__(self, session: Session, plan: Plan, observed: ObservedVerdicts) -> None:
        super().__init__(session, plan)
        self._plan, self._observed = plan, observed

    def judge(
        self, speculation: Speculation, noise: FloatArray, token_noise: TokenNoise, attempt: int = 0
    ) -> ExactVerdict:
        verdict, n = super().judge(speculation, noise, token_noise, attempt), noise.shape[1]
        if attempt:
            self._observed.resumed += verdict.accepted.tolist()
        else:
            rejected = _count(self._observed, self._plan, verdict, token_noise)
            self._observed.left += ((n - 1 - verdict.accepted_steps[rejected]) / n).tolist()
        return verdict


class _ObservedPaperVerifier(PaperVerifier):
    def __init__(self, session: Session, plan: Plan, observed: ObservedVerdicts) -> None:
        super().__init__(session, plan)
        self._plan, self._observed = plan, observed

    def judge(self, speculation: Speculation, noise: FloatArray, token_noise: TokenNoise) -> PaperVerdict:
        verdict = super().judge(speculation, noise, token_noise)
        _count(self._observed, self._plan, verdict, token_noise)
        return verdict


def _count(observed: ObservedVerdicts, plan: Plan, verdict: Verdict, token_noise: TokenNoise) -> BoolArray:
    """Count a round's verdicts; a token's position and the order of its image say at which AR step it is made."""
    images, row = np.unique(token_noise.image, return_inverse=True)
    rank = np.argsort(plan.draw_order(token_noise.draws, images), axis=1)  # [B, L] by position
    ar_step = np.searchsorted(plan.schedule.known, rank[row, token_noise.position], side="right") - 1
    return observed.count(token_noise.image, ar_step, verdict.accepted)
