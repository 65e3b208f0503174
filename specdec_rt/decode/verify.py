"""How the target judges drafted tokens, and what it puts in the place of the first that it rejects.

`judge_exact` keeps the target's distribution exactly: block verification (Sun et al., arXiv 2403.10444)
along the chain of each token. `judge_paper` is CSpD as published (arXiv 2411.11925 §3), an approximation.
Rows are tokens of any image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from specdec_rt.acceptance import BlockVerdict, block_verify, paper_log_acceptance
from specdec_rt.chain import Chain
from specdec_rt.decode import redraft
from specdec_rt.decode.chain import Trajectory
from specdec_rt.decode.draft import Proposal
from specdec_rt.residual import draw_block_residual, draw_paper_residual
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = [
    "Again",
    "Completion",
    "ExactJudgement",
    "Finish",
    "PaperJudgement",
    "ResidualDraws",
    "complete_exact",
    "complete_paper",
    "judge_exact",
    "judge_paper",
    "judge_rest",
]


Finish = Callable[[IntArray, FloatArray, FloatArray, IntArray], tuple[FloatArray, FloatArray]]
"""`(rows [K], start [K, D], noise [K, n, D], begin [K])` → tokens, means `[K, D]`: the target's chains of some rows,
from the state before transition `begin` on."""


@dataclass(frozen=True)
class ResidualDraws:
    """The random numbers that replace the first rejected state of K rows, and lead on from there."""

    coordinate: FloatArray
    """`[K]` uniform and"""
    direction: FloatArray
    """`[K, D]` normal draw the residual"""
    fresh: FloatArray
    """`[K, n, D]` normal: the transitions after it (never the draft's noise: that would bias them)"""


@dataclass(frozen=True)
class Again:
    """What speculation on the rest of chains takes; rows are those of the round."""

    redraft: Callable[[IntArray, FloatArray, FloatArray, IntArray], tuple[Proposal, FloatArray, IntArray]]
    """arguments of a `Finish` → what is drafted, the target's means there, sequential head calls `[K]`"""
    uniform: Callable[[IntArray, int], FloatArray]
    """`(rows [K], attempt)` → `[K, n + 1]` that decide how much is accepted"""
    draws: Callable[[IntArray, int], ResidualDraws]
    """of the same arguments"""


@dataclass(frozen=True)
class Completion:
    """Tokens of the target's own, for K rows whose draft was rejected."""

    token: FloatArray
    """`[K, D]` the chain's last state: what is fed back"""
    mean: FloatArray
    """`[K, D]` the mean it was drawn around"""
    head_calls: IntArray
    """`[K]` sequential head calls of each row"""


@dataclass(frozen=True)
class ExactJudgement:
    """Block verification's outcome for R rows."""

    verdict: BlockVerdict
    target_mean: FloatArray
    """`[R, n, D]` the target's means out of the drafted states"""

    @property
    def accepted(self) -> BoolArray:
        """`[R]` whether the whole path, and so the token, is kept."""
        return np.asarray(self.verdict.accepted_steps == self.target_mean.shape[1])

    @property
    def mean(self) -> FloatArray:
        """`[R, D]` what an accepted token shows: the target's mean, a function of the exact path."""
        return self.target_mean[:, -1]


def judge_exact(chain: Chain, proposal: Proposal, target_mean: FloatArray, uniform: FloatArray) -> ExactJudgement:
    """Verify all paths, given the target's means `[R, n, D]` at their states; `uniform [R, n + 1]`."""
    verdict = block_verify(proposal.noise.steps, proposal.drawn.mean, target_mean, chain.std, uniform)
    return ExactJudgement(verdict, target_mean)


def judge_rest(
    chain: Chain,
    proposal: Proposal,
    target_mean: FloatArray,
    uniform: FloatArray,
    begin: IntArray,  # noqa: ARG001  # for who forces verdicts
) -> ExactJudgement:
    """As `judge_exact`, of paths that were drafted from transition `begin [R]` on.

    Before it both means are the same (0), so that every verdict accepts what lies there.
    """
    return judge_exact(chain, proposal, target_mean, uniform)


def complete_exact(
    chain: Chain,
    proposal: Proposal,
    judgement: ExactJudgement,
    rows: IntArray,
    finish: Finish,
    draws: ResidualDraws,
    again: Again | None = None,
) -> Completion:
    """Draw the state after each row's accepted prefix from the residual, then go on along the target's chain.

    For the K `rows` with `draws [K]`: where enough is left, and there is an `again`, by speculation on the rest, and
    so forth; then all of them step by step by `finish`.
    """
    n, count = chain.length, len(rows)
    token, mean = np.empty((count, proposal.token.shape[1]), np.float32), np.empty_like(judgement.mean[rows])
    begin, calls, fresh = np.full(count, n), np.zeros(count, np.int64), np.empty_like(draws.fresh)
    rejected, drafted, attempt = np.arange(count), rows, 0  # of the K rows, and of the proposal's
    while True:
        step = judgement.verdict.accepted_steps[drafted]
        token[rejected] = draw_block_residual(
            proposal.drawn.mean[drafted, step],
            judgement.target_mean[drafted, step],
            chain.std[step],
            judgement.verdict.log_weight[drafted],
            draws.coordinate,
            draws.direction,
        )
        mean[rejected], begin[rejected], fresh[rejected] = judgement.mean[drafted], step + 1, draws.fresh
        if again is None:
            break
        long = rejected[n - begin[rejected] >= redraft.LEAST]
        if not len(long):
            break
        attempt += 1
        proposal, target_mean, made = again.redraft(rows[long], token[long], fresh[long], begin[long])
        judgement = judge_rest(chain, proposal, target_mean, again.uniform(rows[long], attempt), begin[long])
        token[long], mean[long], begin[long] = proposal.token, judgement.mean, n
        calls[long] += made
        drafted = np.flatnonzero(~judgement.accepted)
        rejected = long[drafted]
        if not len(rejected):
            break
        draws = again.draws(rows[rejected], attempt)
    left = np.flatnonzero(begin < n)
    if len(left):
        token[left], mean[left] = finish(rows[left], token[left], fresh[left], begin[left])
        calls[left] += n - begin[left]
    return Completion(token, mean, calls)


@dataclass(frozen=True)
class PaperJudgement:
    """The published criterion's outcome for R rows."""

    accepted: BoolArray
    """`[R]`"""
    drafted: Trajectory
    aligned: Trajectory
    """the target's own chains, denoised with the drafts' noise"""
    log_std_ratio: FloatArray
    """`[R]` log Σ', the sum of log σ_q - log σ_p over dimensions and all transitions but the last"""

    @property
    def mean(self) -> FloatArray:
        """`[R, D]` what an accepted token shows: the draft's mean, since the draft's token is what is kept."""
        return self.drafted.mean[:, -1]


def judge_paper(
    chain: Chain, proposal: Proposal, aligned: Trajectory, uniform: FloatArray, tau: float
) -> PaperJudgement:
    """Compare densities on the last transition with those of the target's own, `aligned` chains.

    `uniform [R]`. The last transition has one std in draft and target, so the paper's Σ is Σ' here.
    """
    drafted, std = proposal.drawn, np.asarray(chain.final_density_std)
    log_std_ratio = _log_std_ratio(drafted, aligned)
    log_acceptance = paper_log_acceptance(
        proposal.token, drafted.mean[:, -1], std, aligned.mean[:, -1], std, log_std_ratio, tau
    )
    return PaperJudgement(np.log(uniform) < log_acceptance, drafted, aligned, log_std_ratio)


def _log_std_ratio(drafted: Trajectory, aligned: Trajectory) -> FloatArray:
    """`[R]` log Σ'; 0 where both share the chain's fixed variances."""
    if drafted.std is None or aligned.std is None:
        return np.zeros(len(drafted.path))
    ratio = np.log(drafted.std[:, :-1], dtype=np.float64) - np.log(aligned.std[:, :-1], dtype=np.float64)
    return np.asarray(ratio.sum(axis=(1, 2)))


def complete_paper(
    chain: Chain, judgement: PaperJudgement, rows: IntArray, normal: FloatArray, uniform: FloatArray
) -> Completion:
    """Redraw the last transition of the K `rows`: tries `normal [K, tries, D]`, `uniform [K, tries]`.

    Where no try passes, the target's own aligned token stands.
    """
    std = np.asarray(chain.final_density_std)
    mean = judgement.aligned.mean[rows, -1]
    token, _ = draw_paper_residual(
        judgement.drafted.mean[rows, -1],
        std,
        mean,
        std,
        judgement.log_std_ratio[rows],
        normal,
        uniform,
        judgement.aligned.path[rows, -1],
    )
    return Completion(token.astype(np.float32), mean, head_calls=np.zeros(len(rows), np.int64))
