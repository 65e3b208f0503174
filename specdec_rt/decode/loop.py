"""The loop of rounds: draft, verify, accept, commit, every image at its own pace."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from specdec_rt.decode.chain import Trajectory
from specdec_rt.decode.draft import ChainNoise, Model, Proposal
from specdec_rt.decode.pace import Pace
from specdec_rt.decode.plan import Plan
from specdec_rt.decode.stats import Counters
from specdec_rt.decode.steps import Steps
from specdec_rt.decode.verify import (
    Again,
    Completion,
    ExactJudgement,
    PaperJudgement,
    ResidualDraws,
    complete_exact,
    complete_paper,
    judge_exact,
    judge_paper,
)
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.noise import Ahead, Draws, Purpose
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["Decoder", "Session"]

PAPER_TRIES = 64
"""Proposals for one residual of `paper` mode, drawn as one batch."""
AHEAD, AHEAD_VALUES = 16, 2**17
"""For how many tokens of each image noise is drawn at once, and how many values of it at most, if not just one's."""


@dataclass(frozen=True)
class Session:
    """A pair of models with their buffers, ready for one batch, and the plan that they carry out."""

    plan: Plan
    steps: Steps
    pace: Pace | None = None
    """what chooses draft lengths; None: they are the plan's"""

    @property
    def target(self) -> Model:
        """The target; of no use in `draft` mode, where there is none."""
        assert self.steps.target is not None
        return self.steps.target

    @property
    def lead(self) -> Model:
        """The model whose chain counts."""
        return self.steps.models[0]


class Decoder:
    """The images of a request from first to last token, so many `lanes` of them at a time (default: all).

    An image that is being made has a *lane* of its own in the buffers. Where every image advances at its own pace,
    a lane whose image is done takes the next that waits; else all that were begun end together, and the next
    ones begin together. Lanes are never fewer than the images under way, and may be more (the next size that
    steps are captured for): idle lanes stand past the last AR step. `images [N]` are the images' keys to their
    noise, `labels [N]` theirs; `committed` is told of every token when it is final.
    """

    def __init__(
        self,
        session: Session,
        noise: Draws,
        labels: IntArray,
        images: IntArray,
        counters: Counters,
        committed: Callable[[int], None],
        *,
        lanes: int | None = None,
    ) -> None:
        plan = self._plan = session.plan
        self._steps = session.steps
        self._pace = session.pace
        self._clock = time.perf_counter if session.pace is None else session.pace.clock
        self._chain = session.lead.head.chain
        self._token_dim = session.lead.head.token_dim
        self._noise = noise
        n, dim = self._chain.length, self._token_dim
        self._normals = Ahead(lambda image, token: noise.normal(image, token, Purpose.CHAIN, n + 1, dim))
        deciding = 1 if plan.mode == "paper" else n + 1
        self._uniforms = Ahead(lambda image, token: noise.uniform(image, token, Purpose.ACCEPTANCE, deciding))
        self._images = images
        self._labels = labels
        self._counters = counters
        self._tell = committed
        self.order = self._draw_order()
        """`[N, L]` each image's places in the order in which they are predicted"""
        self._shown = np.zeros((len(images), plan.tokens, self._token_dim), np.float32)
        self._most = len(images) if lanes is None else lanes
        self._begun = 0
        """images that have, or had, a lane: the later ones wait"""
        self._behind = False
        """whether the target made tokens alone that the draft has not taken in"""
        self._lane: IntArray
        """`[A]` the image of each lane"""
        self._step: IntArray
        """`[A]` the AR step that each lane makes next"""
        self._fed: FloatArray
        """`[A, L, D]` the tokens that each lane's image goes on from"""

    def run(self) -> FloatArray:
        """Decode all tokens; returns those to show, `[N, L, D]` float32."""
        while self._begun < len(self._images):
            self._seat()
            self._decode()
        return self._shown

    def _decode(self) -> None:
        """All tokens of the images that have lanes, and of those that take their places."""
        plan, steps = self._plan, self._steps
        if plan.mode == "draft":
            self._alone(steps.draft, plan.schedule.steps)
            return
        self._alone(steps.target, plan.schedule.steps if plan.mode == "target" else plan.prefill)
        self._retire()
        self._catch_up(plan.prefill)
        while self._going.any():
            if self._pace is None:
                self._round(plan.draft_length)
            else:
                self._paced(self._pace)
            if not plan.prefill:  # which the images of a batch go through together
                self._refill()
            self._retire()

    @property
    def _going(self) -> BoolArray:
        """`[A]` which lanes still have tokens to make."""
        return np.asarray(self._step < self._plan.schedule.steps)

    # --- one model alone ---------------------------------------------------------------------------

    def _alone(self, model: Model | None, count: int) -> None:
        """Make the tokens of so many AR steps of every image without speculation."""
        assert model is not None
        for _ in range(count):
            self._single(model)

    def _single(self, model: Model) -> None:
        """One AR step of each image."""
        plan, counters, going, drafting = self._plan, self._counters, self._going, model is self._steps.draft
        images = int(going.sum())
        span = self._span(1)
        noise = self._chain_noise(span)
        token, mean = self._steps.single(model, self._fed, span, noise, plan.guidance_at(span.ar_step))
        if drafting:
            counters.draft_backbone_calls += images
        else:
            counters.target_backbone_calls += images
        counters.sequential_head_calls += images * self._head_calls(plan.evaluate if drafting else None)
        self._store(span, slice(None), token, mean)
        self._step[going] += 1
        self._tell(len(span.owner))

    def _catch_up(self, count: int) -> None:
        """Let the draft take in what the target made alone of the first `count` AR steps."""
        self._behind = False
        if self._steps.draft is None or not self._going.any():
            return
        calls = self._steps.catch_up(self.order[self._lane], self._plan.schedule.known, self._fed, count)
        self._counters.draft_backbone_calls += calls * int(self._going.sum())

    # --- a round -----------------------------------------------------------------------------------

    def _paced(self, pace: Pace) -> None:
        """A round of the length that the pace chooses; of length 0, an AR step by the target alone."""
        going, known = self._going, self._plan.schedule.known
        step = self._step[going]
        waiting = 0 if self._plan.prefill else len(self._images) - self._begun
        length = pace.choose(step, len(self._lane), waiting, behind=self._behind)
        if length and self._behind:
            started = pace.clock()
            # Some lanes are fed more than they have: it stands past their last token, and is overwritten before
            # it is read, like what a dropped draft leaves. So few lengths will do where each has to be captured.
            self._catch_up(self._steps.device.bucketed(int(step.max()), len(known) - 1))
            pace.note_catch_up(pace.clock() - started)
        started = pace.clock()
        completion, accepted, rejected = 0.0, 0, 0
        if length:
            completion, accepted, rejected = self._round(length)
        else:
            assert self._steps.target is not None
            self._single(self._steps.target)
            self._counters.draft_lengths[0] += len(step)
            self._behind = self._steps.draft is not None
        pace.note(pace.clock() - started - completion, completion, accepted, rejected)

    def _round(self, length: int) -> tuple[float, int, int]:
        """Draft up to `length` AR steps of each image, verify them, commit what stands.

        The sets of tokens before the first one with a rejection are kept; that set is committed with its
        rejected tokens redrawn; what was drafted after it is dropped. Returns the seconds that the redrawing took,
        and how many tokens were accepted and rejected; of dropped ones it says nothing: their noise is used again.
        """
        plan, going = self._plan, self._going
        left = plan.schedule.steps - self._step  # [A]
        span = self._span(min(length, int(left.max())))
        noise = self._chain_noise(span)
        guidance = plan.guidance_at(span.ar_step)
        drawn, verified = self._steps.round(self._fed, span, noise, guidance)
        proposal = Proposal(noise, drawn)
        judgement = self._judge(span, proposal, verified)

        accepted = judgement.accepted
        drafted = np.minimum(span.length, left)
        kept = drafted.copy()  # [A] AR steps before the first with a rejection
        np.minimum.at(kept, span.owner[~accepted], span.offset[~accepted])
        taken = span.offset <= kept[span.owner]
        rows = np.flatnonzero(taken & ~accepted)
        taken &= accepted
        self._store(span, taken, proposal.token[taken], judgement.mean[taken])
        started = self._clock()
        if len(rows):
            made = self._complete(span, guidance, proposal, judgement, rows)
            self._store(span, rows, made.token, made.mean)
            longest = np.zeros(len(left), np.int64)
            np.maximum.at(longest, span.owner[rows], made.head_calls)
            self._counters.sequential_head_calls += int(longest.sum())
        completion = self._clock() - started if len(rows) else 0.0
        self._step += np.minimum(kept + 1, drafted)
        kept_tokens = int(taken.sum())
        self._count_round(drafted[going], len(span.owner), accepted=kept_tokens, rejected=len(rows))
        self._tell(kept_tokens + len(rows))
        return completion, kept_tokens, len(rows)

    def _count_round(self, steps: IntArray, drafted: int, *, accepted: int, rejected: int) -> None:
        """Count a round of A images that drafted `steps [A]` AR steps each, `drafted` tokens in all."""
        plan, counters = self._plan, self._counters
        aligned = self._head_calls(None) if plan.mode == "paper" else 0  # all rows in one batch
        counters.rounds += len(steps)
        counters.draft_lengths.update(steps.tolist())
        counters.committed += accepted + rejected
        counters.drafted += drafted
        counters.accepted += accepted
        counters.rejected += rejected
        counters.target_backbone_calls += len(steps)
        counters.draft_backbone_calls += 0 if plan.draft is None else int(steps.sum())
        counters.sequential_head_calls += int(steps.sum()) * self._head_calls(plan.evaluate) + len(steps) * aligned

    def _head_calls(self, evaluate: BoolArray | None) -> int:
        """Sequential calls that a chain takes."""
        return self._chain.length if evaluate is None else int(evaluate.sum())

    def _judge(
        self, span: PositionBatch, proposal: Proposal, verified: FloatArray | Trajectory
    ) -> ExactJudgement | PaperJudgement:
        uniform = self._uniforms(self._image(span), span.place, lambda: self._coming(span))
        if isinstance(verified, Trajectory):
            return judge_paper(self._chain, proposal, verified, uniform[:, 0], self._plan.tau)
        return judge_exact(self._chain, proposal, verified, uniform)

    def _complete(
        self,
        span: PositionBatch,
        guidance: FloatArray,
        proposal: Proposal,
        judgement: ExactJudgement | PaperJudgement,
        rows: IntArray,
    ) -> Completion:
        image, place = self._image(span), span.place
        if isinstance(judgement, PaperJudgement):
            of_rows = image[rows], place[rows], Purpose.RESIDUAL, PAPER_TRIES
            normal = self._noise.normal(*of_rows, self._token_dim)
            return complete_paper(self._chain, judgement, rows, normal, self._noise.uniform(*of_rows))

        def draws(some: IntArray, attempt: int) -> ResidualDraws:
            return self._residual_draws(image[some], place[some], attempt)

        again = Again(
            redraft=lambda some, *rest: self._steps.redraft(some, guidance[:, some], *rest),
            uniform=lambda some, attempt: self._noise.uniform(
                image[some], place[some], Purpose.ACCEPTANCE, self._chain.length + 1, attempt
            ),
            draws=draws,
        )
        return complete_exact(
            self._chain,
            proposal,
            judgement,
            rows,
            lambda some, *rest: self._steps.complete(some, guidance[:, some], *rest),
            draws(rows, 0),
            None if self._plan.grid is None else again,
        )

    def _residual_draws(self, image: IntArray, place: IntArray, attempt: int) -> ResidualDraws:
        noise, n, dim = self._noise, self._chain.length, self._token_dim
        return ResidualDraws(
            coordinate=noise.uniform(image, place, Purpose.RESIDUAL, 1, attempt)[:, 0],
            direction=noise.normal(image, place, Purpose.RESIDUAL, 1, dim, attempt)[:, 0],
            fresh=noise.normal(image, place, Purpose.COMPLETION, n, dim, attempt),
        )

    # --- the batch's state -------------------------------------------------------------------------

    def _draw_order(self) -> IntArray:
        plan, images = self._plan, self._images
        if not plan.random_order:
            return np.tile(np.arange(plan.tokens), (len(images), 1))
        uniform = self._noise.uniform(images, np.zeros_like(images), Purpose.ORDER, plan.tokens)
        return np.argsort(uniform, axis=1, kind="stable")

    def _span(self, length: int) -> PositionBatch:
        """The next AR steps of all lanes."""
        return PositionBatch.of(self.order[self._lane], self._plan.schedule.known, self._step, length)

    def _store(
        self, span: PositionBatch, rows: BoolArray | IntArray | slice, token: FloatArray, mean: FloatArray
    ) -> None:
        lane, place = span.owner[rows], span.place[rows]
        self._fed[lane, place] = token
        self._shown[self._lane[lane], place] = mean if self._plan.emit_mean else token

    def _seat(self) -> None:
        """Give the next images that wait lanes, all anew."""
        first, count = self._begun, min(self._most, len(self._images) - self._begun)
        idle = self._steps.device.batch_bucket(count) - count
        self._lane = np.concatenate([np.arange(first, first + count), np.full(idle, first)])
        self._step = np.concatenate([np.zeros(count, np.int64), np.full(idle, self._plan.schedule.steps)])
        self._fed = np.zeros((len(self._lane), *self._shown.shape[1:]), np.float32)
        self._begun += count
        self._behind = False
        self._begin()
        if self._pace is not None:
            self._pace.begin(len(self._lane))

    def _refill(self) -> None:
        """Let images that wait begin in lanes whose own are done."""
        waiting = len(self._images) - self._begun
        if not waiting:
            return
        going = self._going
        free = np.flatnonzero(~going)[: min(waiting, self._most - int(going.sum()))]
        if not len(free):
            return
        self._lane[free] = self._begun + np.arange(len(free))
        self._step[free], self._fed[free] = 0, 0
        self._begun += len(free)
        self._begin()

    def _begin(self) -> None:
        """Tell the backbones whose lanes they are. What older images left in caches stands past the new ones' step."""
        for model in self._steps.models:
            model.backbone.begin(self._labels[self._lane])

    def _retire(self) -> None:
        """Leave out lanes that are done, as far as fewer lanes are of use."""
        going = np.flatnonzero(self._going)
        lanes = self._steps.device.batch_bucket(len(going))
        if not len(going) or lanes >= len(self._lane):
            return
        idle = np.flatnonzero(~self._going)[: lanes - len(going)]
        kept = np.sort(np.concatenate([going, idle]))
        self._lane, self._step, self._fed = self._lane[kept], self._step[kept], self._fed[kept]
        for model in self._steps.models:
            model.backbone.select(kept)

    def _image(self, span: PositionBatch) -> IntArray:
        """`[R]` the key of each row's image to its noise."""
        return self._images[self._lane[span.owner]]

    def _chain_noise(self, span: PositionBatch) -> ChainNoise:
        return ChainNoise.of(self._normals(self._image(span), span.place, lambda: self._coming(span)))

    def _coming(self, span: PositionBatch) -> tuple[IntArray, IntArray]:
        """Image and place of the next tokens of every lane, those of `span` among them."""
        known, lanes = self._plan.schedule.known, np.flatnonzero(self._going)
        first = known[self._step[lanes]]
        wanted = np.bincount(span.owner, minlength=len(self._lane))[lanes]
        each = self._token_dim * (self._chain.length + 1) * len(lanes)
        count = max(min(AHEAD, AHEAD_VALUES // each), int(wanted.max()))
        rank = np.minimum(first[:, None] + np.arange(count), self._plan.tokens - 1)
        place = self.order[self._lane[lanes][:, None], rank]
        return np.repeat(self._images[self._lane[lanes]], count), place.ravel()
