"""Decoding a request: rounds of draft, verification and commitment, every image at its own pace."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from specdec_rt.decode.batch import Batch
from specdec_rt.decode.draft_length import DraftLengthController, RoundRecord
from specdec_rt.decode.model import Model
from specdec_rt.decode.session import Session, Speculation
from specdec_rt.decode.stats import Counters
from specdec_rt.decode.verifier import Verdict, Verifier
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.noise import Draws
from specdec_rt.plan import Plan
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["Decoder", "DecodingSetup"]


@dataclass(frozen=True)
class DecodingSetup:
    """All that decodes a request with certain options, but the request itself."""

    plan: Plan
    session: Session
    verifier: Verifier | None
    """None in modes `target` and `draft`, where nothing is judged"""
    controller: DraftLengthController | None = None
    """what chooses draft lengths; None: the plan's is taken"""

    @property
    def target(self) -> Model:
        """The target, which there is in every mode but `draft`."""
        assert self.session.target is not None
        return self.session.target


class Decoder:
    """Makes the images of a request, `slots` of them at a time (default: all).

    `labels [B]` are the images' classes, `images [B]` the keys of their noise. `progress` is called with the number of
    tokens whenever some are final.
    """

    def __init__(
        self,
        setup: DecodingSetup,
        draws: Draws,
        labels: IntArray,
        images: IntArray,
        counters: Counters,
        progress: Callable[[int], None],
        *,
        slots: int | None = None,
    ) -> None:
        self._plan, self._session, self._verifier = setup.plan, setup.session, setup.verifier
        self._controller = setup.controller
        self._clock = time.perf_counter if setup.controller is None else setup.controller.clock
        self._counters, self._progress = counters, progress
        self._chain_length = setup.session.primary_model.head.chain.length
        self.batch = Batch(setup.session, setup.plan, draws, labels, images, len(images) if slots is None else slots)
        self._draft_is_behind = False
        """whether the target made tokens alone that the draft has not taken in"""

    def run(self) -> FloatArray:
        """Make all tokens; returns those to show, `[B, L, D]` float32."""
        while self.batch.waiting:
            self.batch.admit()
            if self._controller is not None:
                self._controller.begin_batch(len(self.batch))
            self._decode_batch()
        return self.batch.shown

    def _decode_batch(self) -> None:
        """Make all tokens of the images that have slots, and of those that take their places."""
        plan, batch = self._plan, self.batch
        if plan.mode in ("target", "draft"):
            for _ in range(plan.schedule.steps):
                self._ar_step(self._session.primary_model)
            return
        for _ in range(plan.prefill):
            self._ar_step(self._session.primary_model)
        batch.compact()
        self._catch_up(plan.prefill)
        while batch.under_way.any():
            if self._controller is None:
                self._round(plan.draft_length)
            else:
                self._controlled_round(self._controller)
            if not plan.prefill:  # images go through their prefill together
                batch.backfill()
            batch.compact()

    # --- without speculation ----------------------------------------------------------------------------

    def _ar_step(self, model: Model) -> None:
        """The next AR step of each image by one model alone."""
        batch, counters, drafting = self.batch, self._counters, model is self._session.draft
        under_way = batch.under_way
        images, positions = int(under_way.sum()), batch.next_positions(1)
        guidance = self._plan.guidance_at(positions.ar_step)
        drawn = self._session.draw(model, batch.tokens, positions, batch.normals(positions), guidance)
        counters.draft_backbone_calls += images if drafting else 0
        counters.target_backbone_calls += 0 if drafting else images
        counters.sequential_head_calls += images * self._head_calls(drafting=drafting)
        batch.store(positions, np.arange(len(positions.position)), drawn.token, drawn.mean[:, -1])
        batch.ar_step[under_way] += 1
        self._progress(len(positions.position))

    def _catch_up(self, ar_steps: int) -> None:
        """Let the draft take in what the target made alone of the first AR steps."""
        batch, self._draft_is_behind = self.batch, False
        if self._session.draft is None or not batch.under_way.any():
            return
        calls = self._session.catch_up(batch.order, self._plan.schedule.known, batch.tokens, ar_steps)
        self._counters.draft_backbone_calls += calls * int(batch.under_way.sum())

    # --- a round ----------------------------------------------------------------------------------------

    def _controlled_round(self, controller: DraftLengthController) -> None:
        """A round of the length that the controller chooses; at length 0 an AR step by the target alone."""
        batch, steps = self.batch, self._plan.schedule.steps
        ar_step = batch.ar_step[batch.under_way]
        waiting = 0 if self._plan.prefill else batch.waiting
        length = controller.choose(ar_step, len(batch), waiting, draft_is_behind=self._draft_is_behind)
        started = controller.clock()
        if length and self._draft_is_behind:
            # Some images are fed more than they have: it stands past their last token, and is overwritten before it is
            # read. So few lengths will do where each has to be captured.
            self._catch_up(self._session.device.bucketed(int(ar_step.max()), steps))
        caught_up = controller.clock()
        accepted, rejected, completion = 0, 0, 0.0
        if length:
            accepted, rejected, completion = self._round(length)
        else:
            self._ar_step(self._session.primary_model)
            self._counters.draft_lengths[0] += len(ar_step)
            self._draft_is_behind = self._session.draft is not None
        seconds = controller.clock() - caught_up - completion
        controller.observe(RoundRecord(length, seconds, completion, caught_up - started, accepted, rejected))

    def _round(self, length: int) -> tuple[int, int, float]:
        """Draft up to `length` AR steps of each image, verify them, commit what stands.

        The sets of tokens before the first one with a rejection are kept; that set is committed with its rejected
        tokens redrawn; what was drafted after it is dropped. Returns how many tokens were accepted and rejected, and
        the seconds that redrawing took. Dropped tokens are not counted: their noise is used again.
        """
        plan, batch = self._plan, self.batch
        assert self._verifier is not None
        left = plan.schedule.steps - batch.ar_step  # [A]
        positions = batch.next_positions(min(length, int(left.max())))
        normals, token_noise = batch.normals(positions), batch.noise(positions)
        guidance = plan.guidance_at(positions.ar_step)
        speculation = self._session.speculate(batch.tokens, positions, normals, guidance)
        verdict: Verdict = self._verifier.judge(speculation, normals[:, 1:], token_noise)

        drafted = np.minimum(positions.length, left)
        kept, taken, rejected = _first_rejections(positions, verdict.accepted, drafted)
        batch.store(positions, taken, speculation.drawn.token[taken], verdict.mean[taken])
        started, head_calls = self._clock(), 0
        if len(rejected):
            picked = token_noise.pick(rejected)
            made = self._verifier.complete(verdict, rejected, guidance[:, rejected], picked)
            batch.store(positions, rejected, made.token, made.mean)
            longest = np.zeros(len(batch), np.int64)
            np.maximum.at(longest, positions.image_index[rejected], made.head_calls)
            head_calls = int(longest.sum())
        completion_seconds = self._clock() - started if len(rejected) else 0.0
        accepted = int(taken.sum())
        self._count(drafted[batch.under_way], speculation, accepted, len(rejected), head_calls)
        batch.ar_step += np.minimum(kept + 1, drafted)
        self._progress(accepted + len(rejected))
        return accepted, len(rejected), completion_seconds

    # --- figures ----------------------------------------------------------------------------------------

    def _count(self, steps: IntArray, speculation: Speculation, accepted: int, rejected: int, head_calls: int) -> None:
        """Count a round of some images that drafted `steps` AR steps each."""
        counters, paper = self._counters, self._plan.mode == "paper"
        counters.rounds += len(steps)
        counters.draft_lengths.update(steps.tolist())
        counters.committed += accepted + rejected
        counters.drafted += len(speculation.drawn.path)
        counters.accepted += accepted
        counters.rejected += rejected
        counters.target_backbone_calls += len(steps)
        counters.draft_backbone_calls += 0 if self._session.draft is None else int(steps.sum())
        counters.sequential_head_calls += int(steps.sum()) * self._head_calls(drafting=True) + head_calls
        # In `paper` mode the target runs the chains of all rows side by side.
        counters.sequential_head_calls += len(steps) * self._chain_length if paper else 0

    def _head_calls(self, *, drafting: bool) -> int:
        """Sequential calls that a chain takes."""
        step_mask = self._plan.draft_step_mask if drafting else None
        return self._chain_length if step_mask is None else int(step_mask.sum())


def _first_rejections(
    positions: PositionBatch, accepted: BoolArray, drafted: IntArray
) -> tuple[IntArray, BoolArray, IntArray]:
    """The AR steps `[A]` kept before an image's first rejection, the rows `[R]` taken as they are, those to redraw.

    `accepted [R]`, `drafted [A]` AR steps.
    """
    kept = drafted.copy()
    np.minimum.at(kept, positions.image_index[~accepted], positions.offset[~accepted])
    reached = positions.offset <= kept[positions.image_index]
    return kept, reached & accepted, np.flatnonzero(reached & ~accepted)
