"""What a draft proposes: the tokens of one round, with the paths that led to them."""

from dataclasses import dataclass

from specdec_rt.decode.chain import Head, Trajectory
from specdec_rt.families.backbone import Backbone
from specdec_rt.types import FloatArray

__all__ = ["ChainNoise", "Model", "Proposal"]


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
