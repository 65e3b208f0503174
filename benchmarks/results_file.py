"""The file of one run: a row for each variant and batch size, written anew with each process."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.scenario import RuntimeVariant, Scenario, Variant
from specdec_rt.bench.timing import Times
from specdec_rt.cli.files import write_together

__all__ = ["Results", "write_json"]


def write_json(path: Path, content: object) -> None:
    """Write the file as a whole: a run that is stopped leaves what it wrote last."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_together({path: write})


@dataclass
class Results:
    """What a run has measured so far."""

    path: Path
    name: str
    scenario: Scenario
    threads: int
    machine: dict[str, Any]
    rows: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """by variant and batch size"""
    limits: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None

    def add(self, variant: Variant, batch: int, found: dict[str, Any]) -> dict[str, Any]:
        """Take in what one process measured. Returns the row as it is now."""
        exact, distribution = variant.distribution(self.scenario)
        empty: dict[str, Any] = {
            "variant": variant.name,
            "engine": variant.engine,
            "batch": batch,
            "exact": exact,
            "distribution": distribution,
            "adds": variant.adds,
            "processes": [],
        }
        row = self.rows.setdefault((variant.name, batch), empty)
        row["processes"].append(found)
        seconds = [value for process in row["processes"] for value in process.get("seconds", [])]
        if seconds:
            times = Times(tuple(seconds))
            row["p50_seconds"], row["p95_seconds"] = times.p50, times.p95
            row["samples"] = len(seconds)
            if self.scenario.first_ar_steps is None:
                row["images_per_second"] = batch / times.p50
        turns = [process for process in row["processes"] if "beside_seconds" in process]
        if isinstance(variant, RuntimeVariant) and turns:
            row["beside"] = variant.beside
            row["beside_ratios"] = [
                other / own
                for process in turns
                for own, other in zip(process["seconds"], process["beside_seconds"], strict=True)
            ]
        self.write()
        return row

    def write(self) -> None:
        """Write the file as it is now."""
        content = {
            "scenario": self.name,
            "settings": self.scenario.model_dump(mode="json"),
            "threads": self.threads,
            "machine": self.machine,
            "rows": list(self.rows.values()),
            "limits": self.limits,
            "cost": self.cost,
        }
        write_json(self.path, content)
