"""Draws from what is left of the target once the draft's share is taken out: they replace a rejected state.

`draw_block_residual` belongs to block verification and is exact; `draw_paper_residual` belongs to CSpD
(arXiv 2411.11925 §3). q is the draft, p the target; all arithmetic is float64, all inputs are finite.
"""

from dataclasses import dataclass

import numpy as np

from specdec_rt.types import BoolArray, FloatArray

__all__ = ["draw_block_residual", "draw_paper_residual"]

_CELLS = 64
_LEGENDRE_NODES, _LEGENDRE_WEIGHTS = np.polynomial.legendre.leggauss(8)
_NODES, _WEIGHTS = (1 + _LEGENDRE_NODES) / 2, _LEGENDRE_WEIGHTS / 2  # on [0, 1]
_NODES_AND_END = np.append(_NODES, 1.0)
_SMALL = 1e-7  # of a step, as a share of the interval
_MOST_STEPS = 60  # of Newton or bisection; 4 is usual
_REACH = 10.0  # standard deviations after which the normal density is left out (mass 1e-23)
_CLOSEST = 1e-150  # distances below it count as 0, so that quotients stay finite


def draw_block_residual(
    draft_mean: FloatArray,
    target_mean: FloatArray,
    std: FloatArray,
    log_weight: FloatArray,
    uniform: FloatArray,
    normal: FloatArray,
) -> FloatArray:
    """`[R, D]` float64 from the density ∝ max(0, e^w p - q) of one transition.

    draft_mean, target_mean `[R, D]`; std `[R]`; log_weight `[R]`: w ≤ 0 at that transition
    uniform `[R]` decides the part along μ_p - μ_q, normal `[R, D]` the part across it
    Where the means are equal nothing is left, and the draw is the target's own.
    """
    shift = (target_mean.astype(np.float64) - draft_mean) / std[:, None]
    distance = np.sqrt(np.sum(shift**2, axis=1))
    apart = distance > _CLOSEST
    distance = np.maximum(distance, _CLOSEST)
    direction = np.where(apart[:, None], shift / distance[:, None], 0.0)
    along = _draw_along(distance, log_weight, uniform) - np.sum(normal * direction, axis=1)
    token: FloatArray = target_mean + std[:, None] * (normal + along[:, None] * direction)
    return token


def draw_paper_residual(
    draft_mean: FloatArray,
    draft_std: FloatArray,
    target_mean: FloatArray,
    target_std: FloatArray,
    log_std_ratio: FloatArray,
    normal: FloatArray,
    uniform: FloatArray,
    fallback: FloatArray,
) -> tuple[FloatArray, BoolArray]:
    """Tokens `[R, D]` from the density ∝ max(0, p - q/Σ') of the last transition, in several tries done at once.

    means and stds of the last transition, broadcastable to `[R, D]`
    log_std_ratio `[R]`: log Σ', the sum of log σ_q - log σ_p over dimensions and all transitions but the last
    normal `[R, tries, D]`, uniform `[R, tries]`: one proposal from p and one test a try; the first that passes wins
    fallback `[R, D]`: the token where none passes

    Returns the tokens and `[R]` whether a try passed.
    """
    # [R, 1, D], so that each row's tries share its mean
    q_mean, q_std, p_mean, p_std = (
        np.broadcast_to(value, fallback.shape).astype(np.float64)[:, None]
        for value in (draft_mean, draft_std, target_mean, target_std)
    )
    proposal = p_mean + p_std * normal
    draft_score = (proposal - q_mean) / q_std
    last_log_std_ratio = np.sum(np.log(q_std) - np.log(p_std), axis=-1)
    log_ratio = 0.5 * np.sum(np.square(normal, dtype=np.float64) - draft_score**2, axis=-1) - last_log_std_ratio
    passed = uniform < -np.expm1(np.minimum(log_ratio - log_std_ratio[:, None], 0.0))
    found = np.any(passed, axis=1)
    first = np.argmax(passed, axis=1)
    return np.where(found[:, None], proposal[np.arange(len(proposal)), first], fallback), found


@dataclass(frozen=True, slots=True)
class _Along:
    """The density ∝ e^w φ(t) - φ(t + d) on t > start = -d/2 - w/d, where t = low + span · share, share in [0, 1].

    It is ∝ φ(t) (1 - exp(-d (t - start))) and is integrated in this form: the closed form, a difference of two
    normal tails, loses its digits for small d and underflows for large start.
    """

    low: FloatArray
    """`[R, 1, 1]`"""
    span: FloatArray
    """`[R, 1, 1]`"""
    rate: FloatArray
    """`[R, 1, 1]` d · span"""
    skipped: FloatArray
    """`[R, 1, 1]` (low - start) / span"""

    def density(self, share: FloatArray) -> FloatArray:
        """`[R, cells, points]`, up to a factor of its own for each row."""
        offset = self.span * share
        thinned = np.expm1(-self.rate * (share + self.skipped)) / np.expm1(-self.rate * (1 + self.skipped))
        return np.exp(-offset * (self.low + offset / 2)) * thinned

    def mass(self, left: FloatArray, width: FloatArray) -> FloatArray:
        """`[R, cells]`: the integral of `density` over the cells [left, left + width], both `[R, cells]`."""
        return width * (self.density(left[..., None] + width[..., None] * _NODES) @ _WEIGHTS)


def _support(distance: FloatArray, log_weight: FloatArray) -> _Along:
    start = (-distance / 2 - log_weight / distance)[:, None, None]
    low = np.maximum(start, -_REACH)
    # From its highest point on the support, at t = max(low, 0), φ falls to e^(-_REACH²/2) of it at the upper end.
    top = np.maximum(low, 0.0)
    span = (top - low) + _REACH**2 / (top + np.hypot(top, _REACH))
    return _Along(low=low, span=span, rate=distance[:, None, None] * span, skipped=(low - start) / span)


def _draw_along(distance: FloatArray, log_weight: FloatArray, uniform: FloatArray) -> FloatArray:
    """`[R]`: the t above which the density of `_Along` has the share `uniform` of its mass."""
    support = _support(distance, log_weight)
    # Cells narrow towards the start, where the density rises from 0 within 1/d.
    edges = np.broadcast_to(np.linspace(0.0, 1.0, _CELLS + 1) ** 2, (len(distance), _CELLS + 1))
    mass = support.mass(edges[:, :-1], np.diff(edges))
    above = np.flip(
        np.cumsum(np.flip(mass, axis=1), axis=1, dtype=np.float64), axis=1
    )  # [R, _CELLS], from each cell's left edge upwards
    wanted = uniform * above[:, 0]
    cell = np.sum(above[:, 1:] > wanted[:, None], axis=1)
    rows = np.arange(len(distance))
    left, right = edges[rows, cell], edges[rows, cell + 1]
    share = _solve_in_cell(support, left, right, above[rows, cell] - wanted, mass[rows, cell])
    return support.low[:, 0, 0] + support.span[:, 0, 0] * share


def _solve_in_cell(
    support: _Along, left: FloatArray, right: FloatArray, wanted: FloatArray, mass: FloatArray
) -> FloatArray:
    """`[R]`: where the mass from `left` on reaches `wanted`, within the cell [left, right] that holds `mass`."""
    low, high = left, right
    share = left + (right - left) * np.sqrt(np.clip(wanted / mass, 0.0, 1.0))
    for _ in range(_MOST_STEPS):
        width = share - left
        density = support.density((left[:, None] + width[:, None] * _NODES_AND_END)[:, None])[:, 0]
        excess, slope = width * (density[:, :-1] @ _WEIGHTS) - wanted, density[:, -1]
        low, high = np.where(excess < 0, share, low), np.where(excess < 0, high, share)
        newton = share - excess / np.where(slope > 0, slope, np.inf)
        inside = (newton >= low) & (newton <= high)
        step = np.where(inside, newton, (low + high) / 2) - share
        share = share + step
        # Newton's error is squared at each step: after one as small as this there is none left to see.
        if np.all(np.abs(step) <= np.where(inside, _SMALL, _SMALL**2) * right):
            break
    return share
