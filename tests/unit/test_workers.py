"""Workers that share the images of a request, a thread each."""

import threading
import time

import numpy as np
import pytest
from tolerances import SAME_TO_ROUNDING, largest_difference

from specdec_rt import Pipeline, UsageError, load
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle
from specdec_rt.workers import run_workers

LABELS = np.arange(5)


@pytest.fixture(scope="module")
def alone(cpu):
    return cpu("digits-mar")


@pytest.fixture(scope="module")
def shared():
    """Two workers, however many cores there are."""
    first, second = (Pipeline(load_bundle("digits-mar"), OnnxRuntimeBackend(threads=1)) for _ in range(2))
    return Pipeline(first.bundle, first.backend, [second])


@pytest.mark.parametrize("mode", ["target", "exact"])
def test_images_and_counts_are_those_of_one_worker(alone, shared, mode):
    seen = []
    asked = {"seed": 2, "mode": mode, "ar_steps": 4, "guidance": 1.0, "batch_size": 3, "indices": LABELS + 7}
    expected = alone.generate(LABELS, **asked)
    found = shared.generate(LABELS, **asked, progress=lambda done, total: seen.append((done, total)))

    assert largest_difference(found.tokens, expected.tokens) <= SAME_TO_ROUNDING
    np.testing.assert_array_equal(found.labels, LABELS)
    for name in ("rounds", "accepted", "target_backbone_calls", "sequential_head_calls", "draft_lengths"):
        assert getattr(found.stats, name) == getattr(expected.stats, name)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (5 * 49,) * 2


def test_fewer_images_than_workers(alone, shared):
    asked = {"seed": 2, "mode": "target", "ar_steps": 2, "guidance": 1.0}
    np.testing.assert_array_equal(shared.generate([4], **asked).tokens, alone.generate([4], **asked).tokens)
    many = shared.generate(LABELS, batch_size=1, **asked)
    assert largest_difference(many.tokens, alone.generate(LABELS, **asked).tokens) <= SAME_TO_ROUNDING


def test_an_interrupt_ends_all_and_leaves_the_pipeline_of_use(shared):
    def interrupt(done, _):
        if done > 20:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        shared.generate(LABELS, progress=interrupt, mode="target")
    assert threading.active_count() == before
    assert shared.generate(LABELS[:2], mode="target", ar_steps=2).images.shape == (2, 28, 28, 1)


def test_a_failure_ends_the_others_early():
    done = []

    def fails(progress):
        progress(1)
        raise ValueError("one of them")

    def goes_on(progress):
        for _ in range(1000):
            time.sleep(0.01)
            progress(1)
            done.append(1)

    with pytest.raises(ValueError, match="one of them"):
        run_workers([goes_on, fails], lambda _: None)
    assert len(done) < 100


@pytest.mark.parametrize(
    ("workers", "said"), [(0, "workers is 0"), (10_000, "workers is 10000"), ("2", "workers is '2'")]
)
def test_a_number_of_workers_that_cannot_be_is_refused(workers, said):
    with pytest.raises(UsageError, match=said):
        load("digits", workers=workers)
