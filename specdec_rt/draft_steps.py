"""The choice of the chain steps at which a strided draft calls its head."""

import numpy as np

from specdec_rt.chain import Chain
from specdec_rt.types import BoolArray, IntArray

__all__ = ["choose_draft_steps"]


def choose_draft_steps(chain: Chain, count: int) -> BoolArray:
    """`[n]` bool: at which `count` of a chain's transitions a strided draft calls its head, the first among them.

    Between those steps the draft holds its prediction x̂₀ of the clean token. That costs `weight ‖x̂₀ - held x̂₀‖²` nats
    of KL divergence per transition. The predictions along a chain are a martingale, so the squares of their movements
    add up, and dynamic programming finds the steps that cost least. How far x̂₀ moves depends on the model; a movement
    of Δ log(α/σ) / √weight per step is assumed. On the shipped pairs the steps chosen so are accepted as often as those
    chosen from movements measured on the models.
    """
    n, count = chain.length, min(count, chain.length)
    std = np.where(chain.std > 0, chain.std, chain.final_density_std)
    weight = (chain.epsilon_coefficient / chain.prediction_epsilon) ** 2 / (2 * std**2)
    signal_to_noise = -1 / chain.prediction_epsilon  # α/σ
    moved = np.cumsum(np.append(0, np.diff(np.log(signal_to_noise)) / np.sqrt(weight[1:])))
    # held[l, e]: the cost of transitions l + 1 … e - 1 on the prediction that transition l made
    held = np.full((n, n + 1), np.inf)
    for last in range(n):
        cost = weight[last + 1 :] * (moved[last + 1 :] - moved[last])
        held[last, last + 1 :] = np.cumsum(np.append(0, cost))
    least = np.append(0.0, np.full(n - 1, np.inf))  # cost of the best choice whose last step so far is each transition
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
