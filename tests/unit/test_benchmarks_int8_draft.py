"""A draft with int8 weights in its head's `denoise_step`."""

import shutil

import numpy as np
import onnx
import pytest

from benchmarks.int8_draft import int8_draft, main
from export.causal import read_pair
from specdec_rt import load
from specdec_rt.bundle import load_bundle
from specdec_rt.errors import OutputError, UsageError
from specdec_rt.manifest import WEIGHTS_KEY, GraphName


@pytest.fixture(scope="module")
def with_int8(tmp_path_factory):
    """The digits bundle with a draft `adapter-int8`."""
    folder = tmp_path_factory.mktemp("int8") / "digits"
    assert int8_draft("digits", "adapter", folder)
    return folder


@pytest.fixture(scope="module")
def manifest(with_int8):
    return load_bundle(with_int8).manifest


def step_graph(folder, file):
    return onnx.load(folder / file, load_external_data=False)


def test_it_drafts_as_well_as_what_it_is_made_of(with_int8):
    pipeline = load(with_int8, backend="onnxruntime", threads=1)

    def made(draft):
        return pipeline.generate([1, 2, 3, 4], seed=1, mode="exact", draft=draft, draft_length=4, draft_steps=12)

    of_float, of_int8 = made("adapter"), made("adapter-int8")

    assert of_int8.tokens.shape == (4, 49, 16)
    assert np.isfinite(of_int8.tokens).all()
    assert of_int8.stats.acceptance_rate > 0.8 * of_float.stats.acceptance_rate
    assert not np.array_equal(of_int8.tokens, of_float.tokens)


def test_wide_products_of_its_steps_are_int8(with_int8, manifest):
    step = step_graph(with_int8, manifest.drafts["adapter-int8"].graphs[GraphName.DENOISE_STEP].file)
    sizes = dict.fromkeys(onnx.TensorProto.DataType.values(), 0)
    for tensor in step.graph.initializer:
        sizes[tensor.data_type] += int(np.prod(tensor.dims))

    assert sum(node.op_type == "MatMulInteger" for node in step.graph.node) == 6
    assert sizes[onnx.TensorProto.INT8] >= 6 * 256 * 256
    assert sizes[onnx.TensorProto.FLOAT] < 2 * 16 * 256 + 7000  # the ends, biases and norms


def test_its_graph_says_of_itself_what_the_source_says(with_int8, manifest):
    said = [
        {
            entry.key: entry.value
            for entry in step_graph(with_int8, record.graphs[GraphName.DENOISE_STEP].file).metadata_props
        }
        for record in (manifest.drafts["adapter-int8"], manifest.target)
    ]

    assert said[0] == said[1]
    assert set(said[0]) == {WEIGHTS_KEY}


def test_its_other_graphs_are_those_of_the_draft_and_of_the_head_that_it_drives(manifest):
    graphs = manifest.drafts["adapter-int8"].graphs
    others = set(graphs) - {GraphName.BACKBONE, GraphName.DENOISE_STEP}

    assert graphs[GraphName.BACKBONE] == manifest.drafts["adapter"].graphs[GraphName.BACKBONE]
    assert all(graphs[name] == manifest.target.graphs[name] for name in others)


def test_its_parameters_are_those_of_the_draft_and_of_the_head(manifest):
    pair = read_pair("digits")
    parameters = sum(p.numel() for part in (pair.drafts["adapter"], pair.target.head) for p in part.parameters())

    assert manifest.drafts["adapter-int8"].parameters == parameters


def test_the_bundles_own_drafts_stay_as_they_are(manifest):
    plain = load_bundle("digits").manifest

    assert manifest.drafts == {**plain.drafts, "adapter-int8": manifest.drafts["adapter-int8"]}


def test_it_is_made_again_only_when_it_would_be_another(with_int8, tmp_path):
    folder = shutil.copytree(with_int8, tmp_path / "digits")

    assert not int8_draft("digits", "adapter", folder)
    assert int8_draft("digits", "adapter", folder, per_channel=True)
    assert not int8_draft("digits", "adapter", folder, per_channel=True)


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        ("large", r"no draft 'large'; expected one of its drafts \(adapter, small\)"),
        ("adapter", "has a draft 'adapter-int8' already"),
    ],
)
def test_a_draft_that_there_is_not_or_that_was_made_is_named(with_int8, tmp_path, draft, said):
    source = with_int8 if draft == "adapter" else "digits"

    with pytest.raises(UsageError, match=said):
        int8_draft(source, draft, tmp_path / "new")


def test_neither_the_bundle_itself_nor_something_else_is_overwritten(with_int8, tmp_path):
    (tmp_path / "other").write_text("a file")

    with pytest.raises(UsageError, match="is the bundle itself"):
        int8_draft(with_int8, "small", with_int8)
    with pytest.raises(OutputError, match="holds something that is no bundle"):
        int8_draft("digits", "adapter", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["digits", "large", str(tmp_path / "new")]) == 2
    assert "no draft 'large'" in capsys.readouterr().err
