"""Block verification against integration, closed forms and simulation; the criterion of CSpD against scipy."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from specdec_rt.acceptance import (
    block_verify,
    longest_accepted,
    paper_log_acceptance,
    prefix_acceptance,
    residual_mass,
    running_log_weight,
    step_divergence,
)
from specdec_rt.residual import draw_block_residual


def integral(log_weight, distance, part):
    """∫ part(e^w p, q) for p = N(d, 1), q = N(0, 1), split where the two cross."""
    crossing = distance / 2 - log_weight / distance
    points = [point for point in (crossing,) if -12 < point < distance + 12]
    return integrate.quad(
        lambda x: part(np.exp(log_weight) * stats.norm.pdf(x - distance), stats.norm.pdf(x)),
        *(-12, distance + 12),
        points=[0.0, distance, *points],
        limit=200,
        epsabs=1e-13,
    )[0]


def mass_by_integration(log_weight, distance):
    return integral(log_weight, distance, lambda scaled_p, q: max(scaled_p - q, 0.0))


@pytest.fixture
def rng():
    return np.random.default_rng(20240)


def random_block(rng, rows=50, length=4, dim=3):
    noise = rng.normal(size=(rows, length, dim))
    draft_mean = rng.normal(size=(rows, length, dim))
    target_mean = draft_mean + 0.4 * rng.normal(size=(rows, length, dim))
    return noise, draft_mean, target_mean, np.array([1.3, 0.7, 0.4, 0.1])


def test_step_divergence_is_the_log_ratio_of_the_densities(rng):
    noise, draft_mean, target_mean, std = random_block(rng)
    distance, log_ratio = step_divergence(noise, draft_mean, target_mean, std)
    state = draft_mean + std[:, None] * noise
    draft, target = (stats.norm.logpdf(state, mean, std[:, None]).sum(axis=2) for mean in (draft_mean, target_mean))
    np.testing.assert_allclose(log_ratio, target - draft, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(distance, np.linalg.norm(draft_mean - target_mean, axis=2) / std, rtol=1e-12)


def test_step_divergence_of_engine_outputs_is_float64(rng):
    block = [array.astype(np.float32) for array in random_block(rng)]
    assert {array.dtype for array in step_divergence(*block)} == {np.dtype(np.float64)}


def test_running_log_weight_is_the_recursion(rng):
    log_ratio = rng.normal(size=(40, 30)) - 0.1
    expected = np.zeros((40, 31))
    for j in range(30):
        expected[:, j + 1] = np.minimum(expected[:, j] + log_ratio[:, j], 0)
    actual = running_log_weight(log_ratio)
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    np.testing.assert_array_equal(actual == 0, expected == 0)


@pytest.mark.parametrize("log_weight", [0.0, -1e-6, -0.01, -0.5, -3.0, -20.0])
@pytest.mark.parametrize("distance", [1e-3, 0.1, 1.0, 5.0, 20.0])
def test_residual_mass_is_the_integral(log_weight, distance):
    mass = residual_mass(np.array(log_weight), np.array(distance))
    assert mass == pytest.approx(mass_by_integration(log_weight, distance), rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(-30, 0), st.floats(1e-2, 30))
def test_residual_mass_is_the_integral_anywhere(log_weight, distance):
    mass = residual_mass(np.array(log_weight), np.array(distance))
    assert mass == pytest.approx(mass_by_integration(log_weight, distance), rel=1e-8, abs=1e-11)


@pytest.mark.parametrize(
    ("log_weight", "distance", "expected"),
    [
        (0.0, 0.0, 0.0),
        (-0.5, 0.0, 0.0),
        (-1e5, 0.0, 0.0),
        (-1e5, 1e6, 0.0),
        (-1e5, 1e-12, 0.0),
        (-1e300, 5e-324, 0.0),
        (-1e-3, 1e-12, 0.0),
        (0.0, 1e6, 1.0),
        (-2.0, 1e6, np.exp(-2.0)),
        (-0.5, 60.0, np.exp(-0.5)),
        (0.0, 1e-6, 1e-6 / np.sqrt(2 * np.pi)),
    ],
)
def test_residual_mass_at_the_edges(log_weight, distance, expected):
    with np.errstate(all="raise", under="ignore"):
        mass = residual_mass(np.array(log_weight), np.array(distance))
    assert mass >= 0
    assert mass == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_residual_mass_never_rounds_below_zero(rng):
    """Where both terms are about to underflow, their difference alone would be -5e-324 now and then."""
    distance, boundary = rng.uniform(1e-3, 1, 20_000), rng.uniform(-38.5, -37.5, 20_000)
    assert residual_mass(boundary * distance, distance).min() >= 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(-1e6, 0), st.floats(0, 1e7), st.floats(-50, 0))
def test_prefix_acceptance_is_a_probability(log_weight, distance, last):
    with np.errstate(all="raise", under="ignore"):
        acceptance = prefix_acceptance(np.array([[log_weight, last]]), np.array([[distance]]))
    assert np.all((acceptance >= 0) & (acceptance <= 1))


def test_prefix_acceptance_at_the_edges():
    log_weight = np.array([[0.0, 0.0, -0.7, -1e5, -0.4]])
    distance = np.array([[0.0, 1e6, 0.0, 1e-12]])
    np.testing.assert_allclose(prefix_acceptance(log_weight, distance), [[1, 1, 0, 0, np.exp(-0.4)]], rtol=1e-15)


@pytest.mark.parametrize("distance", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("log_weight", [-1e-4, -0.3, -2.0])
def test_a_prefix_is_kept_as_often_as_its_weight(log_weight, distance):
    """With n = 2, a first state of weight e^w must survive with probability e^w, by its own test or the next one's."""
    own = prefix_acceptance(np.array([[log_weight, 0.0]]), np.array([[distance]]))[0, 0]
    by_the_next = integral(log_weight, distance, min)  # E_q[min(e^w p/q, 1)]
    assert own + (1 - own) * by_the_next == pytest.approx(np.exp(log_weight), rel=1e-8)


def test_a_single_transition_is_rejected_as_often_as_the_residual_weighs():
    """With n = 1, q min(1, p/q) plus the residual's mass is all of p."""
    for distance in (0.1, 1.0, 4.0):
        kept = integral(0.0, distance, min)
        assert kept + residual_mass(np.array(0.0), np.array(distance)) == pytest.approx(1.0, abs=1e-9)


def test_the_longest_prefix_counts_not_the_first_failure():
    acceptance = np.array([[1.0, 0.5, 0.9, 0.2], [1.0, 0.5, 0.9, 0.2], [1.0, 0.5, 0.9, 0.2]])
    uniform = np.array([[0.1, 0.6, 0.5, 0.9], [0.9, 0.9, 0.95, 0.3], [0.9, 0.9, 0.95, 0.1]])
    accepted = longest_accepted(acceptance, uniform)
    np.testing.assert_array_equal(accepted, [2, 0, 3])
    assert accepted.dtype == np.int64


def test_block_verify_returns_the_weight_where_it_stopped():
    """One row per outcome: equal means; a shift no noise explains; a rejection after one accepted transition."""
    noise = np.array([[[0.3], [0.2]], [[0.0], [0.0]], [[0.0], [-3.0]]])
    target_mean = np.array([[[0.0], [0.0]], [[50.0], [0.0]], [[-0.6], [2.0]]])
    uniform = np.array([[0.5, 0.5, 0.999], [0.5, 0.5, 0.5], [0.5, 0.1, 0.9]])
    verdict = block_verify(noise, np.zeros((3, 2, 1)), target_mean, np.ones(2), uniform)
    np.testing.assert_array_equal(verdict.accepted_steps, [2, 0, 1])
    np.testing.assert_allclose(verdict.log_weight, [0.0, 0.0, -0.18], atol=1e-12)


@dataclass(frozen=True)
class Toy:
    """Draft and target: two-dimensional chains whose means depend linearly on the state before."""

    draft: tuple[float, float] = (0.8, 0.3)
    target: tuple[float, float] = (0.5, -0.2)
    std: tuple[float, ...] = (0.8, 0.6, 0.5)

    def target_law(self):
        """Mean and std of each state in the target's chain, started at 0."""
        (slope, offset), mean, variance = self.target, 0.0, 0.0
        law = []
        for std in self.std:
            mean, variance = slope * mean + offset, slope**2 * variance + std**2
            law.append((mean, np.sqrt(variance)))
        return law


def simulate(toy, rows, seed, judge=block_verify, fresh=True):
    """`[rows, n, 2]` states of `exact` on `toy`: draft, judge, draw the residual, let the target finish."""
    rng, length, std = np.random.default_rng(seed), len(toy.std), np.array(toy.std)
    noise, uniform = rng.normal(size=(rows, length, 2)), rng.random((rows, length + 1))
    path = np.zeros((rows, length + 1, 2))
    for j in range(length):
        path[:, j + 1] = toy.draft[0] * path[:, j] + toy.draft[1] + std[j] * noise[:, j]
    draft_mean, target_mean = (slope * path[:, :-1] + offset for slope, offset in (toy.draft, toy.target))
    verdict = judge(noise, draft_mean, target_mean, std, uniform)
    for j in range(length):
        here, done = verdict.accepted_steps == j, verdict.accepted_steps < j
        completion = rng.normal(size=(rows, 2)) if fresh else noise[:, j]
        finished = toy.target[0] * path[:, j] + toy.target[1] + std[j] * completion
        path[done, j + 1] = finished[done]
        path[here, j + 1] = draw_block_residual(
            draft_mean[here, j],
            target_mean[here, j],
            np.full(here.sum(), std[j]),
            verdict.log_weight[here],
            rng.random(here.sum()),
            rng.normal(size=(here.sum(), 2)),
        )
    return path[:, 1:]


def first_failure(noise, draft_mean, target_mean, std, uniform):
    """The control: a rule that stops at the first prefix to fail its test."""
    distance, log_ratio = step_divergence(noise, draft_mean, target_mean, std)
    log_weight = running_log_weight(log_ratio)
    failed = uniform >= prefix_acceptance(log_weight, distance)
    accepted = np.where(failed.any(axis=1), failed.argmax(axis=1) - 1, len(std))
    verdict = block_verify(noise, draft_mean, target_mean, std, uniform)
    return type(verdict)(accepted, log_weight[np.arange(len(noise)), accepted])


def smallest_p_value(toy, path):
    """Over every state and every innovation of the path: KS against the target's own law, Bonferroni-corrected."""
    previous = np.concatenate([np.zeros_like(path[:, :1]), path[:, :-1]], axis=1)
    innovation = path - toy.target[0] * previous - toy.target[1]
    p_values = []
    for j, (mean, std) in enumerate(toy.target_law()):
        for dim in range(2):
            p_values.append(stats.kstest(path[:, j, dim], "norm", (mean, std)).pvalue)
            p_values.append(stats.kstest(innovation[:, j, dim], "norm", (0, toy.std[j])).pvalue)
    return min(p_values) * len(p_values)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_block_verification_keeps_the_targets_distribution(length):
    toy = Toy(std=Toy.std[:length])
    assert smallest_p_value(toy, simulate(toy, 40_000, seed=length)) > 0.01


@pytest.mark.parametrize("control", [{"judge": first_failure}, {"fresh": False}], ids=["first failure", "reused noise"])
def test_biased_variants_are_told_apart(control):
    assert smallest_p_value(Toy(), simulate(Toy(), 40_000, seed=3, **control)) < 1e-6


def test_paper_criterion_is_the_density_ratio_at_tau_1(rng):
    """With Σ of the last transition alone, log Σ + ℓ is log p - log q."""
    token, draft_mean, target_mean = rng.normal(size=(3, 200, 4))
    draft_std, target_std = np.exp(0.3 * rng.normal(size=(2, 200, 4)))
    log_std_ratio = np.sum(np.log(draft_std / target_std), axis=1)
    log_ratio = np.sum(
        stats.norm.logpdf(token, target_mean, target_std) - stats.norm.logpdf(token, draft_mean, draft_std), axis=1
    )
    actual = paper_log_acceptance(token, draft_mean, draft_std, target_mean, target_std, log_std_ratio, 1.0)
    np.testing.assert_allclose(actual, np.minimum(log_ratio, 0), rtol=1e-9, atol=1e-12)
    assert 0.05 < np.mean(actual == 0) < 0.95  # both branches were taken


def test_tau_divides_the_exponent_and_not_sigma():
    one = np.ones((1, 1))
    arguments = (2 * one, np.zeros((1, 1)), one, 5 * one, 2 * one, np.array([-0.25]))
    exponent = 0.5 * 2**2 - 0.5 * 1.5**2
    assert paper_log_acceptance(*arguments, tau=1.0)[0] == pytest.approx(min(0.0, -0.25 + exponent))
    assert paper_log_acceptance(*arguments, tau=2.5)[0] == pytest.approx(-0.25 + exponent / 6.25)


def test_paper_stds_broadcast(rng):
    token, draft_mean, target_mean = rng.normal(size=(3, 6, 4)).astype(np.float32)
    shared, full = np.array(0.7), np.full((6, 4), 0.7)
    expected = paper_log_acceptance(token, draft_mean, full, target_mean, full, np.zeros(6), 1.0)
    actual = paper_log_acceptance(token, draft_mean, shared, target_mean, shared, np.zeros(6), 1.0)
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == np.float64
