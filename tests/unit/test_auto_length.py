"""Decoding at draft lengths chosen on the way: what the draft has to be told, what is counted, what is refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from fake_cuda import FakeBackend, FakeCuda
from specdec_rt.decode.loop import Decoder

from specdec_rt import DecodeOptions, Pipeline, UsageError, load
from specdec_rt.backends.base import Limits
from specdec_rt.backends.cuda import CudaDevice
from specdec_rt.bench.predict import Predictor
from specdec_rt.bundle import load_bundle
from specdec_rt.decode.stats import Counters, Stats
from specdec_rt.noise import NoiseSource

CLOSE = 1e-3
"""Rounding between batch shapes may move a token by this much."""
LABELS = np.arange(3)
QUICK = {"mode": "exact", "guidance": 1.0, "draft_steps": 8}


class Scripted:
    """Lengths from a list, over and over, in the place of a pace."""

    clock = staticmethod(itertools.count().__next__)

    def __init__(self, *lengths):
        self._lengths = itertools.cycle(lengths)
        self.seen, self.noted, self.caught_up, self.begun = [], [], 0, []

    def begin(self, lanes):
        self.begun.append(lanes)

    def choose(self, step, lanes, waiting, *, behind):
        self.seen.append((step.tolist(), lanes, waiting, behind))
        return next(self._lengths)

    def note(self, seconds, completion, accepted, rejected):
        self.noted.append((seconds, completion, accepted, rejected))

    def note_catch_up(self, seconds):
        self.caught_up += seconds > 0


class CatchingUpAlways(Decoder):
    """The draft takes in everything before every round."""

    _behind = property(lambda _: True, lambda *_: None)


class NeverCatchingUp(Decoder):
    """What must be seen."""

    _behind = property(lambda _: False, lambda *_: None)


@pytest.fixture(scope="module")
def pipelines():
    return {name: load(name, backend="onnxruntime", threads=1) for name in ("digits", "digits-mar")}


@pytest.fixture(scope="module")
def pipeline(pipelines):
    return pipelines["digits"]


def decode(pipeline, pace, *, decoder=Decoder, labels=LABELS, lanes=None, seed=3):
    """Tokens, and the counters."""
    steps = 6 if pipeline.bundle.manifest.family == "mar" else None
    session = pipeline.session(DecodeOptions(**QUICK, draft_length=4, ar_steps=steps))
    counters, keys = Counters(), np.arange(len(labels))
    made = decoder(
        replace(session, pace=pace), NoiseSource(seed), labels, keys, counters, lambda _: None, lanes=lanes
    ).run()
    return made, counters


# --- the draft catches up ------------------------------------------------------------------------------


def test_steps_of_the_target_alone_are_a_prefill(pipeline):
    alone = 12
    pace = Scripted(*[0] * alone, *[4] * 49)
    found, counters = decode(pipeline, pace)
    expected = pipeline.generate(LABELS, seed=3, draft_length=4, prefill=(alone - 0.5) / 49, **QUICK)
    np.testing.assert_array_equal(found, expected.tokens)
    for name in ("rounds", "accepted", "rejected", "target_backbone_calls", "draft_backbone_calls"):
        assert getattr(counters, name) == getattr(expected.stats, name)
    assert counters.sequential_head_calls == expected.stats.sequential_head_calls
    assert counters.draft_lengths[0] == alone * len(LABELS)
    assert pace.caught_up == 1


def test_a_draft_that_catches_up_when_it_must_knows_all(pipeline):
    """Images stand at steps of their own, and lanes take new ones: as if all was taken in before every round."""
    lengths = (4, 0, 0, 2, 0, 1, 4)
    found, counters = decode(pipeline, Scripted(*lengths), lanes=2)
    expected, more = decode(pipeline, Scripted(*lengths), decoder=CatchingUpAlways, lanes=2)
    assert np.abs(found - expected).max() <= CLOSE
    assert counters.accepted == more.accepted
    assert counters.draft_backbone_calls < more.draft_backbone_calls


def test_a_draft_that_does_not_catch_up_is_seen(pipeline):
    lengths = (0, 4)
    found, counters = decode(pipeline, Scripted(*lengths), decoder=NeverCatchingUp)
    expected, knowing = decode(pipeline, Scripted(*lengths))
    assert np.abs(found - expected).max() > 0.1
    assert counters.accepted < 0.9 * knowing.accepted


def test_on_a_device_that_captures_steps(pipeline, monkeypatch):
    """What the draft catches up with is padded to a few sizes: past an image's last token lies what is never read."""
    FakeCuda().install(monkeypatch)
    gpu = Pipeline(load_bundle("digits"), FakeBackend(CudaDevice(batch_buckets=(1, 4, 8), graphs=True)))
    expected, found = (decode(each, Scripted(2, 0, 0, 4, 0))[0] for each in (pipeline, gpu))
    assert np.abs(found - expected).max() <= CLOSE


# --- images --------------------------------------------------------------------------------------------


def test_images_do_not_depend_on_which_lengths_draft_them(pipelines):
    """As with fixed ones; with 0 among them they would."""
    first, second = (decode(pipelines["digits-mar"], Scripted(*lengths))[0] for lengths in ((1, 4, 2), (2, 2, 1, 3)))
    assert np.abs(first - second).max() <= CLOSE


def test_the_target_alone_all_the_way_is_target_mode(pipelines):
    found, counters = decode(pipelines["digits-mar"], Scripted(0))
    expected = pipelines["digits-mar"].generate(LABELS, seed=3, mode="target", ar_steps=6, guidance=1.0)
    np.testing.assert_array_equal(found, expected.tokens)
    assert (counters.rounds, counters.drafted, counters.draft_backbone_calls) == (0, 0, 0)
    assert counters.target_backbone_calls == expected.stats.target_backbone_calls
    assert counters.sequential_head_calls == expected.stats.sequential_head_calls


# --- what the pace is told -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_it_hears_of_judged_tokens_alone(pipelines, name):
    """Verdicts on dropped drafts must not reach it: their noise is used again."""
    pace = Scripted(4, 2, 0)
    _, counters = decode(pipelines[name], pace)
    seconds, completion, accepted, rejected = np.array(pace.noted).T
    assert (accepted.sum(), rejected.sum()) == (counters.accepted, counters.rejected)
    assert counters.accepted + counters.rejected == counters.committed < counters.drafted
    assert ((completion > 0) == (rejected > 0)).all()
    assert (seconds > 0).all()


def test_it_hears_where_images_are(pipeline):
    pace = Scripted(2, 0)
    decode(pipeline, pace, lanes=2)
    steps, lanes, waiting, behind = zip(*pace.seen, strict=True)
    assert pace.begun == [2]
    assert steps[0] == [0, 0]
    assert max(max(each) for each in steps) == 48
    assert (waiting[0], waiting[-1]) == (1, 0)
    assert set(lanes) == {1, 2}
    assert behind[:3] == (False, False, True)


def test_a_pace_is_kept_for_what_costs_the_same(pipeline):
    def pace(**options):
        return pipeline.session(DecodeOptions(mode="exact", draft_length="auto", **options)).pace

    first = pace()
    assert first.lengths == (0, 1, 2, 4, 8)
    assert pace(temperature=0.9, guidance=2.0) is first
    others = [pace(guidance=1.0), pace(draft="small"), pace(draft_steps=9), pace(draft="self")]
    assert len({id(each) for each in (first, *others)}) == 5
    assert others[-1].lengths == (0, 1)


@pytest.mark.parametrize(
    ("limit", "ar_steps", "lengths"), [(4, 49, (0, 1, 2, 4)), (6, 49, (0, 1, 2, 4)), (None, 3, (0, 1, 2))]
)
def test_lengths_end_where_engines_and_schedules_do(pipelines, monkeypatch, limit, ar_steps, lengths):
    pipeline = pipelines["digits-mar"]
    monkeypatch.setattr(pipeline, "backend", replace(pipeline.backend, limits=Limits(draft_length=limit)))
    monkeypatch.setattr(pipeline, "_paces", {})
    session = pipeline.session(DecodeOptions(mode="exact", draft_length="auto", ar_steps=ar_steps))
    assert session.pace.lengths == lengths
    assert session.plan.draft_length >= lengths[-1]


# --- requests ------------------------------------------------------------------------------------------


def test_a_request_says_which_lengths_it_took(pipeline):
    seen = []
    stats = pipeline.generate(
        LABELS, batch_size=2, draft_length="auto", progress=lambda done, total: seen.append((done, total)), **QUICK
    ).stats
    assert seen[-1] == (3 * 49, 3 * 49)
    assert sum(count for length, count in stats.draft_lengths.items() if length) == stats.rounds
    assert stats.target_backbone_calls == stats.rounds + stats.draft_lengths[0]
    assert list(stats.draft_lengths) == sorted(stats.draft_lengths)


def test_fixed_lengths_are_counted_too(pipeline):
    stats = pipeline.generate([3], draft_length=4, **QUICK).stats
    assert max(stats.draft_lengths) == 4
    assert sum(stats.draft_lengths.values()) == stats.rounds
    assert sum(length * count for length, count in stats.draft_lengths.items()) == stats.drafted
    assert pipeline.generate([3], mode="draft", draft_length="auto").stats.draft_lengths == {}


def test_figures_where_nothing_was_drafted():
    counters = Counters()
    counters.draft_lengths[0] = 3
    stats = Stats.of(counters, mode="exact", backend="none", images=1, seconds=1.0)
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
def test_refusals(pipeline, options, said):
    with pytest.raises(UsageError) as caught:
        pipeline.generate([1], **options)
    assert said in str(caught.value)


def test_predictions_are_for_one_length(pipeline):
    with pytest.raises(UsageError, match="draft_length is 'auto'; a prediction is for one draft length"):
        Predictor(pipeline).workload(DecodeOptions(mode="exact", draft_length="auto"), 1)
