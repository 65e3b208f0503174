"""Graphs that compute in half: which operators do, and how far they are from single precision."""

import argparse

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from export.agreement import PRECISION_TOLERANCE, ParityError, graph_outputs, require_variant, variant_outputs
from export.emulation import emulated
from export.graphs import TimeEmbeddingGraph
from export.models.head import DiffusionHead
from export.models.vae import Middle
from export.precision import MATMULS, compute_precisions, half_graph, value_types, write_variant
from export.to_onnx import ONNX_TYPES, export_graph, save_weights, to_model_proto
from specdec_rt.bundle import load_bundle
from specdec_rt.chain import compile_chain

BUNDLES = ["digits", "digits-mar"]
HALVES = ["fp16", "bf16"]
SINGLE = {"LayerNormalization", "GroupNormalization", "Softmax", "Sin", "Cos", "ReduceSum", "Exp"}
SINGLE |= {"ScatterElements", "ScatterND"}
"""Operators that stay in single precision."""


def graphs(manifest):
    """Every graph of the bundle."""
    return [graph for model in (manifest.target, *manifest.drafts.values()) for graph in model.graphs.values()]


def arguments(graph, manifest):
    """Random inputs of a graph, as tensors in the order of its bindings."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(manifest.tokens, generator=generator) for _ in range(3)])
    sizes = {"B": 3, "N": 4, "S": 20, "G": 2, "R": 5, "P": 5, "n": 6, "n_plus_1": 7, "K": 12, "Q": 9}
    whole = {
        "timestep": torch.arange(0, 900, 150),
        "position": torch.tensor([0, 7, 16]),
        "label": torch.tensor([0, 3, manifest.classes]),
        "row": torch.tensor([4, 2, 0, 0, 1]),
        "step": torch.arange(1, 6),
        "visible": orders[:, :12],
        "visible_mask": torch.arange(12) < torch.tensor([[0], [6], [12]]),
        "query": orders[:, -9:],
    }
    return [
        whole[binding.name]
        if binding.name in whole
        else torch.randn([sizes.get(size, size) for size in binding.shape], generator=generator)
        for binding in graph.inputs
    ]


def read(path):
    """The graph in a file, without its weights."""
    return onnx.load(path, load_external_data=False)


def model_of(nodes, inputs, output, initialisers=()):
    """A graph of float32 inputs and one output."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", values, [result], list(initialisers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def run(model, **inputs):
    """What ONNX Runtime computes from the inputs, with its own optimisations."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


# --- what is half --------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", BUNDLES)
def test_products_are_half_and_normalisations_are_not(name, half):
    bundle = load_bundle(name)
    for graph in graphs(bundle.manifest):
        path = bundle.path(graph, half)
        onnx.checker.check_model(str(path), full_check=True)
        model, single = read(path), read(bundle.path(graph))
        types = value_types(model)
        for node in model.graph.node:
            kinds = {types[value] for value in (*node.input, *node.output) if value} & {1, 10, 16}
            if node.op_type in MATMULS:
                assert kinds == {ONNX_TYPES[half]}, node
            elif node.op_type != "Cast":
                assert kinds <= {TensorProto.FLOAT} or (kinds == {ONNX_TYPES[half]} and node.op_type not in SINGLE)
        products = [sum(node.op_type in MATMULS for node in each.graph.node) for each in (model, single)]
        assert products[0] == products[1] > 0
        assert (model.graph.input, model.graph.output) == (single.graph.input, single.graph.output)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", BUNDLES)
def test_the_chains_arithmetic_and_the_residual_stream_are_single(name, half):
    bundle = load_bundle(name)
    for graph in graphs(bundle.manifest):
        model = read(bundle.path(graph, half))
        types, weights = value_types(model), {tensor.name for tensor in model.graph.initializer}
        for node in model.graph.node:  # a node comes after those whose values it reads
            if set(node.input) <= weights:
                weights.update(node.output)
        leads_on = set()
        for node in reversed(model.graph.node):
            if node.op_type in MATMULS or leads_on & set(node.output):
                leads_on |= set(node.input)
        for node in model.graph.node:
            if node.op_type not in MATMULS | {"Cast"}:
                is_sum = node.op_type in {"Add", "Sub"} and not weights & set(node.input)
                if is_sum or not leads_on & set(node.output):
                    assert types[node.output[0]] not in (TensorProto.FLOAT16, TensorProto.BFLOAT16), node


@pytest.mark.parametrize("half", HALVES)
def test_nothing_is_cast_twice_nor_to_what_it_is(half):
    bundle = load_bundle("digits")
    assert bundle.manifest.precision == "fp16"
    for graph in graphs(bundle.manifest):
        model = read(bundle.path(graph, half))
        types = value_types(model)
        cast = {name for node in model.graph.node if node.op_type == "Cast" for name in node.output}
        for node in model.graph.node:
            if node.op_type == "Cast":
                assert node.input[0] not in cast
                assert types[node.input[0]] != types[node.output[0]]
        values_read = {name for node in model.graph.node for name in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= values_read


def test_convolutions_are_half_around_group_norms():
    middle = Middle(64).eval()
    example = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    model = to_model_proto(middle, [example], ["hidden"], ["out"], [{0: torch.export.Dim.DYNAMIC}])
    half = half_graph(model, "fp16")
    types = value_types(half)
    found = {(node.op_type, types[node.output[0]]) for node in half.graph.node}
    for kind, element in (("Conv", 10), ("MatMul", 10), ("GroupNormalization", 1), ("Softmax", 1), ("Add", 1)):
        assert {each for op, each in found if op == kind} == {element}
    with torch.no_grad():
        expected = middle(example).numpy()
    for each in (half, emulated(half, "fp16")):
        found = run(each, hidden=example.numpy())
        assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


# --- how far from single precision ---------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLES)
def test_variants_agree_with_single_precision(name):
    bundle = load_bundle(name)
    recorded = bundle.manifest.provenance["relative_error_of_variants"]
    assert len(recorded) == 2 * len(graphs(bundle.manifest))
    for graph in graphs(bundle.manifest):
        examples = arguments(graph, bundle.manifest)
        expected = graph_outputs(bundle.path(graph), examples, graph.inputs)
        for half in HALVES:
            path = bundle.path(graph, half)
            error = require_variant(path, variant_outputs(path, half, examples, graph.inputs), expected, half)
            assert error > 1e-2 * PRECISION_TOLERANCE[half]  # it does compute in half
            assert recorded[path.name] <= PRECISION_TOLERANCE[half]


@pytest.mark.parametrize("name", BUNDLES)
def test_fp16_runs_on_onnxruntime_itself(name):
    bundle = load_bundle(name)
    for graph in graphs(bundle.manifest):
        examples = arguments(graph, bundle.manifest)
        expected = graph_outputs(bundle.path(graph), examples, graph.inputs)
        session = onnxruntime.InferenceSession(str(bundle.path(graph, "fp16")), providers=["CPUExecutionProvider"])
        names = [binding.name for binding in graph.inputs]
        found = session.run(None, {name: value.numpy() for name, value in zip(names, examples, strict=True)})
        require_variant(bundle.path(graph, "fp16"), found, expected, "fp16")


def test_sinusoids_in_half_would_not_pass(tmp_path):
    """Without this exception the shipped chain's time embedding is over the tolerance."""
    bundle = load_bundle("digits-mar")
    graph = bundle.manifest.target.graphs["time_embedding"]
    examples = [torch.from_numpy(compile_chain(bundle.manifest.chain).timestep)]
    expected = graph_outputs(bundle.path(graph), examples, graph.inputs)
    found = variant_outputs(bundle.path(graph, "bf16"), "bf16", examples, graph.inputs)
    require_variant(bundle.path(graph, "bf16"), found, expected, "bf16")
    weights = bundle.folder / "target.safetensors"
    (tmp_path / weights.name).write_bytes(weights.read_bytes())
    (tmp_path / graph.file).write_bytes(bundle.path(graph).read_bytes())
    path = tmp_path / "time_embedding.bf16.onnx"
    write_variant(tmp_path / graph.file, path, "bf16", in_half=MATMULS | {"Mul", "Cos", "Sin"})
    with pytest.raises(ParityError, match=r"time_embedding\.bf16\.onnx differs from single precision by 2\.\d\de-02"):
        require_variant(path, variant_outputs(path, "bf16", examples, graph.inputs), expected, "bf16")


def test_a_weight_beyond_fp16_is_refused(tmp_path):
    """The message says how to mend it, and that works."""
    torch.manual_seed(0)
    head = DiffusionHead(4, 8, 64, 1, learned_variance=False)
    head.time_embed.mlp[0].weight.data[0, 0] = 7e4
    weights = save_weights({"head": head}, tmp_path / "x.safetensors", precision="fp32")
    graph = load_bundle("digits").manifest.target.graphs["time_embedding"]
    output = graph.outputs[0].model_copy(update={"shape": ("n", 64)})
    examples = [torch.arange(5)]
    export_graph(TimeEmbeddingGraph(head), examples, (graph.inputs, (output,)), tmp_path / "x.onnx", weights)
    expected = graph_outputs(tmp_path / "x.onnx", examples, graph.inputs)
    found = {}
    for half in HALVES:
        path = tmp_path / f"x.{half}.onnx"
        write_variant(tmp_path / "x.onnx", path, half)
        found[half] = variant_outputs(path, half, examples, graph.inputs)
    with pytest.raises(ParityError, match=r"x\.fp16\.onnx differs .* by nan .* 0\.005 .* leave fp16 out of --compute"):
        require_variant(tmp_path / "x.fp16.onnx", found["fp16"], expected, "fp16")
    require_variant(tmp_path / "x.bf16.onnx", found["bf16"], expected, "bf16")


# --- emulation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("half", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_emulation_rounds_as_torch_does(half, dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 1, generator=generator), torch.randn(1, 64, generator=generator)
    model = model_of(
        [helper.make_node("MatMul", ["left", "right"], ["product"]), helper.make_node("Tanh", ["product"], ["out"])],
        {"left": [64, 1], "right": [1, 64]},
        "out",
    )
    found = run(emulated(half_graph(model, half), half), left=left.numpy(), right=right.numpy())
    expected = (left.to(dtype) @ right.to(dtype)).float().tanh()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_overflow_between_products_is_seen():
    model = model_of(
        [helper.make_node("MatMul", ["x", "x"], ["square"]), helper.make_node("MatMul", ["square", "small"], ["out"])],
        {"x": [1, 1], "small": [1, 1]},
        "out",
    )
    inputs = {"x": np.full((1, 1), 300, np.float32), "small": np.full((1, 1), 0.01, np.float32)}
    assert np.isinf(run(emulated(half_graph(model, "fp16"), "fp16"), **inputs))
    assert run(emulated(half_graph(model, "bf16"), "bf16"), **inputs) == pytest.approx(900, rel=1e-2)


def test_scores_are_scaled_before_they_are_summed():
    nodes = [
        helper.make_node("MatMul", ["query", "key"], ["raw"]),
        helper.make_node("Mul", ["raw", "scale"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"]),
        helper.make_node("MatMul", ["shares", "value"], ["out"]),
    ]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.125])
    model = model_of(nodes, {"query": [2, 64], "key": [64, 3], "value": [3, 4]}, "out", [scale])
    inputs = {"query": np.full((2, 64), 40), "key": np.full((64, 3), 40), "value": np.arange(12).reshape(3, 4)}
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    expected = run(model, **inputs)
    np.testing.assert_allclose(run(emulated(half_graph(model, "fp16"), "fp16"), **inputs), expected, rtol=1e-3)
    unscaled = half_graph(model, "fp16", scale_queries=False)
    assert np.isnan(run(emulated(unscaled, "fp16"), **inputs)).all()  # 64 · 1600 = 102,400


# --- where it is used ----------------------------------------------------------------------------------


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("graph_name", ["backbone", "denoise_step"])
def test_tensorrt_builds_a_variant(half, graph_name):
    tensorrt = pytest.importorskip("tensorrt_rtx")
    bundle = load_bundle("digits")
    path = bundle.path(bundle.manifest.drafts["small"].graphs[graph_name], half)
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), parser.get_error(0).desc()
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        assert value.dtype in (tensorrt.float32, tensorrt.int64)
        shape = [2 if size < 0 else size for size in value.shape]
        profile.set_shape(value.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config).nbytes > 1e5
    assert all(network.get_output(index).dtype == tensorrt.float32 for index in range(network.num_outputs))


def test_precisions_to_compute_in():
    assert compute_precisions("fp32") == ()
    assert compute_precisions("bf16, fp16,fp16") == compute_precisions("fp32,fp16,bf16") == ("fp16", "bf16")
    for text in ("", "fp8", "fp16,", "half"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not one of fp32, fp16, bf16"):
            compute_precisions(text)
