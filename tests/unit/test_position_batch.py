"""Which tokens stand next, in both families."""

import numpy as np
import pytest

from specdec_rt.ar_schedule import cosine_schedule, raster_schedule
from specdec_rt.families.position_batch import PositionBatch


def rows(span):
    return list(zip(span.owner.tolist(), span.offset.tolist(), span.place.tolist(), strict=True))


def test_one_token_per_step_in_raster_order():
    order = np.tile(np.arange(5), (2, 1))
    span = PositionBatch.of(order, raster_schedule(5).known, np.array([0, 3]), 3)
    assert rows(span) == [(0, 0, 0), (1, 0, 3), (0, 1, 1), (1, 1, 4), (0, 2, 2)]  # the second image ends
    np.testing.assert_array_equal(span.ar_step, [0, 3, 1, 4, 2])
    assert span.counts == (2, 2, 1)


def test_sets_of_tokens_in_each_images_own_order():
    order = np.array([[4, 2, 0, 1, 3], [3, 1, 4, 0, 2]])
    known = np.array([0, 1, 3, 5])
    span = PositionBatch.of(order, known, np.array([1, 0]), 2)
    assert rows(span) == [(0, 0, 2), (0, 0, 0), (1, 0, 3), (0, 1, 1), (0, 1, 3), (1, 1, 1), (1, 1, 4)]


@pytest.mark.parametrize("schedule", [cosine_schedule(64, 10), raster_schedule(64)], ids=["sets", "single tokens"])
def test_the_step_at_an_offset_holds_the_spans_rows_of_that_offset(schedule):
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(64) for _ in range(4)])
    span = PositionBatch.of(order, schedule.known, np.array([0, 4, 8, 9]), 4)
    assert span.counts == tuple(np.bincount(span.offset, minlength=4))
    for offset in range(4):
        here = span.offset == offset
        single = span.at(offset)
        assert single.counts == (here.sum(),)
        np.testing.assert_array_equal(single.place, span.place[here])
        np.testing.assert_array_equal(single.owner, span.owner[here])
        np.testing.assert_array_equal(single.ar_step, span.ar_step[here])
        assert not single.offset.any()


def test_all_steps_of_an_image_hold_every_place_once():
    order = np.random.default_rng(1).permutation(49)[None]
    span = PositionBatch.of(order, cosine_schedule(49, 7).known, np.array([0]), 7)
    np.testing.assert_array_equal(np.sort(span.place), np.arange(49))


def test_past_the_end_there_is_nothing():
    span = PositionBatch.of(np.arange(4)[None], raster_schedule(4).known, np.array([4]), 2)
    assert rows(span) == []


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
