"""Recorded noise in the place of the draws that decoding makes, so that it repeats a recorded image."""

from dataclasses import dataclass

import numpy as np

from export.reference import RecordingError, Reference
from specdec_rt.ar_schedule import cosine_schedule
from specdec_rt.noise import Purpose
from specdec_rt.types import FloatArray, IntArray

__all__ = ["RecordedNoise"]


@dataclass(frozen=True)
class RecordedNoise:
    """The draws of one recorded image of each label; has the methods of `Draws` that mode `target` calls."""

    uniforms: FloatArray
    """`[B, L]`: sorting them gives the recorded orders"""
    chains: FloatArray
    """`[B, L, n + 1, D]`: x_T, then the noise of each transition, at the token's position"""

    @classmethod
    def of(cls, reference: Reference, kind: str, ar_steps: int, shape: tuple[int, int, int]) -> "RecordedNoise":
        """The draws of `image_{kind}`, whose tokens are of `shape` (B, L, D).

        Raises RecordingError where arrays are missing or do not fit each other.
        """
        images, tokens, dim = shape
        # Recorded from the token that is masked longest.
        order = reference.whole("orders", images, tokens, below=tokens)[:, ::-1]
        if not (np.sort(order, axis=1) == np.arange(tokens)).all():
            raise RecordingError("orders are not permutations of an image's positions")
        known = cosine_schedule(tokens, ar_steps).known
        chains: FloatArray = np.zeros(0)
        for step in range(ar_steps):
            start = reference.floats(f"image_{kind}_xT_{step}", None, dim)
            noise = reference.floats(f"image_{kind}_noise_{step}", None, None, dim)
            # Rows of a recorded AR step are in (image, position) order.
            position = np.sort(order[:, known[step] : known[step + 1]], axis=1)
            if position.size != len(start) or noise.shape[1] < len(start):
                raise RecordingError(
                    f"image_{kind}_xT_{step} has {len(start)} rows, image_{kind}_noise_{step} {noise.shape[1]}; "
                    f"expected {position.size}, the tokens of AR step {step + 1} of {ar_steps}"
                )
            drawn = np.concatenate([start[None], noise[:, : len(start)]])  # [n + 1, rows, D]
            if step == 0:
                chains = np.zeros((images, tokens, len(drawn), dim), np.float32)
            if len(drawn) != chains.shape[2]:
                raise RecordingError(
                    f"image_{kind}_noise_{step} has {len(noise)} steps, the first {chains.shape[2] - 1}"
                )
            chains[np.repeat(np.arange(images), position.shape[1]), position.ravel()] = drawn.swapaxes(0, 1)
        uniforms = np.empty(order.shape)
        np.put_along_axis(uniforms, order, (np.arange(tokens) + 0.5)[None] / tokens, axis=1)
        return cls(uniforms, chains)

    def normal(
        self,
        image: IntArray,
        token: IntArray,
        purpose: Purpose,
        steps: int,
        dim: int,
        attempt: int = 0,  # noqa: ARG002  # the protocol's
    ) -> FloatArray:
        """The recorded chains `[R, n + 1, D]` of `token [R]` of `image [R]`."""
        if purpose != Purpose.CHAIN or self.chains.shape[2:] != (steps, dim):
            raise RecordingError(f"the recorded chains are {list(self.chains.shape[2:])}, not {[steps, dim]}")
        return self.chains[image, token]

    def uniform(self, image: IntArray, token: IntArray, purpose: Purpose, count: int, attempt: int = 0) -> FloatArray:  # noqa: ARG002
        """The numbers `[B, L]` that order the positions of `image [B]`."""
        assert purpose == Purpose.ORDER
        return self.uniforms[image]
