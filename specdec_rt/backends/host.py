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

    def recur(
        self, path: Array, mean: Array, noise: Array, held: tuple[Array, Array], factors: FloatArray
    ) -> BoundCall:
        """As in `base.Device`: unrolled into one product, of what all of it depends on."""
        steps, size = len(mean), mean[0].size
        unrolled = _unrolled(factors)
        given, made = np.empty((3 + steps, size)), np.empty((2 * steps, size))
        parts = [(given[0], path[0]), (given[1], held[0]), (given[2], held[1]), (given[3:], noise)]
        staged = [(part.reshape(source.shape), source) for part, source in parts]
        means_made, states_made = made[:steps].reshape(mean.shape), made[steps:].reshape(mean.shape)
        after = path[1:]

        def call() -> None:
            for part, source in staged:
                part[...] = source
            np.matmul(unrolled, given, out=made)
            mean[...] = means_made
            after[...] = states_made

        return call

    def recur_rows(
        self,
        path: Array,
        mean: Array,
        noise: Array,
        state: Array,
        made: tuple[Array, Array],
        window: tuple[Array, Array],
        factors: Array,
    ) -> BoundCall:
        """As in `base.Device`: a product for each window that there is, which rows mostly share."""
        (next_state, first_mean), (begins, ends) = made, window
        unrolled = lru_cache(maxsize=256)(lambda at, end: _unrolled(factors[at + 1 : end, :3]))

        def call() -> None:
            for at, end in dict.fromkeys(zip(begins.tolist(), ends.tolist(), strict=True)):
                if at >= end:
                    continue
                rows = np.flatnonzero((begins == at) & (ends == end))
                held = factors[at, 3] * path[rows, at] + factors[at, 4] * first_mean[rows]
                path[rows, at + 1], mean[rows, at] = next_state[rows], first_mean[rows]
                if end > at + 1:
                    given = [next_state[rows][None], held[None], noise[rows, at + 1 : end].swapaxes(0, 1)]
                    after = np.tensordot(unrolled(at, end), np.concatenate(given), axes=1).swapaxes(0, 1)
                    mean[rows, at + 1 : end], path[rows, at + 2 : end + 1] = np.split(after, 2, axis=1)
                state[rows] = path[rows, end]

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


def _unrolled(factors: FloatArray) -> FloatArray:
    """`[2 H, 1 + C + H]`: the H means of a recurrence, then its H states, as products with what all of it depends on.

    That is the first state, C held arrays and the noise of each step; `factors [H, C + 2]` are those of the state, of
    the held arrays and of the noise.
    """
    steps, held = len(factors), factors.shape[1] - 2
    known = np.eye(1 + held + steps)
    at, means, states = known[0], [], []
    for each, of in enumerate(factors):
        means.append(of[0] * at + of[1:-1] @ known[1 : 1 + held])
        at = means[-1] + of[-1] * known[1 + held + each]
        states.append(at)
    return np.array([*means, *states])
