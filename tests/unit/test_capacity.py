"""What fits one call: bounds that hold, and at least one of everything."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec_rt.backends.host import HostDevice
from specdec_rt.capacity import BRANCHES, Capacity
from specdec_rt.manifest import ImageLayout
from specdec_rt.pixels import decode_pixels

SIZES = st.integers(1, 5000)


@given(rows=SIZES, width=SIZES, steps=st.integers(1, 200))
def test_modulation_made_at_a_time_fits_or_is_one_steps(rows, width, steps):
    capacity = Capacity(modulation_values=2**20)
    count = capacity.modulation_steps(rows, width, steps)
    assert 1 <= count <= steps
    assert count == 1 or count * rows * width * BRANCHES <= capacity.modulation_values
    assert count == 1 or count * rows <= capacity.modulation_pairs(width)


def test_modulation_of_a_second_step_begins_aligned():
    capacity = Capacity()
    assert capacity.modulation_steps(3, 64, 10) == 10
    assert capacity.modulation_steps(3, 63, 10) == 1  # 189 values are 756 bytes: no multiple of 256


@given(branches=st.integers(1, 2), width=SIZES, steps=st.integers(1, 200))
def test_paths_judged_at_a_time_fit_or_are_one(branches, width, steps):
    capacity = Capacity(states_per_call=2**10, modulation_values=2**20)
    count = capacity.paths_per_call(branches, width, steps)
    assert count == 1 or count * steps * branches <= capacity.states_per_call
    assert count == 1 or count * steps * width * BRANCHES <= capacity.modulation_values


@pytest.mark.parametrize(
    ("capacity", "width", "paths"),
    [(Capacity(), 64, 2**14 // 50), (Capacity(states_per_call=10), 64, 1), (Capacity(modulation_values=2**14), 64, 5)],
)
def test_the_smaller_bound_counts_for_paths(capacity, width, paths):
    assert capacity.paths_per_call(2, width, 25) == paths


@pytest.mark.parametrize(("side", "images"), [(256, 8), (512, 2), (1024, 1), (28, 668)])
def test_images_decoded_at_a_time(side, images):
    assert Capacity().images_per_decode(side * side) == images


class CountingDecoder:
    """Notes how many images it is given at a time."""

    def __init__(self):
        self.sizes = []

    def bind(self, inputs, outputs, *, once):  # noqa: ARG002  # the protocol's
        return lambda: self.sizes.append(len(inputs["tokens"]))


def test_a_decoder_is_given_what_fits():
    layout, decoder = ImageLayout(height=8, width=8, channels=1, patch=4), CountingDecoder()
    decode_pixels(np.zeros((7, 4, 16), np.float32), layout, HostDevice(), decoder, Capacity(pixels_per_call=3 * 64))
    assert decoder.sizes == [3, 3, 1]
