"""What a run on a GPU found, as short tables. Also writes tests.json and parts.json from what its parts have left.

python -m benchmarks.gpu.report DIR [--parts FILE.tsv] [--junit FILE.xml]
"""

import argparse
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from benchmarks.gpu.machine import machine_record, write_json
from benchmarks.gpu.steps import STEPS

__all__ = ["main", "read_junit"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print what is in the folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", type=Path, help="name, exit code and seconds of each part, separated by tabs")
    parser.add_argument("--junit", type=Path, help="what pytest wrote")
    given = parser.parse_args(argv)
    folder: Path = given.folder
    if given.parts is not None:
        write_json(folder / "parts.json", {"machine": machine_record(), "parts": _parts(given.parts)})
    if given.junit is not None and given.junit.exists():
        write_json(folder / "tests.json", {"machine": machine_record(), **read_junit(given.junit)})
    # As wide as the tables, also where there is no terminal.
    console = Console(width=None if Console().is_terminal else 140)
    for name, show in _SECTIONS.items():
        path = folder / f"{name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            console.print(f"{path.name}: nothing to read ({error})", markup=False)
            continue
        console.print(show(content), markup=False, highlight=False)


def read_junit(path: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and why; those that failed or recorded figures, one by one."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    reasons: dict[str, int] = {}
    tests = []
    for case in ET.parse(path).iter("testcase"):  # noqa: S314  # our own pytest wrote it a moment ago
        problems = [case.find(kind) for kind in ("failure", "error", "skipped")]
        problem = next((found for found in problems if found is not None), None)
        outcome = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
        counts[outcome] += 1
        figures = {one.get("name", ""): one.get("value", "") for one in case.iter("property")}
        said = None if problem is None else (problem.get("message") or "")[:1000]
        if outcome == "skipped":
            reasons[said or ""] = reasons.get(said or "", 0) + 1
        elif problem is not None or figures:
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            tests.append({"test": name, "outcome": outcome, "said": said, "figures": figures})
    return {**counts, "reasons": reasons, "tests": tests}


def _parts(path: Path) -> list[dict[str, Any]]:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    endings = {"0": "done", "124": "stopped at its limit", "137": "stopped at its limit"}
    return [
        {
            "part": name,
            "ended": endings.get(status, f"exit code {status}" if status.isdecimal() else status),
            "seconds": int(seconds),
        }
        for name, status, seconds in rows
    ]


def _show_doctor(found: dict[str, Any]) -> RenderableType:
    gpus = found["driver"]["gpus"]
    device = f"{gpus[0]['name']} ({gpus[0]['compute_capability']})" if gpus else found["driver"]["why_not"]
    usable = [name for name, one in found["backends"].items() if one["usable"]]
    return f"{device}; driver {found['driver']['version']}; backends that run: {', '.join(usable) or 'none'}"


def _show_load(found: dict[str, Any]) -> RenderableType:
    errors = sorted({one["error"][:300] for one in found["attempts"] if one["error"]})
    loads = "load" if found.get("loads") else f"do not load: {'; '.join(errors) or found.get('error')}"
    return f"{found.get('library', 'TensorRT-RTX')} engines {loads}"


def _show_tests(found: dict[str, Any]) -> RenderableType:
    failed = [one["test"] for one in found["tests"] if one["outcome"] == "failed"]
    counts = ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    return "\n".join([f"tests: {counts}", *(f"  failed: {test}" for test in failed[:20])])


def _show_steps(found: dict[str, Any]) -> RenderableType:
    """The median of each step in milliseconds, with a line for each form of a backend."""
    table = Table("model", "backend", "graphs", "in", "batch", *STEPS, title="median ms of a step's launch")
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in found["rows"]:
        if "step" in row:
            key = tuple(str(row[name]) for name in ("model", "backend", "graphs", "precision", "batch"))
            lines.setdefault(key, {})[row["step"]] = f"{row['launch']['median_ms']:.2f}"
    for key, line in lines.items():
        table.add_row(*key, *(line.get(step, "-") for step in STEPS))
    return _with_problems(table, found["rows"])


def _show_throughput(found: dict[str, Any]) -> RenderableType:
    modes = list(dict.fromkeys(row["mode"] for row in found["rows"] if "mode" in row))
    table = Table("model", "backend", "graphs", "batch", *modes, title="images a second")
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in found["rows"]:
        if "mode" in row:
            key = tuple(str(row[name]) for name in ("model", "backend", "graphs", "batch"))
            lines.setdefault(key, {})[row["mode"]] = f"{row['images_per_second']:.2f}"
    for key, line in lines.items():
        table.add_row(*key, *(line.get(mode, "-") for mode in modes))
    return _with_problems(table, found["rows"])


def _with_problems(table: Table, rows: list[dict[str, Any]]) -> Table:
    said = [
        " ".join(str(row[name]) for name in ("model", "backend", "graphs", "precision"))
        + f": {(row.get('error') or row['skipped'])[:200]}"
        for row in rows
        if "error" in row or "skipped" in row
    ]
    table.caption = "\n".join(said) or None
    table.caption_justify = "left"
    return table


def _show_parts(found: dict[str, Any]) -> RenderableType:
    return "; ".join(f"{one['part']}: {one['ended']} ({one['seconds']} s)" for one in found["parts"])


_SECTIONS: dict[str, Callable[[dict[str, Any]], RenderableType]] = {
    "steps": _show_steps,
    "throughput": _show_throughput,
    "tests": _show_tests,
    "rtx_load": _show_load,
    "doctor": _show_doctor,
    "parts": _show_parts,
}


if __name__ == "__main__":
    main()
