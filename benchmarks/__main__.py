"""Benchmarks: `python -m benchmarks run SCENARIO` measures, `python -m benchmarks report RESULTS.json…` shows figures.

Figures mean something only where nothing else runs on the machine.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.run import run_scenario
from benchmarks.scenario import SCENARIOS, read_scenario
from specdec_rt.errors import SpecDecError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says. Returns 0, or the exit code of what went wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    given = _parser().parse_args(words)
    try:
        if given.command == "run":
            _run(given, words)
        else:
            from benchmarks.report import write_report  # matplotlib is needed here alone

            for path in write_report(given.results, given.out):
                sys.stderr.write(f"wrote {path}\n")
    except SpecDecError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _run(given: argparse.Namespace, words: list[str]) -> None:
    name, scenario = read_scenario(given.scenario)
    changes = {
        field: value
        for field, value in (
            ("repeats", given.repeats),
            ("samples", given.samples),
            ("warmup", given.warmup),
            ("batches", given.batches),
        )
        if value is not None
    }
    if given.batches is not None:
        changes["variants"] = tuple(variant.model_copy(update={"batches": ()}) for variant in scenario.variants)
    scenario = scenario.model_copy(update=changes)
    out = given.out or Path(f"{name}.json")
    run_scenario(name, scenario, out=out, threads=given.threads, argv=words, only=given.only)
    sys.stderr.write(f"wrote {out}\n")


def _parser() -> argparse.ArgumentParser:
    known = ", ".join(sorted(path.stem for path in SCENARIOS.glob("*.toml")))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a scenario")
    run.add_argument("scenario", help=f"one of {known}, or a TOML file")
    run.add_argument("--out", type=Path, metavar="FILE.json", help="where the figures go (default: SCENARIO.json)")
    run.add_argument("--threads", type=_count, default=2, help="threads of every engine (default: %(default)s)")
    run.add_argument("--only", metavar="TEXT", help="measure only variants whose name holds this")
    run.add_argument(
        "--batches", type=_counts, metavar="1,16", help="batch sizes of all variants, in place of the scenario's"
    )
    run.add_argument("--repeats", type=_count, help="processes per case, in place of the scenario's")
    run.add_argument("--samples", type=_count, help="timed requests per process, in place of the scenario's")
    run.add_argument("--warmup", type=_count, help="untimed requests before them, in place of the scenario's")
    report = commands.add_parser("report", help="write tables and plots of results")
    report.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="benchmarks.md and its plots go there")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
