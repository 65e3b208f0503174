"""What requests to a bundle would take here, at any acceptance: graphs are timed, and the host in two requests."""

from dataclasses import dataclass, replace

import numpy as np

from specdec_rt.bench.cost import Acceptance, CallCosts, HostCost, Prediction, Workload
from specdec_rt.bench.graph_times import GraphClock, GraphTimes
from specdec_rt.bench.simulation import DRAFT, simulate
from specdec_rt.bench.timing import profile
from specdec_rt.chain import compile_chain
from specdec_rt.config import AUTO, SELF_DRAFT, DecodeOptions
from specdec_rt.decode.stats import Stats
from specdec_rt.draft_steps import choose_draft_steps
from specdec_rt.errors import UsageError
from specdec_rt.pipeline import Pipeline

__all__ = ["Predictor"]

SEED = 1
CALIBRATED_STEPS = 8
"""AR steps of the requests that the host's share is taken from, where a request may have so few."""


class _Free:
    """`CallCosts` of nothing: rounds are only counted."""

    def backbone(self, model: str, contexts: int, size: int) -> float:  # noqa: ARG002  # the protocol's
        return 0.0

    def modulation(self, model: str, rows: int, steps: int) -> float:  # noqa: ARG002
        return 0.0

    def denoise_steps(self, model: str, rows: int, calls: int) -> float:  # noqa: ARG002
        return 0.0

    def path_means(self, rows: int, transitions: int) -> float:  # noqa: ARG002
        return 0.0


class Predictor:
    """Predicts batches of one bundle on one backend.

    `draft_share` stands for a draft that does not exist yet: its backbone takes this share of the target's time, and
    it drives the target's head. `host` is given where the host's share is not to be calibrated. `first` ends images
    after so many AR steps.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        draft_share: float | None = None,
        host: HostCost | None = None,
        first: int | None = None,
    ) -> None:
        self.pipeline = pipeline
        self._draft_share, self._given_host, self._first = draft_share, host, first
        self._times: dict[int, GraphTimes] = {}
        self._hosts: dict[tuple[str, int], HostCost] = {}

    def workload(self, options: DecodeOptions, batch: int) -> Workload:
        """How a request of one batch is decoded. Raises UsageError where the draft length is chosen on the way."""
        if options.draft_length == AUTO:
            raise UsageError("draft_length is 'auto'; a prediction is for one draft length: expected a whole number")
        manifest = self.pipeline.bundle.manifest
        hypothetical = self._draft_share is not None and options.mode == "exact"
        # A draft that does not exist is asked for as the target's own, then given the rounds of a model.
        asked = replace(options, draft=SELF_DRAFT, draft_length=None) if hypothetical else options
        setup = self.pipeline.setup(asked)
        plan, chain = setup.plan, setup.session.primary_model.head.chain
        if hypothetical:
            length = min(options.draft_length or manifest.defaults.draft_length, plan.schedule.steps)
            steps = options.draft_steps
            step_mask = None if steps is None else choose_draft_steps(chain, steps)
            plan = replace(plan, draft=DRAFT, draft_length=length, draft_step_mask=step_mask)
        model = manifest.drafts.get(plan.draft or "")
        return Workload(
            plan=plan,
            batch=batch,
            chain=chain.length,
            draft_head=plan.draft if plan.draft is not None and model is not None and model.head == "own" else "target",
            first=self._first,
            batch_bucket=self.pipeline.backend.device.batch_bucket,
        )

    def predict(self, options: DecodeOptions, batch: int, acceptance: Acceptance) -> Prediction:
        """What the batch takes, from its first to its last token."""
        work = self.workload(options, batch)
        return simulate(work, acceptance, self.times(work), self._given_host or self.host(work))

    def times(self, work: Workload) -> GraphTimes:
        """The times of calls with as many guidance branches as the workload has."""
        branches = 1 if work.plan.guidance == 1 else 2
        if branches not in self._times:
            pipeline, chain = self.pipeline, work.chain
            capacity = pipeline.setup(DecodeOptions(mode="target")).target.head.capacity
            self._times[branches] = GraphTimes(
                pipeline.bundle.manifest,
                GraphClock(pipeline, branches=branches, chain=chain, capacity=capacity),
                branches=branches,
                chain=chain,
                capacity=capacity,
                draft_share=self._draft_share,
            )
        return self._times[branches]

    def renew(self) -> None:
        """Forget the times of graphs, so that they are measured anew: a machine is not always as fast."""
        self._times.clear()

    def record(self) -> dict[str, object]:
        """What was measured, as plain values for JSON."""
        hosts = {f"{kind}, batch {batch}": host for (kind, batch), host in self._hosts.items()}
        return {
            "graph_seconds": {str(branches): times.record() for branches, times in self._times.items()},
            "host_seconds": {name: {"stage": host.stage, "token": host.token} for name, host in hosts.items()},
        }

    def host(self, work: Workload) -> HostCost:
        """The host's costs, from profiles of a request of one image and of one of as many; 0 where there are none.

        Requests are like the workload: the target alone, or rounds with its draft. A draft that does not exist is
        replaced by one that does.
        """
        manifest, plan = self.pipeline.bundle.manifest, work.plan
        rounds = plan.mode not in ("target", "draft") and compile_chain(manifest.chain).refusal() is None
        draft = SELF_DRAFT if plan.draft is None else plan.draft
        if plan.draft is not None and draft not in manifest.drafts:
            draft = next(iter(manifest.drafts), SELF_DRAFT)
        kind = draft if rounds else "alone"
        if (kind, work.batch) not in self._hosts:
            options = DecodeOptions(mode="exact", draft=draft) if rounds else DecodeOptions(mode="target")
            self._hosts[kind, work.batch] = self._calibrate(options, work.batch)
        return self._hosts[kind, work.batch]

    def _calibrate(self, options: DecodeOptions, batch: int) -> HostCost:
        manifest = self.pipeline.bundle.manifest
        if manifest.family == "mar":
            options = replace(options, ar_steps=min(CALIBRATED_STEPS, manifest.tokens))
        measured = []
        for images in sorted({1, batch}):
            found = profile(self.pipeline, _Request(options, images), seed=SEED)
            if found is None:
                return HostCost()
            where, stats = found
            counted = self._count(options, images, stats)
            measured.append((counted.stages, counted.tokens, where.host_seconds))
        return HostCost.of(measured)

    def _count(self, options: DecodeOptions, images: int, stats: Stats) -> Prediction:
        """Stages and tokens of a request that was made."""
        setup, free = self.pipeline.setup(options), _Free()
        chain = setup.session.primary_model.head.chain.length
        bucket = self.pipeline.backend.device.batch_bucket
        work = Workload(plan=setup.plan, batch=images, chain=chain, batch_bucket=bucket)
        costs: CallCosts = free
        return simulate(work, Acceptance(stats.acceptance_rate or 0.0), costs, HostCost())


@dataclass(frozen=True)
class _Request:
    options: DecodeOptions
    images: int

    def __call__(self, pipeline: Pipeline, seed: int) -> Stats:
        labels = np.arange(self.images) % pipeline.bundle.manifest.classes
        return pipeline.generate(labels, seed=seed, batch_size=self.images, options=self.options).stats
