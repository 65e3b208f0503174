"""The loop of rounds: draft, verify, accept, commit, every image at its own pace."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from specdec_rt.config import GuidanceSchedule, Mode
from specdec_rt.decode.draft import ChainNoise, Model, Proposal, propose
from specdec_rt.decode.stats import Counters
from specdec_rt.decode.verify import (
    Completion,
    ExactJudgement,
    PaperJudgement,
    complete_exact,
    complete_paper,
    judge_exact,
    judge_paper,
)
from specdec_rt.families.span import Span
from specdec_rt.noise import Draws, Purpose
from specdec_rt.schedule import ArSchedule, guidance_weights
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["Decoder", "Plan", "Session"]

PAPER_TRIES = 64
"""Proposals for one residual of `paper` mode, drawn as one batch."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request's options, resolved against its bundle."""

    mode: Mode
    schedule: ArSchedule
    random_order: bool
    """whether every image takes its places in an order of its own; else from first to last"""
    prefill: int
    """AR steps that the target makes alone"""
    draft_length: int
    """AR steps drafted per round"""
    evaluate: BoolArray | None
    """`[n]` the steps at which the draft calls its head; None: all"""
    draft: str | None
    """the draft model's name; None in `target` mode, and where the target's own head drafts its chain"""
    tau: float
    guidance: float
    guidance_schedule: GuidanceSchedule
    emit_mean: bool

    @property
    def tokens(self) -> int:
        """L."""
        return int(self.schedule.known[-1])

    @property
    def slots(self) -> int:
        """Cache places that a causal backbone needs: a last round may feed it past the end."""
        return self.tokens + self.draft_length - 1

    def guidance_at(self, ar_step: IntArray) -> FloatArray:
        """Weights `[G, R]` of the guidance branches for tokens made at `ar_step [R]`."""
        progress = self.schedule.progress[ar_step]
        return guidance_weights(progress, scale=self.guidance, schedule=self.guidance_schedule)


@dataclass(frozen=True)
class Session:
    """A pair of models with their buffers, fresh for one batch, and the plan that they carry out."""

    plan: Plan
    target: Model | None
    """None in `draft` mode"""
    draft: Model | None
    """None in `target` mode, and where the target's own head drafts"""


class Decoder:
    """One batch from first to last token.

    `images [B]` are the images' keys to their noise; `committed` is told of every token when it is final.
    """

    def __init__(
        self,
        session: Session,
        noise: Draws,
        images: IntArray,
        counters: Counters,
        committed: Callable[[int], None],
    ) -> None:
        plan = self._plan = session.plan
        self._target, self._draft = session.target, session.draft
        self._noise = noise
        self._images = images
        self._counters = counters
        self._tell = committed
        lead = session.target or session.draft
        assert lead is not None
        self._head = lead.head
        self.order = self._draw_order()
        """`[B, L]` each image's places in the order in which they are predicted"""
        self._fed = np.zeros((len(images), plan.tokens, lead.head.token_dim), np.float32)
        self._shown = np.zeros_like(self._fed)
        self._step = np.zeros(len(images), np.int64)
        self._active = np.arange(len(images))

    def run(self) -> FloatArray:
        """Decode all tokens; returns those to show, `[B, L, D]` float32."""
        steps = self._plan.schedule.steps
        if self._plan.mode == "draft":
            assert self._draft is not None
            self._alone(self._draft, steps)
        else:
            assert self._target is not None
            self._alone(self._target, steps if self._plan.mode == "target" else self._plan.prefill)
            self._retire()
            if self._draft is not None and len(self._active):
                calls = self._draft.backbone.catch_up(self._fed[self._active], self._step[self._active])
                self._counters.draft_backbone_calls += calls * len(self._active)
            while len(self._active):
                self._round(self._target)
                self._retire()
        return self._shown

    # --- one model alone ---------------------------------------------------------------------------

    def _alone(self, model: Model, steps: int) -> None:
        """Make the tokens of so many AR steps of every image without speculation."""
        plan, batch = self._plan, len(self._images)
        evaluate = plan.evaluate if model is self._draft else None
        for _ in range(steps):
            span = self._span(1)
            z = model.backbone.condition(self._fed, span)
            noise = self._chain_noise(self._images[span.owner], span.place)
            drawn = model.head.sample(z, plan.guidance_at(span.ar_step), noise.start, noise.steps, evaluate=evaluate)
            if model is self._draft:
                self._counters.draft_backbone_calls += batch
            else:
                self._counters.target_backbone_calls += batch
            self._counters.sequential_head_calls += batch * self._head_calls(evaluate)
            self._store(span, slice(None), drawn.path[:, -1], drawn.mean[:, -1])
            self._step += 1
            self._tell(len(span.owner))

    # --- a round -----------------------------------------------------------------------------------

    def _round(self, target: Model) -> None:
        """Draft the next AR steps of each active image, verify them, commit what stands.

        The sets of tokens before the first one with a rejection are kept; that set is committed with its
        rejected tokens redrawn; what was drafted after it is dropped.
        """
        plan, active = self._plan, self._active
        left = plan.schedule.steps - self._step[active]
        span = self._span(min(plan.draft_length, int(left.max())))
        image = self._images[active[span.owner]]
        noise = self._chain_noise(image, span.place)
        guidance = plan.guidance_at(span.ar_step)
        proposal, z = self._propose_and_condition(target, span, noise, guidance)
        judgement = self._judge(target, z, guidance, proposal, image, span.place)

        accepted = judgement.accepted
        drafted = np.minimum(span.length, left)
        kept = drafted.copy()  # [A] AR steps before the first with a rejection
        np.minimum.at(kept, span.owner[~accepted], span.offset[~accepted])
        taken = span.offset <= kept[span.owner]
        rows = np.flatnonzero(taken & ~accepted)
        taken &= accepted
        self._store(span, taken, proposal.token[taken], judgement.mean[taken])
        if len(rows):
            made = self._complete(target, z, guidance, proposal, judgement, rows, image[rows], span.place[rows])
            self._store(span, rows, made.token, made.mean)
            longest = np.zeros(len(active), np.int64)
            np.maximum.at(longest, span.owner[rows], made.head_calls)
            self._counters.sequential_head_calls += int(longest.sum())
        self._step[active] += np.minimum(kept + 1, drafted)
        self._count_round(drafted, len(span.owner), accepted=int(taken.sum()), rejected=len(rows))
        self._tell(int(taken.sum()) + len(rows))

    def _count_round(self, steps: IntArray, drafted: int, *, accepted: int, rejected: int) -> None:
        """Count a round of A images that drafted `steps [A]` AR steps each, `drafted` tokens in all."""
        plan, counters = self._plan, self._counters
        aligned = self._head_calls(None) if plan.mode == "paper" else 0  # all rows in one batch
        counters.rounds += len(steps)
        counters.committed += accepted + rejected
        counters.drafted += drafted
        counters.accepted += accepted
        counters.rejected += rejected
        counters.target_backbone_calls += len(steps)
        counters.draft_backbone_calls += 0 if plan.draft is None else int(steps.sum())
        counters.sequential_head_calls += int(steps.sum()) * self._head_calls(plan.evaluate) + len(steps) * aligned

    def _head_calls(self, evaluate: BoolArray | None) -> int:
        """Sequential calls that a chain takes."""
        return self._head.chain.length if evaluate is None else int(evaluate.sum())

    def _propose_and_condition(
        self, target: Model, span: Span, noise: ChainNoise, guidance: FloatArray
    ) -> tuple[Proposal, FloatArray]:
        """The round's drafts, and the target's conditions `z [G, R, Z]` for them: one backbone call."""
        plan, tokens = self._plan, self._fed[self._active]
        if self._draft is not None:
            proposal = propose(self._draft, tokens, span, noise, guidance, plan.evaluate)
            return proposal, target.backbone.condition(tokens, span).copy()
        # The target's own head drafts: a round is one AR step.
        z = target.backbone.condition(tokens, span).copy()
        drawn = target.head.sample(z, guidance, noise.start, noise.steps, evaluate=plan.evaluate)
        return Proposal(noise, drawn), z

    def _judge(
        self, target: Model, z: FloatArray, guidance: FloatArray, proposal: Proposal, image: IntArray, place: IntArray
    ) -> ExactJudgement | PaperJudgement:
        if self._plan.mode == "exact":
            uniform = self._noise.uniform(image, place, Purpose.ACCEPTANCE, target.head.chain.length + 1)
            return judge_exact(target.head, z, guidance, proposal, uniform)
        uniform = self._noise.uniform(image, place, Purpose.ACCEPTANCE, 1)
        return judge_paper(target.head, z, guidance, proposal, uniform[:, 0], self._plan.tau)

    def _complete(
        self,
        target: Model,
        z: FloatArray,
        guidance: FloatArray,
        proposal: Proposal,
        judgement: ExactJudgement | PaperJudgement,
        rows: IntArray,
        image: IntArray,
        place: IntArray,
    ) -> Completion:
        n, dim = target.head.chain.length, target.head.token_dim
        if isinstance(judgement, PaperJudgement):
            normal = self._noise.normal(image, place, Purpose.RESIDUAL, PAPER_TRIES, dim)
            uniform = self._noise.uniform(image, place, Purpose.RESIDUAL, PAPER_TRIES)
            return complete_paper(target.head, judgement, rows, normal, uniform)
        return complete_exact(
            target.head,
            z,
            guidance,
            proposal,
            judgement,
            rows,
            coordinate=self._noise.uniform(image, place, Purpose.RESIDUAL, 1)[:, 0],
            direction=self._noise.normal(image, place, Purpose.RESIDUAL, 1, dim)[:, 0],
            fresh=self._noise.normal(image, place, Purpose.COMPLETION, n, dim),
        )

    # --- the batch's state -------------------------------------------------------------------------

    def _draw_order(self) -> IntArray:
        plan, images = self._plan, self._images
        if not plan.random_order:
            return np.tile(np.arange(plan.tokens), (len(images), 1))
        uniform = self._noise.uniform(images, np.zeros_like(images), Purpose.ORDER, plan.tokens)
        return np.argsort(uniform, axis=1, kind="stable")

    def _span(self, length: int) -> Span:
        """The next AR steps of the active images."""
        return Span.of(self.order[self._active], self._plan.schedule.known, self._step[self._active], length)

    def _store(self, span: Span, rows: BoolArray | IntArray | slice, token: FloatArray, mean: FloatArray) -> None:
        image, place = self._active[span.owner[rows]], span.place[rows]
        self._fed[image, place] = token
        self._shown[image, place] = mean if self._plan.emit_mean else token

    def _retire(self) -> None:
        """Drop finished images from the batch, so that none idles in it."""
        going = self._step[self._active] < self._plan.schedule.steps
        if going.all():
            return
        rows = np.flatnonzero(going)
        self._active = self._active[rows]
        for model in (self._target, self._draft):
            if model is not None and len(rows):
                model.backbone.select(rows)

    def _chain_noise(self, image: IntArray, place: IntArray) -> ChainNoise:
        return ChainNoise.of(
            self._noise.normal(image, place, Purpose.CHAIN, self._head.chain.length + 1, self._head.token_dim)
        )
