"""Makes a graph that computes in half precision (fp16 or bf16) from an exported one; bindings and weights stay.

Half precision is used in matrix products and convolutions, and between two of them where everything on the way is
half or a weight: biases, activations, moving data. Casts stand only at the borders. Everything else stays in single
precision. What each of these exceptions is worth was measured on the shipped pairs, by emulation: how far rounding
moves the target's distribution of one token's path, in nats, ½ Σ (‖Δμ‖/σ)² over the chain.

| nats per token, `digits` / `digits-mar` | fp16 | bf16 |
|---|---|---|
| every operation in half | 7e-4 / 9e-4 | 5.0e-2 / 6.6e-2 |
| with the exceptions | 1e-4 / 2e-4 | 0.7e-2 / 1.5e-2 |

The exceptions, and what bf16 gives without each of them. (All of them together gave 0.9e-2 / 2.0e-2 in these runs,
in which biases next to an exception were rounded, too.)

- The chain's arithmetic: the prediction's last bias, guidance, mean, learned std, next state. Coefficients reach
  2.3, guidance 2.5. Without: 2.9e-2 / 4.2e-2.
- The residual stream, that is all sums of two activations: the rounding of every block adds up in it. Without:
  1.0e-2 / 2.5e-2, and z is 3.4e-3 / 2.5e-3 from single precision instead of 1.5e-3 / 1.1e-3.
- Normalisations. Without, but with statistics in single precision: 0.9e-2 / 2.2e-2. In fp16 there is no choice: the
  stream of `digits-mar` reaches 199, whose square is 60 % of the largest number.
- The time embedding's sinusoids and their arguments: in half, training steps up to 975 lose their phase. Without:
  1.1e-2 / 2.2e-2, and the embedding is 1.9e-2 / 2.6e-2 off, over the tolerance, instead of 1.9e-3 / 1.8e-3.
- Softmax and the mask that is added before it: nothing measurable, but -∞ is safe there on any kernel, and TensorRT
  still finds its attention pattern.
- Caches, and the nodes that gather and scatter over them: their bindings are float32.

The scale of attention scores is applied to the queries, before the product with the keys. Unscaled scores are the
first to leave the range of fp16 (298 in `digits-mar`, 42 scaled), and TensorRT wants it so where it fuses attention.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import get_args

import onnx
from onnx import NodeProto, TensorProto, helper

from export.to_onnx import ONNX_TYPES
from specdec_rt.manifest import Precision

__all__ = ["MATMULS", "MOVES", "POINTWISE", "compute_precisions", "half_graph", "value_types", "write_variant"]

MATMULS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""Operators that are worth computing in half."""
POINTWISE = frozenset({"Add", "Div", "Elu", "Erf", "Gelu", "LeakyRelu", "Mul", "Neg", "Relu", "Sigmoid", "Sub", "Tanh"})
"""Operators that are computed in half between two of `MATMULS`."""
MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Resize"}
    | {"ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"}
)
"""Operators that move values without changing them; in half between two of `MATMULS`."""
SUMS = frozenset({"Add", "Sub"})
"""Operators that add up the residual stream, where both inputs are activations."""


def compute_precisions(text: str) -> tuple[Precision, ...]:
    """Parse an option such as 'fp32,fp16': the half precisions in it. Graphs in fp32 are always written."""
    known: tuple[Precision, ...] = get_args(Precision)
    named = [word.strip() for word in text.split(",")]
    for name in named:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
    return tuple(precision for precision in known if precision in named and precision != "fp32")


def write_variant(source: Path, path: Path, precision: Precision, *, in_half: frozenset[str] = MATMULS) -> None:
    """Write a copy of the graph at `source` that computes in `precision` to `path`, and check it; see `half_graph`."""
    assert path.parent == source.parent, "both read the same weights file"
    onnx.save(half_graph(onnx.load(source, load_external_data=False), precision, in_half=in_half), path)
    onnx.checker.check_model(str(path), full_check=True)


def half_graph(
    model: onnx.ModelProto,
    precision: Precision,
    *,
    in_half: frozenset[str] = MATMULS,
    scale_queries: bool = True,
) -> onnx.ModelProto:
    """A copy of a single-precision graph that computes in `precision` ("fp16" or "bf16"), with the exceptions above.

    Weights are read as they are stored and cast once, which every backend does when it loads the graph. To measure
    what an exception is worth, name the operators that are always `in_half`, or leave scores unscaled.
    """
    assert precision != "fp32"
    assert not model.functions
    half = onnx.ModelProto()
    half.CopyFrom(model)
    if scale_queries:
        _scale_queries(half.graph)
    _Rewriter(half, precision, in_half).rewrite()
    return half


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value, by name."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values if value.type.tensor_type.elem_type}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        for name in node.output:
            if name not in types:  # ONNX infers nothing inside functions, and GroupNormalization is one to it
                types[name] = types[node.input[0]]
    return types


def _scale_queries(graph: onnx.GraphProto) -> None:
    """Where a scalar multiplies a matrix product that nothing else reads, multiply the product's first matrix by it."""
    scalars = {tensor.name for tensor in graph.initializer if not tensor.dims}
    consumers = _consumers(graph)
    nodes: list[NodeProto] = []
    replaced: set[str] = set()
    for node in graph.node:
        after = consumers[node.output[0]]
        scales = [name for name in after[0].input if name in scalars] if len(after) == 1 else []
        if node.op_type == "MatMul" and scales and after[0].op_type == "Mul":
            queries, keys = node.input
            (scores,) = after[0].output
            nodes.append(helper.make_node("Mul", [queries, scales[0]], [f"{queries}.scaled"]))
            nodes.append(helper.make_node("MatMul", [f"{queries}.scaled", keys], [scores], name=node.name))
            replaced.add(scores)
        elif node.output[0] not in replaced:
            nodes.append(node)
    _replace_nodes(graph, nodes)


def _consumers(graph: onnx.GraphProto) -> dict[str, list[NodeProto]]:
    """The nodes that read each value."""
    consumers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    return consumers


def _replace_nodes(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


class _Rewriter:
    """Moves nodes of a graph to half precision; the half copy of value `x` is called `x.fp16` or `x.bf16`."""

    def __init__(self, model: onnx.ModelProto, precision: Precision, in_half: frozenset[str]) -> None:
        self._graph, self._precision, self._element = model.graph, precision, ONNX_TYPES[precision]
        self._in_half = in_half
        self._types = value_types(model)
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._weights = self._made_of_weights()
        self._half = self._half_nodes()
        self._nodes: list[NodeProto] = []
        self._lowered: dict[str, str] = {}
        """the name of the half copy of each single-precision value that has one"""

    def rewrite(self) -> None:
        """Replace the nodes, then remove nodes and initialisers that nothing reads any more."""
        for node in self._graph.node:
            if node.output[0] not in self._half:
                self._nodes.append(node)
                continue
            self._nodes.append(self._lower_node(node))
            for name in node.output:
                raised = helper.make_node("Cast", [self._lowered[name]], [name], to=TensorProto.FLOAT)
                self._nodes.append(raised)
        needed = {value.name for value in self._graph.output}
        nodes: list[NodeProto] = []
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        _replace_nodes(self._graph, nodes[::-1])
        initialisers = [tensor for tensor in self._graph.initializer if tensor.name in needed]
        del self._graph.initializer[:]
        self._graph.initializer.extend(initialisers)

    def _made_of_weights(self) -> set[str]:
        """The values that depend on no input of the graph."""
        found = {tensor.name for tensor in self._graph.initializer}
        for node in self._graph.node:
            if all(name in found for name in node.input if name):
                found.update(node.output)
        return found

    def _half_nodes(self) -> set[str]:
        """The nodes to compute in half, each by the name of its first output.

        A pass forward finds the nodes that could follow a matrix product in half; a pass back keeps those of them
        that lead to another matrix product.
        """
        half: set[str] = set()
        for node in self._graph.node:
            activations = [name for name in node.input if self._is_float(name) and name not in self._weights]
            if not activations or not self._is_float(node.output[0]):
                continue
            producers = [self._producers.get(name) for name in activations]
            inside = all(producer is not None and producer.output[0] in half for producer in producers)
            residual = node.op_type in SUMS and len(activations) > 1
            if node.op_type in self._in_half or (node.op_type in POINTWISE | MOVES and inside and not residual):
                half.add(node.output[0])
        consumers = _consumers(self._graph)
        for node in reversed(self._graph.node):
            leads_on = any(consumer.output[0] in half for name in node.output for consumer in consumers[name])
            if node.op_type not in self._in_half and not leads_on:
                half.discard(node.output[0])
        return half

    def _is_float(self, name: str) -> bool:
        return bool(name) and self._types[name] == TensorProto.FLOAT

    def _lower_node(self, node: NodeProto) -> NodeProto:
        """A copy of the node in half precision; nodes that make its inputs are appended to `_nodes` first."""
        lowered = NodeProto()
        lowered.CopyFrom(node)
        for index, name in enumerate(node.input):
            if self._is_float(name):
                lowered.input[index] = self._lower(name)
        for index, name in enumerate(node.output):
            lowered.output[index] = self._lowered[name] = f"{name}.{self._precision}"
        return lowered

    def _lower(self, name: str) -> str:
        """The name of a value's half copy; the nodes that make the copy are appended when it is first asked for."""
        if name in self._lowered:
            return self._lowered[name]
        producer, stored = self._producers.get(name), name
        if producer is not None and name in self._weights:  # weights are cast first, then moved
            if producer.op_type in MOVES:
                self._nodes.append(self._lower_node(producer))
                return self._lowered[name]
            if producer.op_type == "Cast":
                stored = producer.input[0]
        if self._types[stored] == self._element:
            self._lowered[name] = stored
        else:
            self._lowered[name] = f"{name}.{self._precision}"
            self._nodes.append(helper.make_node("Cast", [stored], [self._lowered[name]], to=self._element))
        return self._lowered[name]
