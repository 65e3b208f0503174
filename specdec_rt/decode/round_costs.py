"""What rounds of each draft length have cost, as far as is known: robust figures of a few clock times."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Cell", "RoundCosts", "lane_size"]

WINDOW = 9
"""The last rounds of a length, and the last completions, that costs are taken from."""
COMPLETION = 0.8
"""What it costs to go on where a token was rejected, of a step of the target alone; until that is known."""
TAIL = 0.8
"""What a round costs of a full one, on average, while the slowest images of a batch end; until that is known."""
PHASES = 4
"""Parts of the schedule that are told apart where later AR steps cost more."""


@dataclass
class Cell:
    """Rounds with about so many lanes, in one part of the schedule. Length 0 is a step of the target alone."""

    seconds: dict[int, float] = field(default_factory=dict)
    """of a round without its completion, by length: the lower quartile, since it is always the same work, and what
    else a machine does only makes it longer"""
    times: dict[int, deque[float]] = field(default_factory=dict)
    completions: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    calls: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    """which of the cell's rounds was the last of a length"""
    rounds: int = 0
    spent: float = 0.0
    """seconds of all rounds"""
    lost: dict[int, float] = field(default_factory=dict)
    """seconds that were spent on trying a length again"""
    catch_up: float = 0.0
    """least seconds that the draft took to catch up"""

    def note(self, length: int, seconds: float, completion: float) -> None:
        """A round took so long, and the completion at its end, if there was one. Buffers are made in the first."""
        self.rounds += 1
        self.spent += seconds + completion
        self.last[length] = self.rounds
        self.calls[length] = self.calls.get(length, 0) + 1
        if self.calls[length] > 1:
            times = self.times.setdefault(length, deque(maxlen=WINDOW))
            times.append(seconds)
            self.seconds[length] = sorted(times)[(len(times) - 1) // 4]
        if completion:
            self.completions.append(completion)

    def note_catch_up(self, seconds: float) -> None:
        """The draft caught up."""
        self.spent += seconds
        self.catch_up = min(self.catch_up or math.inf, seconds)


class RoundCosts:
    """The cells of one way of decoding; `uneven` tells that later AR steps of its schedule cost more."""

    def __init__(self, *, uneven: bool) -> None:
        self._phases = PHASES if uneven else 1
        self._cells: dict[tuple[int, int], Cell] = {}

    def key(self, lanes: int, progress: float) -> tuple[int, int]:
        """The cell that a round with so many lanes belongs to, `progress` (0 … 1) into the schedule."""
        return lane_size(lanes), min(int(self._phases * progress), self._phases - 1)

    def cell(self, key: tuple[int, int]) -> Cell:
        """A new one knows nothing."""
        return self._cells.setdefault(key, Cell())

    def calls(self, lanes: int, length: int) -> int:
        """Rounds of a length with so many lanes, wherever in the schedule."""
        return sum(cell.calls.get(length, 0) for key, cell in self._cells.items() if key[0] == lanes)

    def seconds(self, key: tuple[int, int], length: int) -> float | None:
        """A round without completion: as measured, or as many target steps as in the nearest cell that ran it.

        None where no cell did. The cell itself has run the target alone; so it has for `completion`.
        """
        there = self._nearest(key, lambda cell: length in cell.seconds)
        return None if there is None else self._cells[key].seconds[0] * there.seconds[length] / there.seconds[0]

    def completion(self, key: tuple[int, int]) -> float:
        """Seconds of a completion. Its chain has any length up to a whole one's, so this is a mean."""
        alone = self._cells[key].seconds[0]
        there = self._nearest(key, lambda cell: len(cell.completions) > 0)
        if there is None:
            return COMPLETION * alone
        # It is hardly more than a step of the target alone. What takes longer is not decoding, but a buffer that is
        # made, a step that is captured, or another process.
        shares = [min(each / there.seconds[0], 1.0) for each in there.completions]
        return alone * sum(shares) / len(shares)

    def _nearest(self, key: tuple[int, int], fits: Callable[[Cell], bool]) -> Cell | None:
        """The cell itself, if it fits, or the one next to it that does."""
        if fits(self._cells[key]):
            return self._cells[key]
        found, nearest = None, math.inf
        for other, cell in self._cells.items():
            distance = PHASES * abs(math.log(other[0] / key[0])) + abs(other[1] - key[1])
            if distance < nearest and 0 in cell.seconds and fits(cell):
                found, nearest = cell, distance
        return found

    def tail(self, key: tuple[int, int], length: int) -> float:
        """What a round costs of a full one once most images are done."""
        full, few = self._cells[key], self._cells.get((lane_size(-(-key[0] // 4)), key[1]))
        if few is None or length not in few.seconds or length not in full.seconds:
            return TAIL
        return min(few.seconds[length] / full.seconds[length], 1.0)


def lane_size(lanes: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, … that is not below `lanes`."""
    power = 1 << (lanes - 1).bit_length()
    return power // 4 * 3 if power > 2 and lanes <= power // 4 * 3 else power
