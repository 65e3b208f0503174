"""The denoising chain against values recorded from the public MAR reference, and what each field of its spec does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specdec_rt.chain import Chain, ChainSpec, compile_chain, cosine_alpha_bar
from specdec_rt.errors import ChainError

STOCK = ChainSpec(steps=25, variance="learned")
EXACT = ChainSpec(steps=25, t_max=975, drop_last=2, final_std=0.1, emit="mean")


@pytest.fixture(scope="module")
def reference():
    """`betas [25]`, `timestep_map [25]` and one head evaluation of 7 rows; index 0 is the least noisy step."""
    with np.load(Path(__file__).parents[1] / "golden" / "mar_schedule.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def stock():
    return compile_chain(STOCK)


def test_timesteps_are_the_references(reference, stock):
    np.testing.assert_array_equal(stock.timestep, reference["timestep_map"][::-1])
    np.testing.assert_array_equal(stock.timestep[24 - reference["head_step"]], reference["head_timestep"])


def test_cosine_schedule_respaces_to_the_references_betas(reference):
    alpha_bar = cosine_alpha_bar()[reference["timestep_map"]]
    np.testing.assert_allclose(alpha_bar, np.cumprod(1 - reference["betas"]), rtol=1e-9)


def test_large_variance_is_beta_and_its_last_the_clipped_posterior(reference):
    chain = compile_chain(replace(STOCK, variance="large", final_std=0.3))
    np.testing.assert_allclose(chain.std[:-1] ** 2, reference["betas"][:0:-1], rtol=1e-9)
    assert chain.std[-1] == 0.3


def test_small_variance_is_the_posteriors(reference):
    beta, alpha_bar = reference["betas"], np.cumprod(1 - reference["betas"])
    posterior = beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    chain = compile_chain(replace(STOCK, variance="small"))
    np.testing.assert_allclose(chain.std[:-1] ** 2, posterior[::-1], rtol=1e-9)
    assert not chain.log_std_range.any()


def test_transitions_match_the_references_mean_variance_and_prediction(reference, stock):
    row = (24 - reference["head_step"])[:, None]
    state = reference["head_x"].astype(np.float64)
    epsilon, share = np.split(reference["head_out"].astype(np.float64), 2, axis=1)
    mean = stock.state_coefficient[row] * state + stock.epsilon_coefficient[row] * epsilon
    np.testing.assert_allclose(mean, reference["p_mean"], rtol=1e-4, atol=1e-5)
    prediction = stock.prediction_state[row] * state + stock.prediction_epsilon[row] * epsilon
    np.testing.assert_allclose(prediction, reference["p_xstart"], rtol=1e-4, atol=1e-5)
    log_std = np.log(stock.std[row]) + stock.log_std_range[row] * (share + 1) / 2
    np.testing.assert_allclose(2 * log_std, reference["p_log_variance"], rtol=1e-5, atol=1e-5)


def test_the_last_transition_of_the_stock_chain_is_the_prediction_without_noise(stock):
    assert stock.state_coefficient[-1] == stock.prediction_state[-1]
    assert stock.epsilon_coefficient[-1] == stock.prediction_epsilon[-1]
    assert stock.std[-1] == stock.log_std_range[-1] == 0


def test_drop_last_leaves_out_the_least_noisy_steps_and_jumps_from_the_next():
    whole, dropped = compile_chain(replace(EXACT, drop_last=0)), compile_chain(EXACT)
    assert (whole.length, dropped.length) == (25, 23)
    np.testing.assert_array_equal(dropped.timestep, whole.timestep[:-2])
    np.testing.assert_array_equal(dropped.coefficients[:-1], whole.coefficients[:-3])
    expected = [dropped.prediction_state[-1], dropped.prediction_epsilon[-1], 0.1, 0.0]
    np.testing.assert_array_equal(dropped.coefficients[-1], expected)
    np.testing.assert_array_equal(dropped.prediction_state, whole.prediction_state[:-2])


def test_all_steps_but_one_can_be_dropped():
    chain = compile_chain(replace(EXACT, drop_last=24))
    np.testing.assert_array_equal(chain.timestep, [975])
    assert chain.std[0] == 0.1


def test_t_max_is_the_first_training_step():
    timestep = compile_chain(replace(EXACT, drop_last=0)).timestep
    assert (timestep[0], timestep[-1]) == (975, 0)
    assert np.ptp(np.diff(timestep)) <= 1


def test_temperature_multiplies_every_standard_deviation():
    cold, plain = compile_chain(replace(EXACT, temperature=0.5)), compile_chain(EXACT)
    np.testing.assert_allclose(cold.std, plain.std / 2, rtol=1e-15)
    np.testing.assert_array_equal(cold.coefficients[:, [0, 1, 3]], plain.coefficients[:, [0, 1, 3]])


def test_transitions_carry_the_forward_process_back():
    """Posterior mean of x_s given x_t, with the true ε: a x_t + b ε has the mean √ᾱ_s x_0 + … of q(x_s | x_t, x_0)."""
    chain = compile_chain(replace(EXACT, variance="small"))
    clean, epsilon = 0.7, -1.3
    now = cosine_alpha_bar()[chain.timestep]
    state = np.sqrt(now) * clean + np.sqrt(1 - now) * epsilon
    mean = (chain.state_coefficient * state + chain.epsilon_coefficient * epsilon)[:-1]
    remaining = np.sqrt(1 - now[1:] - chain.std[:-1] ** 2)
    np.testing.assert_allclose(mean, np.sqrt(now[1:]) * clean + remaining * epsilon, rtol=1e-9)
    last_mean = chain.state_coefficient[-1] * state[-1] + chain.epsilon_coefficient[-1] * epsilon
    assert last_mean == pytest.approx(clean)


def test_epsilon_weight_is_the_gaussians_divergence():
    chain = compile_chain(EXACT)
    draft_epsilon, target_epsilon = 0.4, -0.2
    shift = chain.epsilon_coefficient * (draft_epsilon - target_epsilon)
    divergence = 0.5 * (shift / chain.std) ** 2  # KL of two normals with equal std
    np.testing.assert_allclose(chain.epsilon_weight * (draft_epsilon - target_epsilon) ** 2, divergence, rtol=1e-12)


def test_the_step_out_of_pure_noise_carries_nearly_all_path_divergence():
    assert compile_chain(replace(EXACT, t_max=999)).epsilon_weight[0] > 1e4
    assert compile_chain(EXACT).epsilon_weight.max() < 10


def test_densities_of_a_last_transition_without_noise_use_the_clipped_posterior(reference):
    """The reference clips the posterior variance of step 0, which is 0, to that of step 1."""
    beta, alpha_bar = reference["betas"], np.cumprod(1 - reference["betas"])
    clipped = np.sqrt(beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1]))
    assert compile_chain(replace(STOCK, temperature=0.5)).final_density_std == pytest.approx(clipped / 2, rel=1e-9)
    assert compile_chain(replace(EXACT, temperature=0.5)).final_density_std == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("steps", 1, "2 to t_max + 1 = 976"),
        ("steps", 977, "2 to t_max + 1 = 976"),
        ("t_max", 0, "1 to 999"),
        ("t_max", 1000, "1 to 999"),
        ("drop_last", -1, "0 to steps - 1 = 24"),
        ("drop_last", 25, "0 to steps - 1 = 24"),
        ("final_std", -0.1, "at least 0"),
        ("final_std", float("nan"), "at least 0"),
        ("variance", "fixed", "'small', 'large' or 'learned'"),
        ("temperature", 0.0, "above 0"),
        ("temperature", float("inf"), "above 0"),
        ("emit", "both", "'sample' or 'mean'"),
    ],
)
def test_a_contradiction_names_field_value_and_expectation(field, value, expected):
    with pytest.raises(ChainError) as caught:
        replace(EXACT, **{field: value})
    message = str(caught.value)
    assert message.startswith(f"chain.{field} is {value!r}")
    assert expected in message


@pytest.mark.parametrize(
    ("field", "value"), [("variance", "learned"), ("t_max", 999), ("final_std", 0.0)], ids=lambda value: str(value)
)
def test_exact_refuses_a_chain_by_the_fields_name(field, value):
    with pytest.raises(ChainError, match=rf"chain\.{field}\b.* {value!r}"):
        compile_chain(replace(EXACT, **{field: value})).require_density_ratio()


def test_exact_takes_a_chain_with_noise_in_every_transition():
    chain = compile_chain(EXACT)
    assert isinstance(chain, Chain)
    chain.require_density_ratio()
    assert np.all(chain.std > 0)


def test_the_prediction_that_a_chain_is_held_on_is_the_clean_token():
    table = compile_chain(ChainSpec(steps=30, t_max=975, final_std=0.1))
    hold, rng = table.hold_coefficients, np.random.default_rng(0)
    state, epsilon, later = rng.normal(size=3)
    for step in (0, 7, 28):
        mean = table.state_coefficient[step] * state + table.epsilon_coefficient[step] * epsilon
        clean = table.prediction_state[step] * state + table.prediction_epsilon[step] * epsilon
        assert hold[step, 3] * state + hold[step, 4] * mean == pytest.approx(clean)
        after = step + 1
        held = (clean - table.prediction_state[after] * later) / table.prediction_epsilon[after]
        wanted = table.state_coefficient[after] * later + table.epsilon_coefficient[after] * held
        assert hold[after, 0] * later + hold[after, 1] * clean == pytest.approx(wanted)
