"""`exact` keeps the target's distribution on a toy chain; four ways of getting it wrong are seen."""

from dataclasses import replace

import numpy as np
import pytest
from specdec_rt.decode.draft import ChainNoise, Proposal
from specdec_rt.decode.verify import ResidualDraws, complete_exact, judge_exact
from toy import DIM, TOY_CHAIN, toy_head
from twosample import sliced_p_value

from specdec_rt.acceptance import BlockVerdict, prefix_acceptance, running_log_weight, step_divergence

TOKENS = 200_000
CHUNK = 20_000
N = TOY_CHAIN.length
TARGET, DRAFT = toy_head(TOY_CHAIN, draft=False), toy_head(TOY_CHAIN, draft=True)


def conditions(rows):
    return np.zeros((1, rows, 1), np.float32), np.ones((1, rows), np.float32)


def normals(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def sample(head, rng, rows):
    """One head alone: tokens, and the means that are shown for them, `[rows, 2 D]`."""
    z, guidance = conditions(rows)
    drawn = head.sample(z, guidance, normals(rng, rows, DIM), normals(rng, rows, N, DIM))
    return np.concatenate([drawn.path[:, -1], drawn.mean[:, -1]], axis=1)


def speculate(rng, rows, variant):
    """The same by speculation: drafts, judged and completed by the code that ships, bent where `variant` says."""
    z, guidance = conditions(rows)
    noise = ChainNoise(normals(rng, rows, DIM), normals(rng, rows, N, DIM))
    drawn = DRAFT.sample(z, guidance, noise.start, noise.steps)
    proposal = Proposal(noise, drawn)
    uniform = rng.random((rows, N + 1))
    judgement = judge_exact(TOY_CHAIN, proposal, TARGET.means(drawn.path, z, guidance), uniform)
    if variant == "stops at the first failure":
        judgement = replace(judgement, verdict=first_failure(proposal, judgement.target_mean, uniform))
    token = proposal.token.copy()
    mean = (proposal.drawn.mean[:, -1] if variant == "shows the draft's mean" else judgement.mean).copy()
    rejected = np.flatnonzero(~judgement.accepted)
    fresh = normals(rng, len(rejected), N, DIM)
    if variant == "reuses the draft's noise":
        fresh = noise.steps[rejected]
    if variant == "without residual":
        step = judgement.verdict.accepted_steps[rejected]
        start = proposal.drawn.path[rejected, step]
        z, guidance = conditions(len(rejected))
        drawn = TARGET.sample(z, guidance, start, fresh, begin=step)
        token[rejected], mean[rejected] = drawn.path[:, -1], drawn.mean[:, -1]
        return np.concatenate([token, mean], axis=1), judgement.accepted
    completion = complete_exact(
        TOY_CHAIN,
        proposal,
        judgement,
        rejected,
        TARGET.finish(z, guidance),
        ResidualDraws(
            coordinate=rng.random(len(rejected)),
            direction=normals(rng, len(rejected), DIM),
            fresh=fresh,
        ),
    )
    token[rejected], mean[rejected] = completion.token, completion.mean
    return np.concatenate([token, mean], axis=1), judgement.accepted


def first_failure(proposal, target_mean, uniform):
    """The verdict that stops at the first prefix whose uniform fails, instead of taking the longest that passes."""
    distance, log_ratio = step_divergence(proposal.noise.steps, proposal.drawn.mean, target_mean, TOY_CHAIN.std)
    log_weight = running_log_weight(log_ratio)
    passes = uniform < prefix_acceptance(log_weight, distance)
    steps = np.cumprod(passes, axis=1).sum(axis=1) - 1
    return BlockVerdict(steps, log_weight[np.arange(len(steps)), steps])


def in_chunks(draw, seed):
    rng = np.random.default_rng(seed)
    return np.concatenate([draw(rng, CHUNK) for _ in range(TOKENS // CHUNK)])


@pytest.fixture(scope="module")
def target_tokens():
    return in_chunks(lambda rng, rows: sample(TARGET, rng, rows), seed=1)


def test_exact_draws_from_the_target(target_tokens):
    accepted = []

    def draw(rng, rows):
        token, kept = speculate(rng, rows, "exact")
        accepted.append(kept.mean())
        return token

    tokens = in_chunks(draw, seed=2)
    assert 0.2 < np.mean(accepted) < 0.9  # both branches really ran
    assert sliced_p_value(tokens, target_tokens) > 0.01


@pytest.mark.parametrize(
    "variant",
    ["stops at the first failure", "reuses the draft's noise", "without residual", "shows the draft's mean"],
)
def test_a_broken_variant_is_seen(target_tokens, variant):
    tokens = in_chunks(lambda rng, rows: speculate(rng, rows, variant)[0], seed=3)
    assert sliced_p_value(tokens, target_tokens) < 1e-6


def test_the_raw_draft_is_seen(target_tokens):
    tokens = in_chunks(lambda rng, rows: sample(DRAFT, rng, rows), seed=4)
    assert sliced_p_value(tokens, target_tokens) < 1e-6
