"""From tokens to pixels: patches laid out as an image, or a decoder's engine run over batches that fit."""

import numpy as np

from specdec_rt.backends.base import Device, Engine, run_once
from specdec_rt.capacity import Capacity
from specdec_rt.manifest import Family, ImageLayout
from specdec_rt.types import Array, FloatArray

__all__ = ["decode_pixels", "lay_patches", "to_bytes"]


def lay_patches(tokens: FloatArray, layout: ImageLayout, family: Family) -> FloatArray:
    """Tokens `[B, L, D]`, each a patch's pixels in the family's order, to images `[B, height, width, channels]`."""
    patch, channels = layout.patch, layout.channels
    grid = (len(tokens), layout.height // patch, layout.width // patch)
    if family == "mar":
        pixels = tokens.reshape(*grid, channels, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    else:
        pixels = tokens.reshape(*grid, patch, patch, channels).swapaxes(2, 3)
    return pixels.reshape(-1, layout.height, layout.width, channels)


def decode_pixels(
    tokens: FloatArray, layout: ImageLayout, device: Device, decoder: Engine, capacity: Capacity = Capacity()
) -> FloatArray:
    """Tokens `[B, L, D]` to images `[B, height, width, channels]`, as many at a time as fit."""
    size = capacity.images_per_decode(layout.height * layout.width)
    shape = (layout.height, layout.width, layout.channels)
    parts = [tokens[begin : begin + size] for begin in range(0, len(tokens), size)]
    return np.concatenate(
        [run_once(device, decoder, {"tokens": part}, {"pixels": (len(part), *shape)})["pixels"] for part in parts]
    )


def to_bytes(pixels: FloatArray) -> Array:
    """Values in [-1, 1] to uint8; what lies outside is clipped."""
    return np.asarray(np.clip(np.rint((pixels + 1) * 127.5), 0, 255), np.uint8)
