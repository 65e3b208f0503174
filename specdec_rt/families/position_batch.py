"""Which tokens stand next: the AR steps that a backbone is asked about, and the places that they predict."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from specdec_rt.types import IntArray

__all__ = ["PositionBatch"]


@dataclass(frozen=True)
class PositionBatch:
    """Some AR steps of each of A images, from the image's own step on, and the R tokens that they predict.

    Rows run step by step, in each step image by image; steps past an image's last have no rows.
    """

    order: IntArray
    """`[A, L]` each image's places in the order in which they are predicted"""
    known: IntArray
    """`[S + 1]` as in `ArSchedule`"""
    step: IntArray
    """`[A]` the first step"""
    length: int
    """steps of each image"""
    owner: IntArray
    """`[R]` the row's image among the A"""
    offset: IntArray
    """`[R]` the row's step, counted from the image's first"""
    rank: IntArray
    """`[R]` where the row's place stands in the image's order"""
    single: bool = False
    """whether every step of every image predicts one token, as nearly always in the causal family"""

    @classmethod
    def of(cls, order: IntArray, known: IntArray, step: IntArray, length: int) -> "PositionBatch":
        """The span of `length` steps from `step [A]` on."""
        bounds = known[np.minimum(step + np.arange(length + 1)[:, None], len(known) - 1)]  # [length + 1, A]
        count = (bounds[1:] - bounds[:-1]).ravel()
        if count.all() and count.max() == 1:
            offset, owner = _grid(length, len(step))
            return cls(order, known, step, length, owner, offset, bounds[:-1].ravel(), single=True)
        row = np.arange(count.sum())
        offset, owner = np.divmod(np.repeat(np.arange(len(count)), count), len(step))
        rank = row - np.repeat(np.cumsum(count) - count, count) + bounds[offset, owner]
        return cls(order, known, step, length, owner, offset, rank)

    @cached_property
    def place(self) -> IntArray:
        """`[R]`: the token's place in its image."""
        return self.order[self.owner, self.rank]

    @property
    def ar_step(self) -> IntArray:
        """`[R]`: the AR step that makes the row's token."""
        return self.step[self.owner] + self.offset

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each of the `length` offsets."""
        if self.single:
            return (len(self.step),) * self.length
        return tuple(np.bincount(self.offset, minlength=self.length).tolist())

    def at(self, offset: int) -> "PositionBatch":
        """The one step at `offset`; its rows are those of this span with that offset, in the same order."""
        if self.single:
            images = len(self.step)
            first, owner = _grid(1, images)
            rank = self.rank[offset * images : (offset + 1) * images]
            return PositionBatch(self.order, self.known, self.step + offset, 1, owner, first, rank, single=True)
        return PositionBatch.of(self.order, self.known, np.minimum(self.step + offset, len(self.known) - 1), 1)


@lru_cache(maxsize=64)
def _grid(length: int, images: int) -> tuple[IntArray, IntArray]:
    """Offset and owner of rows where every step of every image has one; neither is ever written to."""
    offset, owner = np.divmod(np.arange(length * images), images)
    offset.flags.writeable = owner.flags.writeable = False
    return offset, owner
