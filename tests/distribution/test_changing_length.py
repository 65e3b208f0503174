"""A draft length that changes on the way keeps the target's distribution, unless it looks at noise yet to be used."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from decoding import decode
from toy import DIM, IMAGE_CHAIN, TableDraws, toy_setup
from twosample import sliced_p_value

from specdec_rt.decode.draft_length import DraftLengthController
from specdec_rt.noise import Purpose

MANY, FEW = 20_000, 1_500
"""Images of four tokens that are decoded in many slots; of two, one by one."""


def images_of(images, seed, make_controller=None, *, tokens=4, mode="exact", slots=MANY):
    """`[N, L D]`, and the counters; `make_controller` is given the random numbers."""
    draws, setup = TableDraws(seed, images, tokens), toy_setup(tokens, mode=mode)
    if make_controller is not None:
        setup = replace(setup, controller=make_controller(draws))
    made = decode(setup, np.zeros(images, np.int64), draws, slots=slots)
    return made.tokens.reshape(images, -1), made.counters


class RestlessController:
    """After a rejection the target goes on alone, after acceptance drafts get longer."""

    def __init__(self, draws):
        self.clock = itertools.count().__next__
        self.draws = draws
        self.length, self.image = 1, -1

    def begin_batch(self, slots):
        """As in `DraftLengthController`."""

    def choose(self, ar_step, slots, waiting, *, draft_is_behind):  # noqa: ARG002  # as in `DraftLengthController`
        """As in `DraftLengthController`."""
        self.image += int(ar_step[0] == 0)
        return min(self.length, 2 - int(ar_step[0]))

    def observe(self, record):
        """As in `DraftLengthController`."""
        self.length = 0 if record.rejected else max(2 * self.length, 1)


class PeekingController(RestlessController):
    """What must not be: the target makes those tokens alone whose noise points to one side."""

    def choose(self, ar_step, slots, waiting, *, draft_is_behind):
        """As in `DraftLengthController`."""
        super().choose(ar_step, slots, waiting, draft_is_behind=draft_is_behind)
        normals = self.draws.normal(np.array([self.image]), ar_step, Purpose.CHAIN, IMAGE_CHAIN.length + 1, DIM)
        return int(normals[0, -1, 0] > 0)


@pytest.fixture(scope="module")
def target_images():
    return images_of(MANY, 1, mode="target")[0]


@pytest.fixture(scope="module")
def target_pairs():
    """Images of two tokens."""
    return images_of(MANY, 1, tokens=2, mode="target")[0]


def test_the_controller_that_ships_draws_from_the_target(target_images):
    """Whatever rounds seem to cost: any length may look like the fastest at any time."""
    rng = np.random.default_rng(5)

    def controller(_):
        now = itertools.accumulate(iter(lambda: 0.1 * rng.random(), None))
        estimate = lambda seconds: rng.exponential()  # noqa: E731, ARG005  # of no seconds at all
        return DraftLengthController(np.arange(5), 4, clock=now.__next__, estimate=estimate, hold_rounds=0)

    images, counters = images_of(MANY, 2, controller, slots=100)
    taken = counters.draft_lengths
    assert all(taken[length] > 0.05 * taken.total() for length in (0, 1, 2, 4)), taken
    assert 0.1 < counters.accepted / (counters.accepted + counters.rejected) < 0.9
    assert sliced_p_value(images, target_images) > 0.01


def test_lengths_that_follow_from_earlier_verdicts_draw_from_the_target(target_pairs):
    images, counters = images_of(FEW, 3, RestlessController, tokens=2, slots=1)
    taken = counters.draft_lengths
    assert min(taken[length] for length in (0, 1, 2)) > 0.05 * taken.total(), taken
    assert sliced_p_value(images, target_pairs) > 0.01


def test_lengths_that_follow_from_the_tokens_own_noise_are_seen(target_pairs):
    images, _ = images_of(FEW, 3, PeekingController, tokens=2, slots=1)
    assert sliced_p_value(images, target_pairs) < 1e-6


def test_the_draft_alone_is_seen(target_images):
    assert sliced_p_value(images_of(FEW, 4, mode="draft")[0], target_images) < 1e-6
