"""Buffers in host memory: an array is its own device buffer, and calls run at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from specdec_rt.backends.base import BoundCall
from specdec_rt.types import Array, FloatArray

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
        """Transitions on a held x̂₀, unrolled into one product for all rows, or for each row if windows differ."""
        begins, ends = window

        @lru_cache(maxsize=256)
        def hold(first: int, last: int, begin: int, end: int) -> BoundCall:
            rows = slice(first, last)
            return _hold(
                [array[rows] for array in (path, mean, normals, *evaluated)], begin, end, coefficients[begin:end]
            )

        def call() -> None:
            windows = list(zip(begins.tolist(), ends.tolist(), strict=True))
            if len(set(windows)) == 1:
                hold(0, len(windows), *windows[0])()
                return
            for row, (begin, end) in enumerate(windows):
                hold(row, row + 1, begin, end)()

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


def _hold(arrays: Sequence[Array], begin: int, end: int, coefficients: FloatArray) -> BoundCall:
    """`linear_recurrence` of rows that share a window; `coefficients [end - begin, 5]` are the window's."""
    path, mean, normals, before, after, evaluated_mean = arrays
    if begin >= end:
        return lambda: np.copyto(after, before)
    steps = end - begin - 1
    unrolled = _unrolled(coefficients)
    given, made = np.empty((3 + steps, *before.shape)), np.empty((2, steps, *before.shape))
    flat_given, flat_made = given.reshape(3 + steps, before.size), made.reshape(2 * steps, before.size)
    noise = normals[:, begin + 2 : end + 1].swapaxes(0, 1)
    held_means, held_states = mean[:, begin + 1 : end].swapaxes(0, 1), path[:, begin + 2 : end + 1].swapaxes(0, 1)
    first_mean, first_state, last_state = mean[:, begin], path[:, begin + 1], path[:, end]

    def call() -> None:
        first_mean[:], first_state[:] = evaluated_mean, after
        if steps:
            given[0], given[1], given[2], given[3:] = before, evaluated_mean, after, noise
            np.matmul(unrolled, flat_given, out=flat_made)
            held_means[:], held_states[:] = made
            after[:] = last_state

    return call


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
    return np.array([*means, *states]).reshape(-1, len(given))
