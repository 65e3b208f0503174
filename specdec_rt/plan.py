"""What a request's options come to on its bundle: the plan that decoding carries out."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specdec_rt.ar_schedule import ArSchedule, cosine_schedule, guidance_weights, raster_schedule
from specdec_rt.backends.base import Limits
from specdec_rt.capacity import Capacity
from specdec_rt.chain import Chain
from specdec_rt.config import AUTO, SELF_DRAFT, DecodeOptions, GuidanceSchedule, Mode
from specdec_rt.draft_steps import choose_draft_steps
from specdec_rt.errors import UsageError
from specdec_rt.manifest import Manifest
from specdec_rt.noise import Draws, Purpose
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["Plan", "Tuning", "make_plan", "schedule_of"]

PAPER_PREFILL = 0.05


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What decoding is tuned by. Nothing here changes a distribution."""

    min_resume_steps: int = 24
    """transitions left from which on a rejected token's chain is drafted and judged again: drafting, verification and
    a verdict have to take less than so many head calls"""
    self_draft_calls: float = 1.9
    """head calls of a target that drafts for itself, as a multiple of √n for a chain of n transitions: the fewer, the
    more often it is rejected, and has to go on with a part of the n"""
    longest_draft: int = 8
    """AR steps of a round at most, where its length is chosen automatically and engines set no limit"""
    capacity: Capacity = Capacity()
    """what fits one call"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request's options, resolved against its bundle."""

    mode: Mode
    schedule: ArSchedule
    random_order: bool
    """whether every image takes its positions in an order of its own; else from first to last"""
    prefill: int
    """AR steps that the target makes alone"""
    draft_length: int
    """AR steps drafted per round, at most"""
    draft_step_mask: BoolArray | None
    """`[n]` the steps at which the draft calls its head; None: all"""
    draft: str | None
    """the draft model's name; None in `target` mode, and where the target's own head drafts its chain"""
    tau: float
    guidance: float
    guidance_schedule: GuidanceSchedule
    emit_mean: bool
    resume_step_mask: BoolArray | None = None
    """`[n]` the steps at which the target calls its head to draft what is left of a chain; None: it does not"""
    min_resume_steps: int = Tuning.min_resume_steps
    """as in `Tuning`"""
    automatic_length: bool = False
    """whether a `DraftLengthController` chooses the draft length of each round"""

    @property
    def tokens(self) -> int:
        """L."""
        return int(self.schedule.known[-1])

    @property
    def cache_positions(self) -> int:
        """S, positions that a causal backbone's caches need: a last round may feed it past the end."""
        return self.tokens + self.draft_length - 1

    @cached_property
    def _guidance(self) -> FloatArray:
        """`[G, T]` weights of the guidance branches at each AR step."""
        return guidance_weights(self.schedule.progress, scale=self.guidance, schedule=self.guidance_schedule)

    def guidance_at(self, ar_step: IntArray) -> FloatArray:
        """Weights `[G, R]` of the guidance branches for tokens made at `ar_step [R]`."""
        return self._guidance[:, ar_step]

    def draw_order(self, draws: Draws, images: IntArray) -> IntArray:
        """`[B, L]` the positions of images in the order in which they are predicted; `images [B]` key their noise."""
        if not self.random_order:
            return np.tile(np.arange(self.tokens), (len(images), 1))
        uniform = draws.uniform(images, np.zeros_like(images), Purpose.ORDER, self.tokens)
        return np.argsort(uniform, axis=1, kind="stable")


def make_plan(
    options: DecodeOptions, manifest: Manifest, chain: Chain, limits: Limits, backend: str, tuning: Tuning
) -> Plan:
    """Resolve options against a bundle's defaults and chain, and what the engines of `backend` are built for.

    Raises UsageError where they cannot be met, ChainError where the chain cannot do what the mode needs.
    """
    defaults = manifest.defaults
    mode, draft = options.mode or defaults.mode, options.draft or defaults.draft
    _check_draft(draft, mode, manifest, chain)
    longest = _longest_draft(options, draft, mode, defaults.draft_length, limits, backend, tuning)
    schedule = schedule_of(manifest, defaults.ar_steps if options.ar_steps is None else options.ar_steps)
    if mode == "exact":
        chain.require_density_ratio()
    prefill = options.prefill
    if prefill is None:
        prefill = PAPER_PREFILL if mode == "paper" else 0.0
    step_mask = _draft_step_mask(options.draft_steps, draft, chain, tuning)
    return Plan(
        mode=mode,
        schedule=schedule,
        random_order=manifest.family == "mar",
        prefill=int(np.searchsorted(schedule.known, prefill * manifest.tokens)),
        draft_length=min(longest, schedule.steps),
        automatic_length=options.draft_length == AUTO and mode == "exact",
        draft_step_mask=step_mask,
        min_resume_steps=tuning.min_resume_steps,
        resume_step_mask=_resume_step_mask(step_mask, manifest, chain, tuning) if mode == "exact" else None,
        draft=None if draft == SELF_DRAFT or mode == "target" else draft,
        tau=options.tau,
        guidance=defaults.guidance if options.guidance is None else options.guidance,
        guidance_schedule=options.guidance_schedule or defaults.guidance_schedule,
        emit_mean=chain.spec.emit == "mean",
    )


def schedule_of(manifest: Manifest, steps: int) -> ArSchedule:
    """How the bundle's family spreads an image's tokens over so many AR steps. Raises UsageError where it cannot."""
    if manifest.family == "causal":
        if steps != manifest.tokens:
            raise UsageError(
                f"ar_steps is {steps}; a causal family makes one token per step, so {manifest.tokens} here"
            )
        return raster_schedule(manifest.tokens)
    if steps > manifest.tokens:
        raise UsageError(f"ar_steps is {steps}; expected 1 to {manifest.tokens}, the tokens of an image")
    return cosine_schedule(manifest.tokens, steps)


def _check_draft(draft: str, mode: Mode, manifest: Manifest, chain: Chain) -> None:
    if draft != SELF_DRAFT:
        if draft not in manifest.drafts:
            names = ", ".join([*manifest.drafts, SELF_DRAFT])
            raise UsageError(f"draft is {draft!r}; bundle {manifest.name!r} has {names}")
    elif mode in ("paper", "draft"):
        others = ", ".join(manifest.drafts)
        raise UsageError(
            f"draft 'self' has no model of its own, so mode {mode!r} cannot use it; take "
            + (f"one of the drafts {others}" if others else "mode 'target', or export again with a draft")
            + ("" if chain.refusal() else ", or mode 'exact'")
        )


def _longest_draft(
    options: DecodeOptions, draft: str, mode: Mode, usual: int, limits: Limits, backend: str, tuning: Tuning
) -> int:
    """AR steps that a round drafts at most; `usual` is the bundle's default."""
    given, most = options.draft_length, limits.draft_length
    if given == AUTO and mode == "paper":
        raise UsageError(
            "draft_length is 'auto', but in mode 'paper' the share of tokens that the target makes alone changes "
            "their distribution: expected a whole number, or mode 'exact'"
        )
    if isinstance(given, int) and most is not None and given > most:
        raise UsageError(
            f"draft_length is {given}, but the engines of backend {backend!r} are built "
            f"for {most} at most: take a recipe with a larger draft_length"
        )
    if draft == SELF_DRAFT:
        if given not in (None, AUTO, 1):
            raise UsageError(f"draft_length is {given}; draft 'self' proposes 1 AR step per round")
        return 1
    if isinstance(given, int):
        return given
    return (most or tuning.longest_draft) if given == AUTO else min(usual, most or usual)


def _draft_step_mask(steps: int | None, draft: str, chain: Chain, tuning: Tuning) -> BoolArray | None:
    """`Plan.draft_step_mask` where the request asks for so many head calls a chain."""
    if steps is None:
        return _few_steps(chain, tuning) if draft == SELF_DRAFT else None
    if steps > chain.length:
        raise UsageError(f"draft_steps is {steps}; the chain has {chain.length} steps")
    if chain.spec.variance == "learned":
        raise UsageError(
            f"draft_steps is {steps}, but the chain's variances are learned: a step left out has none; "
            "leave out draft_steps, or export with a fixed-variance chain (--chain exact)"
        )
    return choose_draft_steps(chain, steps)


def _resume_step_mask(
    draft_step_mask: BoolArray | None, manifest: Manifest, chain: Chain, tuning: Tuning
) -> BoolArray | None:
    """`Plan.resume_step_mask`: the draft's own steps, where it leaves some out."""
    width, n = manifest.target.modulation_width, chain.length
    assert width is not None  # the bundle was checked: a target has a head
    if n <= tuning.min_resume_steps or tuning.capacity.modulation_steps(1, width, n) < n:
        return None
    few = draft_step_mask is not None and not draft_step_mask.all()
    return draft_step_mask if few else _few_steps(chain, tuning)


def _few_steps(chain: Chain, tuning: Tuning) -> BoolArray:
    return choose_draft_steps(chain, round(tuning.self_draft_calls * chain.length**0.5))
