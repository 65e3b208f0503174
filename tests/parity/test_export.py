"""Export of a small causal pair: checked graphs, shared weights, and comparisons with torch that can fail."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from export.agreement import ParityError, graph_outputs, require_agreement, require_precision, torch_outputs
from export.bundles import annotate
from export.causal import CausalPair, read_pair, write_bundle
from export.digits.__main__ import main as digits_command
from export.graphs import DenoiseStepGraph, TimeEmbeddingGraph
from export.models.causal import CausalBackbone, CausalBackboneSize, CausalModel
from export.models.head import DiffusionHead
from export.to_onnx import OPSET, export_graph, rounding_changes, save_weights
from specdec_rt import load
from specdec_rt.bundle import load_bundle
from specdec_rt.chain import ChainSpec
from specdec_rt.errors import OutputError
from specdec_rt.manifest import Defaults, ImageLayout


@pytest.fixture(scope="module")
def pair():
    """A target of two layers, and a draft of one that drives its head; no weight is zero."""
    torch.manual_seed(0)
    size = CausalBackboneSize(tokens=6, token_dim=12, classes=3, width=32, depth=2, heads=2)
    target = CausalModel(CausalBackbone(size), DiffusionHead(12, 32, 24, 1, learned_variance=False))
    draft = CausalBackbone(replace(size, width=16, depth=1), adapter_dim=32)
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


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    """The pair's bundle with weights in fp16; rounds the pair's own weights."""
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    write_bundle(pair, out, precision="fp16")
    return out


def require_parity(module, examples, inputs, path):
    """The graph's error against the module; raises ParityError where it is too large."""
    return require_agreement(path, graph_outputs(path, examples, inputs), torch_outputs(module, examples))


def test_a_new_bundle_generates_colour_images(folder):
    for mode in ("target", "draft", "exact", "paper"):
        result = load(folder).generate([0, 1, 2], mode=mode)
        assert result.images.shape == (3, 4, 6, 3)
        assert np.isfinite(result.tokens).all()


def test_models_come_back_from_a_bundle(folder, pair):
    again = read_pair(folder)
    assert type(again.drafts["adapter"]) is CausalBackbone
    for found, wanted in ((again.target, pair.target), (again.drafts["adapter"], pair.drafts["adapter"])):
        assert found.state_dict().keys() == wanted.state_dict().keys()
        for name, parameter in wanted.state_dict().items():
            assert torch.equal(found.state_dict()[name], parameter)


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


@pytest.mark.full
@pytest.mark.parametrize("name", ["digits", "digits-mar"])
def test_a_shipped_bundle_can_be_written_anew(tmp_path, name):
    """With the pinned torch every file is the same, byte for byte, but the manifest; its figures stay."""
    shipped = load_bundle(name)
    assert digits_command(["--from-bundle", name, "--keep-figures", "--out", str(tmp_path / name)]) == 0
    again = load_bundle(tmp_path / name)
    assert again.manifest.files == shipped.manifest.files
    for field in ("command", "versions", "figures"):
        assert again.manifest.provenance[field] == shipped.manifest.provenance[field]
    assert again.manifest.provenance["exported_again"]["command"].endswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-figures"], "add --from-bundle DIR"),
        (["--from-bundle", "digits", "--family", "mar"], "leave out --family"),
        (["--from-bundle", "digits", "--keep-figures", "--classifier", "x.onnx"], "give one of the two"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        digits_command([*options, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_weights_that_are_rounded_already_have_no_error_of_rounding(folder, pair):
    assert "relative_error_of_precision" in load_bundle(folder).manifest.provenance
    modules = {"backbone": pair.target.backbone, "head": pair.target.head}
    assert not rounding_changes(modules, "fp16")
    assert rounding_changes(modules, "bf16")


def test_a_graph_that_half_precision_cannot_compute_is_refused(pair, tmp_path):
    size = replace(pair.target.backbone.size, depth=1)
    target = CausalModel(CausalBackbone(size), DiffusionHead(12, 32, 24, 1, learned_variance=False))
    target.backbone.token_embed.weight.data[0, 0] = 7e4
    alone = replace(pair, target=target, drafts={})
    message = r"target\.backbone\.fp16\.onnx differs from single precision by nan .* leave fp16 out of --compute$"
    with pytest.raises(ParityError, match=message):
        write_bundle(alone, tmp_path / "out", precision="fp32", compute=["fp16"])
    assert list(tmp_path.iterdir()) == []


def test_export_replaces_nothing_but_a_bundle(pair, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="holds something that is no bundle"):
        write_bundle(pair, tmp_path, precision="fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_note_is_added_to_what_the_provenance_says(tmp_path):
    shipped = load_bundle("digits")
    shutil.copytree(shipped.folder, tmp_path / "digits")
    annotate(tmp_path / "digits", {"note": "added"})
    assert load_bundle(tmp_path / "digits").manifest.provenance == {**shipped.manifest.provenance, "note": "added"}
