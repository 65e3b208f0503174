"""What a request will take, from the time of each graph's calls: rounds are simulated, calls are added up.

    tokens of a round (causal, one image)   Σ_{i<γ} aⁱ, for a share a of judged drafts that is accepted
    a round                                 γ · (draft backbone + chain) + target backbone + verification
                                            (+ what is left of the target's chain, where a token was rejected:
                                            step by step, or drafted and verified again)

`simulate` plays rounds out, so that images that end at different rounds, sets of tokens and last rounds cost what
they do. It answers whether speculation would pay before a draft is trained.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from specdec_rt.decode import redraft
from specdec_rt.plan import Plan
from specdec_rt.types import FloatArray, IntArray

__all__ = [
    "DRAFT",
    "Acceptance",
    "Costs",
    "HostCost",
    "Interpolated",
    "Prediction",
    "Workload",
    "draw_left",
    "simulate",
]

SLOW = 0.3
"""Seconds of a call."""
DRAFT = "draft"
"""What a prediction's parts call the draft's backbone, whichever model it is."""


@dataclass(frozen=True)
class Acceptance:
    """What a draft is worth."""

    rate: float
    """accepted / judged drafts"""
    left: float = 0.5
    """mean share of the chain that the target has to go on with where it rejects"""
    resumed: float | None = None
    """accepted / judged rests of chains that are drafted again; None: `rate` squared, for the hard ones come again"""

    @property
    def of_rests(self) -> float:
        """The share of rests that is accepted."""
        return self.rate**2 if self.resumed is None else self.resumed


class Costs(Protocol):
    """Seconds of one call."""

    def backbone(self, owner: str, contexts: int, size: int) -> float:
        """`contexts` images (in every guidance branch): `size` positions of each, or (MAR) so many known tokens."""
        ...

    def modulation(self, owner: str, rows: int, steps: int) -> float:
        """What the chains of so many tokens need of their conditions, for so many steps."""
        ...

    def steps(self, owner: str, rows: int, calls: int) -> float:
        """So many transitions, one after the other, of the chains of so many tokens."""
        ...

    def density(self, rows: int) -> float:
        """All transitions of as many tokens at once, by the target, whose modulation there is."""
        ...


@dataclass(frozen=True)
class HostCost:
    """Everything outside engine calls: seconds of a launch (as `Prediction` counts them), and of each of its tokens."""

    launch: float = 0.0
    token: float = 0.0

    @classmethod
    def of(cls, measured: list[tuple[float, float, float]]) -> "HostCost":
        """The fit of `(launches, tokens, seconds)` of some requests; neither cost is below 0."""
        table = np.array(measured, float)
        by_launch = float(table[:, 2].sum() / table[:, 0].sum())
        if len(table) == 1:
            return cls(by_launch)
        found = np.linalg.lstsq(table[:, :2], table[:, 2], rcond=None)[0]
        if found[0] < 0:
            return cls(0.0, float(table[:, 2].sum() / table[:, 1].sum()))
        return cls(by_launch) if found[1] < 0 else cls(float(found[0]), float(found[1]))


@dataclass(frozen=True)
class Workload:
    """A batch of images, and how it is decoded."""

    plan: Plan
    batch: int
    chain: int
    """n, transitions"""
    draft_head: str = "target"
    """whose head drafts"""
    first: int | None = None
    """end after so many AR steps"""
    lanes: Callable[[int], int] = field(default=lambda images: images)
    """as in `base.Device`"""

    @property
    def steps(self) -> int:
        """AR steps that are made."""
        return self.plan.schedule.steps if self.first is None else min(self.first, self.plan.schedule.steps)

    @property
    def draft_calls(self) -> int:
        """Head calls of a drafted chain."""
        return self.chain if self.plan.evaluate is None else int(self.plan.evaluate.sum())


@dataclass(frozen=True)
class Prediction:
    """A batch, on average over the simulations."""

    seconds: float
    launches: float
    """AR steps of one model, drafted or not, verifications, and rests that are drafted again"""
    tokens: float
    """that launches made or drafted"""
    parts: dict[str, float]
    """seconds by what they go into"""


def simulate(
    work: Workload, acceptance: Acceptance, costs: Costs, host: HostCost, *, trials: int = 16, seed: int = 0
) -> Prediction:
    """Play the batch out; `acceptance` matters where something is drafted."""
    trials = 1 if work.plan.mode in ("target", "draft") else trials
    run = _Run(work, acceptance, costs, np.random.default_rng(seed))
    for _ in range(trials):
        run.image()
    parts = {name: seconds / trials for name, seconds in run.parts.items()}
    parts["host"] = (host.launch * run.launches + host.token * run.tokens) / trials
    return Prediction(sum(parts.values()), run.launches / trials, run.tokens / trials, parts)


class _Run:
    def __init__(self, work: Workload, acceptance: Acceptance, costs: Costs, rng: np.random.Generator) -> None:
        self._work, self._plan, self._acceptance = work, work.plan, acceptance
        self._costs, self._rng = costs, rng
        self.parts: dict[str, float] = defaultdict(float)
        self.launches = self.tokens = 0.0

    def image(self) -> None:
        """One batch."""
        plan, work = self._plan, self._work
        alone = plan.mode in ("target", "draft")
        begun = work.steps if alone else min(plan.prefill, work.steps)
        owner = (plan.draft or "target") if plan.mode == "draft" else "target"
        for step in range(begun):
            self._single(owner, step)
        at = np.full(work.batch, begun)
        while (at < work.steps).any():
            at = self._round(at[at < work.steps])

    def _single(self, owner: str, step: int) -> None:
        drafting, known = owner != "target", self._plan.schedule.known
        rows = self._work.batch * int(known[step + 1] - known[step])
        self._backbone(owner, self._work.batch, int(known[step]), 1)
        calls = self._work.draft_calls if drafting else self._work.chain
        self._chain(self._work.draft_head if drafting else "target", calls, rows)
        self.launches += 1
        self.tokens += rows

    def _round(self, at: IntArray) -> IntArray:
        """One round of the images at AR steps `at [A]`; where they stand after it."""
        plan, work, known = self._plan, self._work, self._plan.schedule.known
        left = plan.schedule.steps - at
        length = min(plan.draft_length, int(left.max()))
        reached = np.minimum(at[:, None] + np.arange(length + 1), plan.schedule.steps)
        sizes = np.diff(known[reached], axis=1)  # [A, length]
        lanes, rows = work.lanes(len(at)), int(sizes.sum())
        owner = plan.draft or "target"
        # A target that judges its own draft has made all modulation to draft it.
        whole = work.chain if plan.draft is None and plan.mode == "exact" else None
        for offset in range(length):
            self._backbone(owner, lanes, int(known[reached[:, offset]].max()), 1)
            self._chain(work.draft_head, work.draft_calls, int(sizes[:, offset].sum()), made=whole)
        if plan.draft is not None:  # else the target's backbone was called to draft
            contexts = int((sizes > 0).sum()) if plan.random_order else lanes
            self._backbone("target", contexts, int(known[reached[:, length - 1]].max()), length)
        if plan.mode == "paper":
            self._chain("target", work.chain, rows)
        else:
            if whole is None:
                self.parts["target.modulation"] += self._costs.modulation("target", rows, work.chain)
            # Steps that it was called at to draft are judged already.
            share = 1.0 if whole is None else 1 - work.draft_calls / work.chain
            self.parts["target.path_means"] += share * self._costs.density(rows)
        self.launches += 1 if plan.draft is None else length + 1
        self.tokens += rows
        return self._accept(at, left, sizes)

    def _accept(self, at: IntArray, left: IntArray, sizes: IntArray) -> IntArray:
        drafted = np.minimum(sizes.shape[1], left)
        failed = self._rng.binomial(sizes, 1 - self._acceptance.rate)  # [A, length] rejected tokens of each set
        kept = np.where((failed > 0).any(axis=1), (failed > 0).argmax(axis=1), drafted)
        rejected = int(failed[np.flatnonzero(kept < drafted), kept[kept < drafted]].sum())
        if rejected and self._plan.mode == "exact":
            self._complete(draw_left(self._rng.random(rejected), self._work.chain, self._acceptance.left))
        return np.asarray(at + np.minimum(kept + 1, drafted))

    def _complete(self, left: IntArray) -> None:
        """What rejected tokens with `left [K]` transitions to go take: drafted and judged again, or step by step."""
        grid, chain = self._plan.grid, self._work.chain
        short: list[int] = []
        while len(left):
            long = left >= (chain if grid is None else redraft.LEAST)
            short += left[~long].tolist()
            left = left[long]
            if grid is None or not len(left):
                break
            rows, most = len(left), int(left.max())
            # On the round's modulation.
            self._chain("target", 1 + int(grid[-most:].sum()), rows, made=0)
            self.parts["target.path_means"] += self._costs.density(rows) * most / chain
            self.launches += 1
            self.tokens += rows
            left = left[self._rng.random(rows) >= self._acceptance.of_rests]
            left = draw_left(self._rng.random(len(left)), left, 0.5)
        if short:
            self._chain("target", max(short), len(short))

    def _backbone(self, owner: str, contexts: int, known: int, length: int) -> None:
        part = "target.backbone" if owner == "target" else DRAFT
        size = known if self._plan.random_order else length
        self.parts[part] += self._costs.backbone(owner, contexts, size)

    def _chain(self, owner: str, calls: int, rows: int, *, made: int | None = None) -> None:
        """`made`: of how many transitions modulation is made, where that is not those that are called."""
        steps = calls if made is None else made
        if steps:
            self.parts[f"{owner}.modulation"] += self._costs.modulation(owner, rows, steps)
        self.parts[f"{owner}.denoise_step"] += self._costs.steps(owner, rows, calls)


def draw_left(uniform: FloatArray, length: int | IntArray, share: float) -> IntArray:
    """`[K]`: transitions left after the rejected one, of `length` (or `[K]`): uniform with mean `length · share`.

    `uniform [K]` in [0, 1) decides.
    """
    low, high = max(0.0, 2 * share - 1), min(2 * share, 1.0)
    left: IntArray = np.minimum(np.floor((low + (high - low) * uniform) * length), length - 1).astype(np.int64)
    return left


class Interpolated:
    """The seconds of calls of two sizes, taken when first needed on a coarse grid, linear between its points.

    The grid is 1, 2, 3, 4, 6, 8, 12, …; of y it is `grid`, ascending, where that is given. A call slower than `SLOW`
    is all arithmetic: those larger in x are not made, but taken to last longer in proportion.
    """

    def __init__(self, evaluate: Callable[[int, int], float], *, grid: tuple[int, ...] | None = None) -> None:
        self._evaluate, self._grid = evaluate, grid
        self.points: dict[tuple[int, int], float] = {}

    def __call__(self, x: int, y: int) -> float:
        total = 0.0
        for at_x, weight_x in _neighbours(x, _grid_around(x)):
            for at_y, weight_y in _neighbours(y, self._grid or _grid_around(y)):
                total += weight_x * weight_y * self._point(at_x, at_y)
        return total

    def _point(self, x: int, y: int) -> float:
        if (x, y) not in self.points:
            slow = [at for at in self.points.items() if at[0][1] == y and at[0][0] < x and at[1] > SLOW]
            if slow:
                (largest, _), seconds = max(slow)
                self.points[x, y] = seconds * x / largest
            else:
                self.points[x, y] = self._evaluate(x, y)
        return self.points[x, y]


def _grid_around(x: int) -> tuple[int, ...]:
    power = 1 << (x.bit_length() - 1)
    return (power, power + power // 2, 2 * power)


def _neighbours(x: int, grid: tuple[int, ...]) -> list[tuple[int, float]]:
    """The grid's points around x (its end, where x lies past it), and their weights."""
    high = bisect_left(grid, x)
    if high == len(grid):
        return [(grid[-1], 1.0)]
    if grid[high] == x or high == 0:
        return [(grid[high], 1.0)]
    share = (x - grid[high - 1]) / (grid[high] - grid[high - 1])
    return [(grid[high - 1], 1 - share), (grid[high], share)]
