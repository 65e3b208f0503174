"""How to decode: the options that the API and the CLI share."""

import operator
from dataclasses import dataclass
from numbers import Real
from typing import Final, Literal, get_args

from specdec_rt.errors import UsageError

__all__ = ["AUTO", "LARGEST", "SELF_DRAFT", "DecodeOptions", "GuidanceSchedule", "Mode", "check_whole_number"]

Mode = Literal["exact", "paper", "target", "draft"]
GuidanceSchedule = Literal["linear", "constant"]

SMALLEST, LARGEST = 1e-6, 1e6
"""Bounds that no sensible scale reaches: beyond them float64 arithmetic overflows."""

AUTO: Final = "auto"
"""The draft length that is chosen anew for each round."""

SELF_DRAFT = "self"
"""The draft that is no model: the target's own head on a subset of its steps."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Options of one request; None takes the bundle's default. Raises UsageError on a bad value."""

    mode: Mode | None = None
    draft: str | None = None
    """a draft's name in the bundle, or "self" """
    draft_length: int | Literal["auto"] | None = None
    """γ, AR steps drafted per round: tokens in a causal family, sets of tokens in MAR's.

    "auto" (in mode `exact`) chooses it for each round from the speed of those before: 0, where the target makes the
    step alone, 1, 2, 4, … The distribution is the target's all the same. But a token made alone uses its noise in
    another way than one that was drafted, and what is fastest depends on timing: so the same seed may draw another
    image on another run.
    """
    draft_steps: int | None = None
    """head evaluations per drafted token; None evaluates every step (for "self" 1.9 √n of n)"""
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
    """autoregressive steps per image, 1 to its number of tokens; a causal family makes one token per step"""

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("guidance_schedule", GuidanceSchedule)):
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                raise UsageError(f"{name} is {value!r}; expected one of {', '.join(get_args(kind))}")
        if not isinstance(self.draft, str | None):
            raise UsageError(f"draft is {self.draft!r}; expected the name of a draft, or {SELF_DRAFT!r}")
        for name in ("draft_length", "draft_steps", "ar_steps"):
            value, word = getattr(self, name), AUTO if name == "draft_length" else None
            if value is not None and not (isinstance(value, str) and value == word):
                check_whole_number(name, value, 1, word=word)
        for name in ("tau", "temperature"):
            value = getattr(self, name)
            if not (_is_number(value) and SMALLEST <= value <= LARGEST):
                raise UsageError(f"{name} is {value!r}; expected a number above 0 (from {SMALLEST} to {LARGEST})")
        if self.prefill is not None and not (_is_number(self.prefill) and 0 <= self.prefill <= 1):
            raise UsageError(f"prefill is {self.prefill!r}; expected a share from 0 to 1")
        if self.guidance is not None and not (_is_number(self.guidance) and 0 <= self.guidance <= LARGEST):
            raise UsageError(f"guidance is {self.guidance!r}; expected a number from 0 to {LARGEST} (1 is no guidance)")


def check_whole_number(
    name: str, value: object, least: int, most: int | None = None, *, word: str | None = None
) -> int:
    """`value` as an int; raises UsageError unless it is a whole number from `least` to `most`.

    `word` is what else the caller takes, for the message.
    """
    wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
    wanted += "" if word is None else f", or {word!r}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # what is not a whole number is refused below
    except TypeError as error:
        raise UsageError(f"{name} is {value!r}; expected a whole number {wanted}") from error
    if number < least or (most is not None and number > most):
        raise UsageError(f"{name} is {value!r}; expected a whole number {wanted}")
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
