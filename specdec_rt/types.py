"""Shared types, and the legend of the letters that shapes are written in.

B images in a batch   L tokens in an image   D values in a token    Z values in a condition
γ draft length        n transitions in a chain   R rows (tokens of any image, flattened)
G guidance branches (1, or 2: conditional, unconditional)   H heads   Dh values a head   S cache slots
P pairs of a row and a step, for which modulation of M values is made
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "BoolArray", "FloatArray", "IntArray"]

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
