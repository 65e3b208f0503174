"""Replay a recorded reference through a MAR bundle's engines: `python -m export.parity DIR REFERENCE.npz`.

`docs/mar.md` says what the file holds. The exit code is 1 where a quantity is over its tolerance or missing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from export.console import print_line
from export.replay import replay
from specdec_rt import SpecDecError, load

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Replay and print a table of the quantities; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m export.parity", description=__doc__)
    parser.add_argument("bundle", metavar="DIR", help="a MAR bundle")
    parser.add_argument("reference", type=Path, metavar="REFERENCE.npz", help="what your own PyTorch recorded")
    arguments = parser.parse_args(argv)
    try:
        comparisons = replay(load(arguments.bundle), arguments.reference, progress=print_line)
    except SpecDecError as error:
        print_line(f"error: {error}")
        return error.exit_code
    table = Table("quantity", "relative L2 error", "tolerance", "")
    for comparison in comparisons:
        found = comparison.problem if comparison.error is None else f"{comparison.error:.1e}"
        verdict = "passed" if comparison.passed else "FAILED"
        table.add_row(Text(comparison.name), Text(found), f"{comparison.tolerance:.0e}", verdict)
    failed = sum(not comparison.passed for comparison in comparisons)
    Console().print(table)
    Console().print(f"{len(comparisons) - failed} of {len(comparisons)} quantities passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
