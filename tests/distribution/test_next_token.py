"""The digits pairs, teacher-forced: the next token in fixed contexts, `exact` against `target`."""

from dataclasses import dataclass

import numpy as np
import pytest
from twosample import grouped_sliced_p_value

from specdec_rt import DecodeOptions, Pipeline
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle
from specdec_rt.capacity import Capacity
from specdec_rt.decode.head import Head
from specdec_rt.decode.reference import verify
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.noise import NoiseSource, TokenNoise
from specdec_rt.plan import Tuning

SIZES = {"fast, the bundle's guidance": (8, 500, None), "full, no guidance": (64, 2000, 1.0)}
CASES = [
    pytest.param((bundle, *sizes), id=f"{bundle}, {size}", marks=[pytest.mark.full] if "full" in size else [])
    for bundle in ("digits", "digits-mar")
    for size, sizes in SIZES.items()
]
FEW_PATHS_AT_A_TIME = Tuning(capacity=Capacity(states_per_call=2**11))
"""Their modulation fits a core's caches: a third quicker where there are hundreds."""


@dataclass(frozen=True)
class Side:
    """A model's head, and its conditions `z [G, K, Z]` in K contexts."""

    head: Head
    z: np.ndarray


@dataclass(frozen=True)
class Contexts:
    """K contexts, and how many next tokens are drawn in each."""

    target: Side
    draft: Side
    guidance: np.ndarray
    """`[G, K]`"""
    draws: int

    def __len__(self):
        return self.guidance.shape[1]

    def each(self, seed):
        """Of each context: the noise of its tokens, the same as normals, and both models' `z`, and guidance."""
        head, position = self.target.head, np.arange(self.draws)
        for context in range(len(self)):
            noise = TokenNoise(NoiseSource(seed), np.full(self.draws, context), position)
            z, draft_z, guidance = (
                np.repeat(values[:, context : context + 1], self.draws, axis=1)
                for values in (self.target.z, self.draft.z, self.guidance)
            )
            yield noise, noise.chain(head.chain.length, head.token_dim), z, draft_z, guidance


@pytest.fixture(scope="module", params=CASES)
def contexts(request):
    """Known tokens: in raster order before a position, or at random positions of MAR's."""
    bundle, count, draws, guidance = request.param
    pipeline = Pipeline(load_bundle(bundle), OnnxRuntimeBackend(), tuning=FEW_PATHS_AT_A_TIME)
    manifest = pipeline.bundle.manifest
    rng = np.random.default_rng(0)
    labels = np.arange(count) % manifest.classes
    images = pipeline.generate(labels, seed=5, mode="target")
    tokens = images.tokens + manifest.chain.final_std * rng.standard_normal(images.tokens.shape, dtype=np.float32)
    setup = pipeline.setup(DecodeOptions(guidance=guidance, ar_steps=manifest.tokens))
    known = rng.integers(0, manifest.tokens, count)
    sides = []
    for model in setup.session.models:
        model.backbone.begin(labels)
        sides.append(Side(model.head, next_condition(model.backbone, tokens, known, setup.plan.random_order)))
    return Contexts(*sides, setup.plan.guidance_at(known), draws)


def next_condition(backbone, tokens, known, random_order):
    """`z [G, K, Z]` for the token after the first `known [K]` of each image's order, one token a step."""
    count, length = tokens.shape[:2]
    if not random_order:  # the caches must be filled first
        before = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)
        return backbone.feed(before, np.zeros(count, np.int64))[:, np.arange(count), known]
    rng = np.random.default_rng(1)
    order = np.stack([rng.permutation(length) for _ in range(count)])
    return backbone.condition(tokens, PositionBatch.of(order, np.arange(length + 1), known, 1))


@pytest.fixture(scope="module")
def target_tokens(contexts):
    head = contexts.target.head
    return np.stack([head.sample(z, guidance, normals).token for _, normals, z, _, guidance in contexts.each(seed=1)])


def test_exact_draws_the_targets_next_token(contexts, target_tokens):
    target, draft, tokens, shares = contexts.target.head, contexts.draft.head, [], []
    for noise, normals, z, draft_z, guidance in contexts.each(seed=4):
        drawn = draft.sample(draft_z, guidance, normals)
        token, _, accepted = verify(target, z, guidance, drawn, normals, noise)
        tokens.append(token)
        shares.append(accepted.mean())
    assert 0.5 < np.mean(shares) < 0.99
    assert grouped_sliced_p_value(np.stack(tokens), target_tokens) > 0.01


def test_the_draft_alone_is_seen(contexts, target_tokens):
    head = contexts.draft.head
    tokens = [head.sample(z, guidance, normals).token for _, normals, _, z, guidance in contexts.each(seed=3)]
    assert grouped_sliced_p_value(np.stack(tokens), target_tokens) < (1e-6 if contexts.draws >= 2000 else 1e-3)
