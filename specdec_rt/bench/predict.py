"""What requests to a bundle would take here, at any acceptance: graphs are timed, and the host in two requests."""

from dataclasses import dataclass, replace

import numpy as np

from specdec_rt.bench.cost import Acceptance, Costs, HostCost, Prediction, Workload, simulate
from specdec_rt.bench.graph_times import GraphTimes
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
    """As in `cost.Costs`: nothing costs anything, only rounds are counted."""

    def backbone(self, owner: str, contexts: int, size: int) -> float:  # noqa: ARG002  # the protocol's
        return 0.0

    def modulation(self, owner: str, rows: int, steps: int) -> float:  # noqa: ARG002
        return 0.0

    def steps(self, owner: str, rows: int, calls: int) -> float:  # noqa: ARG002
        return 0.0

    def density(self, rows: int) -> float:  # noqa: ARG002
        return 0.0


class Predictor:
    """Predicts batches of one bundle on one backend.

    `draft_share` stands for a draft that is not there yet: its backbone takes this share of the target's time, and
    it drives the target's head. `host` is given where the host's share is not to be calibrated. `first` ends
    images after so many AR steps.
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
        self._share, self._given, self._first = draft_share, host, first
        self._times: dict[int, GraphTimes] = {}
        self._hosts: dict[tuple[str, int], HostCost] = {}

    def workload(self, options: DecodeOptions, batch: int) -> Workload:
        """How a request of one batch is decoded. Raises UsageError where the draft length is chosen on the way."""
        if options.draft_length == AUTO:
            raise UsageError("draft_length is 'auto'; a prediction is for one draft length: expected a whole number")
        manifest = self.pipeline.bundle.manifest
        hypothetical = self._share is not None and options.mode == "exact"
        # A draft that is not there is asked for as the target's own, with the rounds of a model.
        asked = replace(options, draft=SELF_DRAFT, draft_length=None) if hypothetical else options
        plan = self.pipeline.setup(asked).plan
        if hypothetical:
            length = min(options.draft_length or manifest.defaults.draft_length, plan.schedule.steps)
            steps, chain = options.draft_steps, compile_chain(manifest.chain)
            evaluate = None if steps is None else choose_draft_steps(chain, steps)
            plan = replace(plan, draft="draft", draft_length=length, evaluate=evaluate)
        model = manifest.drafts.get(plan.draft or "")
        return Workload(
            plan=plan,
            batch=batch,
            chain=compile_chain(manifest.chain).length,
            draft_head=plan.draft if plan.draft is not None and model is not None and model.head == "own" else "target",
            first=self._first,
            lanes=self.pipeline.backend.device.batch_bucket,
        )

    def predict(self, options: DecodeOptions, batch: int, acceptance: Acceptance) -> Prediction:
        """The batch, from its first to its last token."""
        work = self.workload(options, batch)
        return simulate(work, acceptance, self.times(work), self._given or self.host(work))

    def times(self, work: Workload) -> GraphTimes:
        """Of calls with as many guidance branches as the workload has."""
        branches = 1 if work.plan.guidance == 1 else 2
        if branches not in self._times:
            self._times[branches] = GraphTimes(
                self.pipeline, branches=branches, chain=work.chain, draft_share=self._share
            )
        return self._times[branches]

    def renew(self) -> None:
        """Time graphs anew from now on: a machine's moments differ."""
        self._times.clear()

    def record(self) -> dict[str, object]:
        """What was measured, as plain values for JSON."""
        hosts = {f"{kind}, batch {batch}": host for (kind, batch), host in self._hosts.items()}
        return {
            "graph_seconds": {str(branches): times.record() for branches, times in self._times.items()},
            "host_seconds": {name: {"launch": host.launch, "token": host.token} for name, host in hosts.items()},
        }

    def host(self, work: Workload) -> HostCost:
        """The host's costs, from profiles of a request of one image and of one of as many; 0 where there are none.

        Requests are like the workload: the target alone, or rounds with its draft (one that is not there: with any).
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
            of, stats = found
            share = self._counted(options, images, stats)
            measured.append((share.launches, share.tokens, of.host_seconds))
        return HostCost.of(measured)

    def _counted(self, options: DecodeOptions, images: int, stats: Stats) -> Prediction:
        """Launches and tokens of a request that was made."""
        plan = self.pipeline.setup(options).plan
        chain = compile_chain(self.pipeline.bundle.manifest.chain).length
        work = Workload(plan=plan, batch=images, chain=chain, lanes=self.pipeline.backend.device.batch_bucket)
        free: Costs = _Free()
        return simulate(work, Acceptance(stats.acceptance_rate or 0.0), free, HostCost())


@dataclass(frozen=True)
class _Request:
    options: DecodeOptions
    images: int

    def __call__(self, pipeline: Pipeline, seed: int) -> Stats:
        labels = np.arange(self.images) % pipeline.bundle.manifest.classes
        return pipeline.generate(labels, seed=seed, batch_size=self.images, options=self.options).stats
