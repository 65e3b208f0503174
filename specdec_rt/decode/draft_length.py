"""Choosing the draft length of each round from what earlier rounds cost and how many tokens were accepted.

The policy, kept apart for each `CostBucket` (rounds with about as many slots and about as large sets of tokens):

1. Measure the target alone (length 0) first. The first round of any length is not counted: buffers are made in it.
2. A round of length γ takes its usual seconds, and those of a completion if any token is rejected.
3. It commits `1 + p + … + p^(γ-1)` AR steps of an image on average. Here `p`, the probability that a whole set of
   tokens is accepted, is the acceptance rate to the power of the set's size.
4. Of several images, some advance more slowly than that, and the slowest decides when the batch ends: allow for it.
5. Use the length with the fewest seconds per AR step. Drafting has to beat the target alone by a margin.
6. A length not tried yet costs at least what the shorter ones suggest. If that would make it the best, try the
   shortest untried one. Try known lengths again now and then, for a small share of the time.

Why the controller is told so little: in `exact` mode a changing draft length keeps the target's distribution as long
as it depends on the past alone: on clock times, and on verdicts on final tokens. The noise of tokens still to come must
have no say. Nor must verdicts on dropped drafts, whose noise is used again: if they made the target take over, some
tokens would be favoured. What the choice does change is which image a seed gives, since a token uses its noise for the
draft's chain if it is drafted, and for the target's if the target makes it alone.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specdec_rt.types import IntArray

__all__ = ["DraftLengthController", "RoundRecord", "lower_quartile"]

FIRST_TARGET_ROUNDS = 32
"""AR steps by the target alone before all else, for a third of an image at most: a new process is slow at first."""
TRIES = 2
"""Rounds after which the cost of a length is known; one more comes before them, which is not counted."""
WINDOW = 9
"""How many rounds of a length, and how many completions, are remembered."""
HALF_LIFE = 512
"""Judged tokens after which a verdict counts half."""
MARGIN = 1.05
"""How much faster than the target alone drafting has to look: estimates err, and the best of several looks too good."""
RETRY_SHARE, TARGET_RETRY_SHARE = 0.005, 0.02
"""Share of the time for trying one length again; larger for the target alone, which all others are compared with."""


@dataclass(frozen=True)
class RoundRecord:
    """What one round cost and what came of it."""

    draft_length: int
    """0: an AR step by the target alone"""
    seconds: float
    """without catching up and without completion"""
    completion_seconds: float = 0.0
    """redrawing rejected tokens; 0 where none was rejected"""
    catch_up_seconds: float = 0.0
    """the draft taking in tokens that the target made alone; 0 where there were none"""
    accepted: int = 0
    """judged tokens that were accepted; drafts that were dropped unjudged do not count"""
    rejected: int = 0


def lower_quartile(seconds: Sequence[float]) -> float:
    """What a round takes undisturbed: it is always the same work, and other processes can only make it longer."""
    return sorted(seconds)[(len(seconds) - 1) // 4]


@dataclass
class CostBucket:
    """What rounds cost that have about as many slots and about as large sets of tokens, in seconds per slot."""

    round_seconds: dict[int, deque[float]] = field(default_factory=dict)
    """of the last rounds of each length, without completions; the first round of a length is not counted"""
    completion_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    catch_up_seconds: float = 0.0
    """of the last time that the draft had to catch up"""
    total_seconds: float = 0.0
    retry_at: dict[int, float] = field(default_factory=dict)
    """the `total_seconds` from which each length may be tried again"""

    def add(self, record: RoundRecord, slots: int) -> None:
        """Take in what a round of so many slots cost."""
        length = record.draft_length
        if length not in self.round_seconds:
            self.round_seconds[length] = deque(maxlen=WINDOW)
            return
        elapsed = (record.seconds + record.completion_seconds + record.catch_up_seconds) / slots
        self.total_seconds += elapsed
        self.retry_at[length] = self.total_seconds + elapsed / (RETRY_SHARE if length else TARGET_RETRY_SHARE)
        self.round_seconds[length].append(record.seconds / slots)
        if record.completion_seconds:
            self.completion_seconds.append(record.completion_seconds / slots)
        if record.catch_up_seconds:
            self.catch_up_seconds = record.catch_up_seconds / slots

    def knows(self, length: int) -> bool:
        """Whether a length was tried often enough to tell what it costs."""
        return len(self.round_seconds.get(length, ())) >= TRIES

    def mean_completion(self, target_seconds: float) -> float:
        """The seconds of a completion, or those of an AR step by the target where none was seen.

        A completion is hardly more than such a step. If it took longer, buffers were made, or something disturbed it.
        """
        seen = self.completion_seconds or [target_seconds]
        return sum(min(each, target_seconds) for each in seen) / len(seen)


@dataclass(frozen=True)
class BatchProgress:
    """How far a batch is when a length is chosen for it."""

    images: int
    """under way"""
    steps_left: float
    """AR steps per image under way, those of waiting images included"""
    set_acceptance: float
    """the probability that all tokens of a drafted set are accepted"""
    draft_is_behind: bool


class DraftLengthController:
    """Chooses among 0 (the target alone), 1, 2, 4, … up to `longest`, and keeps what it learns for later batches.

    `known [T + 1]` are the tokens known before each AR step and at the end; `clock` gives seconds. Two settings are
    for tests: `estimate` turns the last times of a length into one, and a choice stands for `hold_rounds` more rounds.
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
        self._estimate = estimate
        self._hold_rounds, self._held = hold_rounds, 0
        self._set_sizes: list[int] = (known[1:] - known[:-1]).tolist()
        self._target_rounds_due = min(FIRST_TARGET_ROUNDS, len(self._set_sizes) // 3)
        self._accepted, self._judged = 1.0, 1.0  # optimistic: a draft never tried cannot improve its rate
        self._buckets: defaultdict[tuple[int, int], CostBucket] = defaultdict(CostBucket)
        self._bucket = CostBucket()
        self._batch_slots, self._is_full, self._length = 1, True, 0

    def begin_batch(self, slots: int) -> None:
        """Images begin in so many slots. Later, when there are fewer, nothing is tried and no cost is recorded."""
        self._batch_slots, self._held = slots, 0

    def choose(self, ar_step: IntArray, slots: int, waiting: int, *, draft_is_behind: bool) -> int:
        """The draft length of the next round, whose record `observe` must then be given.

        `ar_step [A]` are the next AR steps of the images under way, in `slots` slots; `waiting` images have not begun.
        """
        images, steps = len(ar_step), len(self._set_sizes)
        mean_step, most_left = int(ar_step.sum()) // images, steps - int(ar_step.min())
        # Costs are alike for slot counts within a factor of √2, and for set sizes within a factor of 2.
        bucket = self._buckets[round(2 * math.log2(self._batch_slots)), self._set_sizes[mean_step].bit_length()]
        self._is_full = slots == self._batch_slots
        if self._held and bucket is self._bucket and self._length <= most_left:
            self._held -= 1
        else:
            self._bucket = bucket
            steps_left = steps - mean_step + waiting / images * steps
            progress = BatchProgress(images, steps_left, self._set_acceptance(mean_step, images), draft_is_behind)
            self._length = self._decide([length for length in self.lengths if length <= most_left], progress)
        return self._length

    def observe(self, record: RoundRecord) -> None:
        """Learn from the round that was chosen last."""
        judged = record.accepted + record.rejected
        kept = 0.5 ** (judged / HALF_LIFE)
        self._accepted = self._accepted * kept + record.accepted
        self._judged = self._judged * kept + judged
        if self._is_full:
            self._bucket.add(record, self._batch_slots)

    def _set_acceptance(self, step: int, images: int) -> float:
        """The probability that all tokens of a set are accepted, for images that make AR step `step` on average."""
        coming = self._set_sizes[step:]
        # One image keeps what it gains now. Of several, the slowest counts: what the others gain on it while sets are
        # small is lost if the target has to go on alone once sets are larger.
        size = coming[0] if images == 1 else sum(coming) / len(coming)
        return float((self._accepted / self._judged) ** size)

    def _decide(self, lengths: list[int], progress: BatchProgress) -> int:
        """The best of some lengths, or one to be tried."""
        bucket = self._bucket
        self._held = 0
        if self._target_rounds_due or not bucket.knows(0):
            self._target_rounds_due = max(self._target_rounds_due - 1, 0)
            return 0
        known = [length for length in lengths if bucket.knows(length)]
        forecast = self._forecast(lengths if self._is_full else known, progress)
        best = min(forecast, key=forecast.__getitem__)
        if best not in known:
            return min(set(lengths) - set(known))
        for length in known:
            if self._is_full and length != best and bucket.retry_at[length] <= bucket.total_seconds:
                return length
        self._held = self._hold_rounds
        return best

    def _forecast(self, lengths: list[int], progress: BatchProgress) -> dict[int, float]:
        """Seconds per AR step at each length; at least so many where a length was not tried yet."""
        bucket = self._bucket
        seconds: dict[int, float] = {}
        for length in lengths:
            if bucket.knows(length):
                seconds[length] = self._estimate(bucket.round_seconds[length])
            else:
                seconds[length] = _least_seconds(length, seconds)
        completion = bucket.mean_completion(seconds[0])
        catch_up = bucket.catch_up_seconds / progress.steps_left if progress.draft_is_behind else 0.0
        return {
            length: MARGIN * (_seconds_per_step(length, each, completion, progress) + catch_up) if length else each
            for length, each in seconds.items()
        }


def _least_seconds(length: int, shorter: dict[int, float]) -> float:
    """What a round of a new length takes at least if shorter ones take so much: costs grow along a straight line."""
    half = shorter[length // 2] if length > 1 else 0.0
    quarter = shorter[length // 4] if length > 3 else half
    return half + 2 * max(half - quarter, 0.0)  # lengths double, and so does each further rise


def _seconds_per_step(length: int, round_seconds: float, completion: float, progress: BatchProgress) -> float:
    """What an AR step of the slowest image takes if rounds of this length go on to the end."""
    acceptance, images = progress.set_acceptance, progress.images
    reached = [acceptance**before for before in range(length)]  # probabilities that a round commits 1, 2, … AR steps
    mean = sum(reached)
    variance = sum((2 * before + 1) * each for before, each in enumerate(reached)) - mean**2
    # How long an image takes is about normal; of n normal numbers, the largest lies near √(2 ln n) deviations up.
    spread = math.sqrt(2 * math.log(images) * max(variance, 0.0) / (mean * progress.steps_left))
    any_rejected = 1 - acceptance ** (length * images)
    return (round_seconds + any_rejected * completion) / mean * (1 + spread)
