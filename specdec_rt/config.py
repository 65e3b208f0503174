"""How to decode: the options that the API and the CLI share."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from specdec_rt.errors import UsageError

__all__ = ["SELF_DRAFT", "DecodeOptions", "GuidanceSchedule", "Mode"]

Mode = Literal["exact", "paper", "target", "draft"]
GuidanceSchedule = Literal["linear", "constant"]

SELF_DRAFT = "self"
"""The draft that is no model: the target's own head on a subset of its steps."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Options of one request; None takes the bundle's default. Raises UsageError on a bad value."""

    mode: Mode = "exact"
    draft: str | None = None
    """a draft's name in the bundle, or "self" """
    draft_length: int | None = None
    """γ, tokens proposed per round"""
    draft_steps: int | None = None
    """head evaluations per drafted token; None evaluates every step (a third of them for "self")"""
    tau: float = 1.0
    """τ, the temperature of `paper` mode's acceptance; 1 is the published criterion"""
    prefill: float | None = None
    """share of the tokens that the target makes alone; None is 0.05 in `paper` mode, else 0"""
    guidance: float | None = None
    """classifier-free guidance scale; 1 is none"""
    guidance_schedule: GuidanceSchedule | None = None
    temperature: float = 1.0
    """factor on the standard deviations of the bundle's chain"""
    ar_steps: int | None = None
    """autoregressive steps per image; a causal family makes one token per step"""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UsageError(f"mode is {self.mode!r}; expected one of {', '.join(get_args(Mode))}")
        if self.guidance_schedule not in (None, *get_args(GuidanceSchedule)):
            raise UsageError(f"guidance_schedule is {self.guidance_schedule!r}; expected 'linear' or 'constant'")
        for name in ("draft_length", "draft_steps", "ar_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected a whole number of at least 1")
        for name in ("tau", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} is {value}; expected a number above 0")
        if self.prefill is not None and not 0 <= self.prefill <= 1:
            raise UsageError(f"prefill is {self.prefill}; expected a share from 0 to 1")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UsageError(f"guidance is {self.guidance}; expected a number of at least 0 (1 is no guidance)")
