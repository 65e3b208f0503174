"""The records that predictions are made of."""

import pytest

from specdec_rt.bench.cost import Acceptance, HostCost


def test_host_costs_are_fitted_to_stages_and_tokens():
    fitted = HostCost.of([(10, 40, 9.0), (10, 160, 21.0)])

    assert (fitted.stage, fitted.token) == pytest.approx((0.5, 0.1))


def test_one_measurement_gives_the_cost_of_a_stage():
    assert HostCost.of([(10, 10, 5.0)]) == HostCost(0.5)


@pytest.mark.parametrize(
    ("measured", "negative"), [([(10, 10, 5.0), (10, 100, 1.0)], "token"), ([(1, 10, 1.0), (10, 11, 0.1)], "stage")]
)
def test_host_costs_are_never_negative(measured, negative):
    fitted = HostCost.of(measured)

    assert getattr(fitted, negative) == 0
    assert fitted.stage + fitted.token > 0


def test_suffixes_are_accepted_as_rarely_as_two_tokens_unless_it_is_known_better():
    assert Acceptance(0.5).suffix_rate == 0.25
    assert Acceptance(0.5, resumed=0.4).suffix_rate == 0.4
