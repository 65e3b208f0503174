"""Whether graphs compute what they should: a torch module's outputs, or those that a reference recorded.

`python -m export.parity DIR REFERENCE.npz` replays a recorded reference through a MAR bundle's engines
(`export.replay`; `docs/mar.md` says what the file holds). Exit code 1: something differs or is missing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from specdec_rt import load
from specdec_rt.errors import SpecDecError
from specdec_rt.manifest import Binding, Precision
from specdec_rt.types import Array

__all__ = [
    "PRECISION_TOLERANCE",
    "TOLERANCE",
    "ParityError",
    "graph_outputs",
    "main",
    "require_agreement",
    "require_parity",
    "require_precision",
    "torch_outputs",
]

TOLERANCE = 1e-4
"""Relative L2 error that single evaluations in single precision may show."""
PRECISION_TOLERANCE: dict[Precision, float] = {"fp16": 5e-3, "bf16": 2e-2}
"""Relative L2 error that rounding the weights may cause."""


class ParityError(SpecDecError):
    """A graph's outputs differ from its torch module's."""


def require_parity(module: nn.Module, examples: Sequence[Any], inputs: Sequence[Binding], path: Path) -> float:
    """Run both on the same inputs; the largest relative L2 error of an output.

    Raises ParityError where that is over TOLERANCE (or not a number).
    """
    expected = torch_outputs(module, examples)
    return require_agreement(path, graph_outputs(path, examples, inputs), expected)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Replay, print a line for each quantity; 0 where all are within their tolerances."""
    parser = argparse.ArgumentParser(prog="python -m export.parity", description=__doc__)
    parser.add_argument("bundle", metavar="DIR", help="a MAR bundle")
    parser.add_argument("reference", type=Path, metavar="REFERENCE.npz")
    arguments = parser.parse_args(argv)
    from export.replay import replay  # needs the whole runtime, which exporters do not

    try:
        comparisons = replay(load(arguments.bundle), arguments.reference)
    except SpecDecError as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        return error.exit_code
    table = Table("quantity", "relative L2 error", "tolerance", "")
    for comparison in comparisons:
        found = comparison.problem if comparison.error is None else f"{comparison.error:.1e}"
        table.add_row(
            comparison.name, found, f"{comparison.tolerance:.0e}", "passed" if comparison.passed else "FAILED"
        )
    failed = sum(not comparison.passed for comparison in comparisons)
    Console().print(table)
    Console().print(f"{len(comparisons) - failed} of {len(comparisons)} quantities passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
