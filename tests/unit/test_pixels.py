"""Tokens as pixels, in each family's order of values."""

import numpy as np
import pytest

from specdec_rt.backends.host import HostDevice
from specdec_rt.manifest import ImageLayout
from specdec_rt.pixels import decode_pixels, lay_patches, to_bytes

LAYOUT = ImageLayout(height=4, width=6, channels=3, patch=2)


@pytest.mark.parametrize(("family", "axes"), [("causal", (1, 3, 2, 4, 5)), ("mar", (1, 3, 5, 2, 4))])
def test_patches_are_laid_in_raster_order(family, axes):
    """`axes` bring (row, y, column, x, channel) of an image to the order of a token's values."""
    images = np.random.default_rng(0).standard_normal((5, 4, 6, 3), dtype=np.float32)
    grid = images.reshape(5, 2, 2, 3, 2, 3)
    tokens = grid.transpose(0, *axes).reshape(5, 6, 12)
    np.testing.assert_array_equal(lay_patches(tokens, LAYOUT, family), images)


def test_values_outside_are_clipped():
    np.testing.assert_array_equal(to_bytes(np.array([-2.0, -1.0, 0.0, 1.0, 9.0])), [0, 0, 128, 255, 255])


class CountingDecoder:
    """Paints every pixel with its image's first value; notes how many images it is given at a time."""

    def __init__(self):
        self.sizes = []

    def bind(self, inputs, outputs, *, once):
        def call():
            assert once
            self.sizes.append(len(inputs["tokens"]))
            outputs["pixels"][:] = inputs["tokens"][:, :1, :1, None]

        return call


def test_a_large_batch_is_decoded_in_parts():
    layout = ImageLayout(height=512, width=256, channels=3, patch=16)
    tokens = np.arange(9, dtype=np.float32).repeat(512 * 4).reshape(9, 512, 4)
    decoder = CountingDecoder()
    pixels = decode_pixels(tokens, layout, HostDevice(), decoder)
    assert decoder.sizes == [4, 4, 1]
    np.testing.assert_array_equal(pixels[:, 100, 100, 0], np.arange(9))
