"""How far arrays are from what they should be."""

import numpy as np

__all__ = ["relative_error"]


def relative_error(found, expected):
    """Relative L2 error of arrays or tensors of one shape, in double precision."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
