"""A scenario from its first to its last process: variants take turns, results are written as they come."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.machine import machine_record
from benchmarks.scenario import RuntimeVariant, Scenario, TorchVariant, Variant
from benchmarks.worker import Job, Measured
from specdec_rt.bench.timing import Times
from specdec_rt.cli.files import write_together
from specdec_rt.manifest import MANIFEST

__all__ = ["Results", "run_scenario", "write_json"]

WORK = Path(__file__).parents[1] / "work" / "bench"
"""Random bundles, and what is made of bundles for single rows; git ignores it."""


def write_json(path: Path, content: object) -> None:
    """As a whole: a run that is stopped leaves what it wrote last."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_together({path: write})


@dataclass
class Results:
    """The file of one run."""

    path: Path
    name: str
    scenario: Scenario
    threads: int
    machine: dict[str, Any]
    rows: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    limits: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None

    def add(self, variant: Variant, batch: int, found: dict[str, Any]) -> dict[str, Any]:
        """Take in what one process measured; the row as it is now."""
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
        """The file as it is now."""
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


def run_scenario(
    name: str, scenario: Scenario, *, out: Path, threads: int, argv: list[str], only: str | None = None
) -> Results:
    """Measure; progress goes to stderr. `only` keeps the variants whose name holds it."""
    plain = _bundle(scenario)
    drafted = plain if scenario.int8_draft is None else _derived("int8_draft", plain, scenario.int8_draft)
    results = Results(out, name, scenario, threads, machine_record(argv))
    cases = [(variant, batch) for variant, batch in scenario.cases() if only is None or only in variant.name]
    published = plain
    if any(isinstance(variant, RuntimeVariant) and variant.published_head for variant, _ in cases):
        published = _derived("published_head", plain)
    told = _Told(len(cases) * scenario.repeats + 2)

    def job(kind: Any, **more: Any) -> Job:  # noqa: ANN401  # fields of a Job
        variant = more.get("variant")
        bundle = drafted
        if kind == "limits" or isinstance(variant, TorchVariant):
            bundle = plain  # torch reads models from their weights files, and an int8 draft has none
        elif isinstance(variant, RuntimeVariant) and variant.published_head:
            bundle = published
        return Job(kind=kind, scenario=scenario, bundle=str(bundle), threads=threads, **more)

    failed: set[tuple[str, int]] = set()
    for turn in range(scenario.repeats):
        for variant, batch in cases:
            if (variant.name, batch) in failed:
                continue
            profiled = turn == 0 and isinstance(variant, RuntimeVariant) and variant.workers == 1
            found = _perform(job("time", variant=variant, batch=batch, profiled=profiled), threads)
            row = results.add(variant, batch, found)
            if "failed" in found:
                failed.add((variant.name, batch))
            p50 = row.get("p50_seconds")
            told(
                f"{variant.name}, batch {batch}: " + (found.get("failed", "") if p50 is None else f"{p50 * 1e3:.1f} ms")
            )
    for variant, batch in cases:
        if isinstance(variant, RuntimeVariant) and variant.observe and batch == max(scenario.batches):
            row = results.rows[variant.name, batch]
            row["observed"] = _perform(job("observe", variant=variant, batch=batch), threads)
    results.cost = _perform(job("cost", measured=_measured(results)), threads)
    told("cost model")
    results.limits = _perform(job("limits"), threads)
    told("limits")
    results.write()
    return results


def _measured(results: Results) -> tuple[Measured, ...]:
    """The runtime's cases, with the acceptance that they showed (or were forced to)."""
    found = []
    forced = {
        variant.name: variant.forced
        for variant in results.scenario.variants
        if isinstance(variant, RuntimeVariant) and variant.forced is not None
    }
    observed = {name: row["observed"] for (name, _), row in results.rows.items() if "observed" in row}
    others = {
        variant.name
        for variant in results.scenario.variants
        if isinstance(variant, RuntimeVariant) and (variant.paced or variant.workers > 1 or variant.published_head)
    }
    for (name, batch), row in results.rows.items():
        # The model is of fixed draft lengths, one worker and the bundle's own graphs.
        if row["engine"] == "runtime" and name not in others:
            rates = [process["stats"].get("acceptance_rate") for process in row["processes"]]
            rate = sum(rates) / len(rates) if None not in rates else None
            if name in forced:
                of = forced[name]
                seen = {"left": of.left, "resumed": of.resumed}
                rate = of.acceptance
            else:
                seen = observed.get(name, {})
            left, resumed = seen.get("left"), seen.get("resumed")
            found.append(Measured(variant=name, batch=batch, acceptance=rate, left=left, resumed=resumed))
    return tuple(found)


def _perform(job: Job, threads: int) -> dict[str, Any]:
    """The job in a fresh process, which may use so many threads."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker"],
        input=job.model_dump_json(),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **limits},
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise SystemExit(f"a measurement of {job.variant.name if job.variant else job.kind} failed (see above)")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _bundle(scenario: Scenario) -> str | Path:
    """What the scenario's requests go to; random weights are exported where they are missing."""
    if scenario.random_mar is None:
        assert scenario.bundle is not None
        return scenario.bundle
    folder = WORK / scenario.random_mar
    if not (folder / MANIFEST).is_file():
        sys.stderr.write(f"exporting {scenario.random_mar} with random weights to {folder}\n")
        # In a process of its own: this one would hold the weights for as long as it measures.
        command = [sys.executable, "-m", "benchmarks.random_bundle", scenario.random_mar, str(folder)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=sys.stderr)
    return folder


def _derived(module: str, bundle: str | Path, *arguments: str) -> Path:
    """What a module of this package makes of the bundle; made where it is missing, or was made of something else."""
    folder = WORK / "-".join([Path(bundle).name, *arguments, module])
    # In a process of its own: making it takes torch.
    command = [sys.executable, "-m", f"benchmarks.{module}", str(bundle), *arguments, str(folder)]
    if subprocess.run(command, cwd=Path(__file__).parents[1], stdout=sys.stderr).returncode:
        raise SystemExit(f"benchmarks.{module} made nothing of {bundle} (see above)")
    return folder


class _Told:
    """A line for each process on stderr."""

    def __init__(self, total: int, write: Callable[[str], object] = sys.stderr.write) -> None:
        self._total, self._write = total, write
        self._done, self._began = 0, time.monotonic()

    def __call__(self, said: str) -> None:
        self._done += 1
        self._write(f"[{self._done}/{self._total}, {time.monotonic() - self._began:.0f} s] {said}\n")
