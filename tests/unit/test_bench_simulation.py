"""Simulated rounds, their calls counted: against arithmetic, and against what decoding really calls."""

import numpy as np
import pytest
from bench_workloads import CountedCosts, workload

from benchmarks.observe import ObservedVerdicts
from specdec_rt import DecodeOptions, Pipeline, load
from specdec_rt.bench.cost import Acceptance, HostCost
from specdec_rt.bench.simulation import draw_left, simulate
from specdec_rt.bench.timing import TimedBackend
from specdec_rt.plan import Tuning


def seconds(work, rate, trials=200, **costs):
    return simulate(work, Acceptance(rate), CountedCosts(**costs), HostCost(), trials=trials).seconds


# --- the target alone ----------------------------------------------------------------------------------------


def test_the_target_alone_calls_its_head_at_every_transition_of_every_token():
    assert seconds(workload(mode="target"), 0, denoise_step=1) == 49 * 23


def test_the_target_alone_makes_modulation_once_for_each_token():
    assert seconds(workload(mode="target"), 0, modulation=1) == 49


def test_a_batch_shares_the_calls_of_an_ar_step():
    assert seconds(workload(8, mode="target"), 0, backbone=1) == 49


# --- rounds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.8, 1.0])
def test_rounds_are_as_long_as_acceptance_makes_them(rate):
    rounds = seconds(workload(mode="exact", draft_length=4), rate, path_means=1)
    per_round = sum(rate**i for i in range(4))

    assert rounds == pytest.approx(49 / per_round, rel=0.07)  # the last round is cut short


def test_the_slowest_image_of_a_batch_decides():
    one = seconds(workload(mode="exact"), 0.7, path_means=1)
    many = seconds(workload(32, mode="exact"), 0.7, path_means=1)

    assert many > 1.1 * one


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits", {"draft": "adapter"}),
        ("digits", {"draft": "self"}),
        ("digits-mar", {"draft": "small", "draft_length": 2, "ar_steps": 8}),
    ],
)
def test_a_batch_takes_as_many_stages_as_in_decoding(name, options):
    pipeline = load(name, backend="onnxruntime", threads=1)
    stats = pipeline.generate(np.arange(10), mode="exact", batch_size=10, **options).stats
    work = workload(bundle=name, mode="exact", **options)

    found = simulate(work, Acceptance(stats.acceptance_rate), CountedCosts(), HostCost(), trials=100)

    assert found.stages == pytest.approx((stats.rounds + stats.draft_backbone_calls) / 10, rel=0.12)


# --- resumed speculation -------------------------------------------------------------------------------------

RESUMING = {"mode": "exact", "draft": "self", "draft_steps": 5}
FROM_THREE_ON = Tuning(min_resume_steps=3)
"""The shipped chains are too short to be resumed with the usual tuning."""


def test_a_resumed_suffix_makes_its_modulation_and_judges_the_steps_that_it_left_out():
    work, costs = workload(**RESUMING, tuning=FROM_THREE_ON), CountedCosts()
    simulate(work, Acceptance(0.0, resumed=1.0), costs, HostCost(), trials=1)

    resumed = 0
    for modulation, steps, means in zip(costs.calls, costs.calls[1:], costs.calls[2:], strict=False):
        if modulation[0] != "modulation" or modulation[3] == work.chain or means[0] != "path_means":
            continue
        left = modulation[3]
        evaluated = int(work.plan.resume_step_mask[-left:].sum())
        assert (steps, means) == (("denoise_steps", "target", 1, 1 + evaluated), ("path_means", 1, left - evaluated))
        resumed += 1
    assert resumed > 20


def test_short_suffixes_are_finished_step_by_step():
    work, costs = workload(**RESUMING, tuning=FROM_THREE_ON), CountedCosts()
    simulate(work, Acceptance(0.0, left=0.05, resumed=1.0), costs, HostCost(), trials=1)

    finished = [call for call in costs.calls if call[0] == "denoise_steps" and call[3] < 3]
    assert {call[3] for call in finished} == {1, 2}
    assert ("modulation", "target", 1, 2) in costs.calls


def test_a_token_rejected_at_its_last_transition_takes_no_further_call():
    work = workload(**RESUMING)

    at_the_end = simulate(work, Acceptance(0.0, left=0.0), CountedCosts(denoise_step=1), HostCost(), trials=1)

    assert at_the_end.seconds == 49 * 5


def test_resumed_speculation_takes_as_many_calls_of_each_graph_as_in_decoding():
    images, observed = 12, ObservedVerdicts()
    loaded = load("digits", backend="onnxruntime", threads=1)
    backend = TimedBackend(loaded.backend)
    pipeline = Pipeline(loaded.bundle, backend, tuning=FROM_THREE_ON, exact_verifier=observed.exact_verifier)
    options = DecodeOptions(**RESUMING)
    pipeline.setup(options)  # makes the head, which embeds its chain
    backend.clear()
    for seed in range(images):
        pipeline.generate([seed % 10], seed=seed, options=options)
    called = {name: times.calls / images for name, times in backend.graphs.items()}
    acceptance = Acceptance(observed.acceptance_rate, np.mean(observed.left), np.mean(observed.resumed))

    def simulated(**costs):
        work = workload(**RESUMING, tuning=FROM_THREE_ON)
        return simulate(work, acceptance, CountedCosts(**costs), HostCost(), trials=100).seconds

    assert len(observed.resumed) > 100
    for graph in ("backbone", "modulation", "denoise_step", "path_means"):
        assert simulated(**{graph: 1}) == pytest.approx(called[f"target.{graph}"], rel=0.1), graph


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_what_is_left_of_chains_has_the_mean_that_is_asked_for(share):
    left = draw_left(np.random.default_rng(0).random(20_000), 100, share)

    assert left.mean() + 0.5 == pytest.approx(100 * share, abs=1)
    assert left.min() >= 0
    assert left.max() <= 99
