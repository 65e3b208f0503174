"""The steps of decoding on a device with memory of its own: nothing is forgotten, nothing comes too early."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_cuda import FakeBackend, FakeCuda
from specdec_rt.decode.steps import Steps

from specdec_rt import BackendError, DecodeOptions, Pipeline, load
from specdec_rt.backends.cuda import CudaDevice
from specdec_rt.bundle import load_bundle
from specdec_rt.decode import chain, redraft

CLOSE = 2e-4
"""Rounding between batch shapes may move a token by this much."""
MANY_CLOSE = 5e-4
"""The same of more images, which round in more ways."""
CASES = {
    "target": {"mode": "target"},
    "exact": {"mode": "exact", "draft_length": 3},
    "strided draft": {"mode": "draft", "draft_steps": 12},
    "self": {"mode": "exact", "draft": "self"},
    "paper": {"mode": "paper", "tau": 4.0, "prefill": 0.2},
    "prefilled": {"mode": "exact", "prefill": 0.5},
    "without guidance": {"mode": "exact", "guidance": 1.0},
}


@pytest.fixture(scope="module")
def host():
    return {name: load(name, backend="onnxruntime") for name in ("digits", "digits-mar")}


@pytest.fixture(scope="module")
def cuda():
    """A GPU that is none; the device is made on it once, and never imports anything after that."""
    cuda = FakeCuda()
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda.install(monkeypatch)
        cuda.device = CudaDevice(batch_buckets=(1, 4, 8), graphs=True)
    return cuda


@pytest.fixture(scope="module")
def gpu(cuda):
    return {name: Pipeline(load_bundle(name), FakeBackend(cuda.device)) for name in ("digits", "digits-mar")}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_images_are_the_hosts(host, gpu, name, case):
    """Three images in four lanes, rows padded to powers of two, drafts that never pass through the host."""
    options = dict(CASES[case])
    if name == "digits-mar":
        options["ar_steps"] = 8
    expected, found = (pipeline.generate([3, 1, 4], seed=7, **options).tokens for pipeline in (host[name], gpu[name]))
    assert np.abs(found - expected).max() <= CLOSE


@pytest.mark.parametrize("options", [{"draft": "self", "draft_steps": 5}, {"draft": "small", "draft_length": 3}])
@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_rests_of_chains_that_are_drafted_again_are_the_hosts(host, gpu, name, options, monkeypatch):
    monkeypatch.setattr(redraft, "LEAST", 3)
    asked = {"seed": 8, "mode": "exact", **options, **({"ar_steps": 8} if name == "digits-mar" else {})}
    expected, found = (pipeline.generate([3, 1, 4], **asked) for pipeline in (host[name], gpu[name]))
    assert found.stats.sequential_head_calls == expected.stats.sequential_head_calls
    assert np.abs(found.tokens - expected.tokens).max() <= CLOSE


@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_rests_whose_modulation_does_not_fit_are_the_hosts(host, cuda, name, monkeypatch):
    monkeypatch.setattr(redraft, "LEAST", 3)
    asked = {"seed": 8, "mode": "exact", "draft": "self", "draft_steps": 5}
    asked |= {"ar_steps": 4} if name == "digits-mar" else {}
    expected = host[name].generate(np.arange(8), **asked)
    monkeypatch.setattr(chain.Head, "paths_per_call", lambda *_: 4)
    monkeypatch.setattr(chain.Head, "places", lambda *_: 3)
    found = Pipeline(load_bundle(name), FakeBackend(cuda.device)).generate(np.arange(8), **asked)
    assert np.abs(found.tokens - expected.tokens).max() <= MANY_CLOSE


def test_a_pipeline_whose_rounds_grow_and_shrink_is_the_hosts(host, cuda, monkeypatch):
    """Modulation is moved to more room; what was recorded before keeps the room that it had."""
    monkeypatch.setattr(redraft, "LEAST", 3)
    pipeline = Pipeline(load_bundle("digits"), FakeBackend(cuda.device))
    for images in (1, 8, 1, 4):
        asked = {"labels": np.arange(images), "seed": 8, "mode": "exact", "draft": "self", "draft_steps": 5}
        found, expected = (each.generate(**asked).tokens for each in (pipeline, host["digits"]))
        assert np.abs(found - expected).max() <= MANY_CLOSE


@pytest.mark.parametrize("draft_steps", [5, 22, 23])
@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_a_target_evaluates_what_it_left_out_of_its_own_draft(name, draft_steps, monkeypatch):
    """The other means are the draft's; all of them are what judging whole paths finds."""
    rounds = []

    def noted(*asked):
        drawn, verified = launched(*asked)
        rounds.append((drawn.path.copy(), drawn.mean.copy(), verified.copy()))
        return drawn, verified

    launched = Steps.round
    monkeypatch.setattr(Steps, "round", noted)
    asked = {"seed": 7, "mode": "exact", "draft": "self", "draft_steps": draft_steps, "progress": _stop}
    for paths_per_call in (100, 2):  # the latter are judged part by part, on modulation of their own
        monkeypatch.setattr(chain.Head, "paths_per_call", lambda *_, most=paths_per_call: most)
        pipeline = load(name, backend="onnxruntime", threads=1)
        with pytest.raises(_Enough):
            pipeline.generate([3, 1, 4], **asked)
    (path, drafted, own), (same, _, whole) = rounds[0], rounds[1]
    evaluate = pipeline.session(DecodeOptions(mode="exact", draft="self", draft_steps=draft_steps)).plan.evaluate

    assert (23 if evaluate is None else evaluate.sum()) == draft_steps
    np.testing.assert_allclose(same, path, atol=1e-5)
    np.testing.assert_allclose(own, whole, atol=1e-5)
    if draft_steps < 23:
        np.testing.assert_array_equal(own[:, evaluate], drafted[:, evaluate])
        assert np.abs(own - drafted)[:, ~evaluate].max() > 1e-3


class _Enough(Exception):  # noqa: N818  # no error
    pass


def _stop(*_):
    raise _Enough


def test_caches_of_an_engine_that_updates_nothing_in_place(host, cuda):
    pipeline = Pipeline(load_bundle("digits"), FakeBackend(cuda.device, in_place=False))
    expected, found = (of.generate([3, 1], seed=4, draft_length=2).tokens for of in (host["digits"], pipeline))
    assert np.abs(found - expected).max() <= CLOSE


def test_lanes_shrink_with_the_batch(host, gpu):
    """Six images in eight lanes; once four are left, caches move to the four lanes that stay."""
    labels = [0, 1, 2, 3, 4, 5]
    expected, found = (
        pipeline.generate(labels, seed=2, draft_length=2).tokens for pipeline in (host["digits"], gpu["digits"])
    )
    assert np.abs(found - expected).max() <= CLOSE


@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_a_second_request_allocates_nothing_new(cuda, gpu, name):
    """Shapes come again, and with them their buffers: memory does not grow."""
    options = {} if name == "digits" else {"ar_steps": 6}
    gpu[name].generate([1, 2, 3], seed=1, **options)
    gc.collect()
    cuda.device.wait()
    before, launches = cuda.allocated, cuda.stream.launches
    result = gpu[name].generate([1, 2, 3], seed=1, **options)
    assert cuda.allocated == before
    # Every round replays the draft block and the verification, and most of them a completion.
    assert cuda.stream.launches - launches >= 2 * result.stats.rounds / 3


def test_a_request_makes_the_device_its_own_threads(cuda, gpu):
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(threading.get_ident).result()
        pool.submit(gpu["digits"].generate, [3], mode="draft").result()
    assert thread in cuda.threads


def test_values_that_are_not_finite_are_told_whatever_the_step(cuda):
    """An engine whose completions are broken, and nothing else."""
    pipeline = Pipeline(load_bundle("digits"), FakeBackend(cuda.device))
    steps = pipeline.session(DecodeOptions()).steps
    complete = steps.complete
    steps.complete = lambda rows, guidance, start, *rest: complete(rows, guidance, start * np.nan, *rest)
    with pytest.raises(BackendError, match="denoise_step engine returned values that are not finite"):
        pipeline.generate([3, 1, 4, 1], seed=7)


def test_a_forgotten_upload_is_seen(host, monkeypatch):
    """The test can fail: a device whose uploads do nothing draws other images."""
    FakeCuda().install(monkeypatch)
    device = CudaDevice(batch_buckets=(1,), graphs=False)
    monkeypatch.setattr(device, "upload", lambda *_: lambda: None)
    tokens = Pipeline(load_bundle("digits"), FakeBackend(device)).generate([3], seed=7, mode="target").tokens
    assert not np.abs(tokens - host["digits"].generate([3], seed=7, mode="target").tokens).max() <= 0.1
