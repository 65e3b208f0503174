"""`exact` mode: block verification along each token's chain. What is committed has the target's own distribution.

See docs/algorithm.md. Rows are tokens of any image; rows [J] are some of a round's rows [R].
"""

from dataclasses import dataclass

import numpy as np

from specdec_rt.acceptance import block_verify
from specdec_rt.decode.round import ChainSuffixes, Completion, Speculation, Verdict
from specdec_rt.decode.session import Session
from specdec_rt.noise import TokenNoise
from specdec_rt.plan import Plan
from specdec_rt.residual import draw_block_residual
from specdec_rt.types import FloatArray, IntArray

__all__ = ["ExactVerdict", "ExactVerifier"]


@dataclass(frozen=True)
class ExactVerdict(Verdict):
    """How far each row's path was accepted, and what the residual draw goes on from."""

    accepted_steps: IntArray
    """`[R]`, n where the whole path is accepted"""
    log_weight: FloatArray
    """`[R]` running log weight w after `accepted_steps` transitions"""
    speculation: Speculation


class ExactVerifier:
    """Judges what a round drafted, and redraws what it rejects.

    A rejected token's next state is drawn from the residual. Then the target finishes the chain with fresh noise: step
    by step, or, where `plan.min_resume_steps` or more are left, by *resumed speculation*: its own head
    drafts the chain's suffix on few steps, and that is judged like a whole chain, until it is accepted or short.
    """

    def __init__(self, session: Session, plan: Plan) -> None:
        self._session = session
        head = session.primary_model.head
        self._chain, self._token_dim = head.chain, head.token_dim
        self._min_resume_steps = head.chain.length if plan.resume_step_mask is None else plan.min_resume_steps

    def judge(
        self, speculation: Speculation, noise: FloatArray, token_noise: TokenNoise, attempt: int = 0
    ) -> ExactVerdict:
        """Verify the paths that were drawn with `noise [R, n, D]`."""
        drawn, target_mean, n = speculation.drawn, speculation.target.mean, self._chain.length
        uniform = token_noise.acceptance(n + 1, attempt)
        found = block_verify(noise, drawn.mean, target_mean, self._chain.std, uniform)
        # An accepted token shows the target's mean, which is a function of the exact path.
        accepted = found.accepted_steps == n
        return ExactVerdict(accepted, target_mean[:, -1], found.accepted_steps, found.log_weight, speculation)

    def complete(
        self, verdict: ExactVerdict, rows: IntArray, guidance: FloatArray, token_noise: TokenNoise
    ) -> Completion:
        """Tokens of the target's own for the rejected `rows [J]`; `guidance [G, J]`, `token_noise` of J rows."""
        n, count = self._chain.length, len(rows)
        token, mean = np.empty((2, count, self._token_dim), np.float32)
        done = Completion(token, mean, np.zeros(count, np.int64))
        # What is left of each chain. It goes on from `token`: a residual draw sets both.
        begin, noise = np.full(count, n), np.empty((count, n, self._token_dim), np.float32)
        left = ChainSuffixes(rows, guidance, token, begin, noise)
        rejected, verdict_rows, attempt = np.arange(count), rows, 0  # which of the J, and their rows in the verdict
        while len(rejected):
            token_noise_left = token_noise.pick(rejected)
            token[rejected], mean[rejected] = self._draw_residual(verdict, verdict_rows, token_noise_left, attempt)
            begin[rejected] = verdict.accepted_steps[verdict_rows] + 1
            noise[rejected] = token_noise_left.completion(n, self._token_dim, attempt)
            resumed = rejected[n - begin[rejected] >= self._min_resume_steps]
            if not len(resumed):
                break
            attempt += 1
            suffixes = left.pick(resumed)
            speculation, calls = self._session.resume(suffixes)
            verdict = self.judge(speculation, suffixes.noise, token_noise.pick(resumed), attempt)
            token[resumed], mean[resumed], begin[resumed] = speculation.drawn.token, verdict.mean, n
            done.head_calls[resumed] += calls
            verdict_rows = np.flatnonzero(~verdict.accepted)
            rejected = resumed[verdict_rows]
        unfinished = np.flatnonzero(begin < n)
        if len(unfinished):
            token[unfinished], mean[unfinished] = self._session.finish(left.pick(unfinished))
            done.head_calls[unfinished] += n - begin[unfinished]
        return done

    def _draw_residual(
        self, verdict: ExactVerdict, rows: IntArray, token_noise: TokenNoise, attempt: int
    ) -> tuple[FloatArray, FloatArray]:
        """The states `[J, D]` after the accepted prefixes of `rows [J]`, and the target's means around them."""
        step, speculation = verdict.accepted_steps[rows], verdict.speculation
        q_mean, p_mean = speculation.drawn.mean[rows, step], speculation.target.mean[rows, step]
        residual_draws = token_noise.residual(self._token_dim, attempt)
        log_weight = verdict.log_weight[rows]
        return draw_block_residual(q_mean, p_mean, self._chain.std[step], log_weight, *residual_draws), p_mean
