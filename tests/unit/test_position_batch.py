"""Which positions are predicted next, in both families."""

import numpy as np
import pytest

from specdec_rt.ar_schedule import cosine_schedule, raster_schedule
from specdec_rt.families.position_batch import PositionBatch


def rows(positions):
    """Image, offset and position of each row."""
    columns = positions.image_index, positions.offset, positions.position
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_a_causal_image_has_one_token_per_ar_step_in_raster_order():
    order = np.tile(np.arange(5), (2, 1))
    positions = PositionBatch.of(order, raster_schedule(5).known, np.array([0, 3]), 3)
    assert rows(positions) == [(0, 0, 0), (1, 0, 3), (0, 1, 1), (1, 1, 4), (0, 2, 2)]  # the second image ends
    np.testing.assert_array_equal(positions.ar_step, [0, 3, 1, 4, 2])
    assert positions.counts == (2, 2, 1)


def test_a_mar_image_has_sets_of_tokens_in_its_own_order():
    order = np.array([[4, 2, 0, 1, 3], [3, 1, 4, 0, 2]])
    known = np.array([0, 1, 3, 5])
    positions = PositionBatch.of(order, known, np.array([1, 0]), 2)
    assert rows(positions) == [(0, 0, 2), (0, 0, 0), (1, 0, 3), (0, 1, 1), (0, 1, 3), (1, 1, 1), (1, 1, 4)]


@pytest.mark.parametrize("schedule", [cosine_schedule(64, 10), raster_schedule(64)], ids=["sets", "single tokens"])
def test_the_ar_step_at_an_offset_holds_the_rows_of_that_offset(schedule):
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(64) for _ in range(4)])
    positions = PositionBatch.of(order, schedule.known, np.array([0, 4, 8, 9]), 4)
    assert positions.counts == tuple(np.bincount(positions.offset, minlength=4))
    for offset in range(4):
        here = positions.offset == offset
        single = positions.at(offset)
        assert single.counts == (here.sum(),)
        np.testing.assert_array_equal(single.position, positions.position[here])
        np.testing.assert_array_equal(single.image_index, positions.image_index[here])
        np.testing.assert_array_equal(single.ar_step, positions.ar_step[here])
        assert not single.offset.any()


def test_all_ar_steps_of_an_image_hold_every_position_once():
    order = np.random.default_rng(1).permutation(49)[None]
    positions = PositionBatch.of(order, cosine_schedule(49, 7).known, np.array([0]), 7)
    np.testing.assert_array_equal(np.sort(positions.position), np.arange(49))


def test_past_the_last_ar_step_there_are_no_rows():
    positions = PositionBatch.of(np.arange(4)[None], raster_schedule(4).known, np.array([4]), 2)
    assert rows(positions) == []
