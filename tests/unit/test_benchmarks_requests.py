"""Requests of a scenario."""

import numpy as np

from benchmarks.requests import Request, labels_of, request_schedule
from specdec_rt import load
from specdec_rt.config import DecodeOptions


class Watched:
    """A pipeline that remembers how many tokens were done each time that progress was made."""

    def __init__(self, pipeline):
        self._pipeline = pipeline
        self.bundle = pipeline.bundle
        self.done = []

    def generate(self, labels, progress, **named):
        def watching(done, total):
            self.done.append(done)
            progress(done, total)

        return self._pipeline.generate(labels, progress=watching, **named)


def test_a_request_may_end_after_its_first_ar_steps():
    pipeline = Watched(load("digits-mar", backend="onnxruntime", threads=1))
    request = Request(DecodeOptions(mode="target", ar_steps=6), 2, first_ar_steps=2)

    assert request(pipeline, 1) is None
    known = request_schedule(pipeline, request.options).known
    assert pipeline.done == [2 * known[1], 2 * known[2]]


def test_requests_of_other_seeds_have_other_labels():
    pipeline = load("digits", backend="onnxruntime", threads=1)

    np.testing.assert_array_equal(labels_of(pipeline, 1, 4), [4, 5, 6, 7])
    np.testing.assert_array_equal(labels_of(pipeline, 2, 4), [8, 9, 0, 1])
