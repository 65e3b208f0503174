"""One recorded quantity against what a bundle's engines give, with its tolerance."""

import math
from dataclasses import dataclass

import numpy as np

from export.reference import RecordingError
from specdec_rt.manifest import Precision
from specdec_rt.types import Array

__all__ = ["ALLOWANCE", "IMAGE_TOLERANCE", "TABLE_TOLERANCE", "TOLERANCE", "Comparison", "relative_error"]

TOLERANCE = 1e-4
"""Relative L2 error that is allowed in single evaluations, and in single chains of denoising steps."""
IMAGE_TOLERANCE = 1e-3
"""The same for whole images, in which errors feed back."""
TABLE_TOLERANCE = 1e-6
"""The same for the chain's own numbers, which are computed in double precision."""
ALLOWANCE: dict[Precision, float] = {"fp32": 1, "fp16": 50, "bf16": 200}
"""Factor on the tolerances of what a model computes, by the precision that its weights are stored in."""


@dataclass(frozen=True)
class Comparison:
    """The outcome for one recorded quantity."""

    name: str
    tolerance: float
    error: float | None = None
    """relative L2 error of what the engines gave; None where nothing could be compared"""
    problem: str = ""
    """why nothing could be compared"""

    @property
    def passed(self) -> bool:
        """Whether the quantity was compared and is within its tolerance."""
        return self.error is not None and self.error <= self.tolerance


def relative_error(name: str, found: Array, recorded: Array) -> float:
    """Relative L2 error; 0 where zeros were recorded and found. Raises RecordingError where shapes or kinds differ."""
    if found.shape != recorded.shape or recorded.dtype.kind not in "biuf":
        raise RecordingError(
            f"{name} is {recorded.dtype} {list(recorded.shape)}; the bundle gives numbers {list(found.shape)}"
        )
    expected = recorded.astype(np.float64)
    difference, size = np.linalg.norm(found.astype(np.float64) - expected), np.linalg.norm(expected)
    if difference == 0:
        return 0.0
    return float(difference / size) if size > 0 else math.inf
