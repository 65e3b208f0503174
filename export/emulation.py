"""What a half-precision graph computes, in a graph that ONNX Runtime's CPU kernels compute faithfully.

They have no bf16 at all. With fp16 they compute in single precision between casts, and ONNX Runtime then takes
casts out that face each other: 300 · 300 / 100 in fp16 is 900 there, not infinite, and most of a graph differs
from single precision by 0. It runs, but says nothing of what a GPU will make of it.
"""

import onnx
from onnx import NodeProto, TensorProto, helper

from export.precision import MOVES, value_types
from export.to_onnx import ONNX_TYPES
from specdec_rt.manifest import Precision

__all__ = ["emulated"]


def emulated(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """A graph in single precision that rounds every value which `model` holds in `precision`, to nearest.

    As on a GPU each operation is exact but for its result: sums over a product's inner axis are in single precision.
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
