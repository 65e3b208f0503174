"""A head's eager chains, against the formula of a transition written out with the network's own prediction."""

import numpy as np
import pytest
from toy import DIM, IMAGE_CHAIN, TOY_CHAIN, toy_head

from specdec_rt import BackendError
from specdec_rt.capacity import Capacity

N, ROWS = TOY_CHAIN.length, 5
RNG = np.random.default_rng(0)
Z, GUIDANCE = RNG.standard_normal((1, ROWS, DIM)), np.ones((1, ROWS))
NORMALS = RNG.standard_normal((ROWS, N + 1, DIM))
MASK = np.arange(N) % 3 == 0


def written_out(head, begin, step_mask):
    """Path and mean of each row by the formula: a clean token predicted at some steps, and held at the others."""
    chain, epsilon_of = head.chain, head.engines.denoise_step.epsilon
    path, mean = np.repeat(NORMALS[:, :1], N + 1, axis=1), np.zeros((ROWS, N, DIM))
    for row, first in enumerate(begin):
        for step in range(first, N):
            state = path[row, step]
            if step_mask[step] or step == first:
                epsilon = epsilon_of(state, chain.timestep[step], Z[0, row])
                clean = chain.prediction_state[step] * state + chain.prediction_epsilon[step] * epsilon
            else:  # the noise that would have led from the held clean token to the state
                epsilon = (clean - chain.prediction_state[step] * state) / chain.prediction_epsilon[step]
            mean[row, step] = chain.state_coefficient[step] * state + chain.epsilon_coefficient[step] * epsilon
            path[row, step + 1] = mean[row, step] + chain.std[step] * NORMALS[row, step + 1]
    return path, mean


@pytest.mark.parametrize("begin", [[0] * ROWS, [0, 2, 3, 4, N - 1]], ids=["whole chains", "suffixes"])
@pytest.mark.parametrize("step_mask", [np.ones(N, np.bool_), MASK], ids=["every step", "few steps"])
def test_chains_are_those_of_the_formula(begin, step_mask):
    head = toy_head(TOY_CHAIN, draft=False)
    drawn = head.sample(Z, GUIDANCE, NORMALS, begin=np.array(begin), step_mask=step_mask)
    path, mean = written_out(head, begin, step_mask)
    np.testing.assert_allclose(drawn.path, path, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(drawn.mean, mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(drawn.token, drawn.path[:, -1])


def test_by_default_whole_chains_are_drawn_at_every_step():
    head = toy_head(TOY_CHAIN, draft=False)
    drawn, asked = head.sample(Z, GUIDANCE, NORMALS), {"begin": np.zeros(ROWS, np.int64), "step_mask": MASK | True}
    np.testing.assert_array_equal(drawn.path, head.sample(Z, GUIDANCE, NORMALS, **asked).path)


@pytest.mark.parametrize("paths_per_call", [1, 2, 100])
def test_the_means_along_a_path_are_those_that_it_was_drawn_around(paths_per_call):
    head = toy_head(TOY_CHAIN, draft=False, capacity=Capacity(states_per_call=N * paths_per_call))
    drawn = head.sample(Z, GUIDANCE, NORMALS)
    assert head.paths_per_call(branches=1) == paths_per_call
    np.testing.assert_allclose(head.means(drawn.path, Z, GUIDANCE), drawn.mean, rtol=1e-4, atol=1e-4)


def test_values_that_are_not_finite_are_refused():
    head = toy_head(IMAGE_CHAIN, draft=False)
    normals, z, guidance = np.full((1, IMAGE_CHAIN.length + 1, DIM), np.nan), np.zeros((1, 1, DIM)), np.ones((1, 1))
    with pytest.raises(BackendError, match="denoise_step engine returned values that are not finite"):
        head.sample(z, guidance, normals)
    with pytest.raises(BackendError, match="path_means engine returned values that are not finite"):
        head.means(normals, z, guidance)
