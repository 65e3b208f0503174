"""Export of a small new pair: checked graphs, shared weights, and a check that can fail."""

import json

import numpy as np
import onnx
import pytest
import torch

from export.causal import CausalPair, annotate, read_pair, write_bundle
from export.graphs import DenoiseStepGraph
from export.models.causal import CausalBackbone, CausalBackboneSize, CausalModel
from export.models.head import DiffusionHead
from export.parity import ParityError, require_parity
from export.to_onnx import OPSET
from specdec_rt import load
from specdec_rt.bundle import Defaults, ImageLayout
from specdec_rt.errors import OutputError
from specdec_rt.schedule import ChainSpec


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    size = CausalBackboneSize(tokens=6, token_dim=12, classes=3, width=32, depth=2, heads=2)
    target = CausalModel(CausalBackbone(size), DiffusionHead(12, 32, 24, 2, learned_variance=False))
    draft = CausalBackbone(
        CausalBackboneSize(tokens=6, token_dim=12, classes=3, width=16, depth=1, heads=2), adapter_dim=32
    )
    for module in (target, draft):
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return CausalPair(
        name="tiny",
        target=target,
        drafts={"adapter": draft},
        chain=ChainSpec(steps=6, t_max=950, drop_last=1, final_std=0.1, variance="large", emit="mean"),
        image=ImageLayout(height=4, width=6, channels=3, patch=2),
        defaults=Defaults(mode="exact", draft="adapter", draft_length=2, guidance=1.5, guidance_schedule="linear"),
        provenance={"weights": "random"},
    )


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "float16"])
def folder(request, pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    write_bundle(pair, out, half=request.param)
    return out


def test_a_new_bundle_generates_colour_images(folder):
    for mode in ("target", "draft", "exact", "paper"):
        result = load(folder).generate([0, 1, 2], mode=mode)
        assert result.images.shape == (3, 4, 6, 3)
        assert np.isfinite(result.tokens).all()


def test_weights_come_back_as_they_went(folder, pair):
    again = read_pair(folder)
    for name, parameter in pair.target.state_dict().items():
        torch.testing.assert_close(again.target.state_dict()[name], parameter, rtol=1e-3, atol=1e-6)
    assert type(again.drafts["adapter"]) is CausalBackbone


def test_graphs_are_checked_dynamic_and_share_their_weights(folder):
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert {entry.version for entry in model.opset_import if not entry.domain} == {OPSET}
        assert all(value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input)
        assert not {node.op_type for node in model.graph.node} & {"NonZero", "Attention", "If", "Loop"}
    step = onnx.load(folder / "target.denoise_step.onnx", load_external_data=False)
    density = onnx.load(folder / "target.log_density.onnx", load_external_data=False)
    places = [
        {tuple(entry.value for entry in tensor.external_data) for tensor in graph.graph.initializer} - {()}
        for graph in (step, density)
    ]
    assert places[0] == places[1] != set()


def test_a_wrong_weight_fails_the_comparison_with_torch(folder):
    manifest = load(folder).bundle.manifest
    graph = manifest.target.graphs["time_embedding"]
    head = read_pair(folder).target.head

    class Altered(torch.nn.Module):
        def forward(self, timestep):
            return 1.01 * head.time_embed(timestep)

    examples = [torch.arange(5)]
    with torch.no_grad(), pytest.raises(ParityError, match=r"time_embedding\.onnx differs from torch"):
        require_parity(Altered(), examples, graph.inputs, folder / graph.file)


def test_not_a_number_fails_the_comparison_in_any_output(folder):
    manifest = load(folder).bundle.manifest
    graph = manifest.target.graphs["denoise_step"]
    rows, n = 3, 4
    sizes = {"R": rows, "n": n, "G": 1}
    shapes = {binding.name: [sizes.get(size, size) for size in binding.shape] for binding in graph.inputs}
    examples = [
        torch.zeros(shape, dtype=torch.int64) if name == "step" else torch.randn(shape)
        for name, shape in shapes.items()
    ]

    class Broken(torch.nn.Module):
        def forward(self, *values):
            next_state, mean = step(*values)
            return next_state, mean * torch.nan

    step = DenoiseStepGraph(read_pair(folder).target.head)
    with torch.no_grad():
        require_parity(step, examples, graph.inputs, folder / graph.file)
        with pytest.raises(ParityError, match="differs from torch by nan"):
            require_parity(Broken(), examples, graph.inputs, folder / graph.file)


def test_export_replaces_nothing_but_a_bundle(pair, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="holds something that is no bundle"):
        write_bundle(pair, tmp_path, half=False)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_export_replaces_a_bundle_as_a_whole(folder, pair):
    annotate(folder, {"note": "kept"})
    assert json.loads((folder / "manifest.json").read_text())["provenance"]["note"] == "kept"
    (folder / "left-over").write_text("from before")
    write_bundle(pair, folder, half=False)
    assert not (folder / "left-over").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
