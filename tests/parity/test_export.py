"""Export of a small new pair: checked graphs, shared weights, and a check that can fail."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.agreement import ParityError, graph_outputs, require_agreement, require_precision, torch_outputs
from export.bundles import annotate
from export.causal import CausalPair, read_pair, write_bundle
from export.graphs import DenoiseStepGraph, TimeEmbeddingGraph
from export.models.causal import CausalBackbone, CausalBackboneSize, CausalModel
from export.models.head import DiffusionHead
from export.to_onnx import OPSET, export_graph, save_weights
from specdec_rt import load
from specdec_rt.bundle import load_bundle
from specdec_rt.chain import ChainSpec
from specdec_rt.errors import OutputError
from specdec_rt.manifest import Defaults, ImageLayout


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
        defaults=Defaults(
            mode="exact", draft="adapter", draft_length=2, guidance=1.5, guidance_schedule="linear", ar_steps=6
        ),
        provenance={"weights": "random"},
    )


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def folder(request, pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    write_bundle(pair, out, precision=request.param)
    return out


def require_parity(module, examples, inputs, path):
    """The graph's error against the module; raises ParityError."""
    return require_agreement(path, graph_outputs(path, examples, inputs), torch_outputs(module, examples))


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
        assert b"stack_trace" not in path.read_bytes()  # nor any path of the machine that it was made on
    modulation, step, density = (
        {tuple(entry.value for entry in tensor.external_data) for tensor in graph.initializer} - {()}
        for graph in (
            onnx.load(folder / f"target.{name}.onnx", load_external_data=False).graph
            for name in ("modulation", "denoise_step", "path_means")
        )
    )
    assert step == density != set()
    assert modulation - step == modulation != set()


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

    step = DenoiseStepGraph(read_pair(folder).target.head, learned_variance=False)
    with torch.no_grad():
        require_parity(step, examples, graph.inputs, folder / graph.file)
        with pytest.raises(ParityError, match="differs from torch by nan"):
            require_parity(Broken(), examples, graph.inputs, folder / graph.file)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 0), ("fp16", 1e-3), ("bf16", 8e-3)])
def test_weights_are_stored_in_the_precision_that_is_asked_for(tmp_path, precision, limit):
    torch.manual_seed(0)
    head = DiffusionHead(4, 8, 64, 1, learned_variance=False)
    before = head.time_embed.mlp[0].weight.detach().clone()
    weights = save_weights({"head": head}, tmp_path / "x.safetensors", precision=precision)
    after = head.time_embed.mlp[0].weight.detach()
    assert (after - before).abs().max() <= limit * before.abs().max()
    assert torch.equal(after, before) == (precision == "fp32")
    bytes_each = 4 if precision == "fp32" else 2
    assert weights.path.stat().st_size // bytes_each == pytest.approx(
        sum(p.numel() for p in head.parameters()), rel=0.1
    )
    graph = load_bundle("digits").manifest.target.graphs["time_embedding"]
    output = graph.outputs[0].model_copy(update={"shape": ("n", 64)})
    module, examples, path = TimeEmbeddingGraph(head), [torch.arange(5)], tmp_path / "x.onnx"
    export_graph(module, examples, (graph.inputs, (output,)), path, weights)
    assert require_parity(module, examples, graph.inputs, path) > 0


def test_too_coarse_a_precision_is_refused(tmp_path):
    values = [np.ones(4), np.arange(4.0)]
    altered = [np.ones(4), np.arange(4.0) * 1.01]
    assert require_precision(tmp_path / "x.onnx", altered, values, "bf16") == pytest.approx(0.01)
    with pytest.raises(ParityError, match=r"x\.onnx with weights in fp16 differs .* by 1\.00e-02 .* --precision fp32"):
        require_precision(tmp_path / "x.onnx", altered, values, "fp16")


def without_notes(path):
    """A graph's bytes but for what older exports noted on its nodes."""
    model = onnx.load(path, load_external_data=False)
    for annotated in (model.graph, *model.graph.input, *model.graph.output, *model.graph.node):
        annotated.ClearField("metadata_props")
    return model.SerializeToString(deterministic=True)


@pytest.mark.full
def test_the_shipped_bundle_can_be_written_anew(tmp_path):
    """Byte for byte, from its own weights, with the pinned torch."""
    shipped = load_bundle("digits").folder
    write_bundle(read_pair("digits"), tmp_path / "digits", precision="fp16", compute=["fp16", "bf16"])
    for path in (tmp_path / "digits").iterdir():
        read = without_notes if path.suffix == ".onnx" else Path.read_bytes
        if path.name != "manifest.json":
            assert read(path) == read(shipped / path.name), path.name


def test_export_replaces_nothing_but_a_bundle(pair, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="holds something that is no bundle"):
        write_bundle(pair, tmp_path, precision="fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_export_replaces_a_bundle_as_a_whole(pair, tmp_path):
    out = tmp_path / "pair"
    shutil.copytree(load_bundle("digits").folder, out)
    annotate(out, {"note": "kept"})
    assert json.loads((out / "manifest.json").read_text())["provenance"]["note"] == "kept"
    (out / "left-over").write_text("from before")
    alone = replace(pair, drafts={}, defaults=pair.defaults.model_copy(update={"draft": "self"}))
    write_bundle(alone, out, precision="fp32")
    assert {path.name for path in out.iterdir()} == {"manifest.json", *load_bundle(out).manifest.files}
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]
