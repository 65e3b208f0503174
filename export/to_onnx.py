"""torch module → ONNX file whose weights lie in a safetensors file that several graphs share."""

import json
import logging
import math
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
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

__all__ = ["OPSET", "WeightsFile", "export_graph", "save_weights", "to_model_proto"]

OPSET = 22
SHARED_BYTES = 1024
"""Initialisers smaller than this stay inside their graph."""
INSIDE_BYTES = 1 << 20
"""No initialiser that stays inside is larger: a graph whose weights are not found in their file is a mistake."""
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
class Entry:
    """Where a graph's initialiser lies in a weights file, and whether it lies there transposed."""

    offset: int
    length: int
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file that is the external data of several graphs at once.

    The exporter renames parameters, slices some, and turns a linear layer's weight, but copies none: what an
    initialiser is shows by where it lies in memory.
    """

    path: Path
    precision: Precision
    tensors: tuple[Tensor, ...]
    """the modules' own parameters, float32, by ascending address"""
    offsets: tuple[int, ...]
    """where each of them begins in the file"""

    def find(self, value: Array) -> Entry | None:
        """The part of the file that holds `value`, if it is memory of one of the tensors."""
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
        return Entry(self.offsets[index] + before * size, value.size * size, shape, transposed)


def save_weights(
    modules: Mapping[str, nn.Module], path: Path, *, precision: Precision, metadata: Mapping[str, str] | None = None
) -> WeightsFile:
    """Write the modules' parameters, named `{prefix}.{name}` (or as they are where the prefix is empty).

    The modules' own parameters are rounded first, in place, so that they stay what the file holds. It is an
    ordinary safetensors file: the models can be loaded back into torch from their bundle.
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
    """Export `module` at opset 22 with every symbolic size of its bindings dynamic; check the result.

    `examples` are its arguments (tensors, then at most one list of tensors), in the bindings' order. Weights
    never pass through the ONNX file, which could not hold 2 GB.
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
    shared = _take_out_weights(program.model.graph, weights)
    model = _to_proto(program)
    _name_sizes(model, bindings)
    _put_in_entries(model, shared, weights)
    values = sum(math.prod(entry.shape) for entry in shared.values())
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
    """`module`, traced on `examples`, with its weights inside."""
    return _to_proto(_trace(module, examples, input_names, output_names, dynamic_shapes))


def _trace(
    module: nn.Module,
    examples: Sequence[Any],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: Sequence[Any],
) -> torch.onnx.ONNXProgram:
    """Run the exporter without its remarks on packages that it does not need."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its own deprecated names
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


def _to_proto(program: torch.onnx.ONNXProgram) -> onnx.ModelProto:
    """Without the exporter's notes on each node: they hold this machine's paths, and most of the file's bytes."""
    model = program.model_proto
    for annotated in (model.graph, *model.graph.input, *model.graph.output, *model.graph.node):
        annotated.ClearField("metadata_props")
    model.graph.ClearField("value_info")  # names sizes by the exporter's own letters
    return model


def _take_out_weights(graph: ir.Graph, weights: WeightsFile) -> dict[str, Entry]:
    """Replace what lies in the weights file by nothing, before it is serialised; where it lies, by name."""
    shared: dict[str, Entry] = {}
    for name, initialiser in graph.initializers.items():
        assert initialiser.const_value is not None
        value = initialiser.const_value.numpy()
        entry = weights.find(value)
        if entry is not None and entry.length >= SHARED_BYTES:
            shared[name] = entry
            initialiser.const_value = ir.tensor(np.empty(0, np.float32), name=name)
        else:
            assert value.nbytes <= INSIDE_BYTES, f"{name} {value.shape} is not in {weights.path}"
    return shared


def _put_in_entries(model: onnx.ModelProto, shared: Mapping[str, Entry], weights: WeightsFile) -> None:
    """Let initialisers lie in the weights file, cast and transposed back by nodes.

    Every backend folds those nodes when it loads the graph.
    """
    restoring: list[onnx.NodeProto] = []
    rounded = weights.precision != "fp32"
    for initialiser in model.graph.initializer:
        if initialiser.name not in shared:
            continue
        wanted, entry = initialiser.name, shared[initialiser.name]
        stored = f"{wanted}.stored" if rounded or entry.transposed else wanted
        initialiser.CopyFrom(
            onnx.TensorProto(
                name=stored,
                data_type=ONNX_TYPES[weights.precision],
                dims=entry.shape,
                data_location=onnx.TensorProto.EXTERNAL,
            )
        )
        place = {"location": weights.path.name, "offset": entry.offset, "length": entry.length}
        for key, value in place.items():
            initialiser.external_data.add(key=key, value=str(value))
        if rounded:
            cast = f"{wanted}.cast" if entry.transposed else wanted
            restoring.append(helper.make_node("Cast", [stored], [cast], to=onnx.TensorProto.FLOAT))
            stored = cast
        if entry.transposed:
            restoring.append(helper.make_node("Transpose", [stored], [wanted], perm=[1, 0]))
    nodes = [*restoring, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _name_sizes(model: onnx.ModelProto, bindings: Bindings) -> None:
    """Give the symbolic sizes of inputs and outputs the contract's letters."""
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
