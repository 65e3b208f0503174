"""Which tokens stand next: the AR steps that a backbone is asked about, and the places that they predict."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specdec_rt.types import FloatArray, IntArray

__all__ = ["Backbone", "Span"]


@dataclass(frozen=True)
class Span:
    """Some AR steps of each of A images, from the image's own step on, and the R tokens that they predict.

    Rows run image by image, each image's steps in order; steps past an image's last have no rows.
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

    @classmethod
    def of(cls, order: IntArray, known: IntArray, step: IntArray, length: int) -> "Span":
        """The span of `length` steps from `step [A]` on."""
        first, last = known[step], known[np.minimum(step + length, len(known) - 1)]
        count = last - first
        owner = np.repeat(np.arange(len(step)), count)
        rank = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + first[owner]
        offset = np.searchsorted(known, rank, side="right") - 1 - step[owner]
        return cls(order, known, step, length, owner, offset, rank)

    @property
    def place(self) -> IntArray:
        """`[R]`: the token's place in its image."""
        return self.order[self.owner, self.rank]

    @property
    def ar_step(self) -> IntArray:
        """`[R]`: the AR step that makes the row's token."""
        return self.step[self.owner] + self.offset

    def at(self, offset: int) -> "Span":
        """The one step at `offset`; its rows are those of this span with that offset, in the same order."""
        return Span.of(self.order, self.known, np.minimum(self.step + offset, len(self.known) - 1), 1)


class Backbone(Protocol):
    """A backbone on its engine, with what it keeps for the images of one batch."""

    def condition(self, tokens: FloatArray, span: Span) -> FloatArray:
        """Conditions `z [G, R, Z]` for the span's rows.

        `tokens [A, L, D]`: every token of the steps before a row's own stands at its place. What is
        returned may be a view that the next call overwrites.
        """
        ...

    def catch_up(self, tokens: FloatArray, step: IntArray) -> int:
        """Take in `tokens [A, L, D]` that another model made, up to `step [A]`; returns backbone calls per image."""
        ...

    def select(self, rows: IntArray) -> None:
        """Keep only these images of the batch, in this order."""
        ...
