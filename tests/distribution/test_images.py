"""Whole images of the digits pairs: as good as promised, and `exact` draws what `target` draws."""

import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from twosample import permutation_p_value

from specdec_rt import load

CLASSIFIER = Path(__file__).parents[1] / "golden" / "digit_classifier.onnx"
CLASSES = 10
RECOGNISED = {"digits": 0.93, "digits-mar": 0.9}
"""Share of images that must be named as their labels."""
DRAFT_LENGTH = {"digits": 4, "digits-mar": 2}
ACCEPTED = {"digits": 0.75, "digits-mar": 0.65}
CALLS = {"digits": 0.45, "digits-mar": 0.8}
"""Share of the backbone calls of `target` mode that `exact` may take; a set of tokens stops at any rejection."""
WORKERS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(os.cpu_count() or 1, 4)
"""One where other tests have the other cores. The images are the same."""
BATCH_SIZE = 16 * WORKERS
"""Images that a core decodes together are 16: as quick as any number, or quicker."""


@pytest.fixture(scope="module", params=["digits", "digits-mar"])
def pipeline(request):
    return load(request.param, backend="onnxruntime", threads=WORKERS, workers=WORKERS)


@pytest.fixture(scope="module")
def classifier():
    return onnxruntime.InferenceSession(str(CLASSIFIER), providers=["CPUExecutionProvider"])


@pytest.fixture(
    scope="module", params=[pytest.param(16, id="fast"), pytest.param(100, id="full", marks=pytest.mark.full)]
)
def labels(request):
    return np.repeat(np.arange(CLASSES), request.param)


@pytest.fixture(scope="module")
def drawn(pipeline, labels):
    return pipeline.generate(labels, seed=0, mode="target", batch_size=BATCH_SIZE)


def judge(classifier, result):
    logits, features = classifier.run(None, {"image": result.images[..., 0].astype(np.float32) / 255})
    return logits.argmax(axis=1), features


def compare(classifier, first, second):
    return permutation_p_value(judge(classifier, first)[1], judge(classifier, second)[1], first.labels, second.labels)


def test_digits_are_recognised(pipeline, classifier, drawn):
    wanted = RECOGNISED[pipeline.bundle.manifest.name]
    named, _ = judge(classifier, drawn)
    share = (named == drawn.labels).mean()
    noise = 2 * (wanted * (1 - wanted) / len(named)) ** 0.5 if len(named) < 1000 else 0.0
    assert share >= wanted - noise


def test_images_of_a_class_differ(drawn):
    for label in range(CLASSES):
        members = drawn.images[drawn.labels == label].reshape(-1, 28 * 28).astype(np.float64)
        distance = np.sqrt(((members[:, None] - members[None]) ** 2).mean(axis=-1))
        off_diagonal = distance[~np.eye(len(members), dtype=bool)]
        # Two real digits of one class are 45 (ones) to 85 grey levels apart on average.
        assert off_diagonal.mean() > 30
        assert off_diagonal.min() > 5


def test_exact_draws_what_target_draws(pipeline, classifier, labels, drawn):
    name = pipeline.bundle.manifest.name
    exact = pipeline.generate(labels, seed=1, mode="exact", batch_size=BATCH_SIZE, draft_length=DRAFT_LENGTH[name])
    assert compare(classifier, exact, drawn) > 0.01
    assert exact.stats.acceptance_rate >= ACCEPTED[name]
    assert exact.stats.target_backbone_calls <= CALLS[name] * drawn.stats.target_backbone_calls


def test_the_small_draft_alone_is_seen(pipeline, classifier, labels, drawn):
    draft = pipeline.generate(labels, seed=2, mode="draft", draft="small", batch_size=BATCH_SIZE)
    assert compare(classifier, draft, drawn) <= 0.001
