"""Decoding the shipped causal pair: what a token may depend on, and what the counters say."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tolerances import SAME_TO_ROUNDING, largest_difference

from specdec_rt import DecodeOptions

LABELS = np.arange(8)


@pytest.fixture(scope="module")
def pipeline(cpu):
    return cpu("digits")


@pytest.mark.parametrize("mode", ["target", "exact"])
def test_an_image_is_the_same_alone_in_a_batch_and_in_any_order(pipeline, mode):
    together = pipeline.generate(LABELS, seed=3, mode=mode)
    for index in (0, 5):
        alone = pipeline.generate([LABELS[index]], seed=3, mode=mode, indices=[index])
        assert largest_difference(alone.tokens[0], together.tokens[index]) <= SAME_TO_ROUNDING
    order = np.random.default_rng(0).permutation(len(LABELS))
    mixed = pipeline.generate(LABELS[order], seed=3, mode=mode, indices=order, batch_size=5)
    assert largest_difference(mixed.tokens, together.tokens[order]) <= SAME_TO_ROUNDING


def test_a_seed_and_an_index_change_the_image(pipeline):
    first, second = pipeline.generate([3, 3], seed=1, mode="target").tokens
    other = pipeline.generate([3], seed=2, mode="target").tokens[0]
    assert largest_difference(first, second) > 0.1
    assert largest_difference(first, other) > 0.1


def test_tokens_do_not_depend_on_the_draft_length(pipeline):
    """Noise keys hold no round number, so `exact` draws the same image at every γ."""
    one, four, nine = (
        pipeline.generate(LABELS[:3], seed=5, mode="exact", draft_length=length).tokens for length in (1, 4, 9)
    )
    assert largest_difference(one, four) <= SAME_TO_ROUNDING
    assert largest_difference(four, nine) <= SAME_TO_ROUNDING


def test_a_draft_that_is_the_target_is_always_accepted(pipeline):
    """The target's own head at every step proposes what the target would have drawn."""
    steps = pipeline.setup(DecodeOptions()).target.head.chain.length
    drafted = pipeline.generate(LABELS[:4], seed=6, mode="exact", draft="self", draft_steps=steps)
    target = pipeline.generate(LABELS[:4], seed=6, mode="target")
    assert drafted.stats.acceptance_rate == 1
    assert largest_difference(drafted.tokens, target.tokens) <= SAME_TO_ROUNDING


def test_self_draft_saves_sequential_head_calls(pipeline):
    drafted = pipeline.generate(LABELS[:4], seed=6, mode="exact", draft="self").stats
    target = pipeline.generate(LABELS[:4], seed=6, mode="target").stats
    assert drafted.sequential_head_calls < 0.8 * target.sequential_head_calls
    assert drafted.target_backbone_calls == target.target_backbone_calls
    assert drafted.draft_backbone_calls == 0


def test_few_head_calls_are_worth_their_acceptance(pipeline):
    """Six of 23, spread evenly with the end left dense, would be accepted a third of the time."""
    drafted = pipeline.generate(LABELS, seed=6, mode="exact", draft="self", draft_steps=6).stats
    assert drafted.acceptance_rate > 0.5


def test_prefill_of_everything_is_target_mode(pipeline):
    filled = pipeline.generate(LABELS[:2], seed=8, mode="exact", prefill=1.0)
    target = pipeline.generate(LABELS[:2], seed=8, mode="target")
    np.testing.assert_array_equal(filled.tokens, target.tokens)
    assert filled.stats.rounds == 0
    assert filled.stats.acceptance_rate is None


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_prefilled_tokens_are_the_targets(pipeline, mode):
    count = 20
    share = (count - 0.5) / 49
    filled = pipeline.generate(LABELS[:3], seed=9, mode=mode, prefill=share)
    target = pipeline.generate(LABELS[:3], seed=9, mode="target")
    assert largest_difference(filled.tokens[:, :count], target.tokens[:, :count]) <= SAME_TO_ROUNDING
    assert filled.stats.rounds <= 3 * (49 - count)


def test_paper_accepts_everything_as_tau_grows(pipeline):
    """With every draft accepted, and noise that drafts share with `draft` mode, the image is the draft's."""
    paper = pipeline.generate(LABELS[:3], seed=4, mode="paper", tau=1e6, prefill=0.0)
    draft = pipeline.generate(LABELS[:3], seed=4, mode="draft")
    assert paper.stats.acceptance_rate == 1
    assert largest_difference(paper.tokens, draft.tokens) <= SAME_TO_ROUNDING


def test_paper_accepts_more_at_a_higher_tau(pipeline):
    rates = [pipeline.generate(LABELS[:4], seed=4, mode="paper", tau=tau).stats.acceptance_rate for tau in (1, 4)]
    assert rates[0] < rates[1]


def test_the_counters_add_up(pipeline):
    tokens, images, length = 49, 4, 3
    asked = {"seed": 1, "mode": "exact", "draft_length": length}
    stats = pipeline.generate(LABELS[:images], **asked).stats
    assert stats.accepted + stats.rejected == tokens * images  # every token was either
    assert stats.tokens_per_round == pytest.approx(tokens * images / stats.rounds)
    assert stats.acceptance_rate == stats.accepted / (stats.accepted + stats.rejected)
    assert stats.target_backbone_calls == stats.rounds
    assert stats.accepted + stats.rejected <= stats.drafted == stats.draft_backbone_calls
    assert stats.rounds <= stats.draft_backbone_calls <= stats.rounds * length
    alone = [pipeline.generate([LABELS[image]], indices=[image], **asked).stats for image in range(images)]
    for name in ("rounds", "accepted", "sequential_head_calls"):
        assert sum(getattr(one, name) for one in alone) == getattr(stats, name)


def test_target_mode_counts(pipeline):
    steps = pipeline.setup(DecodeOptions()).target.head.chain.length
    stats = pipeline.generate(LABELS[:3], mode="target").stats
    assert stats.target_backbone_calls == 3 * 49
    assert stats.sequential_head_calls == 3 * 49 * steps
    assert (stats.rounds, stats.draft_backbone_calls, stats.acceptance_rate) == (0, 0, None)


def test_guidance_of_one_is_none_and_more_changes_the_image(pipeline):
    plain = pipeline.generate(LABELS[:2], seed=2, mode="target", guidance=1.0)
    nearly = pipeline.generate(LABELS[:2], seed=2, mode="target", guidance=1.0 + 1e-7)
    strong = pipeline.generate(LABELS[:2], seed=2, mode="target", guidance=4.0)
    assert largest_difference(plain.tokens, nearly.tokens) <= 1e-3  # guidance is no more than nearly 1
    assert largest_difference(plain.tokens, strong.tokens) > 0.1


def test_progress_ends_at_all_tokens(pipeline):
    seen = []
    pipeline.generate(LABELS[:3], batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3 * 49, 3 * 49)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_threads_take_turns(pipeline):
    """Requests share buffers; made at once, they still give what each gives alone."""
    seeds = range(3)
    alone = [pipeline.generate([seed], seed=seed, mode="draft").tokens for seed in seeds]
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda seed: pipeline.generate([seed], seed=seed, mode="draft").tokens, seeds))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_more_chains_and_shapes_than_are_kept(pipeline):
    """What is made anew after it was dropped gives what it gave before."""
    first = pipeline.generate([1], mode="draft", temperature=0.5)
    for step in range(10):
        pipeline.generate([1], mode="draft", temperature=0.6 + step / 100)
    np.testing.assert_array_equal(pipeline.generate([1], mode="draft", temperature=0.5).tokens, first.tokens)
