"""Verdicts of requests, forced and observed."""

import numpy as np
import pytest

from benchmarks.forced_verdicts import ForcedVerdicts
from benchmarks.observe import ObservedVerdicts, observe
from benchmarks.requests import Request
from benchmarks.scenario import Forced
from specdec_rt import DecodeOptions, Pipeline, load
from specdec_rt.ar_schedule import cosine_schedule
from specdec_rt.plan import Tuning

SELF = {"mode": "exact", "draft": "self", "ar_steps": 4}
LABELS = [1, 2]
FROM_THREE_ON = Tuning(min_resume_steps=3)
"""The shipped chains are too short to be resumed with the usual tuning."""


@pytest.fixture(scope="module")
def digits_mar():
    return load("digits-mar", backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def verdicts():
    return ForcedVerdicts()


@pytest.fixture(scope="module")
def forced(digits_mar, verdicts):
    """A pipeline whose verdicts come to `verdicts.rates`."""
    return Pipeline(digits_mar.bundle, digits_mar.backend, tuning=FROM_THREE_ON, exact_verifier=verdicts.exact_verifier)


def stats_of(pipeline, **options):
    return pipeline.generate(LABELS, seed=1, **{**SELF, **options}).stats


# --- forced --------------------------------------------------------------------------------------------------


def test_forced_verdicts_have_the_acceptance_that_is_forced(forced, verdicts):
    verdicts.rates = Forced(acceptance=0.25, left=0.5, resumed=0.5)

    made = forced.generate(LABELS, seed=1, **SELF)

    assert abs(made.stats.acceptance_rate - 0.25) < 0.03
    assert np.isfinite(made.tokens).all()


def test_verdicts_are_found_where_none_are_forced(forced, verdicts, digits_mar):
    verdicts.rates = None
    plain = Pipeline(digits_mar.bundle, digits_mar.backend, tuning=FROM_THREE_ON)

    assert stats_of(forced).acceptance_rate == stats_of(plain).acceptance_rate > 0.5


def test_rejections_leave_the_share_of_a_chain_that_is_forced(forced, verdicts):
    calls = {}
    for left in (0.1, 0.9):
        verdicts.rates = Forced(acceptance=0.0, left=left, resumed=0.0)
        calls[left] = stats_of(forced, draft_steps=23).sequential_head_calls

    assert calls[0.9] > 1.3 * calls[0.1]


def test_verdicts_on_resumed_suffixes_are_forced_too(forced, verdicts):
    calls = {}
    for resumed in (0.0, 1.0):
        verdicts.rates = Forced(acceptance=0.0, left=0.8, resumed=resumed)
        calls[resumed] = stats_of(forced).sequential_head_calls

    assert calls[0.0] > 1.3 * calls[1.0]


def test_forced_verdicts_go_on_from_one_request_to_the_next():
    rates = Forced(acceptance=0.5, left=0.5, resumed=0.5)
    whole, parts = ForcedVerdicts(rates), ForcedVerdicts(rates)

    together = whole.draw(10, resumed=False)[0]
    np.testing.assert_array_equal(together[4:], [parts.draw(4, resumed=False), parts.draw(6, resumed=False)][1][0])


# --- observed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mode": "exact"}, {"mode": "exact", "draft": "self"}, {"mode": "paper"}])
def test_observed_verdicts_are_those_that_the_figures_count(digits_mar, options):
    observed = ObservedVerdicts()
    verifiers = {"exact_verifier": observed.exact_verifier, "paper_verifier": observed.paper_verifier}
    pipeline = Pipeline(digits_mar.bundle, digits_mar.backend, **verifiers)

    stats = pipeline.generate([1, 2, 3], seed=1, ar_steps=6, **options).stats

    found = observed.as_dict()
    assert found["judged"] == stats.accepted + stats.rejected
    assert found["acceptance_rate"] == stats.acceptance_rate
    for rows in (found["by_step"], found["by_offset"]):
        assert sum(row["judged"] for row in rows) == found["judged"]


def test_observing_changes_nothing(digits_mar):
    observed = ObservedVerdicts()
    pipeline = Pipeline(digits_mar.bundle, digits_mar.backend, exact_verifier=observed.exact_verifier)

    tokens = [each.generate(LABELS, seed=1, **SELF).tokens for each in (pipeline, digits_mar)]
    np.testing.assert_array_equal(*tokens)


def test_every_token_is_counted_at_its_ar_step(digits_mar):
    request = Request(DecodeOptions(**SELF), 2)  # one AR step a round: each set of tokens is judged once

    observed = observe(digits_mar.bundle, digits_mar.backend, request, seed=1, requests=2)

    sizes = np.diff(cosine_schedule(49, 4).known)
    assert {step: judged for step, (judged, _) in observed.by_step.items()} == dict(enumerate(4 * sizes))
    assert list(observed.by_offset) == [0]


def test_what_rejections_leave_and_resumed_suffixes_are_recorded(digits_mar):
    request = Request(DecodeOptions(**SELF), 2)

    observed = observe(digits_mar.bundle, digits_mar.backend, request, seed=1, requests=1, tuning=FROM_THREE_ON)

    rejected = sum(judged - accepted for judged, accepted in observed.by_step.values())
    assert len(observed.left) == rejected
    assert len(observed.resumed) >= sum(left * 23 >= 3 for left in observed.left) > 0
    assert 0 < observed.as_dict()["resumed"] < 1
