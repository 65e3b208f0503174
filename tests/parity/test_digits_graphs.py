"""The shipped graphs of `digits` against torch, with the bundle's own weights, in the form that training uses."""

import numpy as np
import pytest
import torch
from comparing import relative_error

from export.agreement import TOLERANCE
from export.causal import read_pair
from specdec_rt import DecodeOptions, load
from specdec_rt.chain import compile_chain

BATCH = 3


@pytest.fixture(scope="module")
def pipeline():
    return load()


@pytest.fixture(scope="module")
def pair(pipeline):
    return read_pair(pipeline.bundle.folder)


def inputs(pipeline):
    """Random tokens `[B, L, D]`, what each position is fed (the token before it), and labels `[B]`."""
    manifest = pipeline.bundle.manifest
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((BATCH, manifest.tokens, manifest.token_dim), dtype=np.float32)
    before = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)
    return tokens, before, np.array([0, 4, 9])


@pytest.mark.parametrize("draft", [None, "adapter", "small"])
@torch.no_grad()
def test_cached_decoding_equals_the_training_form(pipeline, pair, draft):
    """Calls of 1, 2 … inputs over caches give together what one causal pass over all tokens gives."""
    tokens, before, labels = inputs(pipeline)
    torch_model = pair.target if draft is None else pair.drafts[draft]
    backbone = getattr(torch_model, "backbone", torch_model)
    expected = backbone(torch.from_numpy(tokens), torch.from_numpy(labels)).numpy()
    model = pipeline.setup(DecodeOptions(draft=draft or "adapter", guidance=1.0)).session.models[draft is not None]
    model.backbone.begin(labels)
    found, done = [], 0
    for length in [1, 2, 1, 5, 30, 10]:
        position = np.full(BATCH, done)
        found.append(model.backbone.feed(before[:, done : done + length], position)[0])
        done += length
    assert done == tokens.shape[1]
    assert relative_error(np.concatenate(found, axis=1), expected) <= TOLERANCE


def test_abandoned_drafts_leave_no_trace(pipeline):
    """Inputs that were fed past a position and then dropped do not change later results."""
    _, before, labels = inputs(pipeline)
    results = []
    for junk in (0.0, 100.0):
        backbone = pipeline.setup(DecodeOptions(guidance=1.0)).target.backbone
        backbone.begin(labels)
        backbone.feed(before[:, :10], np.zeros(BATCH, np.int64))
        backbone.feed(before[:, 10:13] + junk, np.full(BATCH, 10))
        results.append(backbone.feed(before[:, 10:12], np.full(BATCH, 10)))
    np.testing.assert_array_equal(*results)


def test_images_stand_at_positions_of_their_own(pipeline):
    """A batched call at different positions equals a call for each image, also after images have left the batch."""
    _, before, labels = inputs(pipeline)
    position = np.array([3, 0, 7])
    joint = pipeline.setup(DecodeOptions(guidance=1.0)).target.backbone
    joint.begin(labels)
    joint.feed(before[:, :9], np.zeros(BATCH, np.int64))
    kept = np.array([0, 2])
    joint.keep(kept)
    z = joint.feed(np.stack([before[b, position[b] : position[b] + 2] for b in kept]), position[kept])
    for row, b in enumerate(kept):
        single = pipeline.setup(DecodeOptions(guidance=1.0)).target.backbone
        single.begin(labels[b : b + 1])
        single.feed(before[b : b + 1, :9], np.zeros(1, np.int64))
        alone = single.feed(before[b : b + 1, position[b] : position[b] + 2], position[b : b + 1])
        assert relative_error(z[:, row], alone[:, 0]) <= TOLERANCE


@pytest.mark.parametrize("draft", [None, "small"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_a_chain_equals_torch(pipeline, pair, draft, scale):
    """Every transition of the shipped chain is the formula's, with torch's prediction; also with guidance."""
    chain = compile_chain(pipeline.bundle.manifest.chain)
    head = (pair.target if draft is None else pair.drafts[draft]).head
    setup = pipeline.setup(DecodeOptions(draft=draft or "adapter", guidance=scale))
    engine = setup.session.models[draft is not None].head
    rng = np.random.default_rng(1)
    rows, branches = 5, 1 if scale == 1 else 2
    z = rng.standard_normal((branches, rows, engine.z_dim), dtype=np.float32)
    guidance = setup.plan.guidance_at(rng.integers(0, 49, rows))
    normals = rng.standard_normal((rows, 1 + chain.length, engine.token_dim), dtype=np.float32)  # x_T, then noise
    drawn = engine.sample(z, guidance, normals)

    state, noise = torch.from_numpy(normals[:, 0]), normals[:, 1:]
    for j in range(chain.length):
        condition = head.time_embed(torch.tensor([chain.timestep[j]])) + head.cond_embed(torch.from_numpy(z))
        predictions = head(state.expand(branches, -1, -1), condition)
        epsilon = (torch.from_numpy(guidance).float()[..., None] * predictions).sum(0)
        mean = chain.state_coefficient[j] * state + chain.epsilon_coefficient[j] * epsilon
        assert relative_error(drawn.mean[:, j], mean.numpy()) <= TOLERANCE
        state = (mean + chain.std[j] * torch.from_numpy(noise[:, j])).float()
    assert relative_error(drawn.path[:, -1], state.numpy()) <= TOLERANCE
    # Verification finds the very means that the states were drawn around.
    assert relative_error(engine.means(drawn.path, z, guidance), drawn.mean) <= TOLERANCE
