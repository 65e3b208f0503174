"""Buffers in host memory: an array is its own device buffer, and calls run at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import BoundCall
from specdec_rt.types import Array, FloatArray, IntArray

__all__ = ["HostDevice"]


def _nothing() -> None:
    """The copy of an array to its device buffer, which is the array itself."""


@dataclass(frozen=True)
class HostDevice:
    """The CPU as a `Device`. Nothing is captured, so sizes are never padded."""

    kept_shapes: int = 32
    """few: without padding there are many shapes, and each is cheap to make"""

    def activate(self) -> None:
        """Nothing: host memory is every thread's."""

    def zeros(self, shape: tuple[int, ...], dtype: type[np.generic], *, staged: bool = True) -> Array:  # noqa: ARG002
        """An array of zeros."""
        return np.zeros(shape, dtype)

    def aligned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """An array of zeros: engines on the CPU accept any address."""
        return np.zeros(shape, dtype)

    def upload(self, *arrays: Array) -> BoundCall:  # noqa: ARG002  # the protocol's
        """Nothing: host and engine share the array."""
        return _nothing

    download = upload

    def copy(self, destination: Array, source: Array) -> BoundCall:
        """Copies an array to another, broadcast to its shape."""
        return lambda: np.copyto(destination, source)

    def gather(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """`destination = source[index]`, by rows."""

        def call() -> None:
            # Any mode but "raise" spares NumPy a buffer: indices are the program's own.
            source.take(index, axis=0, out=destination, mode="clip")

        return call

    def scatter(self, destination: Array, source: Array, index: Array) -> BoundCall:
        """`destination[index] = source`, by rows."""

        def call() -> None:
            destination[index] = source

        return call

    def linear_recurrence(
        self,
        path: Array,
        mean: Array,
        normals: Array,
        evaluated: tuple[Array, Array, Array],
        window: tuple[Array, Array],
        coefficients: Array,
    ) -> BoundCall:
        """Transitions on a held x̂₀, unrolled into one product for each window; mostly all rows share one."""
        (before, after, evaluated_mean), (begins, ends), noise = evaluated, window, normals[:, 1:]
        unrolled = lru_cache(maxsize=256)(lambda begin, end: _unrolled(coefficients[begin:end]))

        def hold(rows: IntArray | slice, begin: int, end: int) -> None:
            first = after[rows]
            given = np.empty((2 + end - begin, *first.shape))
            given[0], given[1], given[2] = before[rows], evaluated_mean[rows], first
            given[3:] = noise[rows, begin + 1 : end].swapaxes(0, 1)
            held = (unrolled(begin, end) @ given.reshape(len(given), -1)).reshape(2, -1, *first.shape)
            mean[rows, begin + 1 : end], path[rows, begin + 2 : end + 1] = held.swapaxes(1, 2)
            after[rows] = path[rows, end]

        def call() -> None:
            windows = set(zip(begins.tolist(), ends.tolist(), strict=True))
            for begin, end in windows:
                rows = slice(None) if len(windows) == 1 else np.flatnonzero((begins == begin) & (ends == end))
                if begin >= end:
                    after[rows] = before[rows]
                    continue
                path[rows, begin + 1], mean[rows, begin] = after[rows], evaluated_mean[rows]
                if end > begin + 1:
                    hold(rows, begin, end)

        return call

    def record(self, calls: Sequence[BoundCall]) -> BoundCall:
        """All calls as one: they run one after the other."""
        kept = tuple(call for call in calls if call is not _nothing)

        def run() -> None:
            for call in kept:
                call()

        return run

    def wait(self) -> None:
        """Nothing is ever outstanding."""

    def batch_bucket(self, images: int) -> int:
        """`images` itself: nothing is captured."""
        return images

    def bucketed(self, count: int, limit: int) -> int:  # noqa: ARG002  # the protocol's
        """`count` itself: nothing is captured."""
        return count


def _unrolled(coefficients: FloatArray) -> FloatArray:
    """`[2 steps, 3 + steps]`: means, then states, of so many transitions after an evaluated one, as one product.

    They are linear in the state before the evaluated transition, its mean, the state after it, and the noise of each
    step; `coefficients [1 + steps, 5]` are those of the evaluated transition and of the others.
    """
    given = np.eye(2 + len(coefficients))
    x0_pred = coefficients[0, 3] * given[0] + coefficients[0, 4] * given[1]
    state, means, states = given[2], [], []
    for step, (of_state, of_x0, std, *_) in enumerate(coefficients[1:]):
        means.append(of_state * state + of_x0 * x0_pred)
        state = means[-1] + std * given[3 + step]
        states.append(state)
    return np.array([*means, *states])
