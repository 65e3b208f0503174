"""What tests of predictions share: workloads of the embedded bundles, and costs that count calls."""

from functools import lru_cache

from specdec_rt.backends.base import Limits
from specdec_rt.bench.cost import Workload
from specdec_rt.bundle import load_bundle
from specdec_rt.chain import compile_chain
from specdec_rt.config import DecodeOptions
from specdec_rt.plan import Tuning, make_plan


@lru_cache
def manifest_of(name):
    return load_bundle(name).manifest


def workload(batch=1, *, bundle="digits", tuning=None, **options):
    """How an embedded bundle decodes a batch with these options."""
    manifest = manifest_of(bundle)
    chain = compile_chain(manifest.chain)
    plan = make_plan(DecodeOptions(**options), manifest, chain, Limits(), "onnxruntime", tuning or Tuning())
    return Workload(plan=plan, batch=batch, chain=chain.length)


class CountedCosts:
    """Call costs that write every call down, and cost what they are told to: by default nothing."""

    def __init__(self, *, backbone=0.0, modulation=0.0, denoise_step=0.0, path_means=0.0):
        self._costs = backbone, modulation, denoise_step, path_means
        self.calls = []

    def backbone(self, *sizes):
        self.calls.append(("backbone", *sizes))
        return self._costs[0]

    def modulation(self, model, rows, steps):
        self.calls.append(("modulation", model, rows, steps))
        return self._costs[1] if steps else 0.0

    def denoise_steps(self, model, rows, calls):
        self.calls.append(("denoise_steps", model, rows, calls))
        return self._costs[2] * calls

    def path_means(self, rows, transitions):
        self.calls.append(("path_means", rows, transitions))
        return self._costs[3] if transitions else 0.0
