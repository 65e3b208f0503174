"""Decoding a request: rounds of draft, verification and commitment, every image at its own pace."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from specdec_rt.decode.batch import Batch
from specdec_rt.decode.draft_length import DraftLengthController, RoundRecord
from specdec_rt.decode.model import Model
from specdec_rt.decode.round import Verdict, Verifier
from specdec_rt.decode.session import Session
from specdec_rt.decode.stats import Counters
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
        self.batch = Batch(setup.session, setup.plan, draws, labels, images, len(images) if slots is None else slots)
        chain_length, mask = setup.session.primary_model.head.chain.length, setup.plan.draft_step_mask
        self._target_calls, self._draft_calls = chain_length, chain_length if mask is None else int(mask.sum())
        """sequential head calls of a chain"""
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
        for _ in range(plan.schedule.steps if self._verifier is None else plan.prefill):
            self._ar_step(self._session.primary_model)
        self._catch_up(plan.prefill)
        while batch.under_way.any():
            if self._controller is None:
                self._round(plan.draft_length)
            else:
                self._controlled_round(self._controller)
            if not plan.prefill:  # the images of a batch go through their prefill together, so none may join later
                batch.backfill()
            batch.compact()

    # --- without speculation ----------------------------------------------------------------------------

    def _ar_step(self, model: Model) -> RoundRecord:
        """The next AR step of each image by one model alone."""
        batch, counters, started = self.batch, self._counters, self._clock()
        under_way, rows = batch.under_way, batch.next_rows(1)
        images = int(under_way.sum())
        drawn = self._session.draw(model, rows)
        if model is self._session.draft:
            counters.draft_backbone_calls += images
            counters.sequential_head_calls += images * self._draft_calls
        else:
            counters.target_backbone_calls += images
            counters.sequential_head_calls += images * self._target_calls
        batch.store(rows.positions, np.arange(len(drawn.path)), drawn.token, drawn.mean[:, -1])
        batch.ar_step[under_way] += 1
        self._progress(len(drawn.path))
        return RoundRecord(0, self._clock() - started)

    def _catch_up(self, ar_steps: int) -> None:
        """Let the draft take in what the target made alone of the first AR steps."""
        batch, self._draft_is_behind = self.batch, False
        if self._session.draft is not None and batch.under_way.any():
            backbone, known = self._session.draft.backbone, self._plan.schedule.known
            calls = backbone.catch_up(batch.order, known, batch.tokens, ar_steps)
            self._counters.draft_backbone_calls += calls * int(batch.under_way.sum())

    # --- a round ----------------------------------------------------------------------------------------

    def _controlled_round(self, controller: DraftLengthController) -> None:
        """A round of the length that the controller chooses; at length 0 an AR step by the target alone."""
        batch, ar_step = self.batch, self.batch.ar_step[self.batch.under_way]
        waiting = 0 if self._plan.prefill else batch.waiting
        length = controller.choose(ar_step, len(batch), waiting, draft_is_behind=self._draft_is_behind)
        caught_up = 0.0
        if length and self._draft_is_behind:
            started = self._clock()
            # Rounded up, so that few lengths are captured. What images are fed past their last token is overwritten
            # before it is read.
            self._catch_up(self._session.device.bucketed(int(ar_step.max()), self._plan.schedule.steps))
            caught_up = self._clock() - started
        if length:
            record = self._round(length)
        else:
            record = self._ar_step(self._session.primary_model)
            self._counters.draft_lengths[0] += len(ar_step)
            self._draft_is_behind = self._session.draft is not None
        controller.observe(replace(record, catch_up_seconds=caught_up))

    def _round(self, length: int) -> RoundRecord:
        """Draft up to `length` AR steps of each image, verify them, commit what stands.

        The sets of tokens before the first one with a rejection are kept; that set is committed with its rejected
        tokens redrawn; what was drafted after it is dropped. The record does not count dropped tokens: their noise is
        used again.
        """
        batch, started = self.batch, self._clock()
        assert self._verifier is not None
        left = self._plan.schedule.steps - batch.ar_step  # [A]
        rows = batch.next_rows(min(length, int(left.max())))
        positions, token_noise = rows.positions, batch.noise(rows.positions)
        speculation = self._session.speculate(rows)
        verdict: Verdict = self._verifier.judge(speculation, rows.normals[:, 1:], token_noise)

        drafted = np.minimum(positions.length, left)
        kept, taken, rejected = _first_rejections(positions, verdict.accepted, drafted)
        batch.store(positions, taken, speculation.drawn.token[taken], verdict.mean[taken])
        judged, head_calls = self._clock(), np.zeros(len(batch), np.int64)
        if len(rejected):
            guidance, picked = rows.guidance[:, rejected], token_noise.pick(rejected)
            made = self._verifier.complete(verdict, rejected, guidance, picked)
            batch.store(positions, rejected, made.token, made.mean)
            np.maximum.at(head_calls, positions.image_index[rejected], made.head_calls)
        completion = self._clock() - judged if len(rejected) else 0.0
        self._counters.sequential_head_calls += int(head_calls.sum())
        accepted = int(taken.sum())
        self._count(drafted[batch.under_way], len(taken), accepted, len(rejected))
        batch.ar_step += np.minimum(kept + 1, drafted)
        self._progress(accepted + len(rejected))
        seconds = self._clock() - started - completion
        return RoundRecord(length, seconds, completion, accepted=accepted, rejected=len(rejected))

    def _count(self, steps: IntArray, drafted: int, accepted: int, rejected: int) -> None:
        """Count a round of some images that drafted `steps` AR steps each, `drafted` tokens in all."""
        counters, ar_steps = self._counters, int(steps.sum())
        counters.rounds += len(steps)
        counters.draft_lengths.update(steps.tolist())
        counters.drafted += drafted
        counters.accepted += accepted
        counters.rejected += rejected
        counters.target_backbone_calls += len(steps)
        counters.draft_backbone_calls += ar_steps if self._session.draft is not None else 0
        counters.sequential_head_calls += ar_steps * self._draft_calls
        if self._plan.mode == "paper":  # the target runs the chains of all rows side by side
            counters.sequential_head_calls += len(steps) * self._target_calls


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
