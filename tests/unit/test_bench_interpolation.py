"""Seconds of calls of any size, from measurements at few."""

import pytest

from specdec_rt.bench.interpolation import Interpolated


class Measured:
    """Seconds that are linear in both sizes; remembers what was asked."""

    def __init__(self, of_x, of_y=0.0, base=0.0):
        self._of_x, self._of_y, self._base = of_x, of_y, base
        self.asked = []

    def __call__(self, x, y):
        self.asked.append((x, y))
        return self._of_x * x + self._of_y * y + self._base


def test_straight_lines_are_met_exactly_from_points_of_the_grid_alone():
    line = Measured(3e-4, 2e-4)
    function = Interpolated(line)

    assert [function(x, 5) for x in (1, 7, 23, 100)] == pytest.approx([13e-4, 31e-4, 79e-4, 310e-4])
    assert {x for x, _ in line.asked} <= {1, 6, 8, 16, 24, 96, 128}


def test_the_second_size_may_have_a_grid_of_its_own():
    line = Measured(3e-4, 2e-4)

    assert Interpolated(line, y_grid=(1, 25, 49))(2, 13) == pytest.approx(32e-4)
    assert {y for _, y in line.asked} == {1, 25}


def test_slow_calls_are_not_made_at_every_size():
    slow = Measured(0.1, base=0.02)
    function = Interpolated(slow)

    assert function(4, 1) == pytest.approx(0.42)
    assert function(32, 1) == pytest.approx(8 * 0.42)
    assert function(32, 2) == pytest.approx(3.22)
    assert slow.asked == [(4, 1), (32, 2)]
