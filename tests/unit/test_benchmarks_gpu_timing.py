"""How launches are timed."""

import pytest

from benchmarks.gpu.timing import Clock, TimedDevice, summary
from specdec_rt.backends.host import HostDevice


@pytest.fixture
def device():
    return TimedDevice(HostDevice())


@pytest.fixture
def launch(device):
    return device.record([lambda: None])


def test_a_slow_step_is_repeated_less_often(device, launch):
    found = Clock(repeats=20, warmup=0, seconds=0.0, fewest=5).launches(device, launch, ["step"])

    assert found["step"]["repeats"] == found["call"]["repeats"] == 5


def test_launches_without_a_name_belong_to_the_last_one(device, launch):
    def step():
        for _ in range(3):
            launch()

    found = Clock(repeats=1, warmup=0).launches(device, step, ["first", "others"])

    assert found["others"]["repeats"] == 1
    first, *others = device.seconds
    assert (found["first"], found["others"]) == (summary([first]), summary([sum(others)]))


def test_a_step_must_make_the_launches_that_have_names(device, launch):
    with pytest.raises(AssertionError, match="fewer launches than were expected"):
        Clock(repeats=1, warmup=0).launches(device, launch, ["first", "second"])


def test_a_summary_is_in_milliseconds():
    found = summary([0.001, 0.002, 0.003, 0.004, 0.1])

    assert (found["median_ms"], found["least_ms"], found["repeats"]) == (3.0, 1.0, 5)
    assert 4 < found["p95_ms"] <= 100
