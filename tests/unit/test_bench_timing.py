"""Requests on a clock, and where the time of one goes."""

import numpy as np
import pytest

from benchmarks.forced_verdicts import ForcedVerdicts
from benchmarks.scenario import Forced
from specdec_rt import Pipeline, load
from specdec_rt.bench.timing import TimedBackend, profile, repeat


@pytest.fixture(scope="module")
def digits_mar():
    return load("digits-mar", backend="onnxruntime", threads=1)


def test_requests_have_seeds_of_their_own_and_warm_up_with_others():
    seeds = []
    times = repeat(seeds.append, seed=7, warmup=2, samples=3)

    assert seeds == [10, 11, 7, 8, 9]
    assert len(times.seconds) == 3


def test_no_request_begins_when_the_time_is_over_but_one_always_does():
    assert len(repeat(lambda _: None, seed=1, warmup=0, samples=9, limit_seconds=1e-12).seconds) == 1


def test_a_profile_times_every_call_and_leaves_images_as_they_are(digits_mar):
    def request(pipeline, seed):
        return pipeline.generate([1], seed=seed, mode="target", ar_steps=3)

    found, result = profile(digits_mar, request, seed=1)

    assert found.graphs["target.backbone"].calls == 3
    assert found.graphs["target.denoise_step"].calls == 3 * 23
    assert 0 < found.host_share < 1
    np.testing.assert_array_equal(result.tokens, request(digits_mar, 1).tokens)


def test_a_profile_has_the_verdicts_of_the_pipeline_that_is_profiled(digits_mar):
    verdicts = ForcedVerdicts(Forced(acceptance=0.0, left=0.5, resumed=0.0))
    pipeline = Pipeline(digits_mar.bundle, digits_mar.backend, exact_verifier=verdicts.exact_verifier)

    def acceptance_rate(pipeline, seed):
        return pipeline.generate([1], seed=seed, mode="exact", draft="self", ar_steps=2).stats.acceptance_rate

    assert profile(pipeline, acceptance_rate, seed=1, warmup=0)[1] == 0
    assert profile(digits_mar, acceptance_rate, seed=1, warmup=0)[1] > 0


def test_a_timed_backend_is_the_backend_in_everything_but_its_engines(digits_mar):
    backend = digits_mar.backend
    timed = TimedBackend(backend)

    assert (timed.name, timed.device, timed.limits) == (backend.name, backend.device, backend.limits)
