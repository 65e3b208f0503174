"""Tokens whose chains are drafted again after a rejection have the target's distribution, to their last attempt."""

from dataclasses import replace

import numpy as np
import pytest
from decoding import decode
from toy import TableDraws, self_draft_setup
from twosample import sliced_p_value

from specdec_rt.chain import ChainSpec, compile_chain
from specdec_rt.decode.exact import ExactVerifier

IMAGES, AT_A_TIME = 40_000, 4_000
"""Of one token each."""
CHAIN = compile_chain(ChainSpec(steps=16, t_max=960, drop_last=1, final_std=0.15, emit="mean"))
DRAFT_STEPS, MIN_RESUME_STEPS = 3, 2


class OneNoise(TableDraws):
    """What must not be: every attempt draws what the first one drew."""

    def normal(self, image, token, purpose, steps, dim, attempt=0):  # noqa: ARG002  # as in `Draws`
        """As in `Draws`."""
        return super().normal(image, token, purpose, steps, dim)


class CountingVerifier(ExactVerifier):
    """Counts the rows that are judged in each attempt."""

    def __init__(self, session, plan):
        super().__init__(session, plan)
        self.judged = []

    def judge(self, speculation, noise, token_noise, attempt=0):
        """As in `Verifier`."""
        self.judged += [0] * (attempt + 1 - len(self.judged))
        self.judged[attempt] += len(noise)
        return super().judge(speculation, noise, token_noise, attempt)


class LenientVerifier(ExactVerifier):
    """What must not be: the rest of a chain is accepted whatever it is."""

    def judge(self, speculation, noise, token_noise, attempt=0):
        """As in `Verifier`."""
        verdict, rows = super().judge(speculation, noise, token_noise, attempt), len(noise)
        if not attempt:
            return verdict
        return replace(verdict, accepted=np.ones(rows, np.bool_), accepted_steps=np.full(rows, CHAIN.length))


def tokens_of(draws, mode="exact", verifier=None):
    """`[IMAGES, 2 D]` what each token shows, and the state that it stands for."""
    setup = self_draft_setup(CHAIN, DRAFT_STEPS, mode=mode, min_resume_steps=MIN_RESUME_STEPS)
    if verifier is not None:
        setup = replace(setup, verifier=verifier(setup.session, setup.plan))
    parts = np.split(np.arange(IMAGES), IMAGES // AT_A_TIME)
    made = [decode(setup, np.zeros(AT_A_TIME, np.int64), draws, images=images) for images in parts]
    shown = [np.concatenate([each.tokens[:, 0], each.batch.tokens[:, 0]], axis=1) for each in made]
    return np.concatenate(shown), setup.verifier


@pytest.fixture(scope="module")
def target_tokens():
    return tokens_of(TableDraws(1, IMAGES, 1), "target")[0]


def test_exact_draws_from_the_target(target_tokens):
    tokens, verifier = tokens_of(TableDraws(2, IMAGES, 1), verifier=CountingVerifier)

    assert len(verifier.judged) > 3
    assert verifier.judged[2] > 0.05 * IMAGES  # many are rejected again
    assert sliced_p_value(tokens, target_tokens) > 0.01


def test_the_rest_of_a_chain_that_is_accepted_unjudged_is_seen(target_tokens):
    tokens, _ = tokens_of(TableDraws(3, IMAGES, 1), verifier=LenientVerifier)
    assert sliced_p_value(tokens, target_tokens) < 1e-6


def test_noise_that_is_used_again_is_seen(target_tokens):
    assert sliced_p_value(tokens_of(OneNoise(4, IMAGES, 1))[0], target_tokens) < 1e-6
