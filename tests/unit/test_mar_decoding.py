"""Decoding MAR's family: sets of tokens in random order, images at AR steps of their own."""

import numpy as np
import pytest
from bundles import copy_bundle, edit_manifest
from tolerances import SAME_TO_ROUNDING, largest_difference

from specdec_rt import DecodeOptions, UsageError, load
from specdec_rt.noise import NoiseSource

SEED, LABELS = 3, np.arange(5)
STEPS = 7
"""AR steps for 49 tokens: sets of 2 to 11."""


@pytest.fixture(scope="module")
def pipeline(cpu):
    return cpu("digits-mar")


@pytest.fixture(scope="module")
def draw(pipeline):
    """Makes a request, without guidance where nothing else is asked for."""

    def generate(labels=LABELS, **options):
        return pipeline.generate(labels, **{"seed": SEED, "ar_steps": STEPS, "guidance": 1.0, **options})

    return generate


@pytest.fixture(scope="module")
def target(draw):
    return draw(mode="target")


@pytest.fixture(scope="module")
def exact(draw):
    return draw(mode="exact", draft_length=3)


@pytest.mark.parametrize("mode", ["target", "exact"])
def test_an_image_is_the_same_alone_in_a_batch_and_in_any_order(draw, mode):
    together = draw(mode=mode, guidance=2.0)
    alone = draw([LABELS[3]], mode=mode, guidance=2.0, indices=[3])
    assert largest_difference(alone.tokens[0], together.tokens[3]) <= SAME_TO_ROUNDING
    order = np.random.default_rng(0).permutation(len(LABELS))
    mixed = draw(LABELS[order], mode=mode, guidance=2.0, indices=order, batch_size=3)
    assert largest_difference(mixed.tokens, together.tokens[order]) <= SAME_TO_ROUNDING


def test_exact_draws_the_same_image_at_every_draft_length(draw, exact):
    one, seven = (draw(mode="exact", draft_length=length) for length in (1, 7))
    assert largest_difference(one.tokens, exact.tokens) <= SAME_TO_ROUNDING
    assert largest_difference(exact.tokens, seven.tokens) <= SAME_TO_ROUNDING
    assert seven.stats.rounds <= exact.stats.rounds < one.stats.rounds


def order_of(pipeline):
    plan = pipeline.setup(DecodeOptions(mode="target", ar_steps=STEPS)).plan
    return plan, plan.draw_order(NoiseSource(SEED), np.arange(len(LABELS)))


def test_every_image_takes_its_positions_in_an_order_of_its_own(pipeline):
    _, order = order_of(pipeline)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(49), (len(LABELS), 1)))
    assert len(np.unique(order, axis=0)) == len(LABELS)


def test_a_draft_that_is_the_target_is_always_accepted(pipeline, draw, target):
    steps = pipeline.setup(DecodeOptions()).target.head.chain.length
    drafted = draw(mode="exact", draft="self", draft_steps=steps)
    assert drafted.stats.acceptance_rate == 1
    assert largest_difference(drafted.tokens, target.tokens) <= SAME_TO_ROUNDING


def test_self_draft_saves_sequential_head_calls(draw):
    """With a token a step: in a large set some token is nearly always rejected, and the set waits for it."""
    drafted = draw(LABELS[:3], ar_steps=49, mode="exact", draft="self").stats
    target = draw(LABELS[:3], ar_steps=49, mode="target").stats
    assert drafted.sequential_head_calls < target.sequential_head_calls
    assert drafted.target_backbone_calls == target.target_backbone_calls == 49 * 3
    assert drafted.draft_backbone_calls == 0


def test_paper_accepts_everything_as_tau_grows(draw):
    paper = draw(mode="paper", tau=1e6, prefill=0.0)
    assert paper.stats.acceptance_rate == 1
    assert largest_difference(paper.tokens, draw(mode="draft").tokens) <= SAME_TO_ROUNDING


def test_paper_accepts_more_at_a_higher_tau(draw):
    rates = [draw(mode="paper", tau=tau).stats.acceptance_rate for tau in (1, 4, 42)]
    assert rates[0] < rates[1] <= rates[2]


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_prefilled_sets_are_the_targets(pipeline, draw, target, mode):
    filled = draw(mode=mode, prefill=0.5)
    plan, order = order_of(pipeline)
    count = plan.schedule.known[np.searchsorted(plan.schedule.known, 0.5 * 49)]
    rows = np.arange(len(LABELS))[:, None], order[:, :count]
    assert largest_difference(filled.tokens[rows], target.tokens[rows]) <= SAME_TO_ROUNDING
    assert largest_difference(filled.tokens, target.tokens) > 0.1


def test_prefill_of_everything_is_target_mode(draw, target):
    filled = draw(mode="exact", prefill=1.0)
    np.testing.assert_array_equal(filled.tokens, target.tokens)
    assert filled.stats.rounds == 0


def test_the_counters_add_up(draw, exact):
    stats, images = exact.stats, len(LABELS)
    assert stats.accepted + stats.rejected == 49 * images  # every token was either
    assert stats.tokens_per_round == pytest.approx(49 * images / stats.rounds)
    assert stats.target_backbone_calls == stats.rounds
    assert stats.accepted + stats.rejected <= stats.drafted
    assert stats.rounds <= stats.draft_backbone_calls <= 3 * stats.rounds
    alone = [draw([LABELS[i]], mode="exact", draft_length=3, indices=[i]).stats for i in range(images)]
    for name in ("rounds", "accepted", "drafted", "draft_backbone_calls", "sequential_head_calls"):
        assert sum(getattr(one, name) for one in alone) == getattr(stats, name)


@pytest.mark.parametrize("steps", [1, 2, 48, 49])
def test_any_number_of_ar_steps(draw, steps):
    result = draw(LABELS[:2], mode="exact", ar_steps=steps)
    assert np.isfinite(result.tokens).all()
    assert draw(LABELS[:1], mode="target", ar_steps=steps).stats.target_backbone_calls == steps


def test_more_ar_steps_than_tokens_are_refused(draw):
    with pytest.raises(UsageError, match="ar_steps is 50; expected 1 to 49"):
        draw(ar_steps=50)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_guidance_changes_the_image(draw, target, schedule):
    nearly = draw(mode="target", guidance=1.0 + 1e-7, guidance_schedule=schedule)
    strong = draw(mode="target", guidance=4.0, guidance_schedule=schedule)
    assert largest_difference(target.tokens, nearly.tokens) <= 1e-2  # guidance is no more than nearly 1
    assert largest_difference(target.tokens, strong.tokens) > 0.1


def test_temperature_changes_the_image(draw, target):
    assert largest_difference(target.tokens, draw(mode="target", temperature=0.8).tokens) > 0.1


def test_a_bundle_may_make_tokens_only(tmp_path):
    folder = copy_bundle(tmp_path / "tokens", name="digits-mar")
    edit_manifest(folder, "image", value=None)
    result = load(folder, backend="onnxruntime").generate([3], ar_steps=STEPS, mode="draft")
    assert result.images is None
    assert result.tokens.shape == (1, 49, 16)
