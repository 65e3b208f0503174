"""Rounds played out with random verdicts, and the cost of the calls that they make.

    tokens of a round (causal family, one image)   Σ_{i<γ} aⁱ, where a share a of the judged drafts is accepted
    seconds of a round                             γ · (draft backbone + chain) + target backbone + verification
                                                   + completion, where a token was rejected

A completion finishes the target's chain step by step, or resumes speculation on what is left of it. Playing rounds out
gives images that end at different rounds, sets of tokens and last rounds their true cost. It answers whether
speculation would pay before a draft is trained.
"""

from collections import defaultdict

import numpy as np

from specdec_rt.bench.cost import Acceptance, CallCosts, HostCost, Prediction, Workload
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["DRAFT", "draw_left", "simulate"]

DRAFT = "draft"
"""What a prediction's parts call the draft's backbone, whichever model it is."""


def simulate(
    work: Workload, acceptance: Acceptance, costs: CallCosts, host: HostCost, *, trials: int = 16, seed: int = 0
) -> Prediction:
    """What the batch takes on average over so many trials; `acceptance` matters where something is drafted."""
    trials = 1 if work.plan.mode in ("target", "draft") else trials
    simulation = _Simulation(work, acceptance, costs, np.random.default_rng(seed))
    for _ in range(trials):
        simulation.decode_batch()
    parts = {name: seconds / trials for name, seconds in simulation.parts.items()}
    stages, tokens = simulation.stages / trials, simulation.tokens / trials
    parts["host"] = host.stage * stages + host.token * tokens
    return Prediction(sum(parts.values()), stages, tokens, parts)


class _Simulation:
    def __init__(self, work: Workload, acceptance: Acceptance, costs: CallCosts, rng: np.random.Generator) -> None:
        self._work, self._plan, self._acceptance = work, work.plan, acceptance
        self._costs, self._rng = costs, rng
        self.parts: dict[str, float] = defaultdict(float)
        self.stages = self.tokens = 0

    def decode_batch(self) -> None:
        """Play a batch out."""
        plan, work = self._plan, self._work
        without_rounds = plan.mode in ("target", "draft")
        model = (plan.draft or "target") if plan.mode == "draft" else "target"
        alone = work.steps if without_rounds else min(plan.prefill, work.steps)
        for ar_step in range(alone):
            self._ar_step(model, ar_step)
        next_step = np.full(work.batch, alone)
        while (next_step < work.steps).any():
            next_step = self._round(next_step[next_step < work.steps])

    def _ar_step(self, model: str, ar_step: int) -> None:
        """An AR step of all images by one model alone."""
        known, work, drafting = self._plan.schedule.known, self._work, model != "target"
        rows = work.batch * int(known[ar_step + 1] - known[ar_step])
        self._backbone(model, work.batch, int(known[ar_step]), 1)
        head, calls = (work.draft_head, work.draft_calls) if drafting else ("target", work.chain)
        self._chains(head, rows, calls, modulated=calls)
        self._count(stages=1, tokens=rows)

    def _round(self, ar_step: IntArray) -> IntArray:
        """One round of the images whose next AR steps are `ar_step [A]`. Returns the ones that come after it."""
        plan, known = self._plan, self._plan.schedule.known
        left = plan.schedule.steps - ar_step
        length = min(plan.draft_length, int(left.max()))
        bounds = known[np.minimum(ar_step[:, None] + np.arange(length + 1), plan.schedule.steps)]
        set_sizes = np.diff(bounds, axis=1)  # [A, length]
        self._draft(bounds, set_sizes)
        self._verify(bounds, set_sizes)
        return self._commit(ar_step, left, set_sizes)

    def _draft(self, bounds: IntArray, set_sizes: IntArray) -> None:
        """The draft's AR steps. `bounds [A, length + 1]` are the tokens known before each of them, and at the end."""
        plan, work = self._plan, self._work
        # A target that judges its own draft makes all modulation at once.
        modulated = work.chain if plan.draft is None else work.draft_calls
        for offset, rows in enumerate(set_sizes.sum(axis=0).tolist()):
            self._backbone(plan.draft or "target", work.batch_bucket(len(bounds)), int(bounds[:, offset].max()), 1)
            self._chains(work.draft_head, rows, work.draft_calls, modulated=modulated)
            self._count(stages=1, tokens=rows)

    def _verify(self, bounds: IntArray, set_sizes: IntArray) -> None:
        """The target's word on all that was drafted."""
        plan, work = self._plan, self._work
        (images, length), rows = set_sizes.shape, int(set_sizes.sum())
        if plan.draft is None:
            # The target has its conditions and modulation from drafting. What it evaluated then is judged already.
            self._path_means(rows, work.chain - work.draft_calls)
            return
        contexts = int((set_sizes > 0).sum()) if plan.random_order else work.batch_bucket(images)
        self._backbone("target", contexts, int(bounds[:, -2].max()), length)
        if plan.mode == "paper":
            self._chains("target", rows, work.chain, modulated=work.chain)
        else:
            self._modulation("target", rows, work.chain)
            self._path_means(rows, work.chain)
        self._count(stages=1, tokens=0)

    def _commit(self, ar_step: IntArray, left: IntArray, set_sizes: IntArray) -> IntArray:
        """Draw verdicts. The first set with a rejection is completed; what was drafted after it is dropped."""
        drafted = np.minimum(set_sizes.shape[1], left)
        rejected = self._rng.binomial(set_sizes, 1 - self._acceptance.rate)  # [A, length] tokens of each set
        kept = np.where((rejected > 0).any(axis=1), (rejected > 0).argmax(axis=1), drafted)
        completed = int(rejected[np.flatnonzero(kept < drafted), kept[kept < drafted]].sum())
        if completed and self._plan.mode == "exact":
            self._complete(draw_left(self._rng.random(completed), self._work.chain, self._acceptance.left))
        return np.asarray(ar_step + np.minimum(kept + 1, drafted))

    def _complete(self, left: IntArray) -> None:
        """Go on with the chains of rejected tokens that have `left [J]` transitions to go."""
        step_mask, finished = self._plan.resume_step_mask, []
        while len(left):
            resumed = np.full(len(left), step_mask is not None) & (left >= self._plan.min_resume_steps)
            finished += left[~resumed & (left > 0)].tolist()
            left = left[resumed]
            if step_mask is not None and len(left):
                left = self._resume(left, step_mask[-int(left.max()) :])
        if finished:
            self._chains("target", len(finished), max(finished), modulated=max(finished))

    def _resume(self, left: IntArray, step_mask: BoolArray) -> IntArray:
        """Draft chain suffixes and judge them, as one suffix of the longest's length `L`; `step_mask [L]`.

        Returns the transitions that those which are rejected again have left.
        """
        rows, evaluated = len(left), int(step_mask.sum())
        # Each row calls the head where it begins, and then where the mask says.
        self._chains("target", rows, 1 + evaluated, modulated=len(step_mask))
        self._path_means(rows, len(step_mask) - evaluated)
        self._count(stages=1, tokens=rows)
        rejected = left[self._rng.random(rows) >= self._acceptance.suffix_rate]
        return draw_left(self._rng.random(len(rejected)), rejected, 0.5)

    # --- what it costs ----------------------------------------------------------------------------------

    def _backbone(self, model: str, contexts: int, known: int, length: int) -> None:
        part = "target.backbone" if model == "target" else DRAFT
        self.parts[part] += self._costs.backbone(model, contexts, known if self._plan.random_order else length)

    def _chains(self, head: str, rows: int, calls: int, *, modulated: int) -> None:
        """Chains of so many tokens, and the modulation of so many steps that is made for them."""
        self._modulation(head, rows, modulated)
        self.parts[f"{head}.denoise_step"] += self._costs.denoise_steps(head, rows, calls)

    def _modulation(self, head: str, rows: int, steps: int) -> None:
        self.parts[f"{head}.modulation"] += self._costs.modulation(head, rows, steps)

    def _path_means(self, rows: int, transitions: int) -> None:
        self.parts["target.path_means"] += self._costs.path_means(rows, transitions)

    def _count(self, *, stages: int, tokens: int) -> None:
        self.stages += stages
        self.tokens += tokens


def draw_left(uniform: FloatArray, length: int | IntArray, share: float) -> IntArray:
    """`[J]` transitions left after the rejected one, out of `length` (one number, or `[J]`).

    They are uniform with mean `length · share`, as far as that fits; `uniform [J]` in [0, 1) decides.
    """
    low, high = max(0.0, 2 * share - 1), min(2 * share, 1.0)
    left: IntArray = np.minimum(np.floor((low + (high - low) * uniform) * length), length - 1).astype(np.int64)
    return left
