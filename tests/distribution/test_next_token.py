"""The digits pairs, teacher-forced: the next token in fixed contexts, `exact` against `target`."""

from dataclasses import dataclass

import numpy as np
import pytest
from specdec_rt.decode.draft import ChainNoise, Proposal
from specdec_rt.decode.verify import ResidualDraws, complete_exact, judge_exact
from twosample import grouped_sliced_p_value

from specdec_rt import DecodeOptions, load
from specdec_rt.families.position_batch import PositionBatch

SIZES = {"fast, the bundle's guidance": (8, 500, None), "full, no guidance": (64, 2000, 1.0)}
CASES = [
    pytest.param((bundle, *sizes), id=f"{bundle}, {size}", marks=[pytest.mark.full] if "full" in size else [])
    for bundle in ("digits", "digits-mar")
    for size, sizes in SIZES.items()
]


@dataclass(frozen=True)
class Prefixes:
    """K prefixes, and how many next tokens are drawn for each."""

    target: object
    draft: object
    target_z: np.ndarray
    draft_z: np.ndarray
    guidance: np.ndarray
    draws: int

    def __len__(self):
        return self.target_z.shape[1]

    def rows(self, z, prefix):
        return np.repeat(z[:, prefix : prefix + 1], self.draws, axis=1)


@pytest.fixture(scope="module", params=CASES)
def prefixes(request):
    """Contexts of known tokens: in raster order before a place, or at random places of MAR's."""
    bundle, count, draws, guidance = request.param
    pipeline = load(bundle)
    manifest = pipeline.bundle.manifest
    rng = np.random.default_rng(0)
    labels = np.arange(count) % manifest.classes
    images = pipeline.generate(labels, seed=5, mode="target")
    context = images.tokens + manifest.chain.final_std * rng.standard_normal(images.tokens.shape, dtype=np.float32)
    session = pipeline.session(DecodeOptions(guidance=guidance, ar_steps=manifest.tokens))
    for model in session.steps.models:
        model.backbone.begin(labels)
    known = rng.integers(0, manifest.tokens, count)
    conditions = [
        next_condition(model.backbone, context, known, session.plan.random_order, rng_seed=1)
        for model in session.steps.models
    ]
    return Prefixes(
        *(model.head for model in session.steps.models), *conditions, session.plan.guidance_at(known)[:, :, None], draws
    )


def next_condition(backbone, context, known, random_order, rng_seed):
    """`z [G, K, Z]` for the token after the first `known [K]` of each image's order, one token a step."""
    count, tokens = context.shape[:2]
    if not random_order:  # the caches must be filled first
        before = np.concatenate([np.zeros_like(context[:, :1]), context[:, :-1]], axis=1)
        return backbone.feed(before, np.zeros(count, np.int64))[:, np.arange(count), known]
    rng = np.random.default_rng(rng_seed)
    order = np.stack([rng.permutation(tokens) for _ in range(count)])
    return backbone.condition(context, PositionBatch.of(order, np.arange(tokens + 1), known, 1))


def alone(head, prefixes, z, seed):
    """`[K, draws, D]` next tokens of one model by itself."""
    rng = np.random.default_rng(seed)
    tokens = []
    for prefix in range(len(prefixes)):
        noise = draw_noise(head, rng, prefixes.draws)
        guidance = np.repeat(prefixes.guidance[:, prefix], prefixes.draws, axis=1)
        tokens.append(head.sample(prefixes.rows(z, prefix), guidance, noise.start, noise.steps).path[:, -1])
    return np.stack(tokens)


def draw_noise(head, rng, rows):
    return ChainNoise.of(rng.standard_normal((rows, head.chain.length + 1, head.token_dim), dtype=np.float32))


def speculated(prefixes, seed):
    """`[K, draws, D]` next tokens by exact speculation, and the share of drafts accepted."""
    rng = np.random.default_rng(seed)
    target, n = prefixes.target, prefixes.target.chain.length
    tokens, accepted = [], []
    for prefix in range(len(prefixes)):
        noise = draw_noise(target, rng, prefixes.draws)
        guidance = np.repeat(prefixes.guidance[:, prefix], prefixes.draws, axis=1)
        drawn = prefixes.draft.sample(prefixes.rows(prefixes.draft_z, prefix), guidance, noise.start, noise.steps)
        proposal = Proposal(noise, drawn)
        z = prefixes.rows(prefixes.target_z, prefix)
        means = target.means(drawn.path, z, guidance)
        judgement = judge_exact(target.chain, proposal, means, rng.random((prefixes.draws, n + 1)))
        rejected = np.flatnonzero(~judgement.accepted)
        token = proposal.token.copy()
        if len(rejected):
            token[rejected] = complete_exact(
                target.chain,
                proposal,
                judgement,
                rejected,
                target.finish(z, guidance),
                ResidualDraws(
                    coordinate=rng.random(len(rejected)),
                    direction=rng.standard_normal((len(rejected), target.token_dim)),
                    fresh=rng.standard_normal((len(rejected), n, target.token_dim), dtype=np.float32),
                ),
            ).token
        tokens.append(token)
        accepted.append(judgement.accepted.mean())
    return np.stack(tokens), float(np.mean(accepted))


@pytest.fixture(scope="module")
def target_tokens(prefixes):
    return alone(prefixes.target, prefixes, prefixes.target_z, seed=1)


def test_exact_draws_the_targets_next_token(prefixes, target_tokens):
    tokens, accepted = speculated(prefixes, seed=2)
    assert 0.5 < accepted < 0.99
    assert grouped_sliced_p_value(tokens, target_tokens) > 0.01


def test_the_draft_alone_is_seen(prefixes, target_tokens):
    tokens = alone(prefixes.draft, prefixes, prefixes.draft_z, seed=3)
    assert grouped_sliced_p_value(tokens, target_tokens) < (1e-6 if prefixes.draws >= 2000 else 1e-3)
