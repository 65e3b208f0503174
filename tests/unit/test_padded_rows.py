"""Rows are padded with rows of the same AR step, and found again among them."""

import numpy as np
import pytest

from specdec_rt.ar_schedule import cosine_schedule, raster_schedule
from specdec_rt.backends.host import HostDevice
from specdec_rt.families.padded_rows import PaddedRows, row_slices
from specdec_rt.families.position_batch import PositionBatch


class InFours(HostDevice):
    """Captures launches of sizes that four divides."""

    def bucketed(self, count, limit):  # noqa: ARG002  # as in `Device`
        """As in `Device`."""
        return -(-count // 4) * 4


def some_positions(schedule):
    order = np.tile(np.arange(49), (3, 1))
    return PositionBatch.of(order, schedule.known, np.array([0, 5, schedule.steps - 1]), 3)


@pytest.mark.parametrize("schedule", [raster_schedule(49), cosine_schedule(49, 8)], ids=["single tokens", "sets"])
def test_every_ar_step_is_padded_to_the_largest_of_them_with_rows_of_its_own(schedule):
    positions = some_positions(schedule)
    rows = PaddedRows.of(positions, InFours())
    assert rows.counts == (-(-max(positions.counts) // 4) * 4,) * 3
    np.testing.assert_array_equal(rows.source[rows.where], np.arange(len(positions.offset)))
    for offset, part in enumerate(row_slices(rows.counts)):
        assert (positions.offset[rows.source[part]] == offset).all()


def test_a_device_that_captures_nothing_pads_nothing():
    positions = some_positions(cosine_schedule(49, 8))
    rows = PaddedRows.of(positions, HostDevice())
    every_row = np.arange(len(positions.offset))
    assert rows.counts == positions.counts
    np.testing.assert_array_equal(every_row[rows.source], every_row)
    np.testing.assert_array_equal(every_row[rows.where], every_row)
