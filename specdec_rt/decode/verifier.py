"""What a round asks of a verifier, whichever the mode: which drafts stand, and tokens for those that do not."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from specdec_rt.decode.session import Speculation
from specdec_rt.noise import TokenNoise
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["Completion", "Verdict", "Verifier"]


@dataclass(frozen=True)
class Verdict:
    """What became of R drafted tokens."""

    accepted: BoolArray
    """`[R]`"""
    mean: FloatArray
    """`[R, D]` what an accepted token shows where the chain shows means"""


@dataclass(frozen=True)
class Completion:
    """Tokens in the place of J rejected ones."""

    token: FloatArray
    """`[J, D]` the chain's last state: what is fed back"""
    mean: FloatArray
    """`[J, D]` the mean it was drawn around"""
    head_calls: IntArray
    """`[J]` sequential head calls that each took"""

    @classmethod
    def empty(cls, rows: int, dim: int) -> "Completion":
        """To be filled."""
        token, mean = (np.empty((rows, dim), np.float32) for _ in range(2))
        return cls(token, mean, np.zeros(rows, np.int64))


class Verifier(Protocol):
    """One mode's way of judging. Verdicts are its own: only it reads more of them than `Verdict` says."""

    def judge(self, speculation: Speculation, noise: FloatArray, token_noise: TokenNoise) -> Any:  # noqa: ANN401  # its own kind of Verdict
        """A `Verdict` on R drafts that were drawn with `noise [R, n, D]`; `token_noise` holds their draws."""
        ...

    def complete(self, verdict: Any, rows: IntArray, guidance: FloatArray, token_noise: TokenNoise) -> Completion:  # noqa: ANN401  # its own kind of Verdict
        """Tokens for the rejected `rows [J]` of the verdict; `guidance [G, J]`, `token_noise` of these J."""
        ...
