"""What a draft proposes: the tokens of one round, with the paths that led to them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from specdec_rt.decode.chain import Head
from specdec_rt.families.causal import CausalBackbone
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["ChainNoise", "GuidanceOf", "Model", "Proposal", "propose"]

GuidanceOf = Callable[[IntArray], FloatArray]
"""`position [R]` to guidance weights `[G, R]`."""


@dataclass(frozen=True)
class Model:
    """A backbone with its state for the batch, and the head that it drives."""

    backbone: CausalBackbone
    head: Head


@dataclass(frozen=True)
class ChainNoise:
    """The normals of R chains: where they start, and what each transition adds."""

    start: FloatArray
    """`[R, D]` x_T"""
    steps: FloatArray
    """`[R, n, D]`"""

    @classmethod
    def of(cls, normals: FloatArray) -> "ChainNoise":
        """Split draws `[R, n + 1, D]`: the first is the start."""
        return cls(normals[:, 0], normals[:, 1:])


@dataclass(frozen=True)
class Proposal:
    """A round's drafts for R = A γ rows: image by image, each image's γ tokens in order."""

    noise: ChainNoise
    path: FloatArray
    """`[R, n + 1, D]`"""
    mean: FloatArray
    """`[R, n, D]` the draft's transition means: what the states were drawn around"""

    @property
    def token(self) -> FloatArray:
        """`[R, D]` the drafted tokens."""
        return self.path[:, -1]


def propose(
    draft: Model,
    previous: FloatArray,
    position: IntArray,
    length: int,
    noise: ChainNoise,
    guidance_of: GuidanceOf,
    evaluate: BoolArray | None,
) -> Proposal:
    """Draft `length` tokens for each of A images, each token in the context of those before it.

    `previous [A, D]` is the last committed token, `position [A]` the place after it, `noise` of the
    A γ rows. The head is called at the steps that `evaluate [n]` names (None: at all).
    """
    images, dim = previous.shape
    n = draft.head.chain.length
    path = np.empty((images, length, n + 1, dim), np.float32)
    mean = np.empty((images, length, n, dim), np.float32)
    start = noise.start.reshape(images, length, dim)
    steps = noise.steps.reshape(images, length, n, dim)
    token = previous
    for i in range(length):
        z = draft.backbone.condition(token[:, None], position + i)[:, :, 0]
        drawn = draft.head.sample(z, guidance_of(position + i), start[:, i], steps[:, i], evaluate=evaluate)
        path[:, i], mean[:, i] = drawn.path, drawn.mean
        token = drawn.path[:, -1]
    return Proposal(noise, path.reshape(-1, n + 1, dim), mean.reshape(-1, n, dim))
