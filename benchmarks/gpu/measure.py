"""Latency of the steps of decoding, and whole images per second, on every backend that works here and on PyTorch.

    python -m benchmarks.gpu.measure --out DIR [--models digits,mar_base] [--device cuda|cpu] [--limit SECONDS] …

Weights, inputs and steps are the same for all; the device is the first GPU. Models are embedded bundles (digits,
digits-mar), folders, or names under --work (see `random_mar`). Writes steps.json (--what steps) and throughput.json
(--what throughput) row by row, so that what is measured when the time is over is there. A row of what failed holds the
error. `--device cpu` runs the same code with ONNX Runtime and PyTorch on the CPU, to test it.
"""

import argparse
import gc
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.backends import Candidate, candidates
from benchmarks.gpu.machine import machine_record, write_json
from benchmarks.gpu.steps import measure_steps, timed_pipeline
from benchmarks.gpu.throughput import measure_throughput
from benchmarks.gpu.timing import Clock, Deadline
from specdec_rt import Pipeline
from specdec_rt.backends.base import Backend
from specdec_rt.bundle import Bundle, embedded_bundles, load_bundle
from specdec_rt.manifest import Precision

__all__ = ["main", "measured_rows"]

Measure = Callable[[Backend], Iterator[dict[str, Any]]]
"""Measures one backend: its rows, as they come."""


@dataclass
class Results:
    """A file of rows, written anew with each row. Rows of other models are kept."""

    path: Path
    model: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, path: Path, model: str, settings: dict[str, Any]) -> "Results":
        """Take over the rows of other models that are in the file."""
        kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        results = cls(path, model, settings, [row for row in kept if row["model"] != model])
        results.write()
        return results

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append({"model": self.model, **row})
        self.write()

    def write(self) -> None:
        """Write the file as it is now."""
        write_json(self.path, {"machine": machine_record(), "settings": self.settings, "rows": self.rows})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every model asked for, one after the other."""
    given = _parser().parse_args(argv)
    deadline = Deadline.after(given.limit)
    clock = Clock(given.repeats, given.warmup, given.case_seconds)
    for model in given.models.split(","):
        bundle = load_bundle(model if model in embedded_bundles() or Path(model).is_dir() else given.work / model)
        for what in given.what.split(","):
            settings = clock.settings() if what == "steps" else {"requests": given.requests}
            results = Results.begin(given.out / f"{what}.json", model, settings)
            if what == "steps":
                measure: Measure = partial(_steps, bundle, given.batches, clock)
            else:
                measure = partial(_throughput, bundle, given.batches, given.requests)
            for row in measured_rows(bundle, _candidates(given, what), measure, deadline):
                results.add(row)


def _candidates(given: argparse.Namespace, what: str) -> list[Candidate]:
    """What is measured, in this order."""
    steps, engines = what == "steps", given.work / "engines"
    precisions: list[Precision] = given.precisions.split(",") if steps else ["fp32"]
    found = list(candidates(given.device, given.batches, precisions, engines, pytorch=steps))
    if not steps and given.device == "cuda":  # what the GPU is worth
        found += candidates("cpu", given.batches, precisions, engines, pytorch=False)
    return found


def measured_rows(
    bundle: Bundle, candidates: Iterable[Candidate], measure: Measure, deadline: Deadline
) -> Iterator[dict[str, Any]]:
    """The rows of all candidates, as they are measured. None is begun when the time is over."""
    for candidate in candidates:
        if deadline.passed:
            yield {**candidate.record, "skipped": "out of time"}
            continue
        try:
            yield from _rows_of(candidate, bundle, measure, deadline)
        except Exception as error:  # of any library: the next candidate may work
            yield {**candidate.record, "error": f"{type(error).__name__}: {error}"[:2000]}
        gc.collect()
        if candidate.device == "cuda":
            torch.cuda.empty_cache()


def _rows_of(candidate: Candidate, bundle: Bundle, measure: Measure, deadline: Deadline) -> Iterator[dict[str, Any]]:
    began = time.perf_counter()
    with _warnings() as warnings:
        for row in measure(candidate.open(bundle)):
            yield {**candidate.record, **row, "warnings": list(warnings)}
            if deadline.passed:
                yield {**candidate.record, "skipped": f"out of time after {time.perf_counter() - began:.0f} s"}
                return


def _steps(bundle: Bundle, batches: Sequence[int], clock: Clock, backend: Backend) -> Iterator[dict[str, Any]]:
    return measure_steps(*timed_pipeline(bundle, backend), batches, clock)


def _throughput(bundle: Bundle, batches: Sequence[int], requests: int, backend: Backend) -> Iterator[dict[str, Any]]:
    return measure_throughput(Pipeline(bundle, backend), batches, requests)


@contextmanager
def _warnings() -> Iterator[dict[str, None]]:
    """What the runtime warns of, such as graphs that cannot be captured: it belongs to the figures."""
    said: dict[str, None] = {}

    def note(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            said[record.getMessage()] = None
        return True

    logger = logging.getLogger("specdec_rt")
    logger.addFilter(note)
    try:
        yield said
    finally:
        logger.removeFilter(note)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where steps.json and throughput.json go")
    add("--work", type=Path, default=Path("work/gpu"), metavar="DIR", help="random bundles and engines")
    add("--models", default="digits", help="names or folders of bundles (default: %(default)s)")
    add("--what", default="steps,throughput", help="steps, throughput or both (default: both)")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--batches", type=_numbers, default="1,8,64", help="batch sizes (default: %(default)s)")
    add("--precisions", default="fp16,fp32", help="precisions of steps; images are made in fp32 (default: %(default)s)")
    add("--repeats", type=int, default=20, help="timed repeats of a step (default: %(default)s)")
    add("--warmup", type=int, default=3, help="untimed repeats before them (default: %(default)s)")
    add("--case-seconds", type=float, default=15.0, help="a slow step has fewer repeats, at least 5, to end by then")
    add("--requests", type=int, default=3, help="requests for images in each mode (default: %(default)s)")
    add("--limit", type=float, default=1e9, metavar="SECONDS", help="begin nothing new when they are over")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
