"""Results as files: checked before the work that makes them, then written all together or not at all."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from specdec_rt.errors import OutputError
from specdec_rt.types import Array

__all__ = ["Write", "array_writer", "check_file", "check_folder", "png_writer", "write_together"]

Write = Callable[[BinaryIO], None]
"""Writes a file's content to a stream."""


def check_file(path: Path, suffix: str) -> None:
    """Raise OutputError unless a file called `path`, ending in `suffix`, can be written."""
    with _telling(path):
        if path.is_dir():
            raise OutputError(f"{path} is a folder; expected the name of a {suffix} file")
        if path.suffix.lower() != suffix:
            raise OutputError(f"{path} does not end in {suffix}, but a {suffix} file is what it would be; name it so")
        _probe(path)


def check_folder(path: Path) -> None:
    """Raise OutputError unless files can be written into the folder `path`, which may have to be made."""
    with _telling(path):
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; expected the name of a folder")
        _probe(path / "image.png" if path.exists() else path)


def png_writer(image: Array) -> Write:
    """Writes `image [H, W, C]` uint8, C = 1 or 3, as PNG."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return lambda file: picture.save(file, format="PNG")


def array_writer(arrays: Mapping[str, Array]) -> Write:
    """Writes named arrays as a compressed .npz."""
    # numpy's stub takes the names for its own keyword `allow_pickle`.
    return lambda file: np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def write_together(contents: Mapping[Path, Write], *, folder: Path | None = None) -> None:
    """Write every file of `contents` under a passing name, then rename them all; make `folder` if it is missing.

    On any failure, a keyboard interrupt among them, what was begun is removed. Raises OutputError.
    """
    made = folder is not None and not folder.exists()
    staged: dict[Path, Path] = {}
    try:
        if folder is not None:
            with _telling(folder):
                folder.mkdir(exist_ok=True)
        for path, write in contents.items():
            temporary = _temporary(path)
            staged[temporary] = path
            with _telling(path), temporary.open("wb") as file:
                write(file)
        for temporary, path in staged.items():
            with _telling(path):
                temporary.replace(path)
    finally:
        for temporary in staged:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if made and folder is not None:
            with suppress(OSError):  # it holds the images: all went well
                folder.rmdir()


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Turn the file system's refusal into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error


def _probe(path: Path) -> None:
    """Make and remove a file beside `path`: permissions alone do not tell whether a file system takes it."""
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    probe = _temporary(path)
    probe.open("wb").close()
    probe.unlink()


def _temporary(path: Path) -> Path:
    """A name beside `path`: a rename is atomic only within one file system."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")
