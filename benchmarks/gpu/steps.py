"""Latency of the steps of decoding on one backend, through the runtime's own `Steps`.

The batch stands in the middle of its images, each image with the same number of tokens; tokens and noise are
random, so figures are those of the shapes, whatever a model has learned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from specdec_rt.decode.draft import ChainNoise
from specdec_rt.decode.loop import Session

from benchmarks.gpu.timing import Clock, TimedDevice
from specdec_rt import DecodeOptions, Pipeline
from specdec_rt.backends.base import Backend
from specdec_rt.bundle import Bundle
from specdec_rt.decode import redraft
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import FloatArray, IntArray

__all__ = ["STEPS", "Stage", "measure_steps", "timed_pipeline"]

STEPS = ("target", "draft", "verify", "redraft", "completion")
MAR_AR_STEPS = 64
DRAFT_LENGTH = 4
SEED = 0


def timed_pipeline(bundle: Bundle, backend: Backend) -> tuple[Pipeline, TimedDevice]:
    """The bundle on the backend, whose recorded steps are timed."""
    device = TimedDevice(backend.device)
    # Every backend is a dataclass that makes its engines on the device it is given.
    return Pipeline(bundle, cast("Backend", replace(cast("Any", backend), device=device))), device


def measure_steps(
    pipeline: Pipeline, device: TimedDevice, batches: Sequence[int], clock: Clock
) -> Iterator[dict[str, Any]]:
    """A record for each batch size and step, as it is measured.

    "launch" is the step on the device; "call" is all that the runtime does for it, staging and reading included
    (of draft and verification together: they are one call).
    """
    session = pipeline.session(_options(pipeline.bundle))
    for batch in batches:
        stage = Stage.set(session, pipeline.bundle, batch)
        shared = {"batch": batch, "draft_length": stage.span.length, "draft": session.plan.draft or "self"}
        single = clock.launches(device, stage.single, ["target"])
        yield {**shared, "step": "target", **stage.counts(stage.first), **_launch(single, "target"), **_call(single)}
        both = clock.launches(device, stage.round, ["draft", "verify"])
        for step in ("draft", "verify"):
            yield {**shared, "step": step, **stage.counts(stage.span), **_launch(both, step), **_call(both)}
        counts = {"rows": len(stage.rejected), "chain": stage.left}
        if session.plan.grid is not None and stage.left >= redraft.LEAST:  # else chains are too short for it
            again = clock.launches(device, stage.redraft, ["redraft"])
            yield {**shared, "step": "redraft", **counts, **_launch(again, "redraft"), **_call(again)}
        rest = clock.launches(device, stage.complete, ["completion"])
        yield {**shared, "step": "completion", **counts, **_launch(rest, "completion"), **_call(rest)}


def _launch(found: dict[str, Any], name: str) -> dict[str, Any]:
    return {"launch": found[name]}


def _call(found: dict[str, Any]) -> dict[str, Any]:
    return {"call": found["call"]}


def _options(bundle: Bundle) -> DecodeOptions:
    """Exact speculation with guidance."""
    mar = bundle.manifest.family == "mar"
    own_head = bundle.manifest.defaults.draft == "self"
    return DecodeOptions(
        mode="exact",
        draft_length=None if own_head else DRAFT_LENGTH,
        ar_steps=min(MAR_AR_STEPS, bundle.manifest.tokens) if mar else None,
    )


@dataclass(frozen=True)
class Stage:
    """A batch halfway through its images, and what its next steps are given."""

    session: Session
    tokens: FloatArray
    """`[A, L, D]`"""
    first: PositionBatch
    """the next AR step"""
    span: PositionBatch
    """the next γ"""
    normals: FloatArray
    """`[R, n + 1, D]` of the span's rows"""

    @classmethod
    def set(cls, session: Session, bundle: Bundle, batch: int) -> "Stage":
        """Begin a batch of as many lanes as the device takes for it."""
        rng = np.random.default_rng(SEED)
        manifest, plan, steps = bundle.manifest, session.plan, session.steps
        lanes = steps.device.batch_bucket(batch)
        for model in steps.models:
            model.backbone.begin(np.arange(lanes) % manifest.classes)
        order = np.tile(np.arange(manifest.tokens), (lanes, 1))
        if plan.random_order:
            order = rng.permuted(order, axis=1)
        step = np.full(lanes, plan.schedule.steps // 2)
        span = PositionBatch.of(order, plan.schedule.known, step, plan.draft_length)
        tokens = rng.standard_normal((lanes, manifest.tokens, manifest.token_dim), np.float32)
        length = session.lead.head.chain.length
        normals = rng.standard_normal((len(span.owner), length + 1, manifest.token_dim), np.float32)
        return cls(session, tokens, span.at(0), span, normals)

    @property
    def rejected(self) -> IntArray:
        """Rows that are completed: of each image one AR step, the first."""
        return np.flatnonzero(self.span.offset == 0)

    @property
    def left(self) -> int:
        """Transitions that a completion makes: the later half of the chain."""
        return self.session.target.head.chain.length - self._begin

    @property
    def _begin(self) -> int:
        return self.session.target.head.chain.length // 2

    def counts(self, span: PositionBatch) -> dict[str, int]:
        """How much work a step over `span` is."""
        return {"rows": len(span.owner), "chain": self.session.target.head.chain.length}

    def single(self) -> None:
        """The target makes the tokens of one AR step: backbone and a whole chain."""
        rows, plan = len(self.first.owner), self.session.plan
        noise, guidance = ChainNoise.of(self.normals[:rows]), plan.guidance_at(self.first.ar_step)
        self.session.steps.single(self.session.target, self.tokens, self.first, noise, guidance)

    def round(self) -> None:
        """The draft proposes γ AR steps, the target judges them."""
        guidance = self.session.plan.guidance_at(self.span.ar_step)
        self.session.steps.round(self.tokens, self.span, ChainNoise.of(self.normals), guidance)

    def redraft(self) -> None:
        """The target drafts and judges what `complete` makes step by step."""
        self.session.steps.redraft(*self._rest())

    def complete(self) -> None:
        """The target redraws one AR step of each image from halfway down the chain."""
        self.session.steps.complete(*self._rest())

    def _rest(self) -> tuple[IntArray, FloatArray, FloatArray, FloatArray, IntArray]:
        rows = self.rejected
        guidance = self.session.plan.guidance_at(self.span.ar_step[rows])
        start, noise = self.normals[rows, 0], self.normals[rows, 1:]
        return rows, guidance, start, noise, np.full(len(rows), self._begin)
