"""The loop on MAR's family: sets of tokens in random order, images at steps of their own."""

import numpy as np
import pytest
from bundles import copy_bundle, edit_manifest
from specdec_rt.decode.loop import Decoder

from specdec_rt import DecodeOptions, UsageError, load
from specdec_rt.decode.stats import Counters
from specdec_rt.noise import NoiseSource

LABELS = np.arange(8)
STEPS = 7
"""AR steps for 49 tokens: sets of 2 to 11"""
CLOSE = 1e-3
"""Rounding between batch shapes may move a token by this much."""


@pytest.fixture(scope="module")
def pipeline():
    return load("digits-mar")


@pytest.fixture(scope="module")
def draw(pipeline):
    def generate(labels=LABELS, **options):
        return pipeline.generate(labels, **{"seed": 3, "ar_steps": STEPS, **options})

    return generate


def largest_difference(first, second):
    return np.abs(first.tokens - second.tokens).max()


@pytest.mark.parametrize("mode", ["target", "exact"])
def test_an_image_is_the_same_alone_in_a_batch_and_in_any_order(draw, mode):
    together = draw(mode=mode)
    for index in (0, 5):
        alone = draw([LABELS[index]], mode=mode, indices=[index])
        assert np.abs(alone.tokens[0] - together.tokens[index]).max() <= CLOSE
    order = np.random.default_rng(0).permutation(len(LABELS))
    mixed = draw(LABELS[order], mode=mode, indices=order, batch_size=3)
    assert np.abs(mixed.tokens - together.tokens[order]).max() <= CLOSE


def test_exact_draws_the_same_image_at_every_draft_length(draw):
    one, three, seven = (draw(mode="exact", draft_length=length) for length in (1, 3, 7))
    assert largest_difference(one, three) <= CLOSE
    assert largest_difference(three, seven) <= CLOSE
    assert seven.stats.rounds < three.stats.rounds < one.stats.rounds


def test_every_image_takes_its_places_in_an_order_of_its_own(pipeline):
    session = pipeline.session(DecodeOptions())
    order = Decoder(session, NoiseSource(1), LABELS, np.arange(8), Counters(), lambda _: None).order
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(49), (8, 1)))
    assert len(np.unique(order, axis=0)) == 8


def test_a_draft_that_is_the_target_is_always_accepted(pipeline, draw):
    steps = pipeline.session(DecodeOptions()).target.head.chain.length
    drafted = draw(mode="exact", draft="self", draft_steps=steps)
    assert drafted.stats.acceptance_rate == 1
    assert largest_difference(drafted, draw(mode="target")) <= CLOSE


def test_self_draft_saves_sequential_head_calls(draw):
    """With a token a step: in a large set some token is nearly always rejected, and the set waits for it."""
    drafted, target = draw(mode="exact", draft="self", ar_steps=49).stats, draw(mode="target", ar_steps=49).stats
    assert drafted.sequential_head_calls < target.sequential_head_calls
    assert drafted.target_backbone_calls == target.target_backbone_calls == 49 * len(LABELS)
    assert drafted.draft_backbone_calls == 0


def test_paper_accepts_everything_as_tau_grows(draw):
    paper = draw(mode="paper", tau=1e6, prefill=0.0)
    assert paper.stats.acceptance_rate == 1
    assert largest_difference(paper, draw(mode="draft")) <= CLOSE


def test_paper_accepts_more_at_a_higher_tau(draw):
    rates = [draw(mode="paper", tau=tau).stats.acceptance_rate for tau in (1, 4, 42)]
    assert rates[0] < rates[1] <= rates[2]


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_prefilled_sets_are_the_targets(pipeline, draw, mode):
    filled, target = draw(mode=mode, prefill=0.5), draw(mode="target")
    session = pipeline.session(DecodeOptions(ar_steps=STEPS))
    known = session.plan.schedule.known
    count = known[np.searchsorted(known, 0.5 * 49)]
    order = Decoder(session, NoiseSource(3), LABELS, np.arange(8), Counters(), lambda _: None).order[:, :count]
    rows = np.arange(8)[:, None]
    assert np.abs(filled.tokens[rows, order] - target.tokens[rows, order]).max() <= CLOSE
    assert np.abs(filled.tokens - target.tokens).max() > CLOSE


def test_prefill_of_everything_is_target_mode(draw):
    filled = draw(mode="exact", prefill=1.0)
    np.testing.assert_array_equal(filled.tokens, draw(mode="target").tokens)
    assert filled.stats.rounds == 0


def test_the_counters_add_up(draw):
    stats = draw(mode="exact", draft_length=3).stats
    assert stats.accepted + stats.rejected == 49 * len(LABELS)  # every token was either
    assert stats.tokens_per_round == pytest.approx(49 * len(LABELS) / stats.rounds)
    assert stats.target_backbone_calls == stats.rounds
    assert stats.accepted + stats.rejected <= stats.drafted
    assert stats.rounds <= stats.draft_backbone_calls <= 3 * stats.rounds
    alone = [draw([LABELS[i]], mode="exact", draft_length=3, indices=[i]).stats for i in range(len(LABELS))]
    for name in ("rounds", "accepted", "drafted", "draft_backbone_calls", "sequential_head_calls"):
        assert sum(getattr(one, name) for one in alone) == getattr(stats, name)


@pytest.mark.parametrize("steps", [1, 2, 48, 49])
def test_any_number_of_ar_steps(draw, steps):
    result = draw(LABELS[:2], mode="exact", ar_steps=steps)
    assert np.isfinite(result.tokens).all()
    assert draw(LABELS[:2], mode="target", ar_steps=steps).stats.target_backbone_calls == 2 * steps


def test_more_ar_steps_than_tokens_are_refused(draw):
    with pytest.raises(UsageError, match="ar_steps is 50; expected 1 to 49"):
        draw(ar_steps=50)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_guidance_changes_the_image(draw, schedule):
    plain = draw(mode="target", guidance=1.0)
    nearly = draw(mode="target", guidance=1.0 + 1e-7, guidance_schedule=schedule)
    strong = draw(mode="target", guidance=4.0, guidance_schedule=schedule)
    assert largest_difference(plain, nearly) <= 1e-2
    assert largest_difference(plain, strong) > 0.1


def test_temperature_changes_the_image(draw):
    assert largest_difference(draw(mode="exact"), draw(mode="exact", temperature=0.8)) > 0.1


def test_a_bundle_may_make_tokens_only(tmp_path):
    folder = copy_bundle(tmp_path / "tokens", name="digits-mar")
    edit_manifest(folder, "image", value=None)
    result = load(folder).generate([3], ar_steps=STEPS)
    assert result.images is None
    assert result.tokens.shape == (1, 49, 16)
