"""Choosing the draft length of each round from what earlier rounds cost and how many tokens were accepted.

The policy, for rounds that have about as many slots and about as large sets of tokens (a `CostBucket`):

1. Measure the target alone (length 0) first. The first round of any length does not count: buffers are made in it.
2. A round of length γ costs its usual seconds, and those of a completion if some token is rejected.
3. It commits `1 + p₁ + p₁p₂ + …` AR steps of an image, where `pₖ`, the probability that the whole k-th drafted set is
   accepted, is the acceptance rate to the power of the set's size. Where no image waits to take a free slot, the
   slowest image decides when the batch ends, so the steps are those that it will have made.
4. Take the length with the least seconds per AR step. One that drafts has to beat the target alone by a margin.
5. A length not tried yet is taken to cost what the shorter ones suggest. If that would make it the best, try the
   shortest of the untried lengths. Try the others again now and then, for a small share of the time.

Why it sees so little: in `exact` mode a changing draft length keeps the target's distribution as long as it is chosen
from the past, that is from clock times and from verdicts on final tokens. The noise of tokens still to be made must
have no say. A dropped draft's verdict belongs to that noise, which is used again: if it made the target take over,
some tokens would be favoured. What the choice does change is the image that a seed draws, since a token that the target
makes alone uses its noise for another chain than a drafted one.
"""

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specdec_rt.types import IntArray

__all__ = ["DraftLengthController", "RoundRecord", "lower_quartile"]

FIRST_TARGET_ROUNDS = 32
"""AR steps by the target alone that come before all else, up to a third of an image: a new process is slow at first."""
TRIES = 2
"""Rounds that make a length's cost known, after the first, which does not count."""
ROUND_WINDOW, COMPLETION_WINDOW = 9, 32
"""How many of the last rounds of a length, and of the last completions, an estimate is made from."""
PRIOR_ACCEPTED, PRIOR_JUDGED = 1.0, 1.0
"""What the acceptance rate starts from."""
HALF_LIFE = 512
"""Judged tokens after which a verdict counts half."""
MARGIN = 1.05
"""How much faster than the target alone drafting has to look: estimates err, and the best of several looks too good."""
RETRY_SHARE, TARGET_RETRY_SHARE = 0.005, 0.02
"""Share of the time that trying a length again may take; and the target alone, which all others are compared with."""


@dataclass(frozen=True)
class RoundRecord:
    """What one round cost and what came of it."""

    draft_length: int
    """0: an AR step by the target alone"""
    seconds: float
    """without catching up and without completion"""
    completion_seconds: float
    """redrawing rejected tokens; 0 where none was rejected"""
    catch_up_seconds: float
    """the draft taking in tokens that the target made alone; 0 where there were none"""
    accepted: int
    """judged tokens; drafts that were dropped unjudged are neither accepted nor rejected"""
    rejected: int


def lower_quartile(seconds: Sequence[float]) -> float:
    """What a round takes when nothing disturbs it: it is always the same work, and other processes only add to it."""
    return sorted(seconds)[(len(seconds) - 1) // 4]


@dataclass
class CostBucket:
    """Costs of rounds with about as many slots and about as large sets, all in seconds per slot."""

    rounds: Counter[int] = field(default_factory=Counter)
    """how many there were of each length"""
    seconds: defaultdict[int, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=ROUND_WINDOW))
    )
    """of the last rounds of each length"""
    completion_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=COMPLETION_WINDOW))
    catch_up_seconds: float = 0.0
    """the last time the draft took in what the target had made alone"""
    total_seconds: float = 0.0
    retry_at: dict[int, float] = field(default_factory=dict)
    """`total_seconds` from which on each length may be tried again"""

    def add(self, record: RoundRecord, slots: int) -> None:
        """Take in a round of so many slots."""
        length = record.draft_length
        self.rounds[length] += 1
        if self.rounds[length] == 1:  # buffers were made in it
            return
        elapsed = (record.seconds + record.completion_seconds + record.catch_up_seconds) / slots
        self.total_seconds += elapsed
        self.retry_at[length] = self.total_seconds + elapsed / (RETRY_SHARE if length else TARGET_RETRY_SHARE)
        self.seconds[length].append(record.seconds / slots)
        if record.completion_seconds:
            self.completion_seconds.append(record.completion_seconds / slots)
        if record.catch_up_seconds:
            self.catch_up_seconds = record.catch_up_seconds / slots

    def knows(self, length: int) -> bool:
        """Whether a length was tried often enough to tell its cost."""
        return self.rounds[length] > TRIES

    def completion(self, target_seconds: float) -> float:
        """The mean of completions; where none was seen, an AR step by the target.

        Hardly any takes longer than that. If one did, a buffer was made, or another process had the machine.
        """
        seen = self.completion_seconds or [target_seconds]
        return sum(min(each, target_seconds) for each in seen) / len(seen)


@dataclass(frozen=True)
class Outset:
    """Where the images of a batch stand when a length is chosen."""

    images: int
    """under way"""
    steps_left: int
    """AR steps that they have left, on average"""
    work_left: float
    end_together: bool
    """whether free slots stay empty until the slowest image is done"""
    draft_is_behind: bool


class DraftLengthController:
    """Chooses among 0 (the target alone), 1, 2, 4, … up to `longest`; one controller serves many requests.

    `known [S + 1]` are the tokens known before each AR step, and at the end. `clock` gives seconds. For tests:
    `estimate` makes one figure of the last times of a length, and a choice stands for `hold_rounds` more rounds.
    """

    def __init__(
        self,
        known: IntArray,
        longest: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        estimate: Callable[[Sequence[float]], float] = lower_quartile,
        hold_rounds: int = 12,
    ) -> None:
        self.lengths = (0, *(1 << power for power in range(longest.bit_length())))
        self.clock = clock
        self._set_sizes: list[int] = (known[1:] - known[:-1]).tolist()
        self._estimate = estimate
        self._hold_rounds, self._held = hold_rounds, 0
        self._accepted, self._judged = PRIOR_ACCEPTED, PRIOR_JUDGED
        self._target_rounds_due = min(FIRST_TARGET_ROUNDS, len(self._set_sizes) // 3)
        self._buckets: defaultdict[tuple[int, int], CostBucket] = defaultdict(CostBucket)
        self._bucket = CostBucket()
        self._batch_slots, self._slots = 1, 1
        self._length = 0

    def begin_batch(self, slots: int) -> None:
        """Images begin in so many slots. Once fewer are left, costs are not recorded any more, and nothing is tried."""
        self._batch_slots = slots
        self._held = 0

    def choose(self, ar_step: IntArray, slots: int, waiting: int, *, draft_is_behind: bool) -> int:
        """The draft length of the next round, of which `observe` must be told.

        `ar_step [A]` are the next AR steps of the images under way, in `slots` slots; `waiting` images have not begun.
        """
        images, steps = len(ar_step), len(self._set_sizes)
        mean_step, most_left = int(ar_step.sum()) // images, steps - int(ar_step.min())
        # Costs are alike for slot counts within a factor of √2, and for set sizes within a factor of 2.
        bucket = self._buckets[round(2 * math.log2(self._batch_slots)), self._set_sizes[mean_step].bit_length()]
        self._slots = slots
        if self._held and bucket is self._bucket and self._length <= most_left:
            self._held -= 1
            return self._length
        self._bucket = bucket
        batch = Outset(
            images,
            steps - mean_step,
            steps - mean_step + waiting / images * steps,
            images > 1 and not waiting,
            draft_is_behind,
        )
        self._length = self._decide(batch, [length for length in self.lengths if length <= most_left])
        return self._length

    def observe(self, record: RoundRecord) -> None:
        """Learn from the round that the last choice was for."""
        judged = record.accepted + record.rejected
        kept = 0.5 ** (judged / HALF_LIFE)
        self._accepted = self._accepted * kept + record.accepted
        self._judged = self._judged * kept + judged
        if self._slots == self._batch_slots:
            self._bucket.add(record, self._slots)

    def _decide(self, batch: Outset, lengths: list[int]) -> int:
        """The best of these lengths, or one to be tried."""
        bucket, may_try = self._bucket, self._slots == self._batch_slots
        self._held = 0
        if self._target_rounds_due or not bucket.knows(0):
            self._target_rounds_due = max(self._target_rounds_due - 1, 0)
            return 0
        if not may_try:
            lengths = [length for length in lengths if bucket.knows(length)]
        costs = self._round_seconds(lengths)
        forecast = {length: self._seconds_per_step(length, costs, batch) for length in lengths}
        best = min(lengths, key=forecast.__getitem__)
        if not bucket.knows(best):
            return next(length for length in lengths if not bucket.knows(length))
        for length, time in bucket.retry_at.items():
            if may_try and length in lengths and length != best and time <= bucket.total_seconds:
                return length
        self._held = self._hold_rounds
        return best

    def _round_seconds(self, lengths: list[int]) -> dict[int, float]:
        """What a round of each length takes, without completion; if it was not tried yet, what it takes at least."""
        found: dict[int, float] = {}
        for length in lengths:
            if self._bucket.knows(length):
                found[length] = self._estimate(self._bucket.seconds[length])
            else:
                # Lengths double: on a straight line, the next one lies twice as far away as the last two are apart.
                half = found[length // 2] if length > 1 else 0.0
                quarter = found[length // 4] if length > 3 else half
                found[length] = half + 2 * max(half - quarter, 0.0)
        return found

    def _seconds_per_step(self, length: int, costs: dict[int, float], batch: Outset) -> float:
        """What an AR step takes if rounds of this length go on to the end; of a draft, with the margin."""
        if not length:
            return costs[0]
        mean, variance, none_rejected = _steps_per_round(self._set_acceptance(length, batch))
        seconds = costs[length] + self._bucket.completion(costs[0]) * (1 - none_rejected**batch.images)
        slowest = 1.0
        if batch.images > 1:
            # Rounds to the end are about normal; the largest of n normal numbers lies near √(2 ln n) deviations up.
            slowest += math.sqrt(2 * math.log(batch.images) * variance / (mean * batch.work_left))
        catch_up = self._bucket.catch_up_seconds if batch.draft_is_behind else 0.0
        return MARGIN * (seconds / mean * slowest + catch_up / batch.steps_left)

    def _set_acceptance(self, length: int, batch: Outset) -> list[float]:
        """Probabilities that each of the next `length` sets of an image is accepted whole."""
        rate, coming = self._accepted / self._judged, self._set_sizes[-batch.steps_left :]
        if batch.end_together:
            # What images gain on the slowest one is lost if the target goes on alone where sets are larger.
            return [rate ** max(coming)] * length
        return [rate ** coming[min(ahead, len(coming) - 1)] for ahead in range(length)]


def _steps_per_round(set_acceptance: list[float]) -> tuple[float, float, float]:
    """Mean and variance of the AR steps that a round commits of an image, and the probability that it rejects none.

    A set is committed if all before it were accepted: its own rejected tokens are redrawn.
    """
    reached, mean, square = 1.0, 0.0, 0.0
    for before, acceptance in enumerate(set_acceptance):
        mean += reached
        square += (2 * before + 1) * reached
        reached *= acceptance
    return mean, max(square - mean**2, 0.0), reached
