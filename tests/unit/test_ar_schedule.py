"""How tokens are spread over AR steps, and how guidance grows, as in the public MAR reference."""

import numpy as np
import pytest

from specdec_rt.ar_schedule import cosine_schedule, guidance_weights, raster_schedule


def test_cosine_steps_are_the_references():
    """The rows that the reference drew in each of 8 AR steps of 64 tokens, 3 images at a time."""
    np.testing.assert_array_equal(np.diff(cosine_schedule(64, 8).known) * 3, [6, 9, 18, 24, 30, 33, 36, 36])


def test_linear_guidance_grows_with_the_tokens_that_are_known():
    schedule = cosine_schedule(64, 8)
    weights = guidance_weights(schedule.progress, scale=3.0, schedule="linear")
    np.testing.assert_allclose(weights[0, [0, 1, 7]], [1 + 2 * 2 / 64, 1 + 2 * 5 / 64, 1 + 2 * 63 / 64])
    np.testing.assert_allclose(weights.sum(axis=0), 1)
    raster = guidance_weights(raster_schedule(4).progress, scale=3.0, schedule="linear")
    np.testing.assert_allclose(raster[0], [1.5, 2.0, 2.5, 3.0])


def test_constant_guidance_is_the_scale_and_none_has_one_branch():
    progress = raster_schedule(3).progress
    np.testing.assert_array_equal(guidance_weights(progress, scale=2.0, schedule="constant"), [[2.0] * 3, [-1.0] * 3])
    np.testing.assert_array_equal(guidance_weights(progress, scale=1.0, schedule="linear"), [[1.0] * 3])


@pytest.mark.parametrize("tokens", [1, 2, 49, 64, 256])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.77, 1.0])
def test_every_cosine_step_makes_at_least_one_token(tokens, share):
    steps = max(round(share * tokens), 1)
    schedule = cosine_schedule(tokens, steps)
    assert schedule.steps == steps
    assert schedule.known[0] == 0
    assert schedule.known[-1] == tokens
    assert (np.diff(schedule.known) >= 1).all()
    assert (np.diff(schedule.progress) >= 0).all()
    assert schedule.progress[-1] <= (tokens - 1) / tokens
