"""Whether a graph computes what its torch module computes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch import Tensor, nn

from specdec_rt.bundle import Binding

__all__ = ["TOLERANCE", "ParityError", "require_parity"]

TOLERANCE = 1e-4
"""Relative L2 error that single evaluations in single precision may show."""


class ParityError(Exception):
    """A graph's outputs differ from its torch module's."""


def require_parity(module: nn.Module, examples: Sequence[Any], inputs: Sequence[Binding], path: Path) -> float:
    """Run both on the same inputs; the largest relative L2 error of an output.

    Raises ParityError where that is over TOLERANCE (or not a number).
    """
    expected = module(*examples)
    expected = expected if isinstance(expected, tuple) else (expected,)
    flat = [t for example in examples for t in (example if isinstance(example, list) else [example])]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {binding.name: value.numpy() for binding, value in zip(inputs, flat, strict=True)})
    # NumPy's max keeps a NaN, Python's may lose it.
    error = float(np.max([_relative_error(got, wanted) for got, wanted in zip(found, expected, strict=True)]))
    if not error <= TOLERANCE:
        raise ParityError(
            f"{path.name} differs from torch by {error:.2e} (relative L2); at most {TOLERANCE} is allowed"
        )
    return error


def _relative_error(found: np.ndarray[Any, Any], expected: Tensor) -> float:
    wanted = expected.numpy().astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
