"""The choice of the steps at which a draft calls its head."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from specdec_rt.chain import ChainSpec, compile_chain, cosine_alpha_bar
from specdec_rt.draft_steps import choose_draft_steps

EXACT = ChainSpec(steps=25, t_max=975, drop_last=2, final_std=0.1, emit="mean")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_no_choice_of_steps_costs_less(count):
    chain = compile_chain(replace(EXACT, steps=10, drop_last=1))
    n = chain.length
    alpha_bar = cosine_alpha_bar()[chain.timestep]
    per_clean = chain.epsilon_coefficient * np.sqrt(alpha_bar / (1 - alpha_bar))  # of x̂₀ in a mean
    weight = per_clean**2 / (2 * chain.std**2)
    movement = np.append(0, np.diff(np.log(alpha_bar / (1 - alpha_bar))) / np.sqrt(weight[1:]))

    def cost(chosen):
        last = np.maximum.accumulate(np.where(chosen, np.arange(n), 0))
        return sum(weight[k] * movement[last[k] + 1 : k + 1].sum() for k in range(n))

    found = choose_draft_steps(chain, count)
    assert found[0]
    assert found.sum() == count
    others = ((0, *rest) for rest in combinations(range(1, n), count - 1))
    assert cost(found) <= min(cost(np.isin(np.arange(n), other)) for other in others) * (1 + 1e-12)


def test_a_chain_without_noise_at_its_end_can_be_strided():
    chain = compile_chain(replace(EXACT, steps=100, final_std=0.0))
    chosen = choose_draft_steps(chain, 20)
    assert (chosen.sum(), chosen[0], chosen[-1]) == (20, True, True)
    assert choose_draft_steps(chain, 1000).all()
