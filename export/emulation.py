"""Emulates a half-precision graph by one that ONNX Runtime's CPU kernels compute faithfully.

These kernels have no bf16. They compute fp16 in single precision between casts, and ONNX Runtime removes casts that
undo each other: 300 · 300 / 100 in fp16 gives 900 there, where a GPU gives infinity, and most of a graph equals
single precision exactly. So running the fp16 graph itself says nothing of what a GPU makes of it.
"""

import onnx
from onnx import NodeProto, TensorProto, helper

from export.precision import MOVES, value_types
from export.to_onnx import ONNX_TYPES
from specdec_rt.manifest import Precision

__all__ = ["emulated"]


def emulated(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """A graph in single precision that rounds every value which `model` holds in `precision`, to nearest.

    As on a GPU, only the result of an operation is rounded: a matrix product sums in single precision.
    """
    element, types = ONNX_TYPES[precision], value_types(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes: list[NodeProto] = []
    for tensor in copy.graph.initializer:
        if tensor.data_type == element:
            name, tensor.name = tensor.name, f"{tensor.name}.half"
            nodes.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    for node in copy.graph.node:
        name = node.output[0]
        if types[name] != element or node.op_type in MOVES:
            nodes.append(node)
            continue
        assert len(node.output) == 1, node.op_type
        exact = node.input[0]
        if node.op_type != "Cast":
            exact = node.output[0] = f"{name}.exact"
            nodes.append(node)
        nodes.append(helper.make_node("Cast", [exact], [f"{name}.rounded"], to=element))
        nodes.append(helper.make_node("Cast", [f"{name}.rounded"], [name], to=TensorProto.FLOAT))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy
