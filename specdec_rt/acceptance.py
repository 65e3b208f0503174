"""How much of a draft is accepted: block verification along the chain, and the criterion of CSpD.

Block verification (Sun et al., arXiv 2403.10444) is carried over to Gaussian transitions and leaves the
target's distribution unchanged; the criterion of CSpD (arXiv 2411.11925 §3) is approximate. Transitions are
numbered from the noisiest, q is the draft, p the target; all arithmetic is float64, all inputs are finite.
"""

import math
from dataclasses import dataclass

import numpy as np

from specdec_rt.types import FloatArray, IntArray

__all__ = [
    "BlockVerdict",
    "block_verify",
    "longest_accepted",
    "paper_log_acceptance",
    "prefix_acceptance",
    "residual_mass",
    "running_log_weight",
    "step_divergence",
]

_erfc = np.frompyfunc(math.erfc, 1, 1)  # numpy has none; erfc keeps its digits in the lower tail


@dataclass(frozen=True, slots=True)
class BlockVerdict:
    """How far each drafted path was accepted, and what the residual draw needs to go on from there."""

    accepted_steps: IntArray
    """`[R]` accepted transitions; n where the whole path, that is the token, is accepted"""
    log_weight: FloatArray
    """`[R]` running log weight w at that transition"""


def step_divergence(
    noise: FloatArray, draft_mean: FloatArray, target_mean: FloatArray, std: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """How far the target's transitions lie from those that drew the path.

    noise `[R, n, D]`: the standard normal draw of each state, (state - draft_mean) / std
    draft_mean, target_mean `[R, n, D]`: means of the transitions into each state; std `[n]`, above 0

    Returns distance `[R, n]`, d = ‖μ_q - μ_p‖ / σ, and log_ratio `[R, n]`, log p - log q at the states.
    """
    shift = (draft_mean.astype(np.float64) - target_mean) / std[:, None]
    squared = np.vecdot(shift, shift)
    return np.sqrt(squared), -0.5 * squared - np.vecdot(noise, shift)


def running_log_weight(log_ratio: FloatArray) -> FloatArray:
    """`[R, n + 1]`: w_0 = 0, w_{j+1} = min(w_j + log_ratio_j, 0), from log_ratio `[R, n]`."""
    rows, length = log_ratio.shape
    total = np.zeros((rows, length + 1))
    np.cumsum(log_ratio, axis=1, out=total[:, 1:])
    # A walk stopped from rising above 0 is the free walk less the highest point it has reached.
    return total - np.maximum.accumulate(total, axis=1)


def residual_mass(log_weight: FloatArray, distance: FloatArray) -> FloatArray:
    """`[...]`: S = ∫ max(e^w p - q, 0), for unit Gaussians p, q `distance [...]` apart, w = `log_weight [...]` ≤ 0."""
    # Bounds that change no result (e^-1000 is 0, and S at 1e-150 as at 0) but keep the quotient finite.
    weight, gap = np.maximum(log_weight, -1e3), np.maximum(distance, 1e-150)
    boundary = weight / gap
    mass = np.exp(weight) * _normal_cdf(boundary + gap / 2) - _normal_cdf(boundary - gap / 2)
    return np.maximum(mass, 0.0)


def prefix_acceptance(log_weight: FloatArray, distance: FloatArray) -> FloatArray:
    """`[R, n + 1]`: probability h_j that a prefix of j transitions passes its own test.

    log_weight `[R, n + 1]` from `running_log_weight`, distance `[R, n]`.
    """
    weight = log_weight[:, :-1]
    mass = residual_mass(weight, distance)
    lost = np.where(weight < 0, -np.expm1(weight), 1.0)
    inner = np.where(weight < 0, mass / (mass + lost), 1.0)
    return np.concatenate([inner, np.exp(log_weight[:, -1:])], axis=1)


def longest_accepted(acceptance: FloatArray, uniform: FloatArray) -> IntArray:
    """`[R]`: the longest prefix whose own uniform falls under its acceptance, both `[R, n + 1]`.

    Not the first failure: a prefix that fails does not end the search (stopping there is biased).
    The empty prefix has acceptance 1.
    """
    passed = uniform < acceptance
    longest: IntArray = np.max(np.where(passed, np.arange(passed.shape[1], dtype=np.int64), 0), axis=1)
    return longest


def block_verify(
    noise: FloatArray, draft_mean: FloatArray, target_mean: FloatArray, std: FloatArray, uniform: FloatArray
) -> BlockVerdict:
    """Judge drafted paths; arguments as in `step_divergence`, and uniform `[R, n + 1]`."""
    distance, log_ratio = step_divergence(noise, draft_mean, target_mean, std)
    log_weight = running_log_weight(log_ratio)
    accepted = np.full(len(log_weight), log_ratio.shape[1], np.int64)
    # Most paths pass as a whole, which one comparison tells: prefixes are looked at where they do not.
    failed = np.flatnonzero(uniform[:, -1] >= np.exp(log_weight[:, -1]))
    if len(failed):
        acceptance = prefix_acceptance(log_weight[failed], distance[failed])
        accepted[failed] = longest_accepted(acceptance, uniform[failed])
    return BlockVerdict(accepted_steps=accepted, log_weight=log_weight[np.arange(len(accepted)), accepted])


def paper_log_acceptance(
    draft_token: FloatArray,
    draft_mean: FloatArray,
    draft_std: FloatArray,
    target_mean: FloatArray,
    target_std: FloatArray,
    log_std_ratio: FloatArray,
    tau: float = 1.0,
) -> FloatArray:
    """`[R]`: log of the probability with which CSpD accepts a drafted token; τ = 1 is the published criterion.

    draft_token `[R, D]`; means and stds of the last transition, broadcastable to it
    log_std_ratio `[R]`: log Σ, the sum of log σ_q - log σ_p over dimensions and all transitions
    """
    draft_score = (draft_token - draft_mean.astype(np.float64)) / draft_std
    target_score = (draft_token - target_mean.astype(np.float64)) / target_std
    log_ratio: FloatArray = 0.5 * np.sum(draft_score**2 - target_score**2, axis=-1)
    return np.minimum(log_std_ratio + log_ratio / tau**2, 0.0)


def _normal_cdf(x: FloatArray) -> FloatArray:
    return 0.5 * np.asarray(_erfc(-x / math.sqrt(2)), dtype=np.float64)
