"""Predictions for a bundle here: how requests are decoded, and what is measured for them."""

import pytest

from specdec_rt import load
from specdec_rt.bench.cost import Acceptance, HostCost
from specdec_rt.bench.predict import Predictor
from specdec_rt.config import DecodeOptions


@pytest.fixture(scope="module")
def digits():
    return load("digits", backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def digits_mar():
    return load("digits-mar", backend="onnxruntime", threads=1)


def test_a_draft_drives_its_own_head_if_it_has_one(digits):
    predictor = Predictor(digits)
    heads = {draft: digits.bundle.manifest.drafts[draft].head for draft in digits.bundle.manifest.drafts}

    assert heads == {"adapter": "target", "small": "own"}
    for draft, head in (("adapter", "target"), ("small", "small"), ("self", "target")):
        assert predictor.workload(DecodeOptions(mode="exact", draft=draft), 1).draft_head == head


def test_a_draft_that_does_not_exist_has_the_rounds_of_a_model(digits):
    work = Predictor(digits, draft_share=0.25).workload(DecodeOptions(mode="exact", draft_length=3, draft_steps=12), 1)

    assert (work.plan.draft, work.plan.draft_length, work.draft_calls) == ("draft", 3, 12)
    assert work.draft_head == "target"


def test_a_prediction_has_a_part_for_every_graph_and_for_the_host(digits):
    predictor = Predictor(digits)
    found = predictor.predict(DecodeOptions(mode="exact", draft_length=2), 1, Acceptance(0.8))

    assert found.parts["host"] > 0
    of_target = {f"target.{graph}" for graph in ("backbone", "modulation", "denoise_step", "path_means")}
    assert set(found.parts) == {"draft", "host", *of_target}
    assert {"target.path_means", "adapter.backbone"} <= set(predictor.record()["graph_seconds"]["2"])


def test_requests_with_other_drafts_have_host_costs_of_their_own(digits_mar):
    predictor = Predictor(digits_mar)
    for options in (DecodeOptions(mode="target"), *(DecodeOptions(draft=draft) for draft in ("small", "self"))):
        assert predictor.host(predictor.workload(options, 1)).stage > 0

    assert set(predictor.record()["host_seconds"]) == {"alone, batch 1", "small, batch 1", "self, batch 1"}


def test_graphs_are_timed_anew_when_that_is_asked_for(digits):
    predictor = Predictor(digits, host=HostCost())
    work = predictor.workload(DecodeOptions(mode="target"), 1)
    before = predictor.times(work)

    assert predictor.times(work) is before
    predictor.renew()
    assert predictor.times(work) is not before
