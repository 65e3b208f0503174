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
from specdec_rt.noise import NoiseSource, Purpose
from specdec_rt.schedule import guidance_weights
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["Decoder", "Plan", "Session"]

PAPER_TRIES = 64
"""Proposals for one residual of `paper` mode, drawn as one batch."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request's options, resolved against its bundle."""

    mode: Mode
    tokens: int
    """L"""
    prefill: int
    """tokens that the target makes alone"""
    draft_length: int
    evaluate: BoolArray | None
    """`[n]` the steps at which the draft calls its head; None: all"""
    draft: str | None
    """the draft model's name; None in `target` mode, and where the target's own head drafts its chain"""
    tau: float
    guidance: float
    guidance_schedule: GuidanceSchedule
    emit_mean: bool

    @property
    def slots(self) -> int:
        """Cache places that a backbone needs: a last round may draft past the end."""
        return self.tokens + self.draft_length - 1

    def guidance_at(self, position: IntArray) -> FloatArray:
        """Weights `[G, R]` of the guidance branches for the tokens at `position [R]`."""
        return guidance_weights(position, tokens=self.tokens, scale=self.guidance, schedule=self.guidance_schedule)


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
        noise: NoiseSource,
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
        self._fed = np.zeros((len(images), plan.tokens, lead.head.token_dim), np.float32)
        self._shown = np.zeros_like(self._fed)
        self._position = np.zeros(len(images), np.int64)
        self._active = np.arange(len(images))

    def run(self) -> FloatArray:
        """Decode all tokens; returns those to show, `[B, L, D]` float32."""
        if self._plan.mode == "draft":
            assert self._draft is not None
            self._alone(self._draft, self._plan.tokens)
        else:
            assert self._target is not None
            self._alone(self._target, self._plan.tokens if self._plan.mode == "target" else self._plan.prefill)
            self._retire()
            if self._draft is not None and self._plan.prefill and len(self._active):
                self._catch_up(self._draft)
            while len(self._active):
                self._round(self._target)
                self._retire()
        return self._shown

    # --- one model alone ---------------------------------------------------------------------------

    def _alone(self, model: Model, count: int) -> None:
        """Make `count` tokens of every image without speculation."""
        plan = self._plan
        batch, n = len(self._images), model.head.chain.length
        evaluate = plan.evaluate if model is self._draft else None
        for _ in range(count):
            z = model.backbone.condition(self._previous()[:, None], self._position)[:, :, 0]
            noise = self._chain_noise(self._images, self._position)
            drawn = model.head.sample(z, plan.guidance_at(self._position), noise.start, noise.steps, evaluate=evaluate)
            if model is self._draft:
                self._counters.draft_backbone_calls += batch
            else:
                self._counters.target_backbone_calls += batch
            self._counters.sequential_head_calls += batch * (n if evaluate is None else int(evaluate.sum()))
            self._store(self._active, self._position, drawn.path[:, -1], drawn.mean[:, -1])
            self._position += 1
            self._tell(batch)

    def _catch_up(self, draft: Model) -> None:
        """Show the draft the prefilled tokens, all but the last, which the next round feeds."""
        count = self._plan.prefill
        before = np.concatenate([np.zeros_like(self._fed[:, :1]), self._fed[:, : count - 1]], axis=1)
        draft.backbone.condition(before, np.zeros(len(self._active), np.int64))
        self._counters.draft_backbone_calls += len(self._active)

    # --- a round -----------------------------------------------------------------------------------

    def _round(self, target: Model) -> None:
        """Draft γ tokens of each active image, verify them, commit what stands."""
        plan, active = self._plan, self._active
        position = self._position[active]
        left = plan.tokens - position
        length = min(plan.draft_length, int(left.max()))
        place = (position[:, None] + np.arange(length)).ravel()  # [R], image by image
        image = np.repeat(self._images[active], length)
        noise = self._chain_noise(image, place)
        guidance = plan.guidance_at(place)
        proposal, z = self._propose_and_condition(target, position, length, noise)
        judgement = self._judge(target, z, guidance, proposal, image, place)

        accepted = judgement.accepted.reshape(len(active), length)
        offset = np.arange(length)
        kept = np.minimum(np.cumprod(accepted, axis=1).sum(axis=1), left)
        taken = (offset < kept[:, None]).ravel()
        self._store(np.repeat(active, length)[taken], place[taken], proposal.token[taken], judgement.mean[taken])
        rejecting = np.flatnonzero(kept < np.minimum(length, left))
        rows = rejecting * length + kept[rejecting]
        if len(rows):
            made = self._complete(target, z, guidance, proposal, judgement, rows, image[rows], place[rows])
            self._store(active[rejecting], place[rows], made.token, made.mean)
            self._counters.sequential_head_calls += made.head_calls
        self._position[active] += kept
        self._position[active[rejecting]] += 1
        committed = int(kept.sum()) + len(rows)
        self._count_calls(len(active), int(np.minimum(length, left).sum()))
        self._counters.committed += committed
        self._counters.accepted += int(kept.sum())
        self._counters.rejected += len(rows)
        self._tell(committed)

    def _count_calls(self, images: int, drafted: int) -> None:
        """Count a round of so many images and drafts; drafts past an image's end, which companions cause, are none."""
        plan, counters, n = self._plan, self._counters, self._head.chain.length
        evaluations = n if plan.evaluate is None else int(plan.evaluate.sum())
        aligned = n if plan.mode == "paper" else 0
        counters.rounds += images
        counters.drafted += drafted
        counters.target_backbone_calls += images
        counters.draft_backbone_calls += 0 if plan.draft is None else drafted
        counters.sequential_head_calls += drafted * (evaluations + aligned)

    def _propose_and_condition(
        self, target: Model, position: IntArray, length: int, noise: ChainNoise
    ) -> tuple[Proposal, FloatArray]:
        """The round's drafts, and the target's conditions `z [G, R, Z]` for them: one backbone call."""
        plan, images = self._plan, len(position)
        previous = self._previous()
        if self._draft is None:  # the target's own head drafts: a round is one token
            z = target.backbone.condition(previous[:, None], position)[:, :, 0].copy()
            drawn = target.head.sample(z, plan.guidance_at(position), noise.start, noise.steps, evaluate=plan.evaluate)
            return Proposal(noise, drawn.path, drawn.mean), z
        proposal = propose(self._draft, previous, position, length, noise, plan.guidance_at, plan.evaluate)
        drafted = proposal.token.reshape(images, length, -1)
        context = np.concatenate([previous[:, None], drafted[:, :-1]], axis=1)
        z = target.backbone.condition(context, position)
        return proposal, z.reshape(z.shape[0], images * length, -1).copy()

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

    def _previous(self) -> FloatArray:
        """`[A, D]` the last committed token of each active image (at the start any value: the label stands there)."""
        return np.asarray(self._fed[self._active, self._position[self._active] - 1])

    def _store(self, image: IntArray, place: IntArray, token: FloatArray, mean: FloatArray) -> None:
        self._fed[image, place] = token
        self._shown[image, place] = mean if self._plan.emit_mean else token

    def _retire(self) -> None:
        """Drop finished images from the batch, so that none idles in it."""
        going = self._position[self._active] < self._plan.tokens
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
