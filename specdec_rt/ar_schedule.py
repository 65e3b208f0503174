"""How an image's tokens are spread over autoregressive steps, and how guidance grows with them."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from specdec_rt.types import FloatArray, IntArray

__all__ = ["ArSchedule", "cosine_schedule", "guidance_weights", "raster_schedule"]


@dataclass(frozen=True, slots=True)
class ArSchedule:
    """How the L tokens of an image are spread over T autoregressive steps; every step makes at least one."""

    known: IntArray
    """`[T + 1]` tokens known before each step, and in the end all"""
    progress: FloatArray
    """`[T]` how far a linear guidance schedule has grown at each step, from 0 to 1"""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.progress)


def raster_schedule(tokens: int) -> ArSchedule:
    """One token per step."""
    known = np.arange(tokens + 1, dtype=np.int64)
    return ArSchedule(known, known[1:] / tokens)


def cosine_schedule(tokens: int, steps: int) -> ArSchedule:
    """MAR's: after step s of T ≤ L, ⌊L cos(π/2 · (s + 1)/T)⌋ tokens are unknown, if that leaves each step one."""
    unknown = [tokens]
    for step in range(1, steps):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * step / steps))
        unknown.append(max(1, min(unknown[-1] - 1, wanted)))
    known = tokens - np.array([*unknown, 0], np.int64)
    # Guidance grows with the tokens known after a step; the reference counts one as unknown to the last.
    return ArSchedule(known, np.minimum(known[1:], tokens - 1) / tokens)


def guidance_weights(progress: FloatArray, *, scale: float, schedule: Literal["linear", "constant"]) -> FloatArray:
    """Weights `[G, R]` of the branches' predictions for tokens whose steps have `progress [R]` (see `ArSchedule`).

    ε̂ = s ε̂(label) + (1 - s) ε̂(no label); G is 1 where `scale` is 1. The linear schedule grows from 1 to
    `scale` with progress (MAR's `cfg_schedule`).
    """
    if scale == 1:
        return np.ones((1, len(progress)))
    weight = 1 + (scale - 1) * progress if schedule == "linear" else np.full(len(progress), float(scale))
    return np.stack([weight, 1 - weight])
