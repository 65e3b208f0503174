"""Whether a graph computes what its torch module computes, and what rounding its weights costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

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
    "torch_outputs",
]

TOLERANCE = 1e-4
"""Relative L2 error that single evaluations in single precision may show."""
PRECISION_TOLERANCE: dict[Precision, float] = {"fp16": 5e-3, "bf16": 2e-2}
"""Relative L2 error that rounding the weights may cause."""


class ParityError(SpecDecError):
    """A graph's outputs differ from its torch module's."""


def torch_outputs(module: nn.Module, examples: Sequence[Any]) -> list[Array]:
    """What `module` makes of its arguments: tensors, then at most one list of tensors."""
    with torch.no_grad():
        outputs = module(*examples)
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def graph_outputs(path: Path, examples: Sequence[Any], inputs: Sequence[Binding]) -> list[Array]:
    """What the graph at `path` makes of the same arguments.

    It runs as it is written: folded or packed weights would be a second copy in memory.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    flat: list[Tensor] = [t for example in examples for t in (example if isinstance(example, list) else [example])]
    outputs: list[Array] = session.run(
        None, {binding.name: value.numpy() for binding, value in zip(inputs, flat, strict=True)}
    )
    return outputs


def require_agreement(path: Path, found: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest relative L2 error of the graph's outputs; ParityError where it is over TOLERANCE (or no number)."""
    error = _largest_error(found, expected)
    if not error <= TOLERANCE:
        raise ParityError(
            f"{path.name} differs from torch by {error:.2e} (relative L2); at most {TOLERANCE} is allowed"
        )
    return error


def require_precision(path: Path, found: Sequence[Array], unrounded: Sequence[Array], precision: Precision) -> float:
    """The same against the model before its weights were rounded to `precision`, with that precision's tolerance."""
    error, limit = _largest_error(found, unrounded), PRECISION_TOLERANCE[precision]
    if not error <= limit:
        raise ParityError(
            f"{path.name} with weights in {precision} differs from the unrounded model by {error:.2e} (relative L2); "
            f"at most {limit} is allowed; store them in single precision: --precision fp32"
        )
    return error


def _largest_error(found: Sequence[Array], expected: Sequence[Array]) -> float:
    # NumPy's max keeps a NaN, Python's may lose it.
    return float(np.max([_relative_error(got, wanted) for got, wanted in zip(found, expected, strict=True)]))


def _relative_error(found: Array, expected: Array) -> float:
    wanted = expected.astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
