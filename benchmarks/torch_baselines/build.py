"""A bundle's target as a baseline: the same weights, chain, AR steps and guidance that a request to the runtime has."""

from dataclasses import dataclass

from benchmarks.scenario import Style
from benchmarks.torch_baselines.causal import CausalBaseline
from benchmarks.torch_baselines.clock import Parts
from benchmarks.torch_baselines.head import HeadSampler
from benchmarks.torch_baselines.mar import MarBaseline
from export.causal import read_pair
from export.mar_models import read_mar_pair
from specdec_rt.ar_schedule import cosine_schedule, guidance_weights, raster_schedule
from specdec_rt.bundle import Bundle
from specdec_rt.chain import compile_chain

__all__ = ["Baseline", "Request", "build_baseline"]

Baseline = CausalBaseline | MarBaseline


@dataclass(frozen=True)
class Request:
    """What of a request changes the work."""

    ar_steps: int | None = None
    """None: the bundle's default"""
    guidance: float | None = None
    first_ar_steps: int | None = None
    """end after so many AR steps (MAR)"""


def build_baseline(bundle: Bundle, style: Style, request: Request | None = None) -> Baseline:
    """The target of `bundle`, its weights in single precision."""
    request = request or Request()
    manifest, defaults = bundle.manifest, bundle.manifest.defaults
    chain = compile_chain(manifest.chain)
    compiled, hoisted = style == "compiled", style in ("hoisted", "compiled")
    causal = manifest.family == "causal"
    steps = request.ar_steps or defaults.ar_steps
    schedule = raster_schedule(manifest.tokens) if causal else cosine_schedule(manifest.tokens, steps)
    guidance = defaults.guidance if request.guidance is None else request.guidance
    weights = guidance_weights(schedule.progress, scale=guidance, schedule=defaults.guidance_schedule)
    scale = None if guidance == 1 else weights[0]
    if causal:
        target = read_pair(bundle.folder).target.requires_grad_(False)
        sampler = HeadSampler(target.head, chain, hoisted=hoisted, compiled=compiled)
        return CausalBaseline(target.backbone, sampler, scale, style != "eager", compiled, Parts())
    model = read_mar_pair(bundle.folder).target.eval().requires_grad_(False)
    sampler = HeadSampler(model.head, chain, hoisted=hoisted, compiled=compiled)
    first = request.first_ar_steps
    return MarBaseline(model, sampler, schedule, scale, compiled=compiled, first=first, parts=Parts())
