"""`paper` mode: continuous speculative decoding as published (CSpD, arXiv 2411.11925 §3). It is an approximation.

The target denoises from the draft's start with the draft's noise, along states of its own, and only the densities of
the last transition are compared. docs/algorithm.md says how that departs from the target's distribution.
"""

from dataclasses import dataclass

import numpy as np

from specdec_rt.acceptance import paper_log_acceptance
from specdec_rt.decode.round import Completion, Speculation, Verdict
from specdec_rt.decode.session import Session
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

    def judge(self, speculation: Speculation, _noise: FloatArray, token_noise: TokenNoise) -> PaperVerdict:
        """Compare the densities of the last transition.

        It has one std in draft and target, so the paper's Σ over all transitions is Σ' here.
        """
        drawn, std = speculation.drawn, self._std
        q_mean, p_mean, log_std_ratio = drawn.mean[:, -1], speculation.target.mean[:, -1], _log_std_ratio(speculation)
        log_acceptance = paper_log_acceptance(drawn.token, q_mean, std, p_mean, std, log_std_ratio, self._tau)
        accepted = np.log(token_noise.acceptance(1)[:, 0]) < log_acceptance
        # As published, an accepted token is the draft's in all: it shows the draft's mean.
        return PaperVerdict(accepted, q_mean, log_std_ratio, speculation)

    def complete(
        self, verdict: PaperVerdict, rows: IntArray, _guidance: FloatArray, token_noise: TokenNoise
    ) -> Completion:
        """Draw the last transition again. Where no try passes, the target's own token on the shared noise stands."""
        target, std, log_std_ratio = verdict.speculation.target, self._std, verdict.log_std_ratio[rows]
        q_mean, p_mean = verdict.speculation.drawn.mean[rows, -1], target.mean[rows, -1]
        tries = token_noise.residual_tries(RESIDUAL_TRIES, p_mean.shape[1])
        token, _ = draw_paper_residual(q_mean, std, p_mean, std, log_std_ratio, *tries, target.token[rows])
        return Completion(token.astype(np.float32), p_mean, np.zeros(len(rows), np.int64))


def _log_std_ratio(speculation: Speculation) -> FloatArray:
    """`[R]` log Σ'; 0 where draft and target share the chain's fixed variances."""
    q_std, p_std = speculation.drawn.std, speculation.target.std
    if q_std is None or p_std is None:
        return np.zeros(len(speculation.drawn.path))
    ratio = np.log(q_std[:, :-1], dtype=np.float64) - np.log(p_std[:, :-1], dtype=np.float64)
    return np.asarray(ratio.sum(axis=(1, 2)))
