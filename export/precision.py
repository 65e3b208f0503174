"""A graph that computes in half precision (fp16 or bf16), made from an exported one: its bindings and weights stay.

Half is what multiplies matrices or convolves, and what lies between two of those with nothing but half values
and weights on the way: biases, activations, the moving about of data. Casts stand at the borders alone. All
else stays in single precision. What these islands are worth was measured by emulation on the shipped pairs:
how far rounding moves the target's distribution of one token's path, in nats, ½ Σ (‖Δμ‖/σ)² over the chain.

| nats per token, `digits` / `digits-mar` | fp16 | bf16 |
|---|---|---|
| every operation in half | 7e-4 / 9e-4 | 5.0e-2 / 6.6e-2 |
| with the islands | 1e-4 / 2e-4 | 0.7e-2 / 1.5e-2 |

The islands, and what bf16 gives without each (where all islands gave 0.9e-2 / 2.0e-2, with rounded biases at
their shores):

- The chain's arithmetic: the prediction's last bias, guidance, mean, learned std, next state. Coefficients
  reach 2.3, guidance 2.5. 2.9e-2 / 4.2e-2.
- The residual stream, all sums of two activations: every block's rounding adds up in it. 1.0e-2 / 2.5e-2; z is
  3.4e-3 / 2.5e-3 from single precision instead of 1.5e-3 / 1.1e-3.
- Normalisations. 0.9e-2 / 2.2e-2, though with statistics in single precision. Those have no choice in fp16: the
  stream of `digits-mar` reaches 199, whose square is 60 % of the largest number.
- The time embedding's sinusoids and their arguments: training steps up to 975 keep no phase in half. 1.1e-2 /
  2.2e-2; the embedding is 1.9e-2 / 2.6e-2 off, over the tolerance, instead of 1.9e-3 / 1.8e-3.
- Softmax and the mask that is added before it: nothing measurable, but -∞ is safe there whatever the kernel, and
  TensorRT finds its attention pattern all the same.
- Caches, with what gathers and scatters over them: bindings are float32.

Scores are scaled before they are multiplied, in the queries: unscaled they are the first to leave fp16's range
(298 in `digits-mar`, 42 scaled), and TensorRT asks for it where it fuses attention.
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
"""What is worth computing in half."""
POINTWISE = frozenset({"Add", "Div", "Elu", "Erf", "Gelu", "LeakyRelu", "Mul", "Neg", "Relu", "Sigmoid", "Sub", "Tanh"})
"""What is computed in half between two of `MATMULS`."""
MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Resize"}
    | {"ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"}
)
"""What moves values about without changing them, in half between two of `MATMULS`."""
SUMS = frozenset({"Add", "Sub"})
"""Of two activations: the residual stream."""


def compute_precisions(text: str) -> tuple[Precision, ...]:
    """The half precisions in a list such as 'fp32,fp16', for an option of argparse; fp32 is there in any case."""
    known: tuple[Precision, ...] = get_args(Precision)
    named = [word.strip() for word in text.split(",")]
    for name in named:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
    return tuple(precision for precision in known if precision in named and precision != "fp32")


def write_variant(source: Path, path: Path, precision: Precision) -> None:
    """Write the graph at `source`, computing in `precision`, to `path` in the same folder, and check it."""
    assert path.parent == source.parent, "both read the same weights"
    onnx.save(half_graph(onnx.load(source, load_external_data=False), precision), path)
    onnx.checker.check_model(str(path), full_check=True)


def half_graph(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """A copy of a single-precision graph that computes in `precision` ("fp16" or "bf16"); islands as above.

    Weights are read as they lie in their file and cast once, which every backend does when it loads the graph.
    """
    assert precision != "fp32"
    assert not model.functions
    half = onnx.ModelProto()
    half.CopyFrom(model)
    _scale_queries(half.graph)
    _Rewriter(half, precision).rewrite()
    return half


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value, by name."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values if value.type.tensor_type.elem_type}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        for name in node.output:
            if name not in types:  # GroupNormalization is a function to ONNX, and those it does not look into
                types[name] = types[node.input[0]]
    return types


def _scale_queries(graph: onnx.GraphProto) -> None:
    """Where a product of matrices is all that a number multiplies, multiply the first matrix by it."""
    scalars = {tensor.name for tensor in graph.initializer if not tensor.dims}
    takers = _takers(graph)
    nodes: list[NodeProto] = []
    replaced: set[str] = set()
    for node in graph.node:
        after = takers[node.output[0]]
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


def _takers(graph: onnx.GraphProto) -> dict[str, list[NodeProto]]:
    """The nodes that take each value."""
    takers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            takers[name].append(node)
    return takers


def _replace_nodes(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


class _Rewriter:
    """Moves a graph's nodes to half precision, where `x` is called `x.fp16`; a node goes by its first output."""

    def __init__(self, model: onnx.ModelProto, precision: Precision) -> None:
        self._graph, self._precision, self._element = model.graph, precision, ONNX_TYPES[precision]
        self._types = value_types(model)
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._weights = self._made_of_weights()
        self._half = self._half_nodes()
        self._nodes: list[NodeProto] = []
        self._lowered: dict[str, str] = {}
        """what the half nodes take for a single-precision value"""

    def rewrite(self) -> None:
        """Replace the nodes, then drop what nothing takes any more."""
        for node in self._graph.node:
            if node.output[0] not in self._half:
                self._nodes.append(node)
                continue
            self._nodes.append(self._lower_node(node))
            for name in node.output:
                raised = helper.make_node("Cast", [self._lowered[name]], [name], to=TensorProto.FLOAT)
                self._nodes.append(raised)
        taken = {value.name for value in self._graph.output}
        needed: list[NodeProto] = []
        for node in reversed(self._nodes):
            if taken.intersection(node.output):
                taken.update(node.input)
                needed.append(node)
        _replace_nodes(self._graph, needed[::-1])
        initialisers = [tensor for tensor in self._graph.initializer if tensor.name in taken]
        del self._graph.initializer[:]
        self._graph.initializer.extend(initialisers)

    def _made_of_weights(self) -> set[str]:
        """The values that no input has a part in."""
        found = {tensor.name for tensor in self._graph.initializer}
        for node in self._graph.node:
            if all(name in found for name in node.input if name):
                found.update(node.output)
        return found

    def _half_nodes(self) -> set[str]:
        """Forward, all that can follow a product of matrices in half; then back, what leads to another one."""
        half: set[str] = set()
        for node in self._graph.node:
            activations = [name for name in node.input if self._is_float(name) and name not in self._weights]
            if not activations or not self._is_float(node.output[0]):
                continue
            makers = [self._makers.get(name) for name in activations]
            inside = all(maker is not None and maker.output[0] in half for maker in makers)
            residual = node.op_type in SUMS and len(activations) > 1
            if node.op_type in MATMULS or (node.op_type in POINTWISE | MOVES and inside and not residual):
                half.add(node.output[0])
        takers = _takers(self._graph)
        for node in reversed(self._graph.node):
            leads_on = any(taker.output[0] in half for name in node.output for taker in takers[name])
            if node.op_type not in MATMULS and not leads_on:
                half.discard(node.output[0])
        return half

    def _is_float(self, name: str) -> bool:
        return bool(name) and self._types[name] == TensorProto.FLOAT

    def _lower_node(self, node: NodeProto) -> NodeProto:
        """The node in half precision; what it takes is in `_nodes` already."""
        lowered = NodeProto()
        lowered.CopyFrom(node)
        for place, name in enumerate(node.input):
            if self._is_float(name):
                lowered.input[place] = self._lower(name)
        for place, name in enumerate(node.output):
            lowered.output[place] = self._lowered[name] = f"{name}.{self._precision}"
        return lowered

    def _lower(self, name: str) -> str:
        """A single-precision value's name in half precision, where it is made on first use."""
        if name in self._lowered:
            return self._lowered[name]
        maker, stored = self._makers.get(name), name
        if maker is not None and name in self._weights:  # a weight is cast before it is moved, and never twice
            if maker.op_type in MOVES:
                self._nodes.append(self._lower_node(maker))
                return self._lowered[name]
            if maker.op_type == "Cast":
                stored = maker.input[0]
        if self._types[stored] == self._element:
            self._lowered[name] = stored
        else:
            self._lowered[name] = f"{name}.{self._precision}"
            self._nodes.append(helper.make_node("Cast", [stored], [self._lowered[name]], to=self._element))
        return self._lowered[name]
