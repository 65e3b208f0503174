"""Shared types, and the legend of the letters that shapes are written in: each letter has one meaning.

A  slots of a batch: images that are decoded together
B  the batch axis: images of a request, or rows of a backbone's call
C  contexts of a MAR backbone's call: an image before one of its AR steps
D  values in a token
Dh values of an attention head
E  evaluations of the diffusion head along one chain: n of them, or as many as a draft takes
G  guidance branches: 1, or 2 (with the label, without it)
H  attention heads
J  rows picked out of R, mostly those whose draft was rejected
K  visible tokens of a context
L  tokens in an image
M  values of modulation that a condition makes for one denoising step
n  transitions in a chain (for what is left of one, the letter stays and the text says so)
N  positions that a causal backbone is fed for each row
P  pairs of a row and a denoising step for which modulation is made
Q  positions that a context asks about
R  rows: tokens of any images, flattened
S  positions that a key and value cache has room for
T  AR steps of an image
W  width of a diffusion head, values in a row of its time table
Z  values in a condition

Pixels are written out: `[B, height, width, channels]`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "BoolArray", "FloatArray", "IntArray"]

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
