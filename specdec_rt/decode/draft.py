"""What a draft proposes: the tokens of one round, with the paths that led to them."""

from dataclasses import dataclass

import numpy as np

from specdec_rt.decode.chain import Head, Trajectory
from specdec_rt.families.span import Backbone, Span
from specdec_rt.types import BoolArray, FloatArray

__all__ = ["ChainNoise", "Model", "Proposal", "propose"]


@dataclass(frozen=True)
class Model:
    """A backbone with its state for the batch, and the head that it drives."""

    backbone: Backbone
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
    """A round's drafts, for the R rows of a span."""

    noise: ChainNoise
    drawn: Trajectory
    """under the draft's transitions"""

    @property
    def token(self) -> FloatArray:
        """`[R, D]` the drafted tokens."""
        return self.drawn.path[:, -1]


def propose(
    draft: Model,
    tokens: FloatArray,
    span: Span,
    noise: ChainNoise,
    guidance: FloatArray,
    evaluate: BoolArray | None,
) -> Proposal:
    """Draft the span's rows, each set of tokens in the context of those before it.

    `tokens [A, L, D]` holds what is committed; drafts are written to their places in it. `noise` and
    `guidance [G, R]` are of the R rows. The head is called at the steps that `evaluate [n]` names (None: at all).
    """
    n, rows, dim = draft.head.chain.length, len(span.owner), tokens.shape[2]
    path, mean = np.empty((rows, n + 1, dim), np.float32), np.empty((rows, n, dim), np.float32)
    std = np.empty_like(mean) if draft.head.chain.spec.variance == "learned" else None
    for offset in range(span.length):
        here = span.offset == offset
        if not here.any():
            break
        z = draft.backbone.condition(tokens, span.at(offset))
        drawn = draft.head.sample(z, guidance[:, here], noise.start[here], noise.steps[here], evaluate=evaluate)
        path[here], mean[here] = drawn.path, drawn.mean
        if std is not None:
            std[here] = drawn.std
        tokens[span.owner[here], span.place[here]] = drawn.path[:, -1]
    return Proposal(noise, Trajectory(path, mean, std))
