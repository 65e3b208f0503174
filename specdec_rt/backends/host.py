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

    def stage(self, values: Array) -> Array:
        """The values themselves, if they are contiguous."""
        return np.ascontiguousarray(values)

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
        """Transitions on a held x̂₀, unrolled into one product for all rows that share a window."""
        begins, ends = window
        before, after, evaluated_mean = evaluated
        unrolled = lru_cache(maxsize=256)(lambda begin, end: _unrolled(coefficients[begin:end]))

        @lru_cache(maxsize=256)
        def of_all_rows(begin: int, end: int) -> BoundCall:
            states, means, noise = path[:, begin + 1 : end + 1], mean[:, begin:end], normals[:, begin + 2 : end + 1]
            return _hold(states, means, noise, evaluated, unrolled(begin, end))

        def call() -> None:
            windows = set(zip(begins.tolist(), ends.tolist(), strict=True))
            if len(windows) == 1:
                of_all_rows(*windows.pop())()
                return
            for begin, end in windows:
                rows = np.flatnonzero((begins == begin) & (ends == end))
                # Copies, as indices give them.
                states, means = path[rows, begin + 1 : end + 1], mean[rows, begin:end]
                some = before[rows], after[rows], evaluated_mean[rows]
                _hold(states, means, normals[rows, begin + 2 : end + 1], some, unrolled(begin, end))()
                path[rows, begin + 1 : end + 1], mean[rows, begin:end], after[rows] = states, means, some[1]

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


def _hold(
    states: Array, means: Array, noise: Array, evaluated: tuple[Array, Array, Array], unrolled: FloatArray
) -> BoundCall:
    """`linear_recurrence` of rows that share a window of `steps` transitions, whose product is `unrolled`.

    `states` and `means` are `[R, steps, D]`, those of the evaluated transition first; `noise` is `[R, steps - 1, D]`.
    """
    before, after, evaluated_mean = evaluated
    held = means.shape[1] - 1
    if held < 0:
        return lambda: np.copyto(after, before)
    given, made = np.empty((3 + held, *before.shape)), np.empty((2, held, *before.shape))
    flat_given, flat_made = given.reshape(3 + held, before.size), made.reshape(2 * held, before.size)
    held_means, held_states = means[:, 1:].swapaxes(0, 1), states[:, 1:].swapaxes(0, 1)

    def call() -> None:
        means[:, 0], states[:, 0] = evaluated_mean, after
        if held:
            given[0], given[1], given[2], given[3:] = before, evaluated_mean, after, noise.swapaxes(0, 1)
            np.matmul(unrolled, flat_given, out=flat_made)
            held_means[:], held_states[:] = made
            after[:] = states[:, -1]

    return call


def _unrolled(coefficients: FloatArray) -> FloatArray:
    """`[2 steps, 3 + steps]`: means, then states, of so many transitions after an evaluated one, as one product.

    They are linear in the state before the evaluated transition, its mean, the state after it, and the noise of each
    step; `coefficients [1 + steps, 5]` are those of the evaluated transition and of the others.
    """
    if not len(coefficients):  # a row that stays where it is
        return np.zeros((0, 0))
    given = np.eye(2 + len(coefficients))
    x0_pred = coefficients[0, 3] * given[0] + coefficients[0, 4] * given[1]
    state, means, states = given[2], [], []
    for step, (of_state, of_x0, std, *_) in enumerate(coefficients[1:]):
        means.append(of_state * state + of_x0 * x0_pred)
        state = means[-1] + std * given[3 + step]
        states.append(state)
    return np.array([*means, *states]).reshape(-1, len(given))
