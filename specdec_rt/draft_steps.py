"""The choice of the chain steps at which a strided draft calls its head."""

import numpy as np

from specdec_rt.chain import Chain
from specdec_rt.types import BoolArray, IntArray

__all__ = ["choose_draft_steps"]


def choose_draft_steps(chain: Chain, count: int) -> BoolArray:
    """`[n]` bool: at which `count` of a chain's transitions a strided draft calls its head, the first among them.

    Between them it holds its prediction x̂₀ of the clean token, at a cost in nats of `weight ‖movement of x̂₀‖²`
    per transition. Predictions are a martingale: what they move by adds up in the square, and dynamic programming
    finds the choice that costs least. How far they move is the model's own; assumed is Δ log(α/σ) / √weight at each
    step, which on the shipped pairs comes as close in acceptance as what they were seen to move by.
    """
    n, count = chain.length, min(count, chain.length)
    std = np.where(chain.std > 0, chain.std, chain.final_density_std)
    weight = (chain.epsilon_coefficient / chain.prediction_epsilon) ** 2 / (2 * std**2)
    signal_to_noise = -1 / chain.prediction_epsilon  # α/σ
    moved = np.cumsum(np.append(0, np.diff(np.log(signal_to_noise)) / np.sqrt(weight[1:])))
    # held[l, e]: the cost of transitions l + 1 to e - 1 on the prediction of transition l.
    held = np.full((n, n + 1), np.inf)
    for last in range(n):
        cost = weight[last + 1 :] * (moved[last + 1 :] - moved[last])
        held[last, last + 1 :] = np.cumsum(np.append(0, cost))
    least = np.append(0.0, np.full(n - 1, np.inf))  # of choices that end with each transition
    before: list[IntArray] = []
    for _ in range(count - 1):
        total = least[:, None] + held[:, :n]
        before.append(total.argmin(axis=0))
        least = total.min(axis=0)
    at = int((least + held[:, n]).argmin())
    chosen = np.zeros(n, np.bool_)
    chosen[at] = True
    for choice in reversed(before):
        at = int(choice[at])
        chosen[at] = True
    return chosen
