"""The terminal: when a progress bar is shown."""

import io

import pytest
from rich.console import Console

from specdec_rt.cli.terminal import ProgressBar


class Terminal(io.StringIO):
    """A stand-in for a terminal, which a test run has none of."""

    def isatty(self):
        return True


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def console(screen):
    """In colour, which FORCE_COLOR asks for in log files, too."""
    return Console(file=screen, force_terminal=True, width=80)


def shown_after(seconds, screen):
    """What `screen` shows of work of which one token of two is committed after so many seconds."""
    clock = Clock()
    with ProgressBar(console(screen), clock=clock, delay_seconds=1.0) as bar:
        clock.now += seconds
        bar.update(1, 2)
    return screen.getvalue()


def test_long_work_shows_how_many_tokens_are_committed_on_a_terminal():
    shown = shown_after(1.1, Terminal())
    assert "tokens" in shown
    assert "1/2" in shown


@pytest.mark.parametrize(("seconds", "screen"), [(0.9, Terminal), (9.0, io.StringIO)])
def test_short_work_and_log_files_show_no_bar(seconds, screen):
    assert shown_after(seconds, screen()) == ""


def test_the_bar_is_erased_when_the_work_ends():
    assert shown_after(1.1, Terminal()).endswith("\x1b[2K")
