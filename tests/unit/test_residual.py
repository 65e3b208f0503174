"""Residual draws against numerically integrated densities, with controls that the tests must reject."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from specdec_rt.residual import draw_block_residual, draw_paper_residual

ROWS = 10_000
CASES = [(1e-9, 0.0), (1e-3, -1e-4), (0.5, -0.2), (2.0, 0.0), (2.0, -4.0), (5.0, -3.0), (12.0, -70.0)]


def along_cdf(distance, log_weight):
    """CDF of t, the coordinate along μ_p - μ_q: its density integrated on a fine grid."""
    start = -distance / 2 - log_weight / distance
    grid = max(start, -9.0) + np.linspace(0, 1, 20001) * (10 - max(start, -9.0))
    density = stats.norm.pdf(grid) * -np.expm1(-distance * (grid - start))
    cdf = integrate.cumulative_trapezoid(density, grid, initial=0)
    return lambda t: np.interp(t, grid, cdf / cdf[-1])


def draw(distance, log_weight, rows, seed=0):
    """Draws in three dimensions, split into the coordinate along `direction` and the two across it."""
    rng = np.random.default_rng(seed)
    direction = np.array([2.0, -1.0, 2.0]) / 3
    across = np.array([[1.0, 2.0, 0.0], [4.0, -2.0, -5.0]]) / np.sqrt([[5.0], [45.0]])
    std, target_mean = 0.3, np.array([0.1, 0.0, -0.2])
    draws = draw_block_residual(
        np.broadcast_to(target_mean - std * distance * direction, (rows, 3)),
        np.broadcast_to(target_mean, (rows, 3)),
        np.full(rows, std),
        np.full(rows, log_weight),
        rng.random(rows),
        rng.normal(size=(rows, 3)),
    )
    score = (draws - target_mean) / std
    return score @ direction, score @ across.T


def draw_line(distance, log_weight, uniform, sign=1.0):
    """The coordinate t in one dimension, from its uniform alone."""
    uniform = np.atleast_1d(np.asarray(uniform, dtype=np.float64))
    target_mean, column = np.zeros((len(uniform), 1)), np.ones((len(uniform), 1))
    full = np.full(len(uniform), log_weight)
    return draw_block_residual(-sign * distance * column, target_mean, np.ones(len(uniform)), full, uniform, column)[
        :, 0
    ]


@pytest.mark.parametrize(("distance", "log_weight"), CASES)
def test_the_coordinate_along_the_shift_has_the_residuals_density(distance, log_weight):
    along, _ = draw(distance, log_weight, ROWS)
    assert stats.kstest(along, along_cdf(distance, log_weight)).pvalue > 0.01


def test_a_draw_that_ignores_the_weight_is_told_apart():
    along, _ = draw(0.5, 0.0, ROWS)
    assert stats.kstest(along, along_cdf(0.5, -0.2)).pvalue < 1e-6


def test_for_close_means_the_density_tends_to_rayleighs():
    along, _ = draw(1e-9, 0.0, ROWS)
    assert stats.kstest(along, "rayleigh").pvalue > 0.01


@pytest.mark.parametrize(("distance", "log_weight"), CASES)
def test_the_other_directions_stay_standard_normal(distance, log_weight):
    along, across = draw(distance, log_weight, ROWS, seed=1)
    columns = np.stack([along, *across.T])
    assert stats.kstest(across.ravel(), "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(columns) - np.eye(3)).max() < 4 / np.sqrt(ROWS)
    assert stats.kstest(along, "norm").pvalue < 1e-6  # the test can tell


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.floats(1e-6, 20), st.floats(0, 1), st.floats(1e-6, 1 - 1e-6))
def test_the_draw_inverts_the_survival_function(distance, share, uniform):
    """Over the weights at which a residual is ever drawn: its support starts below t = 8."""
    log_weight = -share * (distance / 2 + 8) * distance
    start = -distance / 2 - log_weight / distance
    drawn = draw_line(distance, log_weight, uniform)[0]

    def mass(low):
        def density(t):
            return np.exp((start**2 if start > 0 else 0) / 2 - t**2 / 2) * -np.expm1(-distance * (t - start))

        points = [*np.linspace(low, low + 2, 5), *np.linspace(-8, 12, 11)]
        edges = sorted({low, 14.0} | {point for point in points if low < point < 14})
        return sum(integrate.quad(density, *edges[i : i + 2], epsabs=0, epsrel=1e-11)[0] for i in range(len(edges) - 1))

    assert drawn >= start - 1e-12
    assert mass(drawn) / mass(max(start, -12.0)) == pytest.approx(uniform, rel=1e-7, abs=1e-10)


def test_the_draw_follows_the_shifts_sign():
    uniform = np.linspace(0.01, 0.99, 9)
    np.testing.assert_allclose(draw_line(0.7, -0.1, uniform, -1.0), -draw_line(0.7, -0.1, uniform), rtol=1e-12)


@pytest.mark.parametrize("distance", [5e-324, 1e-200, 1e-12, 1e-3, 1.0, 40.0, 1e6])
@pytest.mark.parametrize("log_weight", [0.0, -1e-300, -1e-9, -1.0, -1e3, -1e5])
def test_extreme_rows_are_finite_and_fall_with_the_uniform(distance, log_weight):
    uniform = np.array([2.0**-53, 1e-9, 0.3, 0.5, 0.999, 1 - 2.0**-53])
    with np.errstate(all="raise", under="ignore"):
        drawn = draw_line(distance, log_weight, uniform)
    assert np.all(np.isfinite(drawn))
    assert np.all(np.diff(drawn) <= 0)


def test_equal_means_give_the_targets_own_draw():
    mean, normal = np.array([[0.3, -0.2]]), np.array([[1.5, 0.5]])
    drawn = draw_block_residual(mean, mean, np.array([0.1]), np.zeros(1), np.array([0.4]), normal)
    np.testing.assert_allclose(drawn, mean + 0.1 * normal, rtol=1e-15)


def test_engine_outputs_give_float64():
    single = np.ones((2, 3), dtype=np.float32)
    drawn = draw_block_residual(0 * single, single, single[:, 0], 0 * single[:, 0], 0.5 * single[:, 0], single)
    assert drawn.dtype == np.float64


PAPER = {"draft_mean": 0.4, "draft_std": 0.8, "target_mean": 0.0, "target_std": 0.5}
LOG_STD_RATIO = 0.35  # log Σ', without the last transition


def paper_density(x, log_std_ratio=LOG_STD_RATIO):
    """max(0, p - q/Σ'), not normalised; p's share that passes one try is its integral."""
    target = stats.norm.pdf(x, PAPER["target_mean"], PAPER["target_std"])
    draft = stats.norm.pdf(x, PAPER["draft_mean"], PAPER["draft_std"])
    return np.maximum(0, target - draft * np.exp(-log_std_ratio))


def draw_paper(rows, tries, seed=0, log_std_ratio=LOG_STD_RATIO):
    rng = np.random.default_rng(seed)
    return draw_paper_residual(
        **{name: np.array(value) for name, value in PAPER.items()},
        log_std_ratio=np.full(rows, log_std_ratio),
        normal=rng.normal(size=(rows, tries, 1)),
        uniform=rng.random((rows, tries)),
        fallback=np.full((rows, 1), 99.0),
    )


def paper_p_value(token, found):
    grid = np.linspace(-4, 4, 20001)
    cdf = integrate.cumulative_trapezoid(paper_density(grid), grid, initial=0)
    return stats.kstest(token[found, 0], lambda x: np.interp(x, grid, cdf / cdf[-1])).pvalue


def test_paper_residual_has_the_residuals_density():
    assert paper_p_value(*draw_paper(ROWS, tries=6)) > 0.01
    assert paper_p_value(*draw_paper(ROWS, tries=6, log_std_ratio=0.0)) < 1e-6  # the test can tell


@pytest.mark.parametrize("tries", [1, 4])
def test_paper_tries_are_bounded_and_then_fall_back(tries):
    token, found = draw_paper(ROWS, tries)
    one_try = integrate.quad(paper_density, -4, 4, points=[-1, 0, 1], limit=200)[0]
    expected = 1 - (1 - one_try) ** tries
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.sqrt(0.25 / ROWS))
    np.testing.assert_array_equal(token[:, 0] == 99.0, ~found)


def test_the_first_try_that_passes_wins():
    """Σ' so large that nothing of q is left: a try passes unless its uniform says otherwise."""
    normal = np.arange(1.0, 9.0).reshape(2, 4, 1)
    token, found = draw_paper_residual(
        *(np.zeros((2, 1)), np.ones((2, 1)), np.full((2, 1), 10.0), np.full((2, 1), 2.0)),
        log_std_ratio=np.full(2, 500.0),
        normal=normal,
        uniform=np.array([[1.0, 0.9, 0.1, 0.1], [0.5, 0.9, 0.1, 0.1]]),
        fallback=np.zeros((2, 1)),
    )
    np.testing.assert_array_equal(found, [True, True])
    np.testing.assert_allclose(token[:, 0], [14.0, 20.0])


@pytest.mark.parametrize("log_std_ratio", [0.0, -1e4])
def test_equal_models_leave_nothing_to_draw(log_std_ratio):
    mean, fallback = np.full((3, 2), 0.5), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    rng = np.random.default_rng(0)
    with np.errstate(all="raise", under="ignore"):
        token, found = draw_paper_residual(
            *(mean, np.array(0.1), mean, np.array(0.1)),
            log_std_ratio=np.full(3, log_std_ratio),
            normal=rng.normal(size=(3, 5, 2)),
            uniform=rng.random((3, 5)),
            fallback=fallback,
        )
    assert not found.any()
    np.testing.assert_array_equal(token, fallback)
