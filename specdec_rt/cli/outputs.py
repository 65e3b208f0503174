"""What `generate` writes: a sheet of all images, one file for each image, an archive of arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from specdec_rt.cli.files import Write, array_writer, check_file, check_folder, png_writer, write_together
from specdec_rt.cli.sheet import SheetLayout, draw_sheet
from specdec_rt.errors import UsageError
from specdec_rt.manifest import Manifest
from specdec_rt.pipeline import Result

__all__ = ["Outputs"]

LARGEST_SHEET_PIXELS = 10**8


@dataclass(frozen=True)
class Outputs:
    """Where the results of a request go; None: not asked for."""

    sheet: Path | None
    """a PNG of all images"""
    folder: Path | None
    """of one PNG for each image"""
    arrays: Path | None
    """an .npz of tokens, labels and images"""
    layout: SheetLayout | None
    """the grid of the sheet; None where the bundle makes no images"""

    @classmethod
    def resolve(
        cls,
        sheet: Path | None,
        folder: Path | None,
        arrays: Path | None,
        *,
        manifest: Manifest,
        labels: int,
        images_per_label: int,
    ) -> "Outputs":
        """The outputs that are asked for, by default a sheet named after the bundle.

        Raises UsageError where images are wanted of a bundle that makes tokens only.
        """
        if sheet is None and folder is None and arrays is None:
            sheet = Path(f"{Path(manifest.name).name}.png")
        image = manifest.image
        if image is not None:
            layout = SheetLayout.of(labels=labels, per_label=images_per_label, height=image.height, width=image.width)
            return cls(sheet, folder, arrays, layout)
        if sheet is not None or folder is not None:
            raise UsageError(
                f"bundle {manifest.name!r} makes tokens only: nothing in it makes pixels; "
                "ask for --tokens FILE.npz alone, or export the bundle with its VAE"
            )
        return cls(sheet, folder, arrays, None)

    @property
    def paths(self) -> list[Path]:
        """Those that are asked for."""
        return [path for path in (self.sheet, self.folder, self.arrays) if path is not None]

    def check(self) -> None:
        """Raise the errors that would otherwise come after the work: UsageError, OutputError."""
        if self.sheet is not None and self.layout is not None:
            _check_sheet_size(self.sheet, self.layout)
            check_file(self.sheet, ".png")
        if self.folder is not None:
            check_folder(self.folder)
        if self.arrays is not None:
            check_file(self.arrays, ".npz")

    def write(self, result: Result) -> None:
        """Write all files, or none. Raises OutputError."""
        write_together(dict(self._contents(result)), folder=self.folder)

    def _contents(self, result: Result) -> Iterator[tuple[Path, Write]]:
        if result.images is not None:
            if self.sheet is not None and self.layout is not None:
                yield self.sheet, png_writer(draw_sheet(result.images, self.layout))
            if self.folder is not None:
                for index, (label, image) in enumerate(zip(result.labels, result.images, strict=True)):
                    yield self.folder / f"{index:05d}-{label}.png", png_writer(image)
        if self.arrays is not None:
            arrays = {"tokens": result.tokens, "labels": result.labels, "images": result.images}
            yield self.arrays, array_writer({name: array for name, array in arrays.items() if array is not None})


def _check_sheet_size(path: Path, layout: SheetLayout) -> None:
    height, width = layout.size
    if height * width > LARGEST_SHEET_PIXELS:
        raise UsageError(
            f"the sheet {path} would have {width} x {height} pixels; expected at most {LARGEST_SHEET_PIXELS:,} in all: "
            "ask for fewer images, or for --out-dir or --tokens instead of a sheet"
        )
