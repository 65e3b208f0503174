"""torch module → ONNX file whose weights lie in a safetensors file that several graphs share."""

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec_rt.bundle import Binding
from specdec_rt.types import Array

__all__ = ["OPSET", "WeightsFile", "export_graph", "save_weights", "to_model_proto"]

OPSET = 22
SHARED_BYTES = 1024
"""Initialisers smaller than this stay inside their graph."""

Bindings = tuple[tuple[Binding, ...], tuple[Binding, ...]]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a weights file."""

    offset: int
    length: int
    shape: tuple[int, ...]
    half: bool
    transposed: bool


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file that is the external data of several graphs at once.

    Its tensors are found by value: the exporter renames parameters, and stores a linear layer's
    weight transposed.
    """

    path: Path
    entries: Mapping[bytes, Entry]


def save_weights(modules: Mapping[str, nn.Module], path: Path, *, half: bool) -> WeightsFile:
    """Write the modules' parameters, named `{prefix}.{name}`, in half or single precision.

    With `half` the modules' own parameters are rounded first, so that they stay what the file holds.
    The file is an ordinary safetensors file: the models can be loaded back into torch from their bundle.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        for name, parameter in module.state_dict(keep_vars=True).items():
            if half:
                parameter.data = parameter.data.half().float()
            tensors[f"{prefix}.{name}"] = parameter.data.to(torch.float16 if half else torch.float32).contiguous()
    save_file(tensors, path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    entries: dict[bytes, Entry] = {}
    for name, tensor in tensors.items():
        begin, end = header[name]["data_offsets"]
        value = tensor.float().numpy()
        plain = Entry(start + begin, end - begin, value.shape, half, transposed=False)
        entries[_fingerprint(value)] = plain
        if value.ndim == 2:
            turned = Entry(plain.offset, plain.length, plain.shape, half, transposed=True)
            entries.setdefault(_fingerprint(value.T), turned)
    return WeightsFile(path, entries)


def export_graph(
    module: nn.Module, examples: Sequence[Any], bindings: Bindings, path: Path, weights: WeightsFile
) -> None:
    """Export `module` at opset 22 with every symbolic size of its bindings dynamic; check the result.

    `examples` are its arguments (tensors, then at most one list of tensors), in the bindings' order.
    """
    inputs, outputs = bindings
    shapes = [
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(binding.shape) if isinstance(size, str)}
        for binding in inputs
    ]
    positional = sum(isinstance(example, Tensor) for example in examples)
    nested = (*shapes[:positional], *([shapes[positional:]] if positional < len(shapes) else []))
    model = to_model_proto(
        module, examples, [binding.name for binding in inputs], [binding.name for binding in outputs], nested
    )
    _name_sizes(model, bindings)
    _share_weights(model, weights)
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


def to_model_proto(
    module: nn.Module,
    examples: Sequence[Any],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: Sequence[Any],
) -> onnx.ModelProto:
    """Trace `module` on `examples`; without the exporter's remarks on packages that it does not need."""
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
    return program.model_proto


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
    model.graph.ClearField("value_info")  # names sizes by the exporter's own letters


def _share_weights(model: onnx.ModelProto, weights: WeightsFile) -> None:
    """Replace initialisers by entries of the weights file, cast and transposed back by nodes.

    Every backend folds those nodes when it loads the graph.
    """
    restoring: list[onnx.NodeProto] = []
    for initialiser in model.graph.initializer:
        entry = weights.entries.get(_fingerprint(numpy_helper.to_array(initialiser)))
        if entry is None or entry.length < SHARED_BYTES:
            continue
        wanted = initialiser.name
        stored = f"{wanted}.stored" if entry.half or entry.transposed else wanted
        initialiser.CopyFrom(
            onnx.TensorProto(
                name=stored,
                data_type=onnx.TensorProto.FLOAT16 if entry.half else onnx.TensorProto.FLOAT,
                dims=entry.shape,
                data_location=onnx.TensorProto.EXTERNAL,
            )
        )
        place = {"location": weights.path.name, "offset": entry.offset, "length": entry.length}
        for key, value in place.items():
            initialiser.external_data.add(key=key, value=str(value))
        if entry.half:
            cast = f"{wanted}.cast" if entry.transposed else wanted
            restoring.append(helper.make_node("Cast", [stored], [cast], to=onnx.TensorProto.FLOAT))
            stored = cast
        if entry.transposed:
            restoring.append(helper.make_node("Transpose", [stored], [wanted], perm=[1, 0]))
    nodes = [*restoring, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _fingerprint(value: Array) -> bytes:
    digest = hashlib.sha256(repr((value.shape, str(value.dtype))).encode())
    digest.update(np.ascontiguousarray(value).data)
    return digest.digest()
