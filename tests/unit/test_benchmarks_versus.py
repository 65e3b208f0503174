"""Two checkouts compared by turns."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.versus import MODES, Side, compare

ROOT = Path(__file__).parents[2]


class FixedSide:
    """A side whose requests take what they are told to."""

    def __init__(self, *seconds):
        self._seconds = list(seconds)
        self.seeds = []

    def seconds(self, *request):
        self.seeds.append(request[-1])
        return self._seconds.pop(0)


def test_ratios_are_of_the_same_requests_and_the_first_does_not_count():
    before, after = FixedSide(100.0, 2.0, 4.0, 8.0), FixedSide(1.0, 1.0, 2.0, 4.0)

    found = compare(before, after, MODES["target"], 1, 3)

    assert before.seeds == after.seeds == [0, 1, 2, 3]
    assert (found["before"], found["after"], found["ratio"]) == (4.0, 2.0, 0.5)
    assert (found["low"], found["high"]) == (0.5, 0.5)


def test_a_side_answers_with_the_package_of_its_checkout():
    side = Side(ROOT, "digits", 1)
    try:
        assert Path(side.package) == ROOT / "specdec_rt" / "__init__.py"
        assert 0 < side.seconds(MODES["target"], 1, 1) < 60
    finally:
        side.close()


def test_a_checkout_is_not_compared_with_itself():
    command = [sys.executable, "-m", "benchmarks.versus", str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 1
    assert "both sides are" in done.stderr


def test_a_side_that_ends_before_it_answers_ends_the_comparison():
    with pytest.raises(SystemExit, match="a side ended before it answered"):
        Side(ROOT, "no such bundle", 1)
