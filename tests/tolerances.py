"""What counts as the same. Tokens are of order 1; a decision that goes another way moves one by about that much."""

import numpy as np

__all__ = ["SAME_TO_ANOTHER_LIBRARY", "SAME_TO_ROUNDING", "largest_difference"]

SAME_TO_ROUNDING = 1e-3
"""Between the tokens of an image by one library: for another shape of batch its kernels round differently, and what is
fed back lets that grow. Most images differ by 1e-5, one in a hundred by more than 1e-4."""
SAME_TO_ANOTHER_LIBRARY = 1e-2
"""The same between libraries, or between a GPU and a CPU. Of 32 images that ONNX Runtime and PyTorch draw on one CPU,
one differs by 0.0017, the others by less than 0.001."""


def largest_difference(first, second):
    """The largest absolute difference of two values."""
    return float(np.abs(np.asarray(first) - np.asarray(second)).max())
