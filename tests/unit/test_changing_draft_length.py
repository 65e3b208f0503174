"""Decoding at draft lengths that are chosen on the way: what the draft has to be told, and what a controller is told.

`test_draft_length.py` is about the choice itself, `tests/distribution/test_changing_length.py` about what it does to
the distribution.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from decoding import decode, with_session
from fake_cuda import FakeBackend
from tolerances import SAME_TO_ROUNDING, largest_difference

from specdec_rt import DecodeOptions, Pipeline, UsageError
from specdec_rt.backends.base import Limits
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle
from specdec_rt.decode.session import Session
from specdec_rt.decode.stats import Counters, Stats
from specdec_rt.noise import NoiseSource

LABELS = np.arange(3)
QUICK = {"mode": "exact", "guidance": 1.0, "draft_steps": 8}


class Scripted:
    """A controller that takes its lengths from a list, over and over."""

    def __init__(self, *lengths):
        self.clock = itertools.count().__next__
        self._lengths = itertools.cycle(lengths)
        self.asked, self.records, self.begun = [], [], []

    def begin_batch(self, slots):
        """As in `DraftLengthController`."""
        self.begun.append(slots)

    def choose(self, ar_step, slots, waiting, *, draft_is_behind):
        """As in `DraftLengthController`."""
        self.asked.append((ar_step.tolist(), slots, waiting, draft_is_behind))
        return next(self._lengths)

    def observe(self, record):
        """As in `DraftLengthController`."""
        self.records.append(record)


class CatchesUpAlways(Session):
    """The draft takes in everything before every round."""

    def speculate(self, inputs):
        """As in `Session`."""
        positions = inputs.positions
        steps = int(positions.first_step.max())
        self.draft.backbone.catch_up(positions.order, positions.known, inputs.tokens, steps)
        return super().speculate(inputs)


class NeverCatchesUp:
    """What must be seen: a backbone that takes in nothing of what the target makes alone."""

    def __init__(self, backbone):
        self._backbone = backbone

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def catch_up(self, order, known, tokens, steps):  # noqa: ARG002  # as in `Backbone`
        """As in `Backbone`."""
        return 0


def setup_of(pipeline):
    few = {"ar_steps": 6} if pipeline.bundle.manifest.family == "mar" else {}
    return pipeline.setup(DecodeOptions(**QUICK, **few, draft_length=4))


def request(setup, controller, *, slots=None):
    """Three images, by lengths that a controller chooses."""
    return decode(replace(setup, controller=controller), LABELS, NoiseSource(3), slots=slots)


# --- the draft catches up ------------------------------------------------------------------------------


def test_steps_of_the_target_alone_are_a_prefill(cpu):
    alone = 12
    controller = Scripted(*[0] * alone, *[4] * 49)
    found = request(setup_of(cpu()), controller)
    expected = cpu().generate(LABELS, seed=3, draft_length=4, prefill=(alone - 0.5) / 49, **QUICK)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    for name in ("rounds", "accepted", "target_backbone_calls", "draft_backbone_calls", "sequential_head_calls"):
        assert getattr(found.counters, name) == getattr(expected.stats, name)
    assert found.counters.draft_lengths[0] == alone * len(LABELS)
    assert sum(record.catch_up_seconds > 0 for record in controller.records) == 1


def test_a_draft_that_catches_up_when_it_must_knows_all(cpu):
    """Images stand at AR steps of their own, and slots are backfilled: as if all was taken in before every round."""
    lengths = (4, 0, 0, 2, 0, 1, 4)
    found = request(setup_of(cpu()), Scripted(*lengths), slots=2)
    expected = request(with_session(setup_of(cpu()), CatchesUpAlways), Scripted(*lengths), slots=2)
    assert largest_difference(found.tokens, expected.tokens) <= SAME_TO_ROUNDING
    assert found.counters.accepted == expected.counters.accepted


def test_a_draft_catches_up_once_before_a_round_that_follows_the_target_alone(cpu):
    controller = Scripted(4, 4, 0, 0, 2, 2, 0, 1)
    request(setup_of(cpu()), controller)
    lengths = [record.draft_length for record in controller.records]
    needed = [length > 0 and before == 0 for before, length in itertools.pairwise([4, *lengths])]
    assert [record.catch_up_seconds > 0 for record in controller.records] == needed


def test_a_draft_that_does_not_catch_up_is_seen(cpu):
    setup = setup_of(cpu())
    draft = setup.session.draft
    forgetful = with_session(setup, draft=replace(draft, backbone=NeverCatchesUp(draft.backbone)))
    found, knowing = request(forgetful, Scripted(0, 4)), request(setup, Scripted(0, 4))
    assert largest_difference(found.tokens, knowing.tokens) > 0.1
    assert found.counters.accepted < 0.9 * knowing.counters.accepted


def test_a_draft_catches_up_on_a_device_that_captures_launches(cpu, make_gpu):
    """What the draft catches up with is padded to a few sizes: past an image's last token lies what is never read."""
    _, device = make_gpu(batch_buckets=(1, 4, 8))
    pipelines = cpu(), Pipeline(load_bundle("digits"), FakeBackend(device))
    expected, found = (request(setup_of(pipeline), Scripted(2, 0, 0, 4, 0)).tokens for pipeline in pipelines)
    assert largest_difference(found, expected) <= SAME_TO_ROUNDING


# --- images --------------------------------------------------------------------------------------------


def test_images_do_not_depend_on_which_lengths_draft_them(cpu):
    """As with fixed ones; with 0 among them they would."""
    first, second = (request(setup_of(cpu("digits-mar")), Scripted(*lengths)) for lengths in ((1, 4, 2), (2, 2, 1, 3)))
    assert largest_difference(first.tokens, second.tokens) <= SAME_TO_ROUNDING


def test_the_target_alone_all_the_way_is_target_mode(cpu):
    found = request(setup_of(cpu("digits-mar")), Scripted(0))
    expected = cpu("digits-mar").generate(LABELS, seed=3, mode="target", ar_steps=6, guidance=1.0)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    counters = found.counters
    assert (counters.rounds, counters.drafted, counters.draft_backbone_calls) == (0, 0, 0)
    assert counters.target_backbone_calls == expected.stats.target_backbone_calls
    assert counters.sequential_head_calls == expected.stats.sequential_head_calls


# --- what a controller is told -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_it_hears_of_judged_tokens_alone(cpu, name):
    """Verdicts on dropped drafts must not reach it: their noise is used again."""
    controller = Scripted(4, 2, 0)
    counters = request(setup_of(cpu(name)), controller).counters
    records = controller.records
    assert sum(record.accepted for record in records) == counters.accepted
    assert sum(record.rejected for record in records) == counters.rejected
    assert counters.accepted + counters.rejected == counters.committed < counters.drafted
    assert all((record.completion_seconds > 0) == (record.rejected > 0) for record in records)
    assert all(record.seconds > 0 for record in records)
    assert [record.draft_length for record in records[:4]] == [4, 2, 0, 4]


def test_it_hears_where_images_are(cpu):
    controller = Scripted(2, 0)
    request(setup_of(cpu()), controller, slots=2)
    steps, slots, waiting, behind = zip(*controller.asked, strict=True)
    assert controller.begun == [2]
    assert steps[0] == [0, 0]
    assert max(max(each) for each in steps) == 48
    assert (waiting[0], waiting[-1]) == (1, 0)
    assert set(slots) == {1, 2}
    assert behind[:3] == (False, False, True)


def test_a_controller_is_kept_for_requests_whose_rounds_cost_the_same(cpu):
    def controller(**options):
        return cpu().setup(DecodeOptions(mode="exact", draft_length="auto", **options)).controller

    first = controller()
    assert first.lengths == (0, 1, 2, 4, 8)
    assert controller(temperature=0.9, guidance=2.0) is first
    others = [controller(guidance=1.0), controller(draft="small"), controller(draft_steps=9), controller(draft="self")]
    assert len({id(each) for each in (first, *others)}) == 5
    assert others[-1].lengths == (0, 1)


@pytest.mark.parametrize(
    ("limit", "ar_steps", "lengths"), [(4, 49, (0, 1, 2, 4)), (6, 49, (0, 1, 2, 4)), (None, 3, (0, 1, 2))]
)
def test_lengths_end_where_engines_and_schedules_do(limit, ar_steps, lengths):
    backend = OnnxRuntimeBackend(threads=1, limits=Limits(draft_length=limit))
    options = DecodeOptions(mode="exact", draft_length="auto", ar_steps=ar_steps)
    setup = Pipeline(load_bundle("digits-mar"), backend).setup(options)
    assert setup.controller.lengths == lengths
    assert setup.plan.draft_length >= lengths[-1]


# --- requests ------------------------------------------------------------------------------------------


def test_a_request_says_which_lengths_it_took(cpu):
    seen = []
    asked = {"batch_size": 2, "draft_length": "auto", "progress": lambda *told: seen.append(told), **QUICK}
    stats = cpu().generate(LABELS, **asked).stats
    assert seen[-1] == (3 * 49, 3 * 49)
    assert sum(count for length, count in stats.draft_lengths.items() if length) == stats.rounds
    assert stats.target_backbone_calls == stats.rounds + stats.draft_lengths[0]
    assert list(stats.draft_lengths) == sorted(stats.draft_lengths)


def test_fixed_lengths_are_counted_too(cpu):
    stats = cpu().generate([3], draft_length=4, **QUICK).stats
    assert max(stats.draft_lengths) == 4
    assert sum(stats.draft_lengths.values()) == stats.rounds
    assert sum(length * count for length, count in stats.draft_lengths.items()) == stats.drafted
    assert cpu().generate([3], mode="draft", draft_length="auto").stats.draft_lengths == {}


def test_figures_where_nothing_was_drafted():
    counters = Counters(target_backbone_calls=3)
    counters.draft_lengths[0] = 3
    stats = Stats(mode="exact", backend="none", images=1, seconds=1.0)
    stats.add(counters)
    assert (stats.acceptance_rate, stats.tokens_per_round, stats.draft_lengths) == (None, None, {0: 3})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"draft_length": "automatic"},
            "draft_length is 'automatic'; expected a whole number of at least 1, or 'auto'",
        ),
        ({"draft_length": 1.5}, "draft_length is 1.5; expected a whole number of at least 1, or 'auto'"),
        ({"draft_steps": "auto"}, "draft_steps is 'auto'; expected a whole number of at least 1"),
        ({"draft_length": "auto", "mode": "paper"}, "draft_length is 'auto', but in mode 'paper'"),
    ],
)
def test_a_length_that_is_none_is_refused(cpu, options, said):
    with pytest.raises(UsageError) as caught:
        cpu().generate([1], **options)
    assert said in str(caught.value)
