"""Opening the backend that a user asks for: what is refused, and what `auto` takes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from fake_cuda import FakeCuda

import specdec_rt
from specdec_rt import BackendError, Pipeline, UsageError
from specdec_rt.backend_choice import open_backend
from specdec_rt.backends.availability import AUTO_ORDER, check
from specdec_rt.backends.base import Limits
from specdec_rt.backends.nvidia_driver import find_gpu
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.recipe import default_recipe, read_recipe
from specdec_rt.bundle import load_bundle

RECIPES = Path(__file__).parents[2] / "engines/recipes"


@pytest.fixture(scope="module")
def bundle():
    return load_bundle("digits")


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU here")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "cuda"])
def test_without_a_driver_a_gpus_backend_says_so(backend):
    with pytest.raises(BackendError, match=rf"backend {backend} cannot run here: (no NVIDIA driver|cuda-bindings)"):
        specdec_rt.load(backend=backend)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that every library finds. Replaced is the outside world: the driver, and ONNX Runtime built for CUDA."""
    pytest.importorskip("tensorrt_rtx")
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    session = SimpleNamespace(get_providers=lambda: providers)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    return cuda


@pytest.mark.usefixtures("gpu")
def test_auto_takes_the_first_that_works(bundle):
    assert open_backend(bundle).name == "tensorrt-rtx"


def test_auto_passes_over_what_only_seems_to_work(bundle, gpu, caplog):
    gpu.broken = "the GPU is on fire"
    promising = [name for name in AUTO_ORDER if name != "onnxruntime" and check(name).usable]
    assert {"tensorrt-rtx", "cuda"} <= set(promising)
    assert open_backend(bundle).name == "onnxruntime"
    assert [record.args[0] for record in caplog.records] == promising
    assert caplog.text.count("the GPU is on fire") == len(promising)


@pytest.mark.usefixtures("gpu")
def test_a_gpus_limits_and_graphs_are_the_recipes(bundle, tmp_path):
    recipe = read_recipe(RECIPES / "rtx.toml")
    cache = EngineCache(tmp_path)
    backend = open_backend(bundle, recipe=recipe, cache=cache)
    assert (backend.name, backend.limits) == ("tensorrt-rtx", Limits(batch_size=16, draft_length=4))
    assert backend.device.graphs
    assert not open_backend(bundle, recipe=recipe, cache=cache, cuda_graph=False).device.graphs


@pytest.mark.usefixtures("gpu")
def test_onnx_runtimes_graphs_take_any_size_and_capture_themselves(bundle):
    backend = open_backend(bundle, "cuda")
    assert (backend.name, backend.limits) == ("cuda", Limits())
    assert (backend.graphs, backend.device.graphs) == (True, False)
    assert not open_backend(bundle, "cuda", cuda_graph=False).graphs


def test_a_recipe_names_its_backend(bundle):
    assert specdec_rt.load(recipe=RECIPES / "cpu.toml").backend.name == "onnxruntime"
    with pytest.raises(UsageError, match=r"backend is 'cuda', but the recipe .* is for 'onnxruntime'; leave one out"):
        open_backend(bundle, "cuda", recipe=default_recipe("onnxruntime"))


@pytest.mark.usefixtures("gpu")
def test_threads_are_the_cpus(bundle):
    with pytest.raises(UsageError, match="threads is 2, but backend 'cuda' does not run on the CPU"):
        open_backend(bundle, "cuda", threads=2)


def test_a_recipes_precision_chooses_the_file(bundle, tmp_path):
    recipe = tmp_path / "half.toml"
    recipe.write_text('backend = "onnxruntime"\n[precision]\ndefault = "fp16"\nbackbone = "fp32"\n')
    backend = specdec_rt.load(recipe=recipe).backend
    graphs = bundle.manifest.target.graphs
    assert backend.file_of(bundle.path(graphs["backbone"])).name == "target.backbone.onnx"
    assert backend.file_of(bundle.path(graphs["denoise_step"])).name == "target.denoise_step.fp16.onnx"


def test_half_precision_draws_nearly_the_same(tmp_path):
    recipe = tmp_path / "half.toml"
    recipe.write_text('backend = "onnxruntime"\n[precision]\ndefault = "fp16"\n')
    half, single = (
        specdec_rt.load(recipe=of).generate([3], mode="target", guidance=1.0).tokens for of in (recipe, None)
    )
    assert np.abs(half - single).max() > 0
    assert np.abs(half - single).mean() < 0.02


def test_engines_built_for_less_are_not_asked_for_more(bundle):
    backend = OnnxRuntimeBackend(limits=Limits(batch_size=2, draft_length=3))
    pipeline = Pipeline(bundle, backend)
    assert max(pipeline.generate([1]).stats.draft_lengths) == 3  # the bundle's default is 4
    with pytest.raises(
        UsageError, match=r"draft_length is 5, but the engines .* are built for 3 at most: take a recipe"
    ):
        pipeline.generate([1], draft_length=5)
    with pytest.raises(
        UsageError, match=r"batch_size is 3, but the engines .* for 2 at most: take a recipe with larger batch_buckets"
    ):
        pipeline.generate([1], batch_size=3)
