"""A sheet: many images in one picture, enlarged if they are small."""

import math
from dataclasses import dataclass

import numpy as np

from specdec_rt.types import Array

__all__ = ["SheetLayout", "draw_sheet"]

READABLE = 112
"""Pixels of an image's longer side, up to which a smaller image is enlarged by a whole factor."""
GAP = 4
BACKGROUND = 40
"""Dark grey: sets off black digits and photographs alike, on light pages and on dark ones."""


@dataclass(frozen=True)
class SheetLayout:
    """The grid of N images of height H and width W: row by row, each enlarged `scale` times."""

    rows: int
    columns: int
    scale: int
    height: int
    """H, before enlarging"""
    width: int
    """W, before enlarging"""

    @classmethod
    def of(cls, *, labels: int, per_label: int, height: int, width: int) -> "SheetLayout":
        """One row for each label if each has several images; otherwise a block about twice as wide as high."""
        images = labels * per_label
        columns = per_label if labels > 1 and per_label > 1 else min(images, math.ceil(math.sqrt(2 * images)))
        scale = max(1, READABLE // max(height, width))
        return cls(-(-images // columns), columns, scale, height, width)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the sheet in pixels, a gap around every image."""
        cell_height, cell_width = self.height * self.scale + GAP, self.width * self.scale + GAP
        return self.rows * cell_height + GAP, self.columns * cell_width + GAP

    def corner(self, index: int) -> tuple[int, int]:
        """Top and left of the image at `index`."""
        row, column = divmod(index, self.columns)
        return GAP + row * (self.height * self.scale + GAP), GAP + column * (self.width * self.scale + GAP)


def draw_sheet(images: Array, layout: SheetLayout) -> Array:
    """`images [N, H, W, C]` uint8 in one picture `[*layout.size, C]` uint8; enlarging repeats pixels."""
    sheet = np.full((*layout.size, images.shape[3]), BACKGROUND, np.uint8)
    enlarged = images.repeat(layout.scale, axis=1).repeat(layout.scale, axis=2)
    for index, image in enumerate(enlarged):
        top, left = layout.corner(index)
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet
