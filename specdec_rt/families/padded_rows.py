"""Rows padded to sizes that come again: what is recorded for one size serves every round of that size."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import Device
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.types import IntArray

__all__ = ["PaddedRows", "row_slices"]


@dataclass(frozen=True)
class PaddedRows:
    """Where the R rows of a position batch stand among padded ones. Padding repeats a row of the same AR step."""

    counts: tuple[int, ...]
    """padded rows of each AR step"""
    source: IntArray | slice
    """`[padded]` the row that each repeats"""
    where: IntArray | slice
    """`[R]` where each row stands"""

    @classmethod
    def of(cls, positions: PositionBatch, device: Device) -> "PaddedRows":
        """Rows of these positions, in the sizes of the device; a device that records nothing pads nothing."""
        most = len(positions.first_step) * _largest_step(positions.known.tobytes())
        counts = positions.counts
        padded = tuple(device.bucketed(count, most) for count in counts)
        if padded == counts:
            return cls(padded, slice(None), slice(None))
        padded = (max(padded),) * len(counts)  # fewer shapes are captured
        first, begin = np.cumsum(counts) - counts, np.cumsum(padded) - padded
        inside = [np.minimum(np.arange(wide), count - 1) for wide, count in zip(padded, counts, strict=True)]
        source = np.concatenate([start + rows for start, rows in zip(first, inside, strict=True)])
        return cls(padded, source, np.arange(sum(counts)) + np.repeat(begin - first, counts))


def row_slices(counts: tuple[int, ...]) -> list[slice]:
    """The rows of each AR step, of which there are so many."""
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


@lru_cache(maxsize=16)
def _largest_step(known: bytes) -> int:
    """Tokens of a schedule's largest AR step; `known [T + 1]` int64 as bytes."""
    return int(np.diff(np.frombuffer(known, np.int64)).max())
