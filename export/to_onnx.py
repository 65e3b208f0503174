"""Exports a torch module as an ONNX file; its weights stay in a safetensors file, which several graphs share."""

import gc
import json
import logging
import math
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from onnxscript import ir
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec_rt.manifest import WEIGHTS_KEY, Bindings, Precision
from specdec_rt.types import Array

__all__ = [
    "ONNX_TYPES",
    "OPSET",
    "TORCH_TYPES",
    "WeightsFile",
    "export_graph",
    "rounding_changes",
    "save_weights",
    "to_model_proto",
]

OPSET = 22
SHARED_BYTES = 1024
"""Initialisers of less than this are stored in the graph itself."""
INSIDE_BYTES = 1 << 20
"""No initialiser of more than this may be stored in the graph: it is a weight that should be in the file."""
TORCH_TYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
ONNX_TYPES: dict[Precision, int] = {
    "fp32": onnx.TensorProto.FLOAT,
    "fp16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class StoredWeight:
    """Where a weights file holds the values of a graph's initialiser."""

    offset: int
    """of the first byte, from the beginning of the file"""
    length: int
    """in bytes"""
    shape: tuple[int, ...]
    """as stored"""
    transposed: bool
    """whether the initialiser is the transpose of what is stored"""


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file that several graphs read as their external data.

    The exporter renames parameters, slices some and transposes the weights of linear layers, but it copies none.
    So an initialiser is recognised by its address in memory.
    """

    path: Path
    precision: Precision
    tensors: tuple[Tensor, ...]
    """the modules' own parameters, float32, by ascending address in memory"""
    offsets: tuple[int, ...]
    """the first byte of each of them in the file"""

    def find(self, value: Array) -> StoredWeight | None:
        """The part of the file that holds `value`; None where `value` is not memory of one of the tensors."""
        address = _address(value)
        index = bisect_right(self.tensors, address, key=Tensor.data_ptr) - 1
        if index < 0 or value.dtype != np.float32:
            return None
        tensor = self.tensors[index]
        before = (address - tensor.data_ptr()) // tensor.element_size()
        transposed = not value.flags.c_contiguous
        if before + value.size > tensor.numel() or (transposed and not value.T.flags.c_contiguous):
            return None
        size = TORCH_TYPES[self.precision].itemsize
        shape = value.T.shape if transposed else value.shape
        return StoredWeight(self.offsets[index] + before * size, value.size * size, shape, transposed)


def rounding_changes(modules: Mapping[str, nn.Module], precision: Precision) -> bool:
    """Whether storing the modules' parameters in `precision` would change any of them."""
    dtype = TORCH_TYPES[precision]
    return any(
        not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
        for module in modules.values()
        for tensor in module.state_dict().values()
    )


def save_weights(
    modules: Mapping[str, nn.Module], path: Path, *, precision: Precision, metadata: Mapping[str, str] | None = None
) -> WeightsFile:
    """Write the parameters of modules, which are keyed by a prefix: `{prefix}.{name}`, or `{name}` with prefix "".

    The modules' own parameters are rounded to `precision` first, so that they equal what the file holds. It is an
    ordinary safetensors file, from which the models can be loaded into torch again.
    """
    parameters: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        for name, parameter in module.state_dict(keep_vars=True).items():
            parameter.data = parameter.data.contiguous()
            if precision != "fp32":
                parameter.data.copy_(parameter.data.to(TORCH_TYPES[precision]))
            parameters[f"{prefix}.{name}" if prefix else name] = parameter.data
    stored = {name: tensor.to(TORCH_TYPES[precision]) for name, tensor in parameters.items()}
    save_file(stored, path, dict(metadata) if metadata else None)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    names = sorted(parameters, key=lambda name: parameters[name].data_ptr())
    return WeightsFile(
        path,
        precision,
        tuple(parameters[name] for name in names),
        tuple(start + header[name]["data_offsets"][0] for name in names),
    )


def export_graph(
    module: nn.Module, examples: Sequence[Any], bindings: Bindings, path: Path, weights: WeightsFile
) -> None:
    """Export `module` to `path` and check the file; every size that its bindings name by a letter is dynamic.

    `examples` are arguments of the module in the order of its inputs: tensors, then at most one list of tensors.
    Weights are taken out before the graph is serialised, for an ONNX file cannot hold more than 2 GB.
    """
    inputs, outputs = bindings
    shapes = [
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(binding.shape) if isinstance(size, str)}
        for binding in inputs
    ]
    positional = sum(isinstance(example, Tensor) for example in examples)
    nested = (*shapes[:positional], *([shapes[positional:]] if positional < len(shapes) else []))
    program = _trace(
        module, examples, [binding.name for binding in inputs], [binding.name for binding in outputs], nested
    )
    stored = _take_out_weights(program.model.graph, weights)
    model = _to_proto(program)
    _name_sizes(model, bindings)
    _refer_to_file(model, stored, weights)
    values = sum(math.prod(weight.shape) for weight in stored.values())
    model.metadata_props.add(key=WEIGHTS_KEY, value=str(values))
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


def to_model_proto(
    module: nn.Module,
    examples: Sequence[Any],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: Sequence[Any],
) -> onnx.ModelProto:
    """`module`, traced on `examples`, as a model that holds its weights itself."""
    return _to_proto(_trace(module, examples, input_names, output_names, dynamic_shapes))


def _trace(
    module: nn.Module,
    examples: Sequence[Any],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: Sequence[Any],
) -> torch.onnx.ONNXProgram:
    """Run torch's exporter, without its log of optional packages that are not installed."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), _without_garbage_collection():
        warnings.simplefilter("ignore", FutureWarning)  # torch itself uses names that it deprecates
        program = torch.onnx.export(
            module.eval(),
            tuple(examples),
            dynamo=True,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=tuple(dynamic_shapes),
            verbose=False,
        )
    assert program is not None
    return program


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Tracing makes millions of small objects; searching them for garbage takes a sixth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _to_proto(program: torch.onnx.ONNXProgram) -> onnx.ModelProto:
    """The ONNX model without the exporter's notes: most of the file's bytes, with paths of this machine in them."""
    model = program.model_proto
    for annotated in (model.graph, *model.graph.input, *model.graph.output, *model.graph.node):
        annotated.ClearField("metadata_props")
    model.graph.ClearField("value_info")  # it names sizes by the exporter's own letters
    return model


def _take_out_weights(graph: ir.Graph, weights: WeightsFile) -> dict[str, StoredWeight]:
    """Empty the initialisers whose values the weights file holds; returns where it holds them, by name."""
    stored: dict[str, StoredWeight] = {}
    for name, initialiser in graph.initializers.items():
        assert initialiser.const_value is not None
        value = initialiser.const_value.numpy()
        weight = weights.find(value)
        if weight is not None and weight.length >= SHARED_BYTES:
            stored[name] = weight
            initialiser.const_value = ir.tensor(np.empty(0, np.float32), name=name)
        else:
            assert value.nbytes <= INSIDE_BYTES, f"{name} {value.shape} is not in {weights.path}"
    return stored


def _refer_to_file(model: onnx.ModelProto, stored: Mapping[str, StoredWeight], weights: WeightsFile) -> None:
    """Make the emptied initialisers refer to the weights file, and add nodes that cast and transpose them back.

    Every backend folds these nodes when it loads the graph.
    """
    restoring: list[onnx.NodeProto] = []
    rounded = weights.precision != "fp32"
    for initialiser in model.graph.initializer:
        if initialiser.name not in stored:
            continue
        wanted, weight = initialiser.name, stored[initialiser.name]
        value = f"{wanted}.stored" if rounded or weight.transposed else wanted
        initialiser.CopyFrom(
            onnx.TensorProto(
                name=value,
                data_type=ONNX_TYPES[weights.precision],
                dims=weight.shape,
                data_location=onnx.TensorProto.EXTERNAL,
            )
        )
        location = {"location": weights.path.name, "offset": weight.offset, "length": weight.length}
        for key, part in location.items():
            initialiser.external_data.add(key=key, value=str(part))
        if rounded:
            cast = f"{wanted}.cast" if weight.transposed else wanted
            restoring.append(helper.make_node("Cast", [value], [cast], to=onnx.TensorProto.FLOAT))
            value = cast
        if weight.transposed:
            restoring.append(helper.make_node("Transpose", [value], [wanted], perm=[1, 0]))
    nodes = [*restoring, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _name_sizes(model: onnx.ModelProto, bindings: Bindings) -> None:
    """Name the dynamic sizes of inputs and outputs by the letters of the bindings."""
    for values, declared in zip((model.graph.input, model.graph.output), bindings, strict=True):
        for value, binding in zip(values, declared, strict=True):
            assert value.name == binding.name, (value.name, binding.name)
            shape = value.type.tensor_type.shape
            assert len(shape.dim) == len(binding.shape), binding
            for dimension, size in zip(shape.dim, binding.shape, strict=True):
                if isinstance(size, int):
                    dimension.dim_value = size
                else:
                    dimension.dim_param = size


def _address(value: Array) -> int:
    address: int = value.__array_interface__["data"][0]
    return address
