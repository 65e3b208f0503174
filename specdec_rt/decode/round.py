"""What passes between decoder, session and verifier in a round, and what is asked of a verifier."""

from dataclasses import dataclass
from typing import Any, Protocol

from specdec_rt.decode.head import Trajectory
from specdec_rt.families.position_batch import PositionBatch
from specdec_rt.noise import TokenNoise
from specdec_rt.types import BoolArray, FloatArray, IntArray

__all__ = ["ChainSuffixes", "Completion", "RowInputs", "Speculation", "Verdict", "Verifier"]


@dataclass(frozen=True)
class RowInputs:
    """What a launch is given: the R tokens to make next, and all that they depend on."""

    positions: PositionBatch
    tokens: FloatArray
    """`[A, L, D]` the tokens committed so far"""
    normals: FloatArray
    """`[R, n + 1, D]` where each token's chain starts, then the noise of its transitions"""
    guidance: FloatArray
    """`[G, R]`"""


@dataclass(frozen=True)
class Speculation:
    """What was drafted, and what the target says of it: R rows. The next round overwrites it."""

    drawn: Trajectory
    """under the draft's transitions"""
    target: Trajectory
    """its means at the same states; in `paper` mode the target's own chains on the draft's noise"""
    begin: IntArray | None = None
    """`[R]` the transition that each row's draft begins at; None: the first"""


@dataclass(frozen=True)
class ChainSuffixes:
    """What is left of the chains of J rejected rows of the last round."""

    rows: IntArray
    """`[J]` which rows of the round"""
    guidance: FloatArray
    """`[G, J]`"""
    start: FloatArray
    """`[J, D]` the state before transition `begin`"""
    begin: IntArray
    """`[J]` the transition that each chain goes on with"""
    noise: FloatArray
    """`[J, n, D]` numbered like the whole chain's transitions"""

    def pick(self, part: IntArray | slice) -> "ChainSuffixes":
        """Some of them."""
        rows, guidance, start = self.rows[part], self.guidance[:, part], self.start[part]
        return ChainSuffixes(rows, guidance, start, self.begin[part], self.noise[part])


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


class Verifier(Protocol):
    """One mode's way of judging. Verdicts are its own: only it reads more of them than `Verdict` says."""

    def judge(self, speculation: Speculation, noise: FloatArray, token_noise: TokenNoise, /) -> Any:  # noqa: ANN401
        """A `Verdict` on R drafts that were drawn with `noise [R, n, D]`; `token_noise` holds their draws."""
        ...

    def complete(self, verdict: Any, rows: IntArray, guidance: FloatArray, token_noise: TokenNoise, /) -> Completion:  # noqa: ANN401
        """Tokens for the rejected `rows [J]` of the verdict; `guidance [G, J]`, `token_noise` of these J."""
        ...
