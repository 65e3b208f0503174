"""Lanes whose images are done take the next that wait: the same images in fewer rounds."""

from itertools import pairwise

import numpy as np
import pytest
from fake_cuda import FakeBackend, FakeCuda
from specdec_rt.decode.loop import Decoder
from specdec_rt.decode.steps import Steps

from specdec_rt import Pipeline, load
from specdec_rt.backends.cuda import CudaDevice
from specdec_rt.bundle import load_bundle

CLOSE = {"digits": 1e-4, "digits-mar": 1e-3}
"""Rounding between batch shapes may move a token by this much."""
LABELS = np.array([3, 1, 4, 1, 5])
LANES = 2


@pytest.fixture(scope="module")
def pipelines():
    return {name: load(name, backend="onnxruntime", threads=1) for name in CLOSE}


@pytest.fixture
def launched(monkeypatch):
    """How often each step was launched, and in how many lanes."""
    calls = {"single": [], "round": []}

    def count(name, tokens_at):
        step = getattr(Steps, name)

        def counted(self, *given):
            calls[name].append(len(given[tokens_at]))
            return step(self, *given)

        monkeypatch.setattr(Steps, name, counted)

    count("single", 1)
    count("round", 0)
    return calls


def draw(pipeline, labels=LABELS, **options):
    steps = 6 if pipeline.bundle.manifest.family == "mar" else None
    quick = {"seed": 3, "batch_size": LANES, "ar_steps": steps, "guidance": 1.0, "draft_steps": 8}
    return pipeline.generate(labels, **{**quick, **options})


def in_waves(pipeline, **options):
    """The same images, each batch a request."""
    parts = [np.arange(first, min(first + LANES, len(LABELS))) for first in range(0, len(LABELS), LANES)]
    return [draw(pipeline, LABELS[part], indices=part, **options) for part in parts]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits", {"mode": "exact"}),
        ("digits-mar", {"mode": "exact"}),
        ("digits-mar", {"mode": "paper", "prefill": 0.0, "draft_length": 2}),
    ],
)
def test_images_are_those_of_requests_of_their_own_and_take_fewer_launches(pipelines, launched, name, options):
    waves = in_waves(pipelines[name], **options)
    before, launched["round"][:] = len(launched["round"]), []
    seen = []
    together = draw(pipelines[name], progress=lambda done, total: seen.append((done, total)), **options)
    assert np.abs(together.tokens - np.concatenate([wave.tokens for wave in waves])).max() <= CLOSE[name]
    for counted in ("rounds", "accepted", "drafted", "target_backbone_calls", "sequential_head_calls"):
        assert getattr(together.stats, counted) == sum(getattr(wave.stats, counted) for wave in waves)
    assert len(launched["round"]) < before
    assert max(launched["round"]) == LANES
    assert seen[-1] == (len(LABELS) * 49,) * 2
    assert all(first < second for (first, _), (second, _) in pairwise(seen))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits", {"mode": "draft"}),
        ("digits-mar", {"mode": "target"}),
        ("digits-mar", {"mode": "exact", "prefill": 0.3}),
    ],
)
def test_images_that_keep_step_come_in_waves(pipelines, launched, name, options):
    waves = in_waves(pipelines[name], **options)
    before = {step: list(calls) for step, calls in launched.items()}
    together = draw(pipelines[name], **options)
    np.testing.assert_array_equal(together.tokens, np.concatenate([wave.tokens for wave in waves]))
    assert {step: calls[len(before[step]) :] for step, calls in launched.items()} == before


def test_no_more_images_at_a_time_than_asked_for(monkeypatch):
    """Three of four lanes are for images, whichever end first."""
    FakeCuda().install(monkeypatch)
    pipeline = Pipeline(load_bundle("digits-mar"), FakeBackend(CudaDevice(batch_buckets=(1, 4), graphs=True)))
    going, refill = [], Decoder._refill

    def watched(self):
        refill(self)
        going.append((int(self._going.sum()), len(self._lane)))

    monkeypatch.setattr(Decoder, "_refill", watched)
    draw(pipeline, mode="exact", batch_size=3)
    assert going[0] == (3, 4)
    assert max(images for images, _ in going) == 3
    assert {lanes for _, lanes in going} == {1, 4}
