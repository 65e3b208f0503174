import json

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.observe import observe
from benchmarks.requests import Request
from specdec_rt import load
from specdec_rt.bench.cost import Acceptance, HostCost, Interpolated, draw_left, simulate
from specdec_rt.bench.predict import Predictor
from specdec_rt.bench.timing import TimedBackend, profile, repeat
from specdec_rt.cli import app
from specdec_rt.config import DecodeOptions
from specdec_rt.decode import redraft
from specdec_rt.errors import UsageError


class Counting:
    """Every call of a kind costs the same, so that a prediction counts calls."""

    def __init__(self, backbone=0.0, modulation=0.0, step=0.0, density=0.0):
        self._backbone, self._modulation, self._step, self._density = backbone, modulation, step, density

    def backbone(self, *_):
        return self._backbone

    def modulation(self, *_):
        return self._modulation

    def steps(self, *asked):
        return self._step * asked[-1]

    def density(self, *_):
        return self._density


@pytest.fixture(scope="module")
def predictor():
    return Predictor(load("digits", backend="onnxruntime", threads=1), host=HostCost())


def predicted(predictor, acceptance, costs, batch=1, **options):
    work = predictor.workload(DecodeOptions(**options), batch)
    return simulate(work, Acceptance(acceptance), costs, HostCost(), trials=200)


def test_the_target_alone_calls_its_head_at_every_step_of_every_token(predictor):
    assert predicted(predictor, 0, Counting(step=1), mode="target").seconds == 49 * 23
    assert predicted(predictor, 0, Counting(backbone=1), mode="target", batch=8).seconds == 49
    assert predicted(predictor, 0, Counting(modulation=1), mode="target").seconds == 49


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.8, 1.0])
def test_rounds_are_as_long_as_acceptance_makes_them(predictor, rate):
    rounds = predicted(predictor, rate, Counting(density=1), mode="exact", draft_length=4).seconds
    per_round = sum(rate**i for i in range(4))

    assert rounds == pytest.approx(49 / per_round, rel=0.07)  # the last round is cut short


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits", {"draft": "adapter"}),
        ("digits", {"draft": "self"}),
        ("digits-mar", {"draft": "small", "draft_length": 2, "ar_steps": 8}),
    ],
)
def test_the_simulation_takes_as_many_rounds_as_decoding(name, options):
    pipeline = load(name, backend="onnxruntime", threads=1)
    labels = np.arange(10)
    stats = pipeline.generate(labels, mode="exact", batch_size=10, **options).stats
    work = Predictor(pipeline).workload(DecodeOptions(mode="exact", **options), 1)

    found = simulate(work, Acceptance(stats.acceptance_rate), Counting(density=1), HostCost(), trials=100)

    assert found.launches == pytest.approx((stats.rounds + stats.draft_backbone_calls) / 10, rel=0.12)


def test_rests_that_are_drafted_again_take_as_many_calls_as_decoding(monkeypatch):
    monkeypatch.setattr(redraft, "LEAST", 3)
    pipeline = load("digits", backend="onnxruntime", threads=1)
    options = DecodeOptions(mode="exact", draft="self", draft_steps=5)
    request = Request(options, 1)
    seen = [observe(pipeline, request, seed=seed, requests=1) for seed in range(12)]
    calls = [request(pipeline, seed).sequential_head_calls for seed in range(12)]
    judged, accepted = np.sum([counts for each in seen for counts in each.by_offset.values()], axis=0)
    rests = np.concatenate([each.rests for each in seen])
    acceptance = Acceptance(accepted / judged, np.mean(np.concatenate([each.left for each in seen])), rests.mean())

    work = Predictor(pipeline, host=HostCost()).workload(options, 1)
    found = simulate(work, acceptance, Counting(step=1), HostCost(), trials=100)

    assert len(rests) > 100
    assert found.seconds == pytest.approx(np.mean(calls), rel=0.1)


def test_the_largest_of_a_batch_decides(predictor):
    one = predicted(predictor, 0.7, Counting(density=1), mode="exact").seconds
    many = predicted(predictor, 0.7, Counting(density=1), mode="exact", batch=32).seconds

    assert many > 1.1 * one


def test_a_draft_yet_to_be_trained_costs_its_share():
    pipeline = load("digits", backend="onnxruntime", threads=1)
    predictor = Predictor(pipeline, draft_share=0.25, host=HostCost())
    work = predictor.workload(DecodeOptions(mode="exact", draft_length=3), 1)
    times = predictor.times(work)
    times._functions = {"target.backbone": lambda *_: 8.0}

    assert work.plan.draft_length == 3
    assert (times.backbone("draft", 1, 1), times.backbone("target", 1, 1)) == (2.0, 8.0)


def test_left_has_the_mean_that_is_asked_for():
    for share in (0.2, 0.5, 0.8):
        left = draw_left(np.random.default_rng(0).random(20_000), 100, share)
        assert left.mean() + 0.5 == pytest.approx(100 * share, abs=1)
        assert left.min() >= 0
        assert left.max() <= 99


def test_interpolation_is_exact_for_straight_lines_and_evaluates_the_grid_alone():
    asked = []

    def line(x, y):
        asked.append((x, y))
        return 3e-4 * x + 2e-4 * y

    function = Interpolated(line)

    assert [function(x, 5) for x in (1, 7, 23, 100)] == pytest.approx([13e-4, 31e-4, 79e-4, 310e-4])
    assert {x for x, _ in asked} <= {1, 6, 8, 16, 24, 96, 128}
    assert Interpolated(line, grid=(1, 25, 49))(2, 13) == pytest.approx(32e-4)


def test_slow_calls_are_not_repeated_at_every_size():
    asked = []

    def slow(x, y):
        asked.append((x, y))
        return 0.1 * x + 0.02

    function = Interpolated(slow)

    assert function(4, 1) == pytest.approx(0.42)
    assert function(32, 1) == pytest.approx(8 * 0.42)
    assert function(32, 2) == pytest.approx(3.22)
    assert asked == [(4, 1), (32, 2)]


def test_host_costs_are_fitted_and_never_negative():
    fitted = HostCost.of([(10, 40, 9.0), (10, 160, 21.0)])
    assert (fitted.launch, fitted.token) == pytest.approx((0.5, 0.1))
    assert HostCost.of([(10, 10, 5.0)]) == HostCost(0.5)
    assert HostCost.of([(10, 10, 5.0), (10, 100, 1.0)]).token == 0


def test_graphs_of_a_bundle_and_the_host_are_timed():
    predictor = Predictor(load("digits", backend="onnxruntime", threads=1))
    found = predictor.predict(DecodeOptions(mode="exact", draft_length=2), 1, Acceptance(0.8))

    assert found.parts["host"] > 0
    of_target = {f"target.{graph}" for graph in ("backbone", "modulation", "denoise_step", "path_means")}
    assert set(found.parts) == {"draft", "host", *of_target}
    assert {"target.path_means", "adapter.backbone"} <= set(predictor.record()["graph_seconds"]["2"])


def test_the_first_step_of_a_chain_finds_no_weights_in_the_cache(predictor):
    times = predictor.times(predictor.workload(DecodeOptions(mode="target"), 1))
    times._functions = {"target.denoise_step": lambda *_: 5.0, "target.denoise_step, again": lambda *_: 2.0}

    assert times.steps("target", 1, 1) == 5.0
    assert times.steps("target", 1, 23) == 5.0 + 22 * 2.0


def test_requests_with_other_drafts_have_host_costs_of_their_own():
    predictor = Predictor(load("digits-mar", backend="onnxruntime", threads=1))
    for options in (DecodeOptions(mode="target"), *(DecodeOptions(draft=draft) for draft in ("small", "self"))):
        assert predictor.host(predictor.workload(options, 1)).launch > 0

    assert set(predictor.record()["host_seconds"]) == {"alone, batch 1", "small, batch 1", "self, batch 1"}


def test_graphs_are_timed_anew_when_that_is_asked_for(predictor):
    work = predictor.workload(DecodeOptions(mode="target"), 1)
    before = predictor.times(work)

    assert predictor.times(work) is before
    predictor.renew()
    assert predictor.times(work) is not before


def test_a_profile_times_every_call_and_leaves_images_as_they_are():
    pipeline = load("digits-mar", backend="onnxruntime", threads=1)

    def request(of, seed):
        return of.generate([1], seed=seed, mode="target", ar_steps=3)

    found, result = profile(pipeline, request, seed=1)

    assert found.graphs["target.backbone"].calls == 3
    assert found.graphs["target.denoise_step"].calls == 3 * 23
    assert 0 < found.host_share < 1
    np.testing.assert_array_equal(result.tokens, request(pipeline, 1).tokens)


def test_a_timed_backend_is_the_backend_in_everything_else():
    backend = load("digits", backend="onnxruntime").backend
    timed = TimedBackend(backend)

    assert (timed.name, timed.device, timed.limits) == (backend.name, backend.device, backend.limits)


def test_requests_have_seeds_of_their_own_and_end_at_the_limit():
    seeds = []
    times = repeat(seeds.append, seed=7, warmup=2, samples=3)

    assert seeds == [10, 11, 7, 8, 9]
    assert len(times.seconds) == 3
    assert len(repeat(lambda _: None, seed=1, warmup=0, samples=9, limit_seconds=1e-12).seconds) == 1


def test_bench_measures_modes_and_predicts():
    words = ["digits", "--batches", "1", "--threads", "1", "--json"]

    run = CliRunner().invoke(app, ["bench", *words, "--modes", "target", "--requests", "1", "--warmup", "0"])
    (row,) = json.loads(run.stdout)["rows"]
    assert (row["mode"], row["exact"], len(row["seconds"])) == ("target", True, 1)
    assert 0 < row["profile"]["host_share"] < 1

    words += ["--predict", "--acceptance", "0.5,0.9", "--draft-lengths", "2", "--draft-cost", "0.1"]
    run = CliRunner().invoke(app, ["bench", *words, "--draft-steps", "8"])
    alone, less, more = json.loads(run.stdout)["rows"]
    assert alone["against_target"] == 1
    assert less["images_per_second"] < more["images_per_second"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batches", "one"], "batches is 'one'"),
        (["--modes", "fast"], "modes holds 'fast'"),
        (["--draft-cost", "0.1"], "add --predict"),
        (["--predict", "--acceptance", "1.5"], "acceptance holds 1.5"),
    ],
)
def test_bench_says_what_it_cannot_do(words, said):
    result = CliRunner().invoke(app, ["bench", "digits", *words])

    assert isinstance(result.exception, UsageError)
    assert said in str(result.exception)
