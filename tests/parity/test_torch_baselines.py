"""The benchmarks' torch baselines do the runtime's work: with its noise they draw its tokens."""

import numpy as np
import pytest
import torch

from benchmarks.torch_baselines.build import Request, build_baseline
from benchmarks.torch_baselines.noise import RuntimeNoise, TorchNoise
from specdec_rt import load

LABELS = [3, 7]
SEED = 5


@pytest.fixture(scope="module", params=["digits", "digits-mar"])
def target(request):
    """A pipeline, options, and what `target` mode draws."""
    pipeline = load(request.param, backend="onnxruntime", threads=1)
    options = {} if request.param == "digits" else {"ar_steps": 4}
    return pipeline, options, pipeline.generate(LABELS, seed=SEED, mode="target", **options).tokens


COMPILED = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # torch itself uses what it deprecates


@pytest.mark.parametrize("style", ["eager", "cached", "hoisted", pytest.param("compiled", marks=COMPILED)])
def test_a_baseline_draws_the_runtimes_tokens(target, style):
    pipeline, options, tokens = target
    baseline = build_baseline(pipeline.bundle, style, Request(**options))

    drawn = baseline.generate(torch.tensor(LABELS), RuntimeNoise(SEED)).numpy()

    np.testing.assert_allclose(drawn, tokens, atol=1e-3)


def test_with_other_noise_a_baseline_draws_other_tokens(target):
    """So that the comparison above can fail."""
    pipeline, options, tokens = target
    baseline = build_baseline(pipeline.bundle, "cached", Request(**options))

    drawn = baseline.generate(torch.tensor(LABELS), TorchNoise(SEED)).numpy()

    assert np.abs(drawn - tokens).max() > 0.1


def test_without_guidance_a_baseline_has_one_branch(target):
    pipeline, options, _ = target
    tokens = pipeline.generate(LABELS, seed=SEED, mode="target", guidance=1.0, **options).tokens
    baseline = build_baseline(pipeline.bundle, "cached", Request(**options, guidance=1.0))

    drawn = baseline.generate(torch.tensor(LABELS), RuntimeNoise(SEED)).numpy()

    np.testing.assert_allclose(drawn, tokens, atol=1e-3)
