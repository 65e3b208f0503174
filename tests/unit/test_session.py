"""The launches of decoding on a device with memory of its own: nothing is forgotten, nothing comes too early."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from decoding import decode, with_session
from fake_cuda import FakeBackend
from tolerances import SAME_TO_ROUNDING, largest_difference

from specdec_rt import BackendError, DecodeOptions, Pipeline
from specdec_rt.backends.cuda import CudaDevice
from specdec_rt.bundle import load_bundle
from specdec_rt.capacity import Capacity
from specdec_rt.decode.batch import Batch
from specdec_rt.decode.session import Session
from specdec_rt.noise import NoiseSource
from specdec_rt.plan import Tuning

BUNDLES = {name: load_bundle(name) for name in ("digits", "digits-mar")}
CASES = {
    "target": {"mode": "target"},
    "exact": {"mode": "exact", "draft_length": 2},
    "strided draft": {"mode": "draft", "draft_steps": 12},
    "self": {"mode": "exact", "draft": "self"},
    "paper": {"mode": "paper", "tau": 4.0, "prefill": 0.2},
    "prefilled": {"mode": "exact", "prefill": 0.5},
    "without guidance": {"mode": "exact", "guidance": 1.0},
}
RESUMES = Tuning(min_resume_steps=3)
"""Rejected tokens' chains are drafted again from three transitions on: the shipped chains are short."""
STRIDED_SELF = {"mode": "exact", "draft": "self", "draft_steps": 5}


@pytest.fixture(scope="module")
def cuda(make_gpu):
    cuda, cuda.device = make_gpu(batch_buckets=(1, 4, 8))
    return cuda


@pytest.fixture(scope="module")
def host(cpu):
    return cpu


@pytest.fixture(scope="module")
def gpu(cuda):
    """As `cpu`, on the fake GPU."""

    @cache
    def pipeline(name="digits", tuning=None):
        return Pipeline(BUNDLES[name], FakeBackend(cuda.device), tuning=tuning)

    return pipeline


def ar_steps(name, few):
    return {"ar_steps": few} if name == "digits-mar" else {}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BUNDLES)
def test_images_are_the_hosts(host, gpu, name, case):
    """Three images in four slots, padded rows, drafts that never pass through the host."""
    asked = {"seed": 7, **CASES[case], **ar_steps(name, 8)}
    expected, found = (pipeline(name).generate([3, 1, 4], **asked).tokens for pipeline in (host, gpu))
    assert largest_difference(found, expected) <= SAME_TO_ROUNDING


# --- resumed speculation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [STRIDED_SELF, {"mode": "exact", "draft": "small", "draft_length": 2}])
@pytest.mark.parametrize("name", BUNDLES)
def test_images_with_resumed_speculation_are_the_hosts(host, gpu, name, options):
    asked = {"seed": 8, **options, **ar_steps(name, 8)}
    expected, found = (pipeline(name, RESUMES).generate([3, 1, 4], **asked) for pipeline in (host, gpu))
    assert found.stats.sequential_head_calls == expected.stats.sequential_head_calls
    assert largest_difference(found.tokens, expected.tokens) <= SAME_TO_ROUNDING


@pytest.mark.parametrize("name", BUNDLES)
def test_images_whose_suffixes_do_not_fit_one_call_are_the_hosts(host, gpu, name):
    asked = {"seed": 8, "guidance": 1.0, **STRIDED_SELF, **ar_steps(name, 4)}
    width, n = BUNDLES[name].manifest.target.modulation_width, 23
    small = replace(RESUMES, capacity=Capacity(modulation_values=2 * width * n * 4))
    assert small.capacity.paths_per_call(1, width, n) == 4
    expected = host(name, RESUMES).generate(np.arange(8), **asked)
    found = gpu(name, small).generate(np.arange(8), **asked)
    assert largest_difference(found.tokens, expected.tokens) <= SAME_TO_ROUNDING


def test_images_are_the_hosts_when_requests_grow_and_shrink(host, cuda):
    """Modulation moves to more memory; what was recorded before keeps the memory that it had."""
    pipelines = host("digits", RESUMES), Pipeline(BUNDLES["digits"], FakeBackend(cuda.device), tuning=RESUMES)
    for images in (1, 8, 1, 4):
        asked = {"seed": 8, "guidance": 1.0, **STRIDED_SELF}
        expected, found = (each.generate(np.arange(images), **asked).tokens for each in pipelines)
        assert largest_difference(found, expected) <= SAME_TO_ROUNDING


# --- a target that judges its own draft ------------------------------------------------------------------


def speculate(pipeline, options):
    """A first round: the tokens drafted at the first AR step of three images, and what the target says of them."""
    setup = pipeline.setup(options)
    batch = Batch(setup.session, setup.plan, NoiseSource(7), np.array([3, 1, 4]), np.arange(3), 3)
    batch.admit()
    return setup, setup.session.speculate(batch.next_rows(1))


@pytest.mark.parametrize("draft_steps", [5, 22, 23])
@pytest.mark.parametrize("name", BUNDLES)
def test_a_target_evaluates_what_it_left_out_of_its_own_draft(host, name, draft_steps):
    """The other means are the draft's; all of them are what judging whole paths finds."""
    options = DecodeOptions(mode="exact", draft="self", draft_steps=draft_steps)
    setup, found = speculate(host(name), options)
    # Paths that do not fit one call are judged part by part, on modulation of their own.
    two_paths = Tuning(capacity=Capacity(states_per_call=2 * 2 * 23))
    _, whole = speculate(host(name, two_paths), options)

    np.testing.assert_allclose(found.drawn.path, whole.drawn.path, atol=1e-5)
    np.testing.assert_allclose(found.target.mean, whole.target.mean, atol=1e-5)
    step_mask = setup.plan.draft_step_mask
    assert step_mask.sum() == draft_steps
    np.testing.assert_array_equal(found.target.mean[:, step_mask], found.drawn.mean[:, step_mask])
    if draft_steps < 23:
        assert largest_difference(found.target.mean[:, ~step_mask], found.drawn.mean[:, ~step_mask]) > 1e-3


# --- memory, threads, failures ---------------------------------------------------------------------------


def test_an_engine_that_updates_nothing_in_place_draws_the_same(host, cuda):
    pipeline = Pipeline(BUNDLES["digits"], FakeBackend(cuda.device, in_place=False))
    expected, found = (of.generate([3, 1], seed=4, draft_length=2).tokens for of in (host("digits"), pipeline))
    assert largest_difference(found, expected) <= SAME_TO_ROUNDING


def test_slots_shrink_with_the_batch(host, gpu):
    """Six images in eight slots; once four are left, caches move to the four slots that stay."""
    labels = [0, 1, 2, 3, 4, 5]
    expected, found = (of("digits").generate(labels, seed=2, draft_length=2).tokens for of in (host, gpu))
    assert largest_difference(found, expected) <= SAME_TO_ROUNDING


@pytest.mark.parametrize("name", BUNDLES)
def test_a_second_request_allocates_nothing(cuda, gpu, name):
    """Shapes come again, and with them their buffers: memory does not grow."""
    asked = {"seed": 1, "draft_length": 2, "guidance": 1.0, **ar_steps(name, 6)}
    gpu(name).generate([1, 2, 3], **asked)
    gc.collect()
    cuda.device.wait()
    before, launches = cuda.allocated, cuda.stream.launches
    result = gpu(name).generate([1, 2, 3], **asked)
    assert cuda.allocated == before
    # Every round replays the draft block and the verification, and most of them a completion.
    assert cuda.stream.launches - launches >= 2 * result.stats.rounds / 3


def test_a_request_makes_the_device_its_own_threads(cuda, gpu):
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(threading.get_ident).result()
        pool.submit(gpu("digits").generate, [3], mode="draft").result()
    assert thread in cuda.threads


class BrokenCompletions(Session):
    """The chains of rejected tokens go on from states that are not finite."""

    def finish(self, left):
        """As in `Session`."""
        return super().finish(replace(left, start=left.start * np.nan))


def test_values_that_are_not_finite_are_told_whichever_launch_made_them(gpu):
    setup = with_session(gpu("digits").setup(DecodeOptions(mode="exact")), BrokenCompletions)
    with pytest.raises(BackendError, match="denoise_step engine returned values that are not finite"):
        decode(setup, [3, 1, 4, 1], NoiseSource(7))


class Forgetful(CudaDevice):
    """Uploads nothing."""

    def upload(self, *arrays):  # noqa: ARG002  # as in `Device`
        """As in `Device`."""
        return lambda: None


def test_a_forgotten_upload_is_seen(host, make_gpu):
    _, device = make_gpu(Forgetful, batch_buckets=(1,), graphs=False)
    pipelines = host("digits"), Pipeline(BUNDLES["digits"], FakeBackend(device))
    expected, found = (pipeline.generate([3], seed=7, mode="target").tokens for pipeline in pipelines)
    assert not largest_difference(found, expected) <= 0.1  # they need not even be numbers
