"""Scenarios: those of the repository, and what is refused."""

import pytest
from benchmark_scenarios import small_scenario

from benchmarks.scenario import SCENARIOS, read_scenario
from specdec_rt.errors import UsageError


@pytest.mark.parametrize("name", sorted(path.stem for path in SCENARIOS.glob("*.toml")))
def test_every_scenario_is_valid_and_has_a_baseline_and_the_target(name):
    _, found = read_scenario(name)

    assert {variant.engine for variant in found.variants} == {"torch", "runtime"}
    assert "target" in {variant.name for variant in found.variants}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("repeats = 1", "repeat = 1", "repeat"),
        ('style = "eager"', 'style = "fast"', "style"),
        ('{ mode = "target" }', '{ mod = "target" }', "mod"),
        ('name = "fewer"', 'name = "target"', "two variants"),
        ('bundle = "digits-mar"', "", "bundle or random_mar"),
        (
            'bundle = "digits-mar"',
            'random_mar = "mar_base"\nint8_draft = "small"',
            "int8_draft is given without bundle",
        ),
        ('bundle = "digits-mar"', 'bundle = "digits-mar"\nforced_source = "a guess"', "forced_source says"),
        ("options = {", 'beside = "targt"\noptions = {', "beside 'targt'"),
        ('draft = "self" }', 'draft = "self" }\npublished_head = true', "published_head, which is for mode 'target'"),
        (
            "observe = true",
            "observe = true\nforced = { acceptance = 0.5, left = 0.5, resumed = 0.5 }",
            "'exact, self' has forced verdicts: leave out workers and observe",
        ),
        ("samples = 2", "samples = ", "TOML"),
    ],
)
def test_what_a_scenario_says_wrong_is_named(tmp_path, old, new, said):
    with pytest.raises(UsageError, match=said):
        small_scenario(tmp_path, (old, new))


def test_only_the_targets_own_distribution_counts_as_exact(tmp_path):
    scenario = small_scenario(tmp_path)
    exact = {variant.name: variant.distribution(scenario)[0] for variant in scenario.variants}

    assert exact == {"target": True, "fewer": False, "exact, self": True, "eager": True}
