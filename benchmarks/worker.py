"""One measurement in a process of its own: a job as JSON on stdin, what was measured as JSON on stdout."""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from benchmarks.forced_verdicts import ForcedVerdicts
from benchmarks.observe import observe
from benchmarks.requests import Request
from benchmarks.scenario import RuntimeVariant, Scenario, TorchVariant, Variant
from specdec_rt import Pipeline, load
from specdec_rt.bench.cost import Acceptance, HostCost, Prediction
from specdec_rt.bench.predict import Predictor
from specdec_rt.bench.timing import Times, profile, repeat
from specdec_rt.decode.stats import Stats

__all__ = ["Job", "Measured", "perform"]


class Measured(BaseModel):
    """A case whose cost is to be predicted."""

    variant: str
    batch: int
    acceptance: float | None
    left: float | None
    resumed: float | None


class Job(BaseModel):
    """What to do."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["time", "observe", "cost", "limits"]
    scenario: Scenario
    bundle: str
    threads: int
    variant: Variant | None = None
    batch: int = 1
    profiled: bool = False
    """whether a request on timed engines follows"""
    observed_images: int = 64
    measured: tuple[Measured, ...] = ()


def perform(job: Job) -> dict[str, Any]:
    """Do the job. Returns what was measured."""
    if isinstance(job.variant, TorchVariant):
        return _time_torch(job, job.variant)
    started = time.perf_counter()
    workers = 1 if job.variant is None else job.variant.workers
    pipeline = load(job.bundle, backend="onnxruntime", threads=job.threads, workers=workers)
    ready = time.perf_counter() - started
    if job.kind == "limits":
        return _limits(job, pipeline)
    if job.kind == "cost":
        return _cost(job, pipeline)
    assert job.variant is not None
    request = Request.of(job.scenario, job.variant, job.batch)
    if job.kind == "observe":
        count = -(-job.observed_images // job.batch)
        observed = observe(pipeline.bundle, pipeline.backend, request, seed=job.scenario.seed, requests=count)
        return observed.as_dict()
    if job.variant.forced is not None:
        pipeline = _with_verdicts(pipeline, ForcedVerdicts(job.variant.forced))
    return {"load_seconds": ready, **_time_runtime(job, pipeline, request)}


def _with_verdicts(pipeline: Pipeline, verdicts: ForcedVerdicts) -> Pipeline:
    """A pipeline without workers whose verdicts are forced."""
    return Pipeline(pipeline.bundle, pipeline.backend, exact_verifier=verdicts.exact_verifier)


# --- timing --------------------------------------------------------------------------------------------------


def _time_runtime(job: Job, pipeline: Pipeline, request: Request) -> dict[str, Any]:
    figures: list[Stats | None] = []

    def counting(seed: int) -> None:
        figures.append(request(pipeline, seed))

    beside = _beside(job)
    if beside is None:
        first, times = _timed(job.scenario, counting)
        turns = {}
    else:
        first, times, others = _by_turns(job.scenario, counting, lambda seed: beside(pipeline, seed))
        turns = {"beside_seconds": list(others.seconds)}
    counted = [stats for stats in figures[-len(times.seconds) :] if stats is not None]
    found = profile(pipeline, request, seed=job.scenario.seed) if job.profiled else None
    return {
        **_record(first, times),
        **turns,
        "stats": _mean(counted),
        "profile": None if found is None else found[0].as_dict(),
    }


def _beside(job: Job) -> Request | None:
    """The request that takes turns with the job's."""
    for variant in job.scenario.variants:
        if isinstance(variant, RuntimeVariant) and variant.name == getattr(job.variant, "beside", None):
            return Request.of(job.scenario, variant, job.batch)
    return None


def _mean(figures: list[Stats]) -> dict[str, float]:
    """Counts per image, ratios over all requests."""
    if not figures:
        return {}
    images = sum(stats.images for stats in figures)
    names = ("rounds", "target_backbone_calls", "draft_backbone_calls", "sequential_head_calls")
    means = {name: sum(getattr(stats, name) for stats in figures) / images for name in names}
    accepted, rejected = (sum(getattr(stats, name) for stats in figures) for name in ("accepted", "rejected"))
    if accepted + rejected:
        means["acceptance_rate"] = accepted / (accepted + rejected)
        per_round = [stats.tokens_per_round for stats in figures if stats.tokens_per_round is not None]
        means["tokens_per_round"] = float(np.mean(per_round))
    return means


def _time_torch(job: Job, variant: TorchVariant) -> dict[str, Any]:
    import torch  # heavy, and no part of the runtime's own measurements

    from benchmarks.torch_baselines.build import Request as BaselineRequest
    from benchmarks.torch_baselines.build import build_baseline
    from benchmarks.torch_baselines.noise import TorchNoise
    from specdec_rt.bundle import load_bundle

    torch.set_num_threads(job.threads)
    scenario, bundle = job.scenario, load_bundle(job.bundle)
    started = time.perf_counter()
    options = BaselineRequest(ar_steps=scenario.ar_steps, first_ar_steps=scenario.first_ar_steps)
    baseline = build_baseline(bundle, variant.style, options)
    ready = time.perf_counter() - started
    classes = bundle.manifest.classes

    def request(seed: int) -> None:
        labels = torch.from_numpy((seed * job.batch + np.arange(job.batch)) % classes)
        baseline.parts.clear()
        baseline.generate(labels, TorchNoise(seed))

    try:
        first, times = _timed(scenario, request)
    except Exception as error:  # torch.compile has many ways to fail; the row says which
        if variant.style != "compiled":
            raise
        return {"failed": f"{type(error).__name__}: {error}"[:1000]}
    parts = {"backbone_seconds": baseline.parts.backbone.seconds, "head_seconds": baseline.parts.head.seconds}
    return {"load_seconds": ready, **_record(first, times), "parts": parts}


def _timed(scenario: Scenario, request: Callable[[int], None]) -> tuple[float, Times]:
    """The seconds of the first request, which makes or compiles what is missing, and the times of those that count."""
    started = time.perf_counter()
    request(scenario.seed + scenario.samples + scenario.warmup)
    first = time.perf_counter() - started
    times = repeat(
        request,
        seed=scenario.seed,
        warmup=scenario.warmup - 1,
        samples=scenario.samples,
        limit_seconds=scenario.limit_seconds,
    )
    return first, times


def _by_turns(
    scenario: Scenario, request: Callable[[int], object], beside: Callable[[int], object]
) -> tuple[float, Times, Times]:
    """What `_timed` returns, and the times of a request that takes turns with this one, also in being the first."""
    started = time.perf_counter()
    request(scenario.seed + scenario.samples)
    first = time.perf_counter() - started
    own: list[float] = []
    others: list[float] = []
    for extra in range(scenario.warmup):
        beside(scenario.seed + scenario.samples + extra)
        if extra:
            request(scenario.seed + scenario.samples + extra)
    while len(own) < scenario.samples and sum(own) < scenario.limit_seconds:
        turns = [(own, request), (others, beside)]
        for seconds, each in turns if len(own) % 2 else turns[::-1]:
            seconds += repeat(each, seed=scenario.seed + len(seconds), warmup=0, samples=1).seconds
    return first, Times(tuple(own)), Times(tuple(others))


def _record(first: float, times: Times) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": list(times.seconds), "first_request_seconds": first, "peak_bytes": peak}


# --- limits and cost model -----------------------------------------------------------------------------------


def _limits(job: Job, pipeline: Pipeline) -> dict[str, Any]:
    import torch

    from benchmarks.limits import graph_limits, machine_limits

    torch.set_num_threads(job.threads)
    machine = machine_limits()
    branches = 1 if pipeline.bundle.manifest.defaults.guidance == 1 else 2
    length = job.scenario.draft_length
    graphs = {
        str(batch): graph_limits(pipeline, machine, batch=batch, branches=branches, draft_length=length)
        for batch in job.scenario.batches
    }
    return {"machine": machine, "branches": branches, "draft_length": length, "graphs": graphs}


def _cost(job: Job, pipeline: Pipeline) -> dict[str, Any]:
    scenario, verdicts = job.scenario, ForcedVerdicts()
    pipeline = _with_verdicts(pipeline, verdicts)
    # An image that ends early has no request to calibrate the host's share in; it is small where that is done.
    host = None if scenario.first_ar_steps is None else HostCost()
    predictor = Predictor(pipeline, host=host, first=scenario.first_ar_steps)
    rows = []
    for case in job.measured:
        rows.append(_predicted(scenario, predictor, verdicts, case))
        sys.stderr.write(f"    predicted {case.variant}, batch {case.batch}\n")
    return {"rows": rows, "host_seconds": predictor.record()["host_seconds"]}


def _predicted(scenario: Scenario, predictor: Predictor, verdicts: ForcedVerdicts, case: Measured) -> dict[str, Any]:
    """What the case was predicted to take, and what it took. Graphs are timed right after each half of its requests."""
    (variant,) = (one for one in scenario.variants if one.name == case.variant)
    assert isinstance(variant, RuntimeVariant)
    request, options = Request.of(scenario, variant, case.batch), variant.decode_options(scenario)
    figures: list[Stats | None] = []

    def predicted(stats: Stats | None) -> Prediction:
        # What rejections cost grows faster than their number: each request has an acceptance of its own.
        rate = None if stats is None else stats.acceptance_rate
        rate = case.acceptance if rate is None else rate
        acceptance = Acceptance(rate or 0.0, 0.5 if case.left is None else case.left, case.resumed)
        return predictor.predict(options, case.batch, acceptance)

    seconds: list[float] = []
    found: list[Prediction] = []
    for samples in filter(None, (-(-scenario.samples // 2), scenario.samples // 2)):
        verdicts.rates = variant.forced
        times = repeat(
            lambda seed: figures.append(request(predictor.pipeline, seed)),
            seed=scenario.seed + len(seconds),
            warmup=1 if seconds else scenario.warmup,
            samples=samples,
            limit_seconds=scenario.limit_seconds / 2,
        ).seconds
        verdicts.rates = None
        predictor.renew()
        found += [predicted(stats) for stats in figures[-len(times) :]]
        seconds += times
    return {
        "variant": case.variant,
        "batch": case.batch,
        "seconds": float(np.mean([one.seconds for one in found])),
        "measured_seconds": Times(tuple(seconds)).mean,
        "parts": {part: float(np.mean([one.parts.get(part, 0.0) for one in found])) for part in found[0].parts},
    }


def main() -> None:
    """Do the job on stdin."""
    job = Job.model_validate_json(sys.stdin.read())
    result = perform(job)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
