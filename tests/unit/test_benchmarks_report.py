"""Results as Markdown and pictures."""

import json

import pytest
from benchmark_scenarios import MACHINE, small_scenario

from benchmarks.__main__ import main
from benchmarks.report import write_report
from benchmarks.results_file import Results, write_json
from benchmarks.scenario import Forced
from specdec_rt.errors import UsageError


def row(variant, batch=1, *, adds="", seconds=1.0, **more):
    return {
        "variant": variant,
        "engine": "runtime",
        "batch": batch,
        "exact": True,
        "distribution": "the target's",
        "adds": adds,
        "processes": [{}],
        "p50_seconds": seconds,
        "p95_seconds": seconds,
        **more,
    }


@pytest.fixture
def report_of(tmp_path):
    """Makes a report of rows; returns its text."""

    def report_of(*rows, forced=None):
        scenario = small_scenario(tmp_path)
        if forced is not None:
            variants = (scenario.variants[0].model_copy(update={"forced": forced}),)
            scenario = scenario.model_copy(update={"variants": variants, "forced_source": "elsewhere"})
        results = Results(tmp_path / "test.json", "test", scenario, 1, machine={**MACHINE})
        results.rows = {(each["variant"], each["batch"]): each for each in rows}
        results.write()
        write_report([results.path], tmp_path / "docs")
        return (tmp_path / "docs" / "benchmarks.md").read_text()

    return report_of


def test_rows_are_compared_with_the_target_of_their_batch(report_of):
    text = report_of(row("target", 1), row("exact", 1, seconds=0.5), row("target", 2), row("exact", 2, seconds=4.0))

    assert "| exact | 500.0 | 500.0 |  | 2.00× |" in text
    assert "| exact | 4000.0 | 4000.0 |  | 0.25× |" in text


def test_an_ablation_compares_each_row_with_the_one_before_it_and_with_the_first(report_of):
    rows = [row("a", adds="first", seconds=4.0), row("b", adds="second", seconds=2.0), row("c", adds="third")]

    text = report_of(*rows)

    assert "### Ablation, batch 1\n" in text
    assert "| second | b | 2000.0 | 2.00× | 2.0× |" in text
    assert "| third | c | 1000.0 | 2.00× | 4.0× |" in text


def test_an_ablation_begins_with_its_first_thing(report_of):
    text = report_of(row("a", 1, adds="first"), row("b", 1, adds="second"), row("b", 2, adds="second"))

    assert text.count("### Ablation") == 1


def test_rows_that_add_nothing_make_no_ablation(report_of):
    assert "Ablation" not in report_of(row("b"))


def test_requests_by_turns_have_a_table_of_ratios(report_of):
    text = report_of(row("auto", beside="target", beside_ratios=[0.9, 1.0, 1.1]))

    assert "| auto | target | 1 | 1.00× | 0.95× to 1.05× |" in text


def test_what_failed_says_why(report_of):
    failed = row("compiled", processes=[{"failed": "no compiler | here"}])
    del failed["p50_seconds"]

    assert "| compiled | failed |  |  |  |  |  | no compiler \\| here |" in report_of(row("target"), failed)


def test_forced_verdicts_are_said_to_be_forced(report_of):
    text = report_of(row("target"), forced=Forced(acceptance=0.72, left=0.5, resumed=0.51))

    assert "**Weights are random: verdicts are forced, as measured elsewhere (elsewhere).**" in text
    assert "72% accepted, 50% of the chain left at a rejection, 51% of the resumed suffixes accepted" in text


def test_two_results_of_one_scenario_are_refused(report_of, tmp_path):
    report_of(row("target"))

    with pytest.raises(UsageError, match="two of the results are of one scenario"):
        write_report([tmp_path / "test.json"] * 2, tmp_path / "docs")


def test_a_file_of_something_else_is_no_result(tmp_path, capsys):
    path = tmp_path / "other.json"
    write_json(path, {"rows": []})

    assert main(["report", str(path), "--out", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_results_are_written_as_a_whole(tmp_path):
    path = tmp_path / "test.json"
    write_json(path, {"old": 1})

    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"new": float("nan")})
    assert json.loads(path.read_text()) == {"old": 1}
