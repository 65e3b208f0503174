"""A target with its head as published, for the ablation."""

import numpy as np
import onnx
import pytest
from benchmark_scenarios import small_scenario

from benchmarks.published_head import main, published_head
from benchmarks.run import run_scenario
from specdec_rt import load
from specdec_rt.bundle import load_bundle
from specdec_rt.manifest import WEIGHTS_KEY

FULL = [pytest.mark.full]  # an export of half a minute
WORK_NAME = "{}-published_head"
"""What a run calls it."""


@pytest.fixture(scope="module", params=["digits-mar", pytest.param("digits", marks=FULL)])
def published(request, tmp_path_factory):
    """A bundle's name, and the folder of what was made of it."""
    out = tmp_path_factory.mktemp("work") / WORK_NAME.format(request.param)
    assert published_head(request.param, out)
    return request.param, out


def weights_inside(folder, graph):
    """How many weights a graph of the target multiplies with."""
    model = onnx.load(folder / f"target.{graph}.onnx", load_external_data=False)
    return int({entry.key: entry.value for entry in model.metadata_props}[WEIGHTS_KEY])


def test_it_draws_the_same_tokens(published):
    name, out = published
    asked = {"labels": [3, 1], "seed": 5, "mode": "target"}

    found, expected = (load(each, backend="onnxruntime", threads=1).generate(**asked).tokens for each in (out, name))

    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_its_steps_multiply_with_the_weights_that_make_modulation(published):
    name, out = published
    folder = load_bundle(name).folder
    step, modulation = (weights_inside(folder, graph) for graph in ("denoise_step", "modulation"))

    assert weights_inside(out, "denoise_step") > step + 0.8 * modulation


def test_it_is_made_again_only_when_it_would_be_another(published):
    assert not published_head(*published)


def test_it_is_not_written_over_its_source(published, capsys):
    _, out = published

    assert main([str(out), str(out)]) == 2
    assert "is the bundle itself" in capsys.readouterr().err


def test_a_run_gives_it_to_the_variants_that_ask_for_it_and_predicts_nothing_for_them(published, tmp_path):
    name, out = published
    scenario = small_scenario(tmp_path, ('name = "target"', 'name = "target"\npublished_head = true'))
    scenario = scenario.model_copy(update={"bundle": name, "ar_steps": None})
    asked = []

    def perform_nothing(job):
        asked.append(job)
        return {"seconds": [1.0], "stats": {}, "left": 0.5}

    run_scenario(
        "test", scenario, out=tmp_path / "out.json", threads=1, argv=[], work=out.parent, perform=perform_nothing
    )

    assert {job.variant.name for job in asked if job.bundle == str(out)} == {"target"}
    predicted = [case.variant for job in asked if job.kind == "cost" for case in job.measured]
    assert predicted == ["fewer", "exact, self"]
