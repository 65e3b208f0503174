"""The choice of a draft length, in worlds where it is known what a round costs and what is accepted."""

import numpy as np
import pytest
from specdec_rt.decode.pace import Pace

from specdec_rt.ar_schedule import cosine_schedule, raster_schedule

CAUSAL, MAR = raster_schedule(49).known, cosine_schedule(49, 24).known


class World:
    """Rounds on a clock of their own: a target's step is 1 s with 64 lanes.

    A draft takes `draft` s per AR step, verification `verify` s; `flat` is the share of all costs that does not
    depend on how many lanes or AR steps there are; where it is 1, lanes come in the sizes that steps are captured for.
    The first round of a kind makes buffers, or captures.
    """

    def __init__(self, *, draft, verify=0.3, rate=0.8, flat=0.5, known=CAUSAL, longest=8, noise=0.05, seed=0):
        self.draft, self.verify, self.rate, self.flat, self.noise = draft, verify, rate, flat, noise
        self.sizes = np.diff(known)
        self.now, self.made = 0.0, set()
        self.rng = np.random.default_rng(seed)
        self.pace = Pace(known, longest, uneven=known is MAR, clock=lambda: self.now)

    def lanes(self, images):
        return next(size for size in (1, 4, 16, 64) if size >= images) if self.flat == 1 else images

    def share(self, size, most):
        return self.flat + (1 - self.flat) * size / most

    def seconds(self, length, lanes):
        drafted = length * self.draft + self.verify * self.share(length, 1)
        return self.share(lanes, 64) * (drafted if length else 1.0)

    def pass_time(self, seconds, kind=None):
        """The clock goes on; sometimes another process has the machine for a while."""
        seconds *= 1 + self.noise * abs(self.rng.standard_normal()) + 2 * (self.rng.random() < self.noise / 20)
        if kind not in self.made:
            self.made.add(kind)
            seconds *= 5 if self.flat == 1 else 1.3
        self.now += seconds
        return seconds

    def request(self, batch, images=None, length=None):
        """Seconds, and the lanes' rounds by length; `length` where it is fixed."""
        waiting, step, behind = (images or batch) - batch, np.zeros(batch, int), False
        started, taken = self.now, {}
        self.pace.begin(self.lanes(batch))
        while (step < len(self.sizes)).any():
            going = np.flatnonzero(step < len(self.sizes))
            lanes, left = self.lanes(len(going)), len(self.sizes) - step[going]
            chosen = length
            if length is None:
                chosen = self.pace.choose(step[going], lanes, waiting, behind=behind)
                if chosen and behind:
                    self.pace.note_catch_up(self.pass_time(0.2 * self.seconds(0, lanes)))
            taken[chosen] = taken.get(chosen, 0) + 1
            behind = not chosen
            seconds = self.pass_time(self.seconds(chosen, lanes), (chosen, lanes))
            completion, accepted, rejected = 0.0, 0, 0
            if chosen:
                judged = [self.judge(step[image], min(chosen, count)) for image, count in zip(going, left, strict=True)]
                _, accepted, rejected = np.sum(judged, axis=0)
                step[going] += np.minimum([kept + 1 for kept, *_ in judged], np.minimum(chosen, left))
                if rejected:
                    completion = self.pass_time(self.rng.random(rejected).max() * self.seconds(0, lanes), "completion")
            else:
                step[going] += 1
            if length is None:
                self.pace.note(seconds, completion, int(accepted), int(rejected))
            done = np.flatnonzero(step >= len(self.sizes))[:waiting]
            step[done], waiting = 0, waiting - len(done)
        return self.now - started, taken

    def judge(self, step, count):
        """AR steps kept, tokens accepted, tokens rejected."""
        accepted = 0
        for kept, size in enumerate(self.sizes[step : step + count]):
            bad = int((self.rng.random(size) > self.rate).sum())
            accepted += size - bad
            if bad:
                return kept, accepted, bad
        return count, accepted, 0

    def warm(self, batch):
        for _ in range(3):
            self.request(batch)
        return self


def most_taken(taken):
    return max(taken, key=taken.__getitem__)


def test_the_lengths_are_powers_of_two_up_to_the_limit():
    assert Pace(CAUSAL, 8, uneven=False).lengths == (0, 1, 2, 4, 8)
    assert Pace(CAUSAL, 6, uneven=False).lengths == (0, 1, 2, 4)
    assert Pace(CAUSAL, 1, uneven=False).lengths == (0, 1)


@pytest.mark.parametrize("known", [CAUSAL, MAR], ids=["causal", "mar"])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_draft_that_is_as_dear_as_the_target_is_left_alone(known, batch):
    world = World(draft=1.0, known=known).warm(batch)
    _, taken = world.request(batch)
    assert taken[0] >= 0.97 * sum(taken.values())


def test_a_draft_that_is_nearly_free_and_nearly_right_drafts_far():
    world = World(draft=0.03, rate=0.97, flat=1.0).warm(1).warm(1)
    seconds, taken = world.request(1)
    assert most_taken(taken) == 8
    assert world.request(1, length=0)[0] > 5 * seconds


def test_a_middling_draft_drafts_some_way():
    _, taken = World(draft=0.15, verify=0.5, rate=0.8).warm(1).warm(1).request(1)
    assert most_taken(taken) in (2, 4)


def test_where_the_target_drafts_itself_it_is_one_step_or_none():
    slow, fast = (World(draft=draft, rate=0.8, longest=1, flat=1.0).warm(1) for draft in (0.9, 0.1))
    assert most_taken(slow.request(1)[1]) == 0
    assert most_taken(fast.request(1)[1]) == 1


@pytest.mark.parametrize("known", [CAUSAL, MAR], ids=["causal", "mar"])
@pytest.mark.parametrize("flat", [0.0, 1.0])
@pytest.mark.parametrize("draft", [0.05, 0.3])
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_it_is_not_much_slower_than_the_target_alone(known, flat, draft, rate, batch):
    """Machines on which a small batch takes as long as a large one, or in proportion; drafts that pay or do not."""
    mine = alone = 0.0
    for seed in range(4):
        world = World(draft=draft, rate=rate, flat=flat, known=known, noise=0.01, seed=seed).warm(batch)
        mine += sum(world.request(batch)[0] for _ in range(6))  # now and then a length is tried again
        alone += sum(world.request(batch, length=0)[0] for _ in range(6))
    assert alone >= 0.95 * mine


def test_fast_images_that_have_to_wait_for_slow_ones_are_no_gain():
    """At 64 flat lanes a round is 1.2 times as fast on average, but the slowest image decides when a batch ends."""
    batch, options = 64, {"draft": 0.2, "verify": 0.3, "rate": 0.75, "flat": 1.0}
    alone, fixed = (World(**options).request(batch, length=length)[0] for length in (0, 4))
    _, taken = World(**options).warm(batch).request(batch)
    assert fixed > alone
    assert taken[0] >= 0.9 * sum(taken.values())


def test_while_images_wait_they_are():
    """As above, but lanes that are free take the next image."""
    options = {"draft": 0.1, "verify": 0.3, "rate": 0.75, "flat": 1.0}
    world = World(**options)
    world.request(64, images=256)
    seconds, taken = world.request(64, images=256)
    assert taken.get(0, 0) <= 0.2 * sum(taken.values())
    assert seconds < 0.95 * world.request(64, images=256, length=0)[0]


def test_later_requests_spend_next_to_nothing_on_trying():
    world = World(draft=0.7, rate=0.9, noise=0.0).warm(8)
    requests = [world.request(8) for _ in range(10)]
    alone, _ = world.request(8, length=0)
    assert sum(seconds for seconds, _ in requests) <= 1.025 * 10 * alone
    tried = {length for _, taken in requests for length in taken}
    assert tried > {0}  # but it is not blind


def test_it_changes_its_mind_when_costs_change():
    world = World(draft=0.9, rate=0.9, flat=1.0).warm(1)
    assert most_taken(world.request(1)[1]) == 0
    world.draft = 0.02
    for _ in range(60):
        world.request(1)
    assert most_taken(world.request(1)[1]) > 0
    world.draft = 2.0
    for _ in range(5):
        world.request(1)
    assert most_taken(world.request(1)[1]) == 0


def test_the_first_round_of_a_length_does_not_count():
    """Buffers are made in it, and steps captured: it may take as long as a whole image."""
    pace = Pace(CAUSAL, 1, uneven=False)
    pace.begin(1)
    seen = []
    for step, seconds in enumerate([90.0, *[1.0] * 15, 90.0, 0.2, 0.2, 0.2]):
        seen.append(pace.choose(np.array([step]), 1, 0, behind=False))
        pace.note(seconds, 0.0, seen[-1], 0)
    assert seen[0] == 0
    assert seen[-2:] == [1, 1]


def test_a_process_that_is_slow_at_first_is_seen_through():
    """All rounds of its first half second take three times as long: the target's, which come first of all."""
    world = World(draft=0.6, rate=0.8, noise=0.0)
    seconds = world.seconds
    world.seconds = lambda length, lanes: seconds(length, lanes) * (3.0 if world.now < 0.5 else 1.0)
    for _ in range(2):
        world.request(1)
    _, taken = world.request(1)
    assert taken[0] >= 0.9 * sum(taken.values())


def test_what_is_known_of_one_batch_size_is_not_taken_for_another():
    """Speculation that pays at 1 and not at 64, whichever came first."""
    for first, second in ((1, 64), (64, 1)):
        world = World(draft=0.2, verify=0.1, rate=0.85, flat=0.0)
        world.seconds = lambda length, lanes: (1 + lanes / 64) * (1 if length == 0 else 0.3 + 0.02 * lanes * length)
        found = {batch: most_taken(world.warm(batch).request(batch)[1]) for batch in (first, second)}
        assert found[64] == 0
        assert found[1] > 0
