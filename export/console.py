"""Lines on stderr: progress, notes and errors of the export commands. Stdout is for results alone."""

from rich.console import Console

__all__ = ["print_line"]


def print_line(line: str) -> None:
    """Print `line` on stderr as it is, however long."""
    Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)
