"""The positions that a backbone is asked about: the next AR steps of each image, and the tokens they predict."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from specdec_rt.types import IntArray

__all__ = ["PositionBatch"]


@dataclass(frozen=True)
class PositionBatch:
    """Consecutive AR steps of each of A images, and the R tokens that they predict.

    Rows run AR step by AR step, within a step image by image. Steps past an image's last one have no rows.
    """

    order: IntArray
    """`[A, L]` each image's positions in the order in which they are predicted"""
    known: IntArray
    """`[T + 1]` as in `ArSchedule`: tokens known before each AR step, and in the end all"""
    first_step: IntArray
    """`[A]` each image's first AR step here"""
    length: int
    """AR steps of each image"""
    image_index: IntArray
    """`[R]` the row's image among the A"""
    offset: IntArray
    """`[R]` the row's AR step, counted from its image's first one here"""
    rank: IntArray
    """`[R]` where the row's position stands in its image's order"""
    one_each: bool = False
    """whether every step of every image predicts exactly one token, as nearly always in the causal family"""

    @classmethod
    def of(cls, order: IntArray, known: IntArray, first_step: IntArray, length: int) -> "PositionBatch":
        """The positions of `length` AR steps from `first_step [A]` on."""
        bounds = known[np.minimum(first_step + np.arange(length + 1)[:, None], len(known) - 1)]  # [length + 1, A]
        count = (bounds[1:] - bounds[:-1]).ravel()
        if count.all() and count.max() == 1:
            offset, image_index = _grid(length, len(first_step))
            return cls(order, known, first_step, length, image_index, offset, bounds[:-1].ravel(), one_each=True)
        row = np.arange(count.sum())
        offset, image_index = np.divmod(np.repeat(np.arange(len(count)), count), len(first_step))
        rank = row - np.repeat(np.cumsum(count) - count, count) + bounds[offset, image_index]
        return cls(order, known, first_step, length, image_index, offset, rank)

    @cached_property
    def position(self) -> IntArray:
        """`[R]`: where the token stands in its image."""
        return self.order[self.image_index, self.rank]

    @property
    def ar_step(self) -> IntArray:
        """`[R]`: the AR step that makes the row's token."""
        return self.first_step[self.image_index] + self.offset

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each of the `length` offsets."""
        if self.one_each:
            return (len(self.first_step),) * self.length
        return tuple(np.bincount(self.offset, minlength=self.length).tolist())

    def at(self, offset: int) -> "PositionBatch":
        """The one AR step at `offset`; its rows are those of this batch with that offset, in the same order."""
        if self.one_each:
            images = len(self.first_step)
            first, image_index = _grid(1, images)
            rank = self.rank[offset * images : (offset + 1) * images]
            first_step = self.first_step + offset
            return PositionBatch(self.order, self.known, first_step, 1, image_index, first, rank, one_each=True)
        return PositionBatch.of(self.order, self.known, np.minimum(self.first_step + offset, len(self.known) - 1), 1)


@lru_cache(maxsize=64)
def _grid(length: int, images: int) -> tuple[IntArray, IntArray]:
    """Offset and image of rows where every step of every image has one row. Neither array is ever written to."""
    offset, image_index = np.divmod(np.arange(length * images), images)
    offset.flags.writeable = image_index.flags.writeable = False
    return offset, image_index
