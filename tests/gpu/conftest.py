"""Every GPU backend that works here, in turn; where none does, each test is skipped with the reason."""

import sys
from pathlib import Path

import pytest
from drawing import SEED, draw

from specdec_rt import Pipeline
from specdec_rt.backend_choice import open_backend
from specdec_rt.backends.availability import AUTO_ORDER, check
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.recipe import PrecisionTable, default_recipe
from specdec_rt.bundle import load_bundle

sys.path.append(str(Path(__file__).parents[1] / "distribution"))  # their two-sample tests serve here, too

GPU_BACKENDS = tuple(name for name in AUTO_ORDER if name != "onnxruntime")
BUCKETS = (1, 4, 16, 64)


@pytest.fixture(scope="session", params=GPU_BACKENDS)
def backend(request):
    """The name of a backend that works here."""
    found = check(request.param)
    if not found.usable:
        pytest.skip(f"{request.param}: {found.why}")
    return request.param


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """Opens a backend for a bundle; engines of TensorRT are built once."""
    cache = EngineCache(tmp_path_factory.mktemp("engines"))

    def open_one(bundle, backend, *, cuda_graph=True, precision="fp32"):
        changes = {"batch_buckets": BUCKETS, "precision": PrecisionTable(default=precision)}
        recipe = default_recipe(backend).model_copy(update=changes)
        return open_backend(bundle, recipe=recipe, cache=cache, cuda_graph=cuda_graph)

    return open_one


@pytest.fixture(scope="session")
def pipeline(opened):
    """Gives the bundle of a name on a backend, always the same one."""
    made = {}

    def one(name, backend, *, cuda_graph=True):
        key = name, backend, cuda_graph
        if key not in made:
            bundle = load_bundle(name)
            made[key] = Pipeline(bundle, opened(bundle, backend, cuda_graph=cuda_graph))
        return made[key]

    return one


@pytest.fixture(scope="session")
def on_cpu(pipeline):
    """Gives what ONNX Runtime draws on the CPU for the same request."""
    drawn = {}

    def tokens(name, mode, seed=SEED):
        key = name, mode, seed
        if key not in drawn:
            drawn[key] = draw(pipeline(name, "onnxruntime"), mode, seed)
        return drawn[key]

    return tokens
