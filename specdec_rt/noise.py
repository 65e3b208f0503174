"""Every random number of a run: counter-based draws (Philox), keyed by seed, purpose, image and token.

Keys hold neither batch nor round, so a token's noise depends neither on its companions in a batch, nor on
their order, nor on the draft length. numpy guarantees the raw stream of a bit generator across versions,
not its distributions (NEP 19): uniforms and normals are made here from the raw stream.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import numpy as np

from specdec_rt.errors import UsageError
from specdec_rt.types import FloatArray, IntArray

__all__ = ["Draws", "NoiseSource", "Purpose", "TokenNoise"]


class Purpose(IntEnum):
    """What a draw is for. The values are part of the format: never renumber them, only append."""

    CHAIN = 0
    """x_T and the noise of every transition, shared by draft and target"""
    ACCEPTANCE = 1
    """the uniforms that decide how long a prefix is accepted"""
    RESIDUAL = 2
    """the draw that replaces the first rejected state or token"""
    COMPLETION = 3
    """the noise on the transitions after a residual draw"""
    ORDER = 4
    """the order in which an image's tokens are predicted"""


class Draws(Protocol):
    """Where decoding takes its random numbers from."""

    def normal(
        self, image: IntArray, token: IntArray, purpose: Purpose, steps: int, dim: int, attempt: int = 0
    ) -> FloatArray:
        """`[R, steps, dim]` standard normal draws for the tokens keyed by `image [R]` and `token [R]`.

        Where a purpose comes again for a token, each `attempt` has draws of its own.
        """
        ...

    def uniform(self, image: IntArray, token: IntArray, purpose: Purpose, count: int, attempt: int = 0) -> FloatArray:
        """`[R, count]` uniform draws, strictly inside (0, 1); `attempt` as above."""
        ...


@dataclass(frozen=True, slots=True)
class NoiseSource:
    """The draws of one seed. A purpose's normals and its uniforms come from different streams."""

    seed: int
    """0 to 2**64 - 1"""
    _streams: dict[Purpose, tuple[np.random.Philox, Any]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """each purpose's generator and its state: to make one takes longer than a token's draws"""

    def __post_init__(self) -> None:
        if not (isinstance(self.seed, int | np.integer) and 0 <= self.seed < 2**64):
            raise UsageError(f"seed is {self.seed!r}; expected an integer from 0 to 2**64 - 1; pass another seed")

    def normal(
        self, image: IntArray, token: IntArray, purpose: Purpose, steps: int, dim: int, attempt: int = 0
    ) -> FloatArray:
        """`[R, steps, dim]` float32 from N(0, 1), for the tokens keyed by `image [R]` and `token [R]`.

        Step s does not depend on `steps`: it reads its own block of the stream.
        """
        half = (dim + 1) // 2
        uniform = _open_uniform(self._raw(image, token, purpose, 2 * attempt, steps * 2 * half))
        # Box-Muller: the first half of a step's block gives radii, the second half angles.
        radius_angle = uniform.reshape(len(image), steps, 2, half)
        radius = np.sqrt(-2 * np.log(radius_angle[:, :, 0]))
        angle = 2 * np.pi * radius_angle[:, :, 1]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=2, dtype=np.float32)
        return normal[:, :, :dim]

    def uniform(self, image: IntArray, token: IntArray, purpose: Purpose, count: int, attempt: int = 0) -> FloatArray:
        """`[R, count]` float64 strictly inside (0, 1), for the tokens keyed by `image [R]` and `token [R]`."""
        return _open_uniform(self._raw(image, token, purpose, 2 * attempt + 1, count))

    def _raw(
        self, image: IntArray, token: IntArray, purpose: Purpose, kind: int, count: int
    ) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
        """`[R, count]` raw words. `kind` keeps a purpose's normals, uniforms and attempts apart."""
        if purpose not in self._streams:
            made = np.random.Philox(key=np.array([self.seed, purpose], dtype=np.uint64))
            self._streams[purpose] = made, made.state
        generator, state = self._streams[purpose]
        # Philox counts up from word 0, so streams that differ in words 1 to 3 never overlap.
        counter = np.zeros((len(image), 4), dtype=np.uint64)
        counter[:, 1], counter[:, 2], counter[:, 3] = token, image, kind
        raw = np.empty((len(image), count), dtype=np.uint64)
        for row, of_row in zip(raw, counter, strict=True):
            state["state"]["counter"] = of_row
            generator.state = state
            row[:] = generator.random_raw(count)
        return raw


@dataclass(frozen=True)
class TokenNoise:
    """The random numbers of R tokens, each keyed by its image and by its position there."""

    draws: Draws
    image: IntArray
    """`[R]`"""
    position: IntArray
    """`[R]`"""

    def pick(self, rows: IntArray) -> "TokenNoise":
        """Those of some rows, `[J]`."""
        return TokenNoise(self.draws, self.image[rows], self.position[rows])

    def chain(self, transitions: int, dim: int) -> FloatArray:
        """`[R, n + 1, D]` normals: where a chain starts, then what each of its n transitions adds."""
        return self.draws.normal(self.image, self.position, Purpose.CHAIN, transitions + 1, dim)

    def acceptance(self, count: int, attempt: int = 0) -> FloatArray:
        """`[R, count]` uniforms that decide how much of a draft is accepted."""
        return self.draws.uniform(self.image, self.position, Purpose.ACCEPTANCE, count, attempt)

    def residual(self, dim: int, attempt: int = 0) -> tuple[FloatArray, FloatArray]:
        """`[R]` uniform and `[R, D]` normal for the state that replaces the first rejected one."""
        uniform = self.draws.uniform(self.image, self.position, Purpose.RESIDUAL, 1, attempt)
        return uniform[:, 0], self.draws.normal(self.image, self.position, Purpose.RESIDUAL, 1, dim, attempt)[:, 0]

    def residual_tries(self, tries: int, dim: int) -> tuple[FloatArray, FloatArray]:
        """`[R, tries, D]` normals, `[R, tries]` uniforms: `paper` mode's proposals for a residual, and their tests."""
        normal = self.draws.normal(self.image, self.position, Purpose.RESIDUAL, tries, dim)
        return normal, self.draws.uniform(self.image, self.position, Purpose.RESIDUAL, tries)

    def completion(self, transitions: int, dim: int, attempt: int = 0) -> FloatArray:
        """`[R, n, D]` normals of the transitions after a residual draw: the draft's own noise would bias them."""
        return self.draws.normal(self.image, self.position, Purpose.COMPLETION, transitions, dim, attempt)


def _open_uniform(raw: np.ndarray[tuple[int, int], np.dtype[np.uint64]]) -> FloatArray:
    """The centres of 2**52 equal cells of (0, 1). With 53 bits the last centre would round to 1."""
    return ((raw >> np.uint64(12)) + 0.5) * 2.0**-52
