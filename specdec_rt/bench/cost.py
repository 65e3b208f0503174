"""What a prediction is made of: seconds of calls, seconds of the host, how good a draft is, what is to be decoded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from specdec_rt.plan import Plan

__all__ = ["Acceptance", "CallCosts", "HostCost", "Prediction", "Workload"]


@dataclass(frozen=True)
class Acceptance:
    """How good a draft is."""

    rate: float
    """share of the judged draft tokens that is accepted"""
    left: float = 0.5
    """mean share of a chain's transitions that come after the one at which a token is rejected"""
    resumed: float | None = None
    """share of the chain suffixes that is accepted in resumed speculation. None: `rate` squared, because the tokens
    that come there are the hard ones"""

    @property
    def suffix_rate(self) -> float:
        """The share of chain suffixes that is accepted."""
        return self.rate**2 if self.resumed is None else self.resumed


class CallCosts(Protocol):
    """Seconds of one call of each graph. `model` is "target" or a draft's name."""

    def backbone(self, model: str, contexts: int, size: int) -> float:
        """For `contexts` images, in every guidance branch.

        `size` is the number of positions of each image in the causal family, of known tokens in MAR's.
        """
        ...

    def modulation(self, model: str, rows: int, steps: int) -> float:
        """Modulation of so many steps for the chains of so many tokens."""
        ...

    def denoise_steps(self, model: str, rows: int, calls: int) -> float:
        """So many transitions, one after the other, of the chains of so many tokens."""
        ...

    def path_means(self, rows: int, transitions: int) -> float:
        """The target's means at so many transitions of the paths of so many tokens. Their modulation is there."""
        ...


@dataclass(frozen=True)
class HostCost:
    """Everything outside engine calls: seconds of each stage, as `Prediction` counts them, and of each token in it."""

    stage: float = 0.0
    token: float = 0.0

    @classmethod
    def of(cls, measured: list[tuple[float, float, float]]) -> "HostCost":
        """The fit of `(stages, tokens, seconds)` of some requests. Neither cost is below 0."""
        table = np.array(measured, float)
        by_stage = float(table[:, 2].sum() / table[:, 0].sum())
        if len(table) == 1:
            return cls(by_stage)
        found = np.linalg.lstsq(table[:, :2], table[:, 2], rcond=None)[0]
        if found[0] < 0:
            return cls(0.0, float(table[:, 2].sum() / table[:, 1].sum()))
        return cls(by_stage) if found[1] < 0 else cls(float(found[0]), float(found[1]))


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
    batch_bucket: Callable[[int], int] = field(default=lambda images: images)
    """slots that so many images take, as the device says"""

    @property
    def steps(self) -> int:
        """AR steps that are made."""
        return self.plan.schedule.steps if self.first is None else min(self.first, self.plan.schedule.steps)

    @property
    def draft_calls(self) -> int:
        """Head calls of a drafted chain."""
        step_mask = self.plan.draft_step_mask
        return self.chain if step_mask is None else int(step_mask.sum())


@dataclass(frozen=True)
class Prediction:
    """What a batch takes, on average over the simulations."""

    seconds: float
    stages: float
    """what the host prepares one by one: each AR step that a model makes or drafts, each verification, and each
    time that speculation is resumed"""
    tokens: float
    """tokens made, drafted or drafted again in all stages"""
    parts: dict[str, float]
    """seconds by graph, and of the host"""
