"""Latency of the steps of decoding on one backend: the launches of the runtime's own `Session`.

The batch stands in the middle of its images, each image with the same number of tokens. Tokens and noise are random, so
figures are those of the shapes, whatever a model has learned.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from benchmarks.gpu.timing import Clock, TimedDevice
from specdec_rt import DecodeOptions, Pipeline
from specdec_rt.backends.base import Backend
from specdec_rt.bundle import Bundle
from specdec_rt.decode.decoder import DecodingSetup
from specdec_rt.decode.round import ChainSuffixes, RowInputs
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.plan import Tuning
from specdec_rt.types import FloatArray

__all__ = ["STEPS", "HalfwayBatch", "measure_steps", "timed_pipeline"]

STEPS = ("target", "draft", "verify", "resume", "finish")
MAR_AR_STEPS = 64
DRAFT_LENGTH = 4
SEED = 0


def timed_pipeline(bundle: Bundle, backend: Backend, tuning: Tuning | None = None) -> tuple[Pipeline, TimedDevice]:
    """The bundle on the backend, whose launches are timed."""
    device = TimedDevice(backend.device)
    # Every backend is a dataclass that makes its engines on the device it is given.
    timed = cast("Backend", replace(cast("Any", backend), device=device))
    return Pipeline(bundle, timed, tuning=tuning), device


def measure_steps(
    pipeline: Pipeline, device: TimedDevice, batches: Sequence[int], clock: Clock
) -> Iterator[dict[str, Any]]:
    """A record for each batch size and step, as it is measured.

    "launch" is the step on the device. "call" is all that the runtime does for it, with the host's work before and
    after the launch; for draft and verification it is one figure, because they are one call.
    """
    setup = pipeline.setup(_options(pipeline.bundle))
    for batch in batches:
        halfway = HalfwayBatch.begin(setup, pipeline.bundle, batch)
        shared = {"batch": batch, "draft_length": halfway.positions.length, "draft": setup.plan.draft or "self"}
        for step, (call, launches) in halfway.steps().items():
            found = clock.launches(device, call, launches)
            for launch in launches:
                record = {"step": launch, **halfway.size_of(step), "launch": found[launch], "call": found["call"]}
                yield {**shared, **record}


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
class HalfwayBatch:
    """A batch halfway through its images, and what its next steps are given."""

    setup: DecodingSetup
    tokens: FloatArray
    """`[A, L, D]`"""
    next_step: PositionBatch
    """the next AR step"""
    positions: PositionBatch
    """the next γ AR steps"""
    normals: FloatArray
    """`[R, n + 1, D]` noise of the rows of `positions`"""

    @classmethod
    def begin(cls, setup: DecodingSetup, bundle: Bundle, batch: int) -> "HalfwayBatch":
        """Begin a batch of as many slots as the device takes for it."""
        rng = np.random.default_rng(SEED)
        manifest, plan, session = bundle.manifest, setup.plan, setup.session
        slots = session.device.batch_bucket(batch)
        for model in session.models:
            model.backbone.begin(np.arange(slots) % manifest.classes)
        order = np.tile(np.arange(manifest.tokens), (slots, 1))
        if plan.random_order:
            order = rng.permuted(order, axis=1)
        first_step = np.full(slots, plan.schedule.steps // 2)
        positions = PositionBatch.of(order, plan.schedule.known, first_step, plan.draft_length)
        tokens = rng.standard_normal((slots, manifest.tokens, manifest.token_dim), np.float32)
        length = setup.target.head.chain.length
        normals = rng.standard_normal((len(positions.position), length + 1, manifest.token_dim), np.float32)
        return cls(setup, tokens, positions.at(0), positions, normals)

    def steps(self) -> dict[str, tuple[Callable[[], object], tuple[str, ...]]]:
        """The runtime's calls by what they do, and the names of the launches that each makes."""
        plan, suffixes = self.setup.plan, self.suffixes
        left = self.chain - int(suffixes.begin[0])
        resumes = (
            plan.resume_step_mask is not None and left >= plan.min_resume_steps
        )  # else chains are too short for it
        session = self.setup.session
        return {
            "draw": (self.draw, ("target",)),
            "speculate": (self.speculate, ("draft", "verify")),
            **({"resume": (lambda: session.resume(suffixes), ("resume",))} if resumes else {}),
            "finish": (lambda: session.finish(suffixes), ("finish",)),
        }

    def size_of(self, step: str) -> dict[str, int]:
        """How many tokens a call is for, and how many transitions of each."""
        if step in ("resume", "finish"):
            return {"rows": len(self.suffixes.rows), "chain": self.chain - int(self.suffixes.begin[0])}
        positions = self.next_step if step == "draw" else self.positions
        return {"rows": len(positions.position), "chain": self.chain}

    def draw(self) -> None:
        """The target makes the tokens of one AR step: backbone and a whole chain."""
        self.setup.session.draw(self.setup.target, self._inputs(self.next_step))

    def speculate(self) -> None:
        """The draft proposes γ AR steps, the target judges them."""
        self.setup.session.speculate(self._inputs(self.positions))

    def _inputs(self, positions: PositionBatch) -> RowInputs:
        """What a launch for these positions is given. Their rows are the first ones of the noise."""
        guidance = self.setup.plan.guidance_at(positions.ar_step)
        return RowInputs(positions, self.tokens, self.normals[: len(positions.position)], guidance)

    @property
    def chain(self) -> int:
        """n, transitions of a whole chain."""
        return self.setup.target.head.chain.length

    @property
    def suffixes(self) -> ChainSuffixes:
        """The later halves of the chains of each image's next AR step, to be resumed or finished."""
        rows = np.flatnonzero(self.positions.offset == 0)
        guidance, normals = self.setup.plan.guidance_at(self.positions.ar_step[rows]), self.normals[rows]
        return ChainSuffixes(rows, guidance, normals[:, 0], np.full(len(rows), self.chain // 2), normals[:, 1:])
