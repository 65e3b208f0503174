"""The choice of a draft length, in worlds where it is known what a round costs and what is accepted."""

from collections import Counter

import numpy as np
import pytest

from specdec_rt.ar_schedule import cosine_schedule, raster_schedule
from specdec_rt.decode.draft_length import DraftLengthController, RoundRecord

CAUSAL, MAR = raster_schedule(49).known, cosine_schedule(49, 24).known
LONG_MAR = cosine_schedule(256, 64).known
"""Sets of 1 to 7 tokens."""


class World:
    """Rounds on a clock of their own: a target's step is 1 s with 64 slots.

    A draft takes `draft` s per AR step, verification `verify` s; `flat` is the share of all costs that does not
    depend on how many slots or AR steps there are; where it is 1, slots come in the sizes that steps are captured for.
    `per_token` is the share that grows with the set of tokens that an AR step makes.
    The first round of a kind makes buffers, or captures.
    """

    def __init__(
        self, *, draft, verify=0.3, rate=0.8, flat=0.5, per_token=0.0, known=CAUSAL, longest=8, noise=0.05, seed=0
    ):
        self.draft, self.verify, self.rate, self.flat, self.noise = draft, verify, rate, flat, noise
        self.per_token = per_token
        self.sizes = np.diff(known)
        self.size = self.sizes[0]
        self.now, self.made = 0.0, set()
        self.rng = np.random.default_rng(seed)
        self.controller = DraftLengthController(known, longest, clock=lambda: self.now)

    def slots(self, images):
        return next(size for size in (1, 4, 16, 64) if size >= images) if self.flat == 1 else images

    def share(self, size, most):
        return self.flat + (1 - self.flat) * size / most

    def seconds(self, length, slots):
        drafted = length * self.draft + self.verify * self.share(length, 1)
        growth = 1 - self.per_token + self.per_token * self.size / self.sizes.mean()
        return self.share(slots, 64) * (drafted if length else 1.0) * growth

    def pass_time(self, seconds, kind=None):
        """The clock goes on; sometimes another process has the machine for a while."""
        seconds *= 1 + self.noise * abs(self.rng.standard_normal()) + 2 * (self.rng.random() < self.noise / 20)
        if kind not in self.made:
            self.made.add(kind)
            seconds *= 5 if self.flat == 1 else 1.3
        self.now += seconds
        return seconds

    def request(self, batch, images=None, length=None):
        """Seconds, and the slots' rounds by length; `length` where it is fixed."""
        waiting, step, behind = (images or batch) - batch, np.zeros(batch, int), False
        started, taken = self.now, Counter()
        self.controller.begin_batch(self.slots(batch))
        while (step < len(self.sizes)).any():
            going = np.flatnonzero(step < len(self.sizes))
            slots, left = self.slots(len(going)), len(self.sizes) - step[going]
            self.size = self.sizes[int(step[going].mean())]
            chosen, catch_up = length, 0.0
            if length is None:
                chosen = self.controller.choose(step[going], slots, waiting, draft_is_behind=behind)
                assert chosen <= left.max()
                if chosen and behind:
                    catch_up = self.pass_time(0.2 * self.seconds(0, slots))
            taken[chosen] += 1
            behind = not chosen
            seconds = self.pass_time(self.seconds(chosen, slots), (chosen, slots))
            completion, accepted, rejected = 0.0, 0, 0
            if chosen:
                judged = [self.judge(step[image], min(chosen, count)) for image, count in zip(going, left, strict=True)]
                _, accepted, rejected = np.sum(judged, axis=0)
                step[going] += np.minimum([kept + 1 for kept, *_ in judged], np.minimum(chosen, left))
                if rejected:
                    completion = self.pass_time(self.rng.random(rejected).max() * self.seconds(0, slots), "completion")
            else:
                step[going] += 1
            if length is None:
                record = RoundRecord(chosen, seconds, completion, catch_up, int(accepted), int(rejected))
                self.controller.observe(record)
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


def test_lengths_are_powers_of_two_up_to_the_limit():
    assert DraftLengthController(CAUSAL, 8).lengths == (0, 1, 2, 4, 8)
    assert DraftLengthController(CAUSAL, 6).lengths == (0, 1, 2, 4)
    assert DraftLengthController(CAUSAL, 1).lengths == (0, 1)


# --- what pays is found --------------------------------------------------------------------------------


def test_a_draft_that_is_nearly_free_and_nearly_right_drafts_far():
    world = World(draft=0.03, rate=0.97, flat=1.0).warm(1).warm(1)
    seconds, taken = world.request(1)
    assert most_taken(taken) == 8
    assert world.request(1, length=0)[0] > 5 * seconds


def test_a_middling_draft_drafts_some_way():
    _, taken = World(draft=0.15, verify=0.5, rate=0.8).warm(1).warm(1).request(1)
    assert most_taken(taken) in (2, 4)


def test_a_draft_of_one_step_is_used_if_it_pays():
    slow, fast = (World(draft=draft, rate=0.8, longest=1, flat=1.0).warm(1) for draft in (0.9, 0.1))
    assert most_taken(slow.request(1)[1]) == 0
    assert most_taken(fast.request(1)[1]) == 1


def test_drafting_that_pays_on_average_is_used_while_images_wait():
    """Slots that are free take the next image, so that fast images do not wait for slow ones."""
    options = {"draft": 0.1, "verify": 0.3, "rate": 0.75, "flat": 1.0}
    world = World(**options)
    world.request(64, images=256)
    seconds, taken = world.request(64, images=256)
    assert taken[0] <= 0.2 * taken.total()
    assert seconds < 0.95 * world.request(64, images=256, length=0)[0]


def test_a_draft_that_is_rarely_right_in_large_sets_is_still_found_for_small_ones():
    world = World(draft=0.05, rate=0.95, known=LONG_MAR).warm(4)
    assert world.request(4, length=0)[0] > 1.3 * np.mean([world.request(4)[0] for _ in range(4)])


# --- what does not pay is left alone -------------------------------------------------------------------


@pytest.mark.parametrize("known", [CAUSAL, MAR], ids=["causal", "mar"])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_draft_as_slow_as_the_target_is_left_alone(known, batch):
    world = World(draft=1.0, known=known).warm(batch)
    _, taken = world.request(batch)
    assert taken[0] >= 0.97 * taken.total()


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


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("rate", [0.5, 0.95])
def test_it_is_not_much_slower_than_the_target_alone_where_large_sets_cost_more(rate, batch):
    """Rounds early in an image, which are cheap, say nothing of an AR step at its end."""
    world = World(draft=0.3, rate=rate, per_token=0.8, known=LONG_MAR).warm(batch)
    mine, alone = (sum(world.request(batch, length=length)[0] for _ in range(6)) for length in (None, 0))
    assert alone >= 0.95 * mine


@pytest.mark.parametrize("batch", [16, 64])
def test_it_is_not_much_slower_than_the_target_alone_while_images_wait(batch):
    """Sets are small at first, where drafting pays for each image; later the slowest decides all the same."""
    mine = alone = 0.0
    for seed in range(4):
        world = World(draft=0.05, rate=0.5, flat=1.0, known=MAR, noise=0.01, seed=seed).warm(batch)
        mine += sum(world.request(batch, images=2 * batch)[0] for _ in range(6))
        alone += sum(world.request(batch, images=2 * batch, length=0)[0] for _ in range(6))
    assert alone >= 0.95 * mine


def test_fast_images_that_have_to_wait_for_slow_ones_are_no_gain():
    """At 64 flat slots a round is 1.2 times as fast on average, but the slowest image decides when a batch ends."""
    batch, options = 64, {"draft": 0.2, "verify": 0.3, "rate": 0.75, "flat": 1.0}
    alone, fixed = (World(**options).request(batch, length=length)[0] for length in (0, 4))
    _, taken = World(**options).warm(batch).request(batch)
    assert fixed > alone
    assert taken[0] >= 0.9 * taken.total()


# --- trying --------------------------------------------------------------------------------------------


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
    controller = DraftLengthController(CAUSAL, 1)
    controller.begin_batch(1)
    seen = []
    for step, seconds in enumerate([90.0, *[1.0] * 15, 90.0, 0.2, 0.2, 0.2]):
        seen.append(controller.choose(np.array([step]), 1, 0, draft_is_behind=False))
        controller.observe(RoundRecord(seen[-1], seconds, 0.0, 0.0, accepted=seen[-1], rejected=0))
    assert seen[0] == 0
    assert seen[-2:] == [1, 1]


def test_a_process_that_is_slow_at_first_is_seen_through():
    """All rounds of its first half second take three times as long: the target's, which come first of all."""
    world = World(draft=0.6, rate=0.8, noise=0.0)
    seconds = world.seconds
    world.seconds = lambda length, slots: seconds(length, slots) * (3.0 if world.now < 0.5 else 1.0)
    for _ in range(2):
        world.request(1)
    _, taken = world.request(1)
    assert taken[0] >= 0.9 * taken.total()


def test_what_is_known_of_one_batch_size_is_not_taken_for_another():
    """Speculation that pays at 1 and not at 64, whichever came first."""
    for first, second in ((1, 64), (64, 1)):
        world = World(draft=0.2, verify=0.1, rate=0.85, flat=0.0)
        world.seconds = lambda length, slots: (1 + slots / 64) * (1 if length == 0 else 0.3 + 0.02 * slots * length)
        found = {batch: most_taken(world.warm(batch).request(batch)[1]) for batch in (first, second)}
        assert found[64] == 0
        assert found[1] > 0


@pytest.mark.parametrize(("slots", "tried"), [(8, True), (7, False)])
def test_nothing_is_tried_once_a_batch_has_lost_slots(slots, tried):
    controller = DraftLengthController(CAUSAL, 8)
    controller.begin_batch(8)
    seen = []
    for step in range(24):
        now = 8 if step < 16 else slots  # the target comes first for a third of an image
        seen.append(controller.choose(np.array([step]), now, 0, draft_is_behind=False))
        controller.observe(RoundRecord(seen[-1], 1.0, 0.0, 0.0, accepted=0, rejected=seen[-1]))
    assert any(seen) == tried


def test_any_length_may_look_like_the_fastest_where_estimates_are_random():
    """As the tests of the distribution need it: lengths that change all the time."""
    world, rng = World(draft=0.3, known=np.arange(5), longest=4), np.random.default_rng(0)
    world.controller = DraftLengthController(
        np.arange(5), 4, clock=lambda: world.now, estimate=lambda _: rng.exponential(), hold_rounds=0
    )
    _, taken = world.request(16, images=1600)
    assert all(taken[length] > 0.05 * taken.total() for length in (0, 1, 2, 4)), taken
