"""A run of a scenario: what is measured on which bundle, and what becomes of it."""

import json
import re

import pytest
from benchmark_scenarios import MACHINE, small_scenario
from bundles import copy_bundle

from benchmarks.__main__ import main
from benchmarks.report import write_report
from benchmarks.results_file import Results
from benchmarks.run import ProgressLog, perform_in_process, run_scenario
from benchmarks.worker import Job, perform
from specdec_rt.bundle import load_bundle

LIMITS = {
    "machine": {
        "moved": [{"bytes": 2**20, "copy_bytes_per_second": 1e9, "read_bytes_per_second": 2e9}],
        "operations_per_second": 1e9,
        "matrix": 8,
    },
    "branches": 2,
    "draft_length": 4,
    "graphs": {},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The results of a small run, each job done in this process, some in part: machines are slow to be measured."""
    folder = tmp_path_factory.mktemp("run")
    scenario = small_scenario(folder).model_copy(update={"samples": 1})

    def perform_here(job):
        if job.kind == "limits":
            return LIMITS
        assert job.kind != "cost" or [case.variant for case in job.measured] == ["target", "fewer", "exact, self"]
        return perform(job.model_copy(update={"observed_images": 2, "measured": job.measured[-1:]}))

    out = folder / "results.json"
    run_scenario("test", scenario, out=out, threads=1, argv=["run", "test"], perform=perform_here)
    return json.loads(out.read_text())


def test_every_variant_is_measured(measured):
    rows = {row["variant"]: row for row in measured["rows"]}

    assert list(rows) == ["target", "fewer", "exact, self", "eager"]
    assert all(row["samples"] == 1 and row["p50_seconds"] > 0 for row in rows.values())
    assert rows["eager"]["processes"][0]["parts"]["head_seconds"] > 0


def test_the_runtimes_time_is_profiled_graph_by_graph(measured):
    profile = measured["rows"][0]["processes"][0]["profile"]

    assert profile["graphs"]["target.backbone"]["calls"] == 3
    assert 0 < profile["host_share"] < 1


def test_acceptance_is_observed_where_the_scenario_says_so(measured):
    observed = {row["variant"]: row["observed"] for row in measured["rows"] if "observed" in row}

    assert list(observed) == ["exact, self"]
    assert observed["exact, self"]["judged"] == 2 * 49


def test_costs_are_predicted_beside_a_measurement(measured):
    (row,) = measured["cost"]["rows"]

    assert row["variant"] == "exact, self"
    assert row["seconds"] > 0
    assert row["measured_seconds"] > 0
    assert sum(row["parts"].values()) == pytest.approx(row["seconds"])


def test_results_become_a_report(measured, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(measured))

    written = write_report([path], tmp_path / "docs")

    plots = {f"benchmarks-test-{kind}.png" for kind in ("latency", "acceptance", "time")}
    assert {file.name for file in written} == {"benchmarks.md", *plots}
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| exact, self |" in text
    assert "**no** | another: 2 AR steps" in text
    assert re.search(r"[01] of 1 within 15%", text)


def test_requests_by_turns_are_compared_in_pairs(tmp_path):
    beside = '{ mode = "target", ar_steps = 2 }\nbeside = "target"'
    scenario = small_scenario(tmp_path, ('{ mode = "target", ar_steps = 2 }', beside))
    fewer = scenario.variants[1]
    scenario = scenario.model_copy(update={"samples": 3})
    results = Results(tmp_path / "test.json", "test", scenario, 1, machine={**MACHINE})

    found = perform(Job(kind="time", scenario=scenario, bundle="digits-mar", threads=1, variant=fewer, batch=1))
    row = results.add(fewer, 1, found)

    assert len(found["seconds"]) == len(found["beside_seconds"]) == len(row["beside_ratios"]) == 3
    assert row["beside_ratios"][0] == found["beside_seconds"][0] / found["seconds"][0]


def test_forced_verdicts_are_timed_and_predicted(tmp_path):
    copy_bundle(tmp_path / "mar_base", "digits-mar")  # stands for one with random weights, which takes minutes to make
    scenario = small_scenario(
        tmp_path,
        ('bundle = "digits-mar"', 'random_mar = "mar_base"\nforced_source = "a guess"'),
        ("observe = true", "forced = { acceptance = 0.25, left = 0.4, resumed = 0.5 }"),
    )

    def perform_here(job):
        return {} if job.kind == "limits" else perform(job)

    results = run_scenario(
        "test",
        scenario.model_copy(update={"samples": 1}),
        out=tmp_path / "out.json",
        threads=1,
        argv=[],
        only="exact",
        work=tmp_path,
        perform=perform_here,
    )

    (process,) = results.rows["exact, self", 1]["processes"]
    assert process["stats"]["acceptance_rate"] == pytest.approx(0.25, abs=0.05)
    (case,) = results.cost["rows"]
    assert case["seconds"] == pytest.approx(case["measured_seconds"], rel=1)  # nothing like the acceptance of its own


def test_torch_and_limits_get_the_bundle_without_the_int8_draft(tmp_path):
    scenario = small_scenario(tmp_path).model_copy(update={"bundle": "digits", "int8_draft": "adapter"})
    asked = []

    def perform_nothing(job):
        asked.append(job)
        return {"seconds": [1.0], "stats": {}, "left": 0.5}

    run_scenario(
        "test", scenario, out=tmp_path / "out.json", threads=1, argv=[], work=tmp_path, perform=perform_nothing
    )

    drafted = str(tmp_path / "digits-adapter-int8_draft")
    assert "adapter-int8" in load_bundle(drafted).manifest.drafts
    of_torch = [job.bundle for job in asked if job.kind == "limits" or (job.variant and job.variant.engine == "torch")]
    assert of_torch == ["digits", "digits"]
    assert {job.bundle for job in asked} == {"digits", drafted}


def test_a_job_is_done_in_a_process_of_its_own(tmp_path):
    scenario = small_scenario(tmp_path).model_copy(update={"samples": 1})
    job = Job(kind="time", scenario=scenario, bundle="digits-mar", threads=1, variant=scenario.variants[0])

    assert len(perform_in_process(job)["seconds"]) == 1


def test_a_job_that_fails_ends_the_run_and_names_its_variant(tmp_path, capfd):
    scenario = small_scenario(tmp_path)
    job = Job(kind="time", scenario=scenario, bundle=str(tmp_path), threads=1, variant=scenario.variants[0])

    with pytest.raises(SystemExit, match="a measurement of target failed"):
        perform_in_process(job)
    assert "BundleError" in capfd.readouterr().err


def test_progress_is_told_process_by_process():
    lines = []
    log = ProgressLog(2, lines.append)
    log("first")
    log("second")

    assert [re.sub(r"\d+ s", "0 s", line) for line in lines] == ["[1/2, 0 s] first\n", "[2/2, 0 s] second\n"]


def test_the_command_line_changes_the_scenario(tmp_path, capsys):
    assert main(["run", str(tmp_path / "none.toml")]) == 2
    assert "there is no scenario" in capsys.readouterr().err
