"""What counts as the same. Tokens are of order 1; a decision that goes another way moves one by about that much."""

import numpy as np

__all__ = ["SAME_TO_ROUNDING", "largest_difference"]

SAME_TO_ROUNDING = 2e-4
"""Between tokens of one image: kernels round differently for other shapes of a batch, and an image feeds that back."""


def largest_difference(first, second):
    """The largest absolute difference of any two values."""
    return float(np.abs(np.asarray(first) - np.asarray(second)).max())
