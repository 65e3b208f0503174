"""Compares graphs with torch: exported ones, those with rounded weights, and those that compute in half."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from export.emulation import emulated
from specdec_rt.errors import SpecDecError
from specdec_rt.manifest import Binding, Precision
from specdec_rt.types import Array

__all__ = [
    "PRECISION_TOLERANCE",
    "TOLERANCE",
    "ParityError",
    "graph_outputs",
    "require_agreement",
    "require_precision",
    "require_variant",
    "torch_outputs",
    "variant_outputs",
]

TOLERANCE = 1e-4
"""Relative L2 error that is allowed in one evaluation of a graph in single precision."""
PRECISION_TOLERANCE: dict[Precision, float] = {"fp16": 5e-3, "bf16": 2e-2}
"""Relative L2 error that is allowed where weights are rounded, and where a graph computes in half."""


class ParityError(SpecDecError):
    """A graph's outputs differ from its torch module's."""


def torch_outputs(module: nn.Module, examples: Sequence[Any]) -> list[Array]:
    """What `module` computes from its arguments: tensors, then at most one list of tensors."""
    with torch.no_grad():
        outputs = module(*examples)
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def graph_outputs(path: Path, examples: Sequence[Any], inputs: Sequence[Binding]) -> list[Array]:
    """What the graph at `path` computes from the same arguments."""
    return _run(str(path), path.parent, examples, inputs, onnxruntime.ExecutionOrder.DEFAULT)


def variant_outputs(
    path: Path, precision: Precision, examples: Sequence[Any], inputs: Sequence[Binding]
) -> list[Array]:
    """What a GPU would compute from them with the graph at `path`, which is in `precision`; see `emulation`."""
    model = emulated(onnx.load(path, load_external_data=False), precision)
    # The default order would cast every weight before the first one is used, and so hold two copies of all.
    return _run(model.SerializeToString(), path.parent, examples, inputs, onnxruntime.ExecutionOrder.PRIORITY_BASED)


def _run(
    model: str | bytes, folder: Path, examples: Sequence[Any], inputs: Sequence[Binding], order: Any
) -> list[Array]:
    """Run a graph whose weights are in `folder`, with no optimisation that would keep a second copy of weights."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.execution_order = order
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    flat: list[Tensor] = [t for example in examples for t in (example if isinstance(example, list) else [example])]
    outputs: list[Array] = session.run(
        None, {binding.name: value.numpy() for binding, value in zip(inputs, flat, strict=True)}
    )
    return outputs


def require_agreement(path: Path, found: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest relative L2 error of the graph's outputs against torch's.

    Raises ParityError where it is over TOLERANCE, or not a number.
    """
    return _require(found, expected, TOLERANCE, f"{path.name} differs from torch")


def require_precision(path: Path, found: Sequence[Array], unrounded: Sequence[Array], precision: Precision) -> float:
    """The largest relative L2 error of a module whose weights were rounded to `precision`, against unrounded weights.

    Raises ParityError where it is over the precision's tolerance, or not a number.
    """
    what = f"{path.name} with weights in {precision} differs from the unrounded model"
    advice = "; store them in single precision: --precision fp32"
    return _require(found, unrounded, PRECISION_TOLERANCE[precision], what, advice)


def require_variant(path: Path, found: Sequence[Array], expected: Sequence[Array], precision: Precision) -> float:
    """The largest relative L2 error of a graph that computes in `precision`, against single precision.

    Raises ParityError where it is over the precision's tolerance, or not a number.
    """
    what, advice = f"{path.name} differs from single precision", f"; leave {precision} out of --compute"
    return _require(found, expected, PRECISION_TOLERANCE[precision], what, advice)


def _require(found: Sequence[Array], expected: Sequence[Array], limit: float, what: str, advice: str = "") -> float:
    error = _largest_error(found, expected)
    if not error <= limit:  # false for a NaN
        raise ParityError(f"{what} by {error:.2e} (relative L2); at most {limit} is allowed{advice}")
    return error


def _largest_error(found: Sequence[Array], expected: Sequence[Array]) -> float:
    # np.max keeps a NaN; Python's max may lose it.
    return float(np.max([_relative_error(got, wanted) for got, wanted in zip(found, expected, strict=True)]))


def _relative_error(found: Array, expected: Array) -> float:
    wanted = expected.astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
