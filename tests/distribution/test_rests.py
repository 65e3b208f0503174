"""Tokens whose chains are drafted again after a rejection have the target's distribution, to their last attempt."""

from dataclasses import replace

import numpy as np
import pytest
from specdec_rt.decode.loop import Decoder
from toy import DIM, TableNoise, self_session
from twosample import sliced_p_value

from specdec_rt.acceptance import BlockVerdict
from specdec_rt.chain import ChainSpec, compile_chain
from specdec_rt.decode import redraft, verify
from specdec_rt.decode.stats import Counters

IMAGES = 40_000
"""Of one token."""
CHAIN = compile_chain(ChainSpec(steps=16, t_max=960, drop_last=1, final_std=0.15, emit="mean"))
EVALUATED = 3


class Attempts(TableNoise):
    """Counts the attempts that are judged."""

    def __init__(self, seed):
        super().__init__(seed, IMAGES, 1)
        self.judged = []

    def uniform(self, image, token, purpose, count, attempt=0):
        """As in `Draws`."""
        if count == CHAIN.length + 1:
            self.judged.append(len(image))
        return super().uniform(image, token, purpose, count, attempt)


class OneNoise(Attempts):
    """What must not be: every attempt draws what the first one drew."""

    def normal(self, image, token, purpose, steps, dim, attempt=0):  # noqa: ARG002
        """As in `Draws`."""
        return super().normal(image, token, purpose, steps, dim)


def decode(noise, mode):
    session = self_session(CHAIN, EVALUATED)
    session = replace(session, plan=replace(session.plan, mode=mode))
    keys = np.arange(IMAGES)
    made = Decoder(session, noise, np.zeros(IMAGES, np.int64), keys, Counters(), lambda _: None, lanes=IMAGES)
    return np.concatenate([made.run().reshape(IMAGES, DIM), made._fed.reshape(IMAGES, DIM)], axis=1)


@pytest.fixture(scope="module")
def target_tokens():
    return decode(Attempts(1), "target")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(redraft, "LEAST", 2)


def test_exact_draws_from_the_target(target_tokens):
    noise = Attempts(2)
    tokens = decode(noise, "exact")

    assert len(noise.judged) > 3
    assert noise.judged[2] > 0.05 * IMAGES  # many are rejected again
    assert sliced_p_value(tokens, target_tokens) > 0.01


def test_a_rest_that_is_taken_unjudged_is_seen(target_tokens, monkeypatch):
    def accept(chain, proposal, target_mean, uniform, begin):  # noqa: ARG001
        whole = np.full(len(target_mean), chain.length)
        return verify.ExactJudgement(BlockVerdict(whole, np.zeros(len(whole))), target_mean)

    monkeypatch.setattr(verify, "judge_rest", accept)
    assert sliced_p_value(decode(Attempts(3), "exact"), target_tokens) < 1e-6


def test_noise_that_is_used_again_is_seen(target_tokens):
    assert sliced_p_value(decode(OneNoise(4), "exact"), target_tokens) < 1e-6
