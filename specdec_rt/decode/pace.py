"""How far to draft: the draft length of each round, from what rounds have cost and how much was accepted.

In `exact` mode a token has the target's distribution given the tokens before it, whether it was drafted, at whatever
draft length, or made by the target alone. That stays so where the length changes on the way, as long as it is chosen
from the past: from timings, and from verdicts on tokens that are final. The noise of tokens still to be made must have
no say. Drafts that are dropped unjudged belong to it, as their noise is used again: to leave a token to the target
alone because its dropped draft looked like being rejected would favour some tokens over others. A `Pace` sees how far
images are, clock times and counts of judged tokens, nothing else.

What does depend on the choice is the image of a seed. A token made alone takes its noise for the target's chain, a
drafted one for the draft's; and which is faster is a matter of timing.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from specdec_rt.decode.round_costs import Cell, RoundCosts, lane_size
from specdec_rt.types import IntArray

__all__ = ["Pace"]

MEMORY = 512
"""Judged tokens after which a verdict counts half."""
PRIOR = (2.8, 4.0)
"""Accepted and judged tokens before there were any."""
GAIN = 1.03
"""How much faster than the target alone speculation has to look: estimates err, and the best of them errs upwards."""
APART = 1.1
"""The same where images would come to end at different times: how long the slowest takes is known but roughly."""
TRIES = 2
"""Rounds after which the cost of a length counts as known; one more comes before them, in which buffers are made."""
COLD = 32
"""Rounds of the target alone that come before all others, up to a third of an image: a new process is slow at first."""
POOR = 1.3
"""How many times the best's time to the end shows at once that a length is poor."""
REFRESH = 0.003
"""Share of the time that trying a length again may cost, for each that is not the best."""
LEAST_LOSS = 0.05
"""Share of a round that trying again is taken to cost at least: a length as good as the best is not tried for ever."""
KEPT = 12
"""Rounds that a choice stands for beside its own: choosing takes time, too."""


class Pace:
    """Chooses among 0 (the target alone), 1, 2, 4, … up to `longest`; keeps what it learns for later requests.

    The choice is the length that, kept to the end, would end the request soonest. A length whose cost is not known
    yet is tried a few times, the shortest first, unless those before it show that none can pay; after that others
    than the best are tried again for a small share of the time. `known [S + 1]` is the schedule's; `uneven` as in
    `RoundCosts`; times are in seconds of `clock`.
    """

    def __init__(
        self, known: IntArray, longest: int, *, uneven: bool, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.lengths = (0, *(1 << power for power in range(longest.bit_length())))
        self.clock = clock
        self._sizes: list[int] = np.diff(known).tolist()
        self._costs = RoundCosts(uneven=uneven)
        self._accepted, self._judged = PRIOR
        self._full = 0
        self._alone = min(COLD, len(self._sizes) // 3)
        """rounds of the target alone that are due: the measure of everything else"""
        self._kept = 0
        """rounds that the last choice still stands for"""
        self._round = _Round(Cell(), 0, 1.0)

    def begin(self, lanes: int) -> None:
        """A batch begins in so many lanes. There lengths are tried that are new; fewer lanes do not last."""
        self._full = lane_size(lanes)
        self._kept = 0
        if self._round.length:  # where speculation is chosen, what it is compared with would never be seen again
            self._alone = max(self._alone, TRIES)

    def choose(self, step: IntArray, lanes: int, waiting: int, *, behind: bool) -> int:
        """The length of the next round, which `note` must follow.

        `step [A]` are the next AR steps of the images under way, in so many `lanes`; `waiting` images have not
        begun. `behind` tells that the draft would have to catch up first.
        """
        at, longest = float(step.mean()), len(self._sizes) - int(step.min())
        key = self._costs.key(lanes, at / len(self._sizes))
        cell, scale = self._costs.cell(key), key[0] / lanes
        before = self._round
        if self._kept and cell is before.cell and before.length <= longest:
            self._kept -= 1
            self._round = _Round(cell, before.length, scale)
        elif self._alone or cell.calls.get(0, 0) <= TRIES:
            self._alone = max(self._alone - 1, 0)
            self._round = _Round(cell, 0, scale)
        else:
            lengths = [length for length in self.lengths if length <= longest]
            rates = [(self._accepted / self._judged) ** size for size in self._sizes[int(at) :]]
            if len(step) > 1 and not waiting:
                # What images gain on the slowest one is lost if the target goes on alone where sets are larger.
                rates = [min(rates)]
            outlook = _Outlook(
                _advances(rates, lengths[-1]),
                images=len(step),
                left=len(self._sizes) - at,
                longest=longest,
                waiting=waiting,
                behind=behind,
            )
            self._round = self._decide(key, lengths, outlook, scale)
        return self._round.length

    def note(self, seconds: float, completion: float, accepted: int, rejected: int) -> None:
        """What the round took without its completion, what that took, and the verdicts; 0 where nothing was drafted."""
        now = self._round
        now.cell.note(now.length, seconds * now.scale, completion * now.scale)
        if now.enough is not None:
            self._lose(max((seconds + completion) * now.scale - now.enough, LEAST_LOSS * now.enough))
        kept = 0.5 ** ((accepted + rejected) / MEMORY)
        self._accepted = self._accepted * kept + accepted
        self._judged = self._judged * kept + accepted + rejected

    def note_catch_up(self, seconds: float) -> None:
        """What it took the draft to catch up, before the round."""
        now = self._round
        now.cell.note_catch_up(seconds * now.scale)
        if now.enough is not None:
            self._lose(seconds * now.scale)

    def _lose(self, seconds: float) -> None:
        lost, length = self._round.cell.lost, self._round.length
        lost[length] = lost.get(length, 0.0) + seconds

    def _decide(self, key: tuple[int, int], lengths: list[int], outlook: "_Outlook", scale: float) -> "_Round":
        """The best length, or one to be tried."""
        cell, costs = self._costs.cell(key), self._costs
        known = {length: each for length in lengths if (each := costs.seconds(key, length)) is not None}
        completion = costs.completion(key)
        seconds = {length: each + outlook.completions(length) * completion for length, each in known.items()}
        total = {
            length: each * outlook.rounds(length, costs.tail(key, length)) * outlook.margin(length)
            + (cell.catch_up if outlook.behind and length else 0.0)
            for length, each in seconds.items()
        }
        best = min(total, key=total.__getitem__)
        self._kept = 0
        if key[0] == self._full and (new := self._new(key, lengths, outlook, seconds, total)) is not None:
            return _Round(cell, new, scale)
        found, oldest = _Round(cell, best, scale), cell.rounds + 1
        for length, each in seconds.items():
            enough = seconds[best] / outlook.advance[best].mean * outlook.worth(length, best)
            switch = cell.catch_up if (outlook.behind if length else best) else 0.0
            loss = max(each - enough, LEAST_LOSS * enough) + switch
            affordable = cell.lost.get(length, 0.0) + loss <= REFRESH * cell.spent
            if length != best and affordable and cell.last.get(length, 0) < oldest:
                found, oldest = _Round(cell, length, scale, enough), cell.last.get(length, 0)
        self._kept = KEPT if found.length == best else 0
        return found

    def _new(
        self,
        key: tuple[int, int],
        lengths: list[int],
        outlook: "_Outlook",
        seconds: dict[int, float],
        total: dict[int, float],
    ) -> int | None:
        """The shortest length whose cost is not known with so many lanes, if it or a longer one may be the best."""
        least = min(total.values())
        unknown = []
        for length in lengths:
            calls = self._costs.calls(key[0], length)
            if calls <= TRIES and not (calls > 1 and total.get(length, 0.0) > POOR * least):
                unknown.append(length)
        for length in unknown:
            shorter = [(each, seconds[each]) for each in lengths if 0 < each < length and each in seconds]
            if _least_seconds(length, shorter) * outlook.rounds(length, self._costs.tail(key, length)) < least:
                return unknown[0]
        return None


@dataclass(frozen=True)
class _Round:
    """The one under way."""

    cell: Cell
    length: int
    scale: float
    """of its seconds, which are those of a cell's full lanes then"""
    enough: float | None = None
    """of a trial: seconds in which the best length does as much"""


@dataclass(frozen=True)
class _Advance:
    """AR steps that a round commits of an image."""

    reach: list[float]
    """probabilities that there are at least 1, 2, …"""
    mean: float
    variance: float
    whole: float
    """the probability that all drafts are accepted"""


@dataclass(frozen=True)
class _Outlook:
    """What is left of a request, and what each length would do for it."""

    advance: dict[int, _Advance]
    images: int
    left: float
    """AR steps of the images under way, on average"""
    longest: int
    """of the one that has most"""
    waiting: int
    behind: bool

    def rounds(self, length: int, tail: float) -> float:
        """Rounds until the images under way are done.

        Some are done before the slowest of them; a round counts as `tail` by then. While others wait that is no loss.
        """
        advance = self.advance[length]
        # The last round of an image may reach further than it has to.
        past = (advance.variance / advance.mean + advance.mean - 1) / 2
        mean = (self.left + past) / advance.mean
        if not self.together:
            return mean
        spread = math.sqrt(self.longest * advance.variance / advance.mean**3)
        slowest = (self.longest + past) / advance.mean + _largest_normal(self.images) * spread
        return mean + tail * (slowest - mean)

    @property
    def together(self) -> bool:
        """Whether the slowest image decides when all are done."""
        return self.images > 1 and not self.waiting

    def margin(self, length: int) -> float:
        """By how much a length has to look better than the target alone."""
        if length == 0:
            return 1.0
        return APART if self.together and self.advance[length].variance else GAIN

    def completions(self, length: int) -> float:
        """How likely a round has one."""
        return 1 - self.advance[length].whole ** self.images

    def worth(self, length: int, best: int) -> float:
        """AR steps that one round of another length than the best does for the request.

        In lanes that keep step with each other only those count that every image makes.
        """
        advance = self.advance[length]
        if best or self.waiting:
            return advance.mean
        return sum(each**self.images for each in advance.reach)


def _advances(rates: list[float], longest: int) -> dict[int, _Advance]:
    """By length up to `longest`, where AR step after step is accepted whole at such `rates`, and then as the last."""
    found = {0: _Advance([1.0], 1.0, 0.0, 1.0)}
    reach, mean, square, reached = [], 0.0, 0.0, 1.0
    for count in range(1, longest + 1):
        reach.append(reached)
        mean += reached
        square += (2 * count - 1) * reached
        reached *= rates[min(count, len(rates)) - 1]
        if count & (count - 1) == 0:
            found[count] = _Advance(reach[:], mean, max(square - mean**2, 0.0), reached)
    return found


def _least_seconds(length: int, shorter: list[tuple[int, float]]) -> float:
    """What a round takes at least if shorter ones `(length, seconds)`, ascending, take so much."""
    if len(shorter) < 2:
        return shorter[0][1] if shorter else 0.0
    (less, cheaper), (more, dearer) = shorter[-2:]
    return dearer + (length - more) / (more - less) * max(dearer - cheaper, 0.0)


@lru_cache
def _largest_normal(count: int) -> float:
    """The mean of the largest of so many standard normal numbers (Blom's approximation)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
