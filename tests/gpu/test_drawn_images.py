"""Images drawn on the GPU: those of the CPU, and in `exact` mode distributed as the target's.

Rounding differs between libraries. In `target` mode it moves a token by little, as nothing is decided; elsewhere
it can flip one of an image's decisions; the image is then another one, drawn from the same distribution.
"""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from drawing import SEED, draw
from tolerances import SAME_TO_ANOTHER_LIBRARY, SAME_TO_ROUNDING
from twosample import permutation_p_value

pytestmark = pytest.mark.gpu

CLASSIFIER = Path(__file__).parents[1] / "golden" / "digit_classifier.onnx"
SAME = 0.9
"""Share of images that hold to it, at least: on a CPU no decision of 32 images flips."""
EACH = 20
"""Images of every class."""
CLASSES = 10


@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_target_mode_draws_the_cpus_images(pipeline, on_cpu, backend, name, record_property):
    differences = np.abs(draw(pipeline(name, backend), "target") - on_cpu(name, "target")).max(axis=(1, 2))
    record_property("largest_difference", float(differences.max()))
    assert differences.max() <= SAME_TO_ANOTHER_LIBRARY
    assert (differences <= SAME_TO_ROUNDING).mean() >= SAME


@pytest.mark.parametrize("mode", ["exact", "paper"])
@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_speculation_draws_the_cpus_images(pipeline, on_cpu, backend, name, mode, record_property):
    differences = np.abs(draw(pipeline(name, backend), mode) - on_cpu(name, mode)).max(axis=(1, 2))
    record_property("share_of_images_equal", float((differences <= SAME_TO_ANOTHER_LIBRARY).mean()))
    assert (differences <= SAME_TO_ANOTHER_LIBRARY).mean() >= SAME


def test_another_seed_draws_no_image_of_the_cpu(pipeline, on_cpu, backend):
    """The comparison above can fail."""
    other = draw(pipeline("digits", backend), "target", SEED + 1)
    assert np.abs(other - on_cpu("digits", "target")).max(axis=(1, 2)).min() > SAME_TO_ANOTHER_LIBRARY


# --- distributions ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    return onnxruntime.InferenceSession(str(CLASSIFIER), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=["digits", "digits-mar"])
def drawn(request, pipeline, backend, classifier):
    """Gives features and labels of many images in a mode, on the GPU."""
    found = pipeline(request.param, backend)
    labels = np.repeat(np.arange(CLASSES), EACH)

    def features(seed, **options):
        images = found.generate(labels, seed=seed, batch_size=64, **options).images
        _, values = classifier.run(None, {"image": images[..., 0].astype(np.float32) / 255})
        return values, labels

    return features


@pytest.fixture(scope="module")
def of_target(drawn):
    return drawn(0, mode="target")


def p_value(first, second):
    return permutation_p_value(first[0], second[0], first[1], second[1])


def test_exact_draws_what_target_draws(drawn, of_target):
    assert p_value(drawn(1, mode="exact"), of_target) > 0.01


def test_the_target_s_own_head_draws_it_too(drawn, of_target):
    assert p_value(drawn(2, mode="exact", draft="self"), of_target) > 0.01


def test_the_small_draft_alone_is_seen(drawn, of_target):
    """The test above can fail."""
    assert p_value(drawn(3, mode="draft", draft="small"), of_target) <= 0.001
