"""`paper` mode: continuous speculative decoding as published (CSpD, arXiv 2411.11925 §3). It is an approximation.

The target denoises from the draft's start with the draft's noise, along states of its own, and only the densities of
the last transition are compared. docs/algorithm.md says how that departs from the target's distribution.
"""

from dataclasses import dataclass

import numpy as np

from specdec_rt.acceptance import paper_log_acceptance
from specdec_rt.decode.head import Trajectory
from specdec_rt.decode.session import Session, Speculation
from specdec_rt.decode.verifier import Completion, Verdict
from specdec_rt.noise import TokenNoise
from specdec_rt.plan import Plan
from specdec_rt.residual import draw_paper_residual
from specdec_rt.types import FloatArray, IntArray

__all__ = ["RESIDUAL_TRIES", "PaperVerdict", "PaperVerifier"]

RESIDUAL_TRIES = 64
"""Proposals for one residual, drawn as one batch."""


@dataclass(frozen=True)
class PaperVerdict(Verdict):
    """Which drafts pass the published criterion, and what the residual draw needs."""

    log_std_ratio: FloatArray
    """`[R]` log Σ', the sum of log σ_q - log σ_p over dimensions and all transitions but the last"""
    speculation: Speculation


class PaperVerifier:
    """Judges by the published criterion with acceptance temperature τ; τ = 1 is the criterion as published."""

    def __init__(self, session: Session, plan: Plan) -> None:
        self._std = np.asarray(session.primary_model.head.chain.final_density_std)
        self._tau = plan.tau

    def judge(self, speculation: Speculation, noise: FloatArray, token_noise: TokenNoise) -> PaperVerdict:  # noqa: ARG002  # the criterion reads tokens alone
        """Compare the densities of the last transition.

        It has one std in draft and target, so the paper's Σ over all transitions is Σ' here.
        """
        drawn, target = speculation.drawn, speculation.target
        log_std_ratio = _log_std_ratio(drawn, target)
        log_acceptance = paper_log_acceptance(
            drawn.token, drawn.mean[:, -1], self._std, target.mean[:, -1], self._std, log_std_ratio, self._tau
        )
        accepted = np.log(token_noise.acceptance(1)[:, 0]) < log_acceptance
        return PaperVerdict(accepted, drawn.mean[:, -1], log_std_ratio, speculation)

    def complete(
        self,
        verdict: PaperVerdict,
        rows: IntArray,
        guidance: FloatArray,  # noqa: ARG002  # no engine is asked
        token_noise: TokenNoise,
    ) -> Completion:
        """Draw the last transition again. Where no try passes, the target's own token on the shared noise stands."""
        drawn, target = verdict.speculation.drawn, verdict.speculation.target
        mean = target.mean[rows, -1]
        normal, uniform = token_noise.residual_tries(RESIDUAL_TRIES, mean.shape[1])
        token, _ = draw_paper_residual(
            drawn.mean[rows, -1],
            self._std,
            mean,
            self._std,
            verdict.log_std_ratio[rows],
            normal,
            uniform,
            target.token[rows],
        )
        return Completion(token.astype(np.float32), mean, np.zeros(len(rows), np.int64))


def _log_std_ratio(drawn: Trajectory, target: Trajectory) -> FloatArray:
    """`[R]` log Σ'; 0 where both share the chain's fixed variances."""
    if drawn.std is None or target.std is None:
        return np.zeros(len(drawn.path))
    ratio = np.log(drawn.std[:, :-1], dtype=np.float64) - np.log(target.std[:, :-1], dtype=np.float64)
    return np.asarray(ratio.sum(axis=(1, 2)))
