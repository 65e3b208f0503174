"""A scenario from its first to its last process: variants take turns, results are written as they come."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine_record
from benchmarks.results_file import Results
from benchmarks.scenario import RuntimeVariant, Scenario, TorchVariant, Variant
from benchmarks.worker import Job, Measured
from specdec_rt.manifest import MANIFEST

__all__ = ["Perform", "perform_in_process", "run_scenario"]

ROOT = Path(__file__).parents[1]
WORK = ROOT / "work" / "bench"
"""Random bundles, and what is made of bundles for single rows; git ignores it."""

Perform = Callable[[Job], dict[str, Any]]
"""Does a job; what it measured."""


def perform_in_process(job: Job) -> dict[str, Any]:
    """Do the job in a fresh process, which may use as many threads as the job says."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(job.threads))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker"],
        input=job.model_dump_json(),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **limits},
        cwd=ROOT,
    )
    if done.returncode:
        raise SystemExit(f"a measurement of {job.variant.name if job.variant else job.kind} failed (see above)")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run_scenario(
    name: str,
    scenario: Scenario,
    *,
    out: Path,
    threads: int,
    argv: list[str],
    only: str | None = None,
    work: Path = WORK,
    perform: Perform = perform_in_process,
) -> Results:
    """Measure. Progress goes to stderr.

    `only` keeps the variants whose name holds it. What is made of bundles for single variants goes to `work`.
    """
    cases = [(variant, batch) for variant, batch in scenario.cases() if only is None or only in variant.name]
    bundles = _Bundles.make(scenario, [variant for variant, _ in cases], work)
    results = Results(out, name, scenario, threads, machine_record(argv))
    log = ProgressLog(len(cases) * scenario.repeats + 2)

    def job(kind: Any, **more: Any) -> Job:  # noqa: ANN401  # fields of a Job
        bundle = bundles.plain if kind == "limits" else bundles.of(more.get("variant"))
        return Job(kind=kind, scenario=scenario, bundle=str(bundle), threads=threads, **more)

    failed: set[tuple[str, int]] = set()
    for turn in range(scenario.repeats):
        for variant, batch in cases:
            if (variant.name, batch) in failed:
                continue
            profiled = turn == 0 and isinstance(variant, RuntimeVariant) and variant.workers == 1
            found = perform(job("time", variant=variant, batch=batch, profiled=profiled))
            row = results.add(variant, batch, found)
            if "failed" in found:
                failed.add((variant.name, batch))
            p50 = row.get("p50_seconds")
            log(
                f"{variant.name}, batch {batch}: " + (found.get("failed", "") if p50 is None else f"{p50 * 1e3:.1f} ms")
            )
    for variant, batch in cases:
        if isinstance(variant, RuntimeVariant) and variant.observe and batch == max(scenario.batches):
            row = results.rows[variant.name, batch]
            row["observed"] = perform(job("observe", variant=variant, batch=batch))
    results.cost = perform(job("cost", measured=_measured(results)))
    log("cost model")
    results.limits = perform(job("limits"))
    log("limits")
    results.write()
    return results


def _measured(results: Results) -> tuple[Measured, ...]:
    """The cases that the cost model covers, with the acceptance that they showed, or were forced to."""
    variants = {variant.name: variant for variant in results.scenario.variants}
    observed = {name: row["observed"] for (name, _), row in results.rows.items() if "observed" in row}
    found = []
    for (name, batch), row in results.rows.items():
        variant = variants[name]
        # The model is of fixed draft lengths, one worker and the bundle's own graphs.
        if isinstance(variant, TorchVariant) or variant.automatic_length or variant.workers > 1:
            continue
        if variant.published_head:
            continue
        rates = [process["stats"].get("acceptance_rate") for process in row["processes"]]
        rate = sum(rates) / len(rates) if None not in rates else None
        seen = observed.get(name, {})
        if variant.forced is not None:
            rate, seen = variant.forced.acceptance, variant.forced.model_dump()
        found.append(
            Measured(variant=name, batch=batch, acceptance=rate, left=seen.get("left"), resumed=seen.get("resumed"))
        )
    return tuple(found)


# --- bundles ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bundles:
    """What requests go to: names of embedded bundles, or folders."""

    plain: str | Path
    drafted: str | Path
    """with the int8 draft, where the scenario has one"""
    published: str | Path
    """with the head as published, where a variant needs it"""

    @classmethod
    def make(cls, scenario: Scenario, variants: list[Variant], work: Path) -> "_Bundles":
        """Make in `work` what is missing there."""
        plain = _plain_bundle(scenario, work)
        draft, published = scenario.int8_draft, plain
        if any(isinstance(variant, RuntimeVariant) and variant.published_head for variant in variants):
            published = _derive("published_head", plain, work)
        return cls(plain, plain if draft is None else _derive("int8_draft", plain, work, draft), published)

    def of(self, variant: Variant | None) -> str | Path:
        """A variant's bundle; None: that of all of them."""
        if isinstance(variant, TorchVariant):
            return self.plain  # torch reads models from their weights files, and an int8 draft has none
        return self.published if variant is not None and variant.published_head else self.drafted


def _plain_bundle(scenario: Scenario, work: Path) -> str | Path:
    """The bundle that the scenario names. Random weights are exported where they are missing."""
    if scenario.random_mar is None:
        assert scenario.bundle is not None
        return scenario.bundle
    folder = work / scenario.random_mar
    if not (folder / MANIFEST).is_file():
        sys.stderr.write(f"exporting {scenario.random_mar} with random weights to {folder}\n")
        # In a process of its own: this one would hold the weights for as long as it measures.
        command = [sys.executable, "-m", "benchmarks.random_bundle", scenario.random_mar, str(folder)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    return folder


def _derive(module: str, bundle: str | Path, work: Path, *arguments: str) -> Path:
    """What a module of this package makes of the bundle; made where it is missing, or was made of something else."""
    folder = work / "-".join([Path(bundle).name, *arguments, module])
    # In a process of its own: making it takes torch.
    command = [sys.executable, "-m", f"benchmarks.{module}", str(bundle), *arguments, str(folder)]
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
        raise SystemExit(f"benchmarks.{module} made nothing of {bundle} (see above)")
    return folder


class ProgressLog:
    """Writes a line to stderr for each process that is done."""

    def __init__(self, total: int, write: Callable[[str], object] = sys.stderr.write) -> None:
        self._total, self._write = total, write
        self._done, self._began = 0, time.monotonic()

    def __call__(self, message: str) -> None:
        self._done += 1
        self._write(f"[{self._done}/{self._total}, {time.monotonic() - self._began:.0f} s] {message}\n")
