"""The seconds of calls of any size, from measurements at few sizes."""

from bisect import bisect_left
from collections.abc import Callable

__all__ = ["Interpolated"]

SLOW = 0.3
"""Seconds of a call from which on it is taken to be all arithmetic."""


class Interpolated:
    """The seconds of calls of two sizes, x and y: measured when first needed on a coarse grid, linear in between.

    The grid is 1, 2, 3, 4, 6, 8, 12, …; for y it is `y_grid`, ascending, where that is given. Once a call of some y
    was slower than `SLOW`, calls larger in x are not made: their seconds are taken to grow in proportion.
    """

    def __init__(self, measure: Callable[[int, int], float], *, y_grid: tuple[int, ...] | None = None) -> None:
        self._measure, self._y_grid = measure, y_grid
        self.points: dict[tuple[int, int], float] = {}

    def __call__(self, x: int, y: int) -> float:
        return sum(
            weight_x * weight_y * self._point(at_x, at_y)
            for at_x, weight_x in _neighbours(x, _grid_around(x))
            for at_y, weight_y in _neighbours(y, self._y_grid or _grid_around(y))
        )

    def _point(self, x: int, y: int) -> float:
        if (x, y) not in self.points:
            slow = [at for at in self.points.items() if at[0][1] == y and at[0][0] < x and at[1] > SLOW]
            if slow:
                (largest, _), seconds = max(slow)
                self.points[x, y] = seconds * x / largest
            else:
                self.points[x, y] = self._measure(x, y)
        return self.points[x, y]


def _grid_around(size: int) -> tuple[int, ...]:
    """The part of the grid that a size lies in."""
    power = 1 << (size.bit_length() - 1)
    return (power, power + power // 2, 2 * power)


def _neighbours(size: int, grid: tuple[int, ...]) -> list[tuple[int, float]]:
    """The grid's points around a size and their weights; the grid's last point, where the size lies past it."""
    high = bisect_left(grid, size)
    if high == len(grid):
        return [(grid[-1], 1.0)]
    if grid[high] == size or high == 0:
        return [(grid[high], 1.0)]
    share = (size - grid[high - 1]) / (grid[high] - grid[high - 1])
    return [(grid[high - 1], 1 - share), (grid[high], share)]
