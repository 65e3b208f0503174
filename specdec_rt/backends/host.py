"""Buffers in host memory: an array is its own twin, calls run at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec_rt.engine import BoundCall
from specdec_rt.types import Array

__all__ = ["HostDevice"]


def _nothing() -> None:
    """What moving an array to where it is takes."""


@dataclass(frozen=True)
class HostDevice:
    """As in `engine.Device`; shapes are never padded, and so there are many of them."""

    kept_shapes: int = 32

    def activate(self) -> None:
        """Nothing: host memory is every thread's."""

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic], *, staged: bool = True) -> Array:  # noqa: ARG002
        """An array of zeros."""
        return np.zeros(shape, dtype)

    def pitched(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """An array of zeros: engines take any part of it."""
        return np.zeros(shape, dtype)

    def upload(self, *arrays: Array) -> BoundCall:  # noqa: ARG002  # the protocol's
        """Nothing: host and engine share the array."""
        return _nothing

    download = upload

    def copy(self, destination: Array, source: Array) -> BoundCall:
        """As in `engine.Device`."""
        return lambda: np.copyto(destination, source)

    def gather(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """As in `engine.Device`."""

        def call() -> None:
            # Any mode but "raise" spares NumPy a buffer: indices are the program's own.
            np.take(source, index, axis=0, out=destination, mode="clip")

        return call

    def scatter(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """As in `engine.Device`."""

        def call() -> None:
            destination[index] = source

        return call

    def combine(self, destination: Array, terms: Sequence[tuple[float, Array]]) -> BoundCall:
        """As in `engine.Device`."""
        (first_factor, first), *others = [(np.float64(factor), array) for factor, array in terms]
        total, part = (np.empty(destination.shape) for _ in range(2))

        def call() -> None:
            np.multiply(first, first_factor, out=total)
            for factor, array in others:
                np.multiply(array, factor, out=part)
                np.add(total, part, out=total)
            np.copyto(destination, total, casting="same_kind")

        return call

    def record(self, calls: Sequence[BoundCall]) -> BoundCall:
        """As in `engine.Device`: they run one after the other."""
        kept = tuple(call for call in calls if call is not _nothing)

        def run() -> None:
            for call in kept:
                call()

        return run

    def wait(self) -> None:
        """Nothing is ever outstanding."""

    def lanes(self, images: int) -> int:
        """As many as there are images."""
        return images

    def padded(self, count: int, limit: int) -> int:  # noqa: ARG002  # the protocol's
        """The size itself."""
        return count
