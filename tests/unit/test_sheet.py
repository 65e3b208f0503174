"""A sheet of images: every pixel is where the layout puts it."""

import numpy as np
import pytest

from specdec_rt.cli.sheet import BACKGROUND, GAP, SheetLayout, draw_sheet


@pytest.mark.parametrize(
    ("labels", "per_label", "grid"),
    [(1, 1, (1, 1)), (3, 1, (1, 3)), (10, 1, (2, 5)), (10, 2, (10, 2)), (1, 8, (2, 4)), (7, 1, (2, 4))],
)
def test_each_label_has_a_row_or_all_images_make_a_wide_block(labels, per_label, grid):
    layout = SheetLayout.of(labels=labels, per_label=per_label, height=28, width=28)
    assert (layout.rows, layout.columns) == grid


@pytest.mark.parametrize(("side", "scale"), [(28, 4), (112, 1), (256, 1), (100, 1), (32, 3)])
def test_small_images_are_enlarged_in_whole_factors(side, scale):
    assert SheetLayout.of(labels=1, per_label=1, height=side, width=side).scale == scale


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_an_image_s_or_background(channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, channels), np.uint8)
    layout = SheetLayout.of(labels=5, per_label=1, height=6, width=4)
    sheet = draw_sheet(images, layout)
    assert sheet.shape == (*layout.size, channels)
    rest = sheet.astype(int)
    for index, image in enumerate(images):
        top, left = layout.corner(index)
        cell = np.s_[top : top + 6 * layout.scale, left : left + 4 * layout.scale]
        np.testing.assert_array_equal(sheet[cell][:: layout.scale, :: layout.scale], image)
        np.testing.assert_array_equal(sheet[cell], image.repeat(layout.scale, axis=0).repeat(layout.scale, axis=1))
        assert (rest[cell] >= 0).all(), "two images overlap"
        rest[cell] = -1
    assert set(np.unique(rest)) == {-1, BACKGROUND}
    assert (sheet[:GAP] == BACKGROUND).all()
    assert (sheet[-GAP:] == BACKGROUND).all()
