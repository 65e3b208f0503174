"""Forced verdicts: random weights have no acceptance of their own, but can be timed at that of a real model."""

from dataclasses import dataclass, replace

import numpy as np

from benchmarks.scenario import Forced
from specdec_rt.bench.simulation import draw_left
from specdec_rt.decode.exact import ExactVerdict, ExactVerifier
from specdec_rt.decode.round import Speculation
from specdec_rt.decode.session import Session
from specdec_rt.noise import TokenNoise
from specdec_rt.plan import Plan
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["ForcedVerdicts"]

GOLDEN, SILVER = (5**0.5 - 1) / 2, 2**0.5 - 1
"""Multiples of either, modulo 1, are spread evenly over [0, 1)."""


@dataclass
class ForcedVerdicts:
    """The verdicts of all `exact` requests of a pipeline, which is given `exact_verifier`.

    Rejections are spread evenly over the tokens, from one request to the next.
    """

    rates: Forced | None = None
    """what the next verdicts are forced to; None: they are what the verifier finds"""
    _judged_drafts: int = 0
    _judged_suffixes: int = 0

    def exact_verifier(self, session: Session, plan: Plan) -> ExactVerifier:
        """A verifier whose verdicts these are."""
        return _ForcedVerifier(session, plan, self)

    def draw(self, rows: int, *, resumed: bool) -> tuple[BoolArray, FloatArray, float]:
        """Whether each of the next R drafts, or suffixes, is accepted; `[R]` where it is cut; the mean of that."""
        assert self.rates is not None
        before = self._judged_suffixes if resumed else self._judged_drafts
        turn = before + np.arange(rows)
        if resumed:
            self._judged_suffixes += rows
        else:
            self._judged_drafts += rows
        rate, left = (self.rates.resumed, 0.5) if resumed else (self.rates.acceptance, self.rates.left)
        return turn * GOLDEN % 1 < rate, turn * SILVER % 1, left


class _ForcedVerifier(ExactVerifier):
    """Judges as usual, so that this takes the time that it takes, and then says what it is told to say."""

    def __init__(self, session: Session, plan: Plan, verdicts: ForcedVerdicts) -> None:
        super().__init__(session, plan)
        self._verdicts = verdicts

    def judge(
        self, speculation: Speculation, noise: FloatArray, token_noise: TokenNoise, attempt: int = 0
    ) -> ExactVerdict:
        """The verdict on a round's drafts, or (from attempt 1 on) on chain suffixes."""
        found = super().judge(speculation, noise, token_noise, attempt)
        if self._verdicts.rates is None:
            return found
        rows, n = noise.shape[:2]
        accepted, where, left = self._verdicts.draw(rows, resumed=attempt > 0)
        begin = np.zeros(rows, np.int64) if speculation.begin is None else speculation.begin
        cut: IntArray = n - 1 - draw_left(where, n - begin, left)
        # With the weight of an unbroken path a residual can be drawn wherever a path is cut.
        return replace(found, accepted=accepted, accepted_steps=np.where(accepted, n, cut), log_weight=np.zeros(rows))
