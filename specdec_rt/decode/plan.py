"""What a request's options come to on its bundle: the plan that decoding carries out."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specdec_rt.ar_schedule import ArSchedule, cosine_schedule, guidance_weights, raster_schedule
from specdec_rt.backends.base import Limits
from specdec_rt.chain import Chain
from specdec_rt.config import AUTO, SELF_DRAFT, DecodeOptions, GuidanceSchedule, Mode
from specdec_rt.decode import redraft
from specdec_rt.draft_steps import choose_draft_steps
from specdec_rt.errors import UsageError
from specdec_rt.manifest import Manifest
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["Plan", "make_plan", "schedule_of"]

LONGEST = 8
"""AR steps that a round drafts at most where they are chosen on the way, and engines set no limit."""
PAPER_PREFILL = 0.05
SELF_STEPS = 1.9
"""A target that drafts for itself evaluates so many times √n of a chain's n steps, where nothing else is asked for.

The fewer it evaluates, the more often it is rejected, and goes on with a part of the n: k calls and n/k weigh up.
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request's options, resolved against its bundle."""

    mode: Mode
    schedule: ArSchedule
    random_order: bool
    """whether every image takes its places in an order of its own; else from first to last"""
    prefill: int
    """AR steps that the target makes alone"""
    draft_length: int
    """AR steps drafted per round, at most"""
    evaluate: BoolArray | None
    """`[n]` the steps at which the draft calls its head; None: all"""
    draft: str | None
    """the draft model's name; None in `target` mode, and where the target's own head drafts its chain"""
    tau: float
    guidance: float
    guidance_schedule: GuidanceSchedule
    emit_mean: bool
    grid: BoolArray | None = None
    """`[n]` the steps at which the target calls its head where it drafts the rest of a chain; None: it does not"""
    paced: bool = False
    """whether a `Pace` chooses the draft length of each round"""

    @property
    def tokens(self) -> int:
        """L."""
        return int(self.schedule.known[-1])

    @property
    def slots(self) -> int:
        """Cache places that a causal backbone needs: a last round may feed it past the end."""
        return self.tokens + self.draft_length - 1

    @cached_property
    def _guidance(self) -> FloatArray:
        """`[G, S]` weights of the guidance branches at each AR step."""
        return guidance_weights(self.schedule.progress, scale=self.guidance, schedule=self.guidance_schedule)

    def guidance_at(self, ar_step: IntArray) -> FloatArray:
        """Weights `[G, R]` of the guidance branches for tokens made at `ar_step [R]`."""
        return self._guidance[:, ar_step]


def make_plan(options: DecodeOptions, manifest: Manifest, chain: Chain, limits: Limits, backend: str) -> Plan:
    """Resolve options against a bundle's defaults and chain, and what the engines of `backend` are built for.

    Raises UsageError where they cannot be met, ChainError where the chain cannot do what the mode needs.
    """
    defaults = manifest.defaults
    mode, draft = options.mode or defaults.mode, options.draft or defaults.draft
    _check_draft(draft, mode, manifest, chain)
    longest = _longest_draft(options, draft, mode, defaults.draft_length, limits, backend)
    schedule = schedule_of(manifest, defaults.ar_steps if options.ar_steps is None else options.ar_steps)
    if mode == "exact":
        chain.require_density_ratio()
    prefill = options.prefill
    if prefill is None:
        prefill = PAPER_PREFILL if mode == "paper" else 0.0
    evaluate = _evaluate(options.draft_steps, draft, chain)
    return Plan(
        mode=mode,
        schedule=schedule,
        random_order=manifest.family == "mar",
        prefill=int(np.searchsorted(schedule.known, prefill * manifest.tokens)),
        draft_length=min(longest, schedule.steps),
        paced=options.draft_length == AUTO and mode == "exact",
        evaluate=evaluate,
        grid=_grid(evaluate, chain) if mode == "exact" else None,
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


def _longest_draft(options: DecodeOptions, draft: str, mode: Mode, usual: int, limits: Limits, backend: str) -> int:
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
    return (most or LONGEST) if given == AUTO else min(usual, most or usual)


def _evaluate(steps: int | None, draft: str, chain: Chain) -> BoolArray | None:
    """`Plan.evaluate` where the request asks for so many evaluations of a chain."""
    if steps is None:
        return _few_steps(chain) if draft == SELF_DRAFT else None
    if steps > chain.length:
        raise UsageError(f"draft_steps is {steps}; the chain has {chain.length} steps")
    if chain.spec.variance == "learned":
        raise UsageError(
            f"draft_steps is {steps}, but the chain's variances are learned: a step left out has none; "
            "leave out draft_steps, or export with a fixed-variance chain (--chain exact)"
        )
    return choose_draft_steps(chain, steps)


def _grid(evaluate: BoolArray | None, chain: Chain) -> BoolArray | None:
    """`Plan.grid`: as the draft evaluates chains, where it leaves steps out."""
    if chain.length <= redraft.LEAST:
        return None
    return _few_steps(chain) if evaluate is None or evaluate.all() else evaluate


def _few_steps(chain: Chain) -> BoolArray:
    return choose_draft_steps(chain, round(SELF_STEPS * chain.length**0.5))
