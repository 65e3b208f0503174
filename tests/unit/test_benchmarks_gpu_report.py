"""The tables that end a run on a GPU."""

import json

import pytest

from benchmarks.gpu import report

MACHINE_ROW = {"model": "digits", "backend": "cuda", "graphs": "none", "precision": "fp32"}


@pytest.fixture
def folder(tmp_path):
    """What a run has left: steps, one candidate that failed, the parts' endings and pytest's report."""
    steps = [
        {**MACHINE_ROW, "batch": 8, "step": "target", "launch": {"median_ms": 1.25}},
        {**MACHINE_ROW, "batch": 8, "step": "resume", "launch": {"median_ms": 0.5}},
        {**MACHINE_ROW, "error": "MemoryError: the GPU is full"},
    ]
    (tmp_path / "steps.json").write_text(json.dumps({"rows": steps}))
    (tmp_path / "parts.tsv").write_text("doctor\t0\t3\ntests\t124\t150\nsteps of mar_huge\tno bundle\t0\n")
    case = '<testcase classname="tests.gpu.test_x" name="'
    (tmp_path / "junit.xml").write_text(
        f'<testsuites><testsuite>{case}one"><skipped message="no driver"/></testcase>{case}two"/>'
        f'{case}three"><properties><property name="relative_error" value="1e-6"/></properties>'
        '<failure message="too far"/></testcase></testsuite></testsuites>'
    )
    return tmp_path


@pytest.fixture
def printed(folder, capsys):
    report.main([str(folder), "--parts", str(folder / "parts.tsv"), "--junit", str(folder / "junit.xml")])
    return capsys.readouterr().out


def test_steps_have_a_row_for_each_form_of_a_backend(printed):
    (line,) = (line for line in printed.splitlines() if "cuda" in line and "MemoryError" not in line)

    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        *("digits", "cuda", "none", "fp32", "8"),
        *("1.25", "-", "-", "0.50", "-"),
    ]


def test_what_failed_stands_below_its_table(printed):
    assert "digits cuda none fp32: MemoryError: the GPU is full" in printed


def test_what_there_is_nothing_of_is_said(printed):
    assert "doctor.json: nothing to read" in printed


def test_parts_say_how_they_ended(printed):
    assert "doctor: done (3 s); tests: stopped at its limit (150 s); steps of mar_huge: no bundle (0 s)" in printed


def test_tests_are_counted_and_those_that_failed_are_kept_with_their_figures(folder, printed):
    assert "1 passed, 1 failed, 1 skipped" in printed
    content = json.loads((folder / "tests.json").read_text())
    assert content["reasons"] == {"no driver": 1}
    figures = {"relative_error": "1e-6"}
    assert content["tests"] == [
        {"test": "test_x::three", "outcome": "failed", "said": "too far", "figures": figures},
    ]
