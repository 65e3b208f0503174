"""A draft length that changes on the way keeps the target's distribution, unless it looks at noise yet to be used."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from specdec_rt.decode.loop import Decoder
from specdec_rt.decode.round_costs import RoundCosts
from toy import DIM, IMAGE_CHAIN, TableNoise, toy_session
from twosample import sliced_p_value

from specdec_rt.decode import pace as shipped
from specdec_rt.decode.stats import Counters
from specdec_rt.noise import Purpose

MANY, FEW = 20_000, 1_500
"""Images of four tokens that are decoded in many lanes; of two, one by one."""


def decode(images, seed, make_pace=None, *, tokens=4, mode="exact", lanes=MANY):
    """Images `[N, L D]`, and the counters."""
    noise, counters, session = TableNoise(seed, images, tokens), Counters(), toy_session(tokens)
    pace = None if make_pace is None else make_pace(noise)
    session = replace(session, plan=replace(session.plan, mode=mode), pace=pace)
    labels, keys = np.zeros(images, np.int64), np.arange(images)
    shown = Decoder(session, noise, labels, keys, counters, lambda _: None, lanes=lanes).run()
    return shown.reshape(images, -1), counters


class Restless:
    """In the place of a pace: after a rejection the target goes on alone, after acceptance drafts get longer."""

    clock = staticmethod(itertools.count().__next__)

    def __init__(self, noise):
        self.noise = noise
        self.length, self.image = 1, -1

    def begin(self, lanes):
        """As a pace's."""

    def choose(self, step, lanes, waiting, *, behind):  # noqa: ARG002  # as a pace's
        self.image += int(step[0] == 0)
        return min(self.length, 2 - int(step[0]))

    def note(self, seconds, completion, accepted, rejected):  # noqa: ARG002
        self.length = 0 if rejected else max(2 * self.length, 1)

    def note_catch_up(self, seconds):
        """As a pace's."""


class Peeking(Restless):
    """What must not be: the target makes those tokens alone whose noise points to one side."""

    def choose(self, step, lanes, waiting, *, behind):
        super().choose(step, lanes, waiting, behind=behind)
        normals = self.noise.normal(np.array([self.image]), step, Purpose.CHAIN, IMAGE_CHAIN.length + 1, DIM)
        return int(normals[0, -1, 0] > 0)


@pytest.fixture(scope="module")
def target_images():
    return decode(MANY, 1, mode="target")[0]


@pytest.fixture(scope="module")
def target_pairs():
    """Images of two tokens."""
    return decode(MANY, 1, tokens=2, mode="target")[0]


def test_the_pace_that_ships_draws_from_the_target(target_images, monkeypatch):
    """Whatever rounds seem to cost: any length may look like the fastest at any time."""
    rng = np.random.default_rng(5)
    monkeypatch.setattr(RoundCosts, "seconds", lambda *_: rng.exponential())
    monkeypatch.setattr(shipped, "KEPT", 0)

    def pace(_):
        now = itertools.accumulate(iter(lambda: 0.1 * rng.random(), None))
        return shipped.Pace(np.arange(5), 4, uneven=False, clock=now.__next__)

    images, counters = decode(MANY, 2, pace, lanes=100)
    taken = counters.draft_lengths
    assert all(taken[length] > 0.05 * taken.total() for length in (0, 1, 2, 4)), taken
    assert 0.1 < counters.accepted / (counters.accepted + counters.rejected) < 0.9
    assert sliced_p_value(images, target_images) > 0.01


def test_lengths_that_follow_from_earlier_verdicts_draw_from_the_target(target_pairs):
    images, counters = decode(FEW, 3, Restless, tokens=2, lanes=1)
    taken = counters.draft_lengths
    assert min(taken[length] for length in (0, 1, 2)) > 0.05 * taken.total(), taken
    assert sliced_p_value(images, target_pairs) > 0.01


def test_lengths_that_follow_from_the_tokens_own_noise_are_seen(target_pairs):
    images, _ = decode(FEW, 3, Peeking, tokens=2, lanes=1)
    assert sliced_p_value(images, target_pairs) < 1e-6


def test_the_draft_alone_is_seen(target_images):
    assert sliced_p_value(decode(FEW, 4, mode="draft")[0], target_images) < 1e-6
