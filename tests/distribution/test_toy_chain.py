"""`exact` keeps the target's distribution on a toy chain; four ways of getting it wrong are seen."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from broken import ReusingDraws
from toy import DIM, TOY_CHAIN, TableDraws, toy_head
from twosample import sliced_p_value

from specdec_rt.acceptance import block_verify, prefix_acceptance, running_log_weight, step_divergence
from specdec_rt.decode.head import Trajectory
from specdec_rt.decode.reference import verify
from specdec_rt.noise import TokenNoise

TOKENS, FEWER = 200_000, 100_000
"""What is right has to pass with more tokens than what is wrong is seen with."""
CHUNK = 20_000
N = TOY_CHAIN.length
TARGET, DRAFT = toy_head(TOY_CHAIN, draft=False), toy_head(TOY_CHAIN, draft=True)
Z, GUIDANCE = np.zeros((1, CHUNK, DIM), np.float32), np.ones((1, CHUNK))


@dataclass(frozen=True)
class Drafts:
    """Chains of a draft, and the noise of their tokens."""

    noise: TokenNoise
    normals: np.ndarray
    drawn: Trajectory

    @classmethod
    def of(cls, head, noise):
        """Drawn by this head."""
        normals = noise.chain(N, DIM)
        return cls(noise, normals, head.sample(Z, GUIDANCE, normals))

    def verified(self, noise):
        """Tokens, their means, and which drafts were accepted; `noise` are the draws that verification sees."""
        return verify(TARGET, Z, GUIDANCE, self.drawn, self.normals, noise)

    def target_mean(self):
        return TARGET.means(self.drawn.path, Z, GUIDANCE)


def shown(token, mean):
    """`[R, 2 D]` the chain's last state, and the mean that is shown for it."""
    return np.concatenate([token, mean], axis=1)


def in_chunks(draw, seed, tokens=TOKENS):
    """`[tokens, 2 D]`: what `draw` makes of the noise of each chunk of tokens."""
    keys = np.zeros(CHUNK, np.int64), np.arange(CHUNK)
    chunks = range(tokens // CHUNK)
    return np.concatenate([draw(TokenNoise(TableDraws([seed, chunk], 1, CHUNK), *keys)) for chunk in chunks])


def alone(head):
    """Draws with one head and no verification."""

    def draw(noise):
        drawn = Drafts.of(head, noise).drawn
        return shown(drawn.token, drawn.mean[:, -1])

    return draw


# --- four broken variants --------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoppingNoise(TokenNoise):
    """After the first prefix whose uniform is not under its `acceptance [R, n + 1]` no uniform is."""

    limits: np.ndarray

    def acceptance(self, count, attempt=0):
        """As in `TokenNoise`."""
        uniform = super().acceptance(count, attempt)
        return np.where(np.logical_and.accumulate(uniform < self.limits, axis=1), uniform, 1.0)


def stops_at_the_first_failure(noise):
    """The longest prefix that passes counts, whatever failed before it."""
    drafts = Drafts.of(DRAFT, noise)
    mean, target_mean = drafts.drawn.mean, drafts.target_mean()
    distance, log_ratio = step_divergence(drafts.normals[:, 1:], mean, target_mean, TOY_CHAIN.std)
    limits = prefix_acceptance(running_log_weight(log_ratio), distance)
    return shown(*drafts.verified(StoppingNoise(**vars(noise), limits=limits))[:2])


def reuses_the_drafts_noise(noise):
    """What rejects a draft depends on its noise: used again, that noise is not normal any more."""
    return shown(*Drafts.of(DRAFT, noise).verified(replace(noise, draws=ReusingDraws(noise.draws)))[:2])


def draws_no_residual(noise):
    """The rejected state has to come from what the draft leaves of the target, not from the target itself."""
    drafts = Drafts.of(DRAFT, noise)
    uniform = noise.acceptance(N + 1)
    verdict = block_verify(drafts.normals[:, 1:], drafts.drawn.mean, drafts.target_mean(), TOY_CHAIN.std, uniform)
    rows = np.flatnonzero(verdict.accepted_steps < N)
    begin = verdict.accepted_steps[rows]
    normals = np.concatenate([drafts.drawn.path[rows, begin][:, None], noise.pick(rows).completion(N, DIM)], axis=1)
    redrawn = TARGET.sample(Z[:, rows], GUIDANCE[:, rows], normals, begin=begin)
    token, mean = drafts.drawn.token.copy(), drafts.target_mean()[:, -1]
    token[rows], mean[rows] = redrawn.token, redrawn.mean[:, -1]
    return shown(token, mean)


def shows_the_drafts_mean(noise):
    """An accepted token is the target's too, and so is the mean that is shown for it."""
    drafts = Drafts.of(DRAFT, noise)
    token, mean, accepted = drafts.verified(noise)
    return shown(token, np.where(accepted[:, None], drafts.drawn.mean[:, -1], mean))


# --- what is seen ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target_tokens():
    return in_chunks(alone(TARGET), seed=1)


def test_exact_draws_from_the_target(target_tokens):
    accepted = []

    def draw(noise):
        token, mean, kept = Drafts.of(DRAFT, noise).verified(noise)
        accepted.append(kept.mean())
        return shown(token, mean)

    tokens = in_chunks(draw, seed=2)
    assert 0.2 < np.mean(accepted) < 0.9  # both branches really ran
    assert sliced_p_value(tokens, target_tokens) > 0.01


@pytest.mark.parametrize(
    "variant",
    [stops_at_the_first_failure, reuses_the_drafts_noise, draws_no_residual, shows_the_drafts_mean],
    ids=lambda variant: variant.__name__.replace("_", " "),
)
def test_a_broken_variant_is_seen(target_tokens, variant):
    assert sliced_p_value(in_chunks(variant, seed=3, tokens=FEWER), target_tokens) < 1e-6


def test_the_draft_alone_is_seen(target_tokens):
    assert sliced_p_value(in_chunks(alone(DRAFT), seed=4, tokens=FEWER), target_tokens) < 1e-6
