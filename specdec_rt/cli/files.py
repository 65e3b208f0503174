"""Files written together or not at all, and checked before the work that makes their contents."""

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
    """Raise OutputError unless a file at `path`, whose name must end in `suffix`, can be written."""
    with translate_os_errors(path):
        if path.is_dir():
            raise OutputError(f"{path} is a folder; expected the name of a {suffix} file")
        if path.suffix.lower() != suffix:
            raise OutputError(f"{path} does not end in {suffix}, but a {suffix} file would be written; name it so")
        _try_to_write_beside(path)


def check_folder(path: Path) -> None:
    """Raise OutputError unless files can be written into the folder `path`, or the folder can be made."""
    with translate_os_errors(path):
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; expected the name of a folder")
        _try_to_write_beside(path / "image.png" if path.exists() else path)


def png_writer(image: Array) -> Write:
    """A function that writes `image [H, W, C]` uint8, C = 1 or 3, as PNG."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return lambda file: picture.save(file, format="PNG")


def array_writer(arrays: Mapping[str, Array]) -> Write:
    """A function that writes named arrays as a compressed .npz file."""
    # numpy's stub takes the names for its own keyword `allow_pickle`.
    return lambda file: np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def write_together(contents: Mapping[Path, Write], *, folder: Path | None = None) -> None:
    """Write every file of `contents` under a temporary name, then rename them all; make `folder` if it is missing.

    On any failure, a keyboard interrupt among them, what was begun is removed; only a failure between two renames
    leaves some files new and the others as they were. Raises OutputError.
    """
    made = folder is not None and not folder.exists()
    try:
        if folder is not None:
            with translate_os_errors(folder):
                folder.mkdir(exist_ok=True)
        _write_then_rename(contents)
    finally:
        if made and folder is not None:
            with suppress(OSError):  # it holds the images: all went well
                folder.rmdir()


def _write_then_rename(contents: Mapping[Path, Write]) -> None:
    staged: dict[Path, Path] = {}
    try:
        for path, write in contents.items():
            temporary = _temporary_path(path)
            staged[temporary] = path
            with translate_os_errors(path), temporary.open("wb") as file:
                write(file)
        for temporary, path in staged.items():
            with translate_os_errors(path):
                temporary.replace(path)
    finally:
        for temporary in staged:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Turn the file system's refusal into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error


def _try_to_write_beside(path: Path) -> None:
    """Make and remove a file beside `path`: permissions alone do not say whether a file system takes it."""
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    trial = _temporary_path(path)
    trial.open("wb").close()
    trial.unlink()


def _temporary_path(path: Path) -> Path:
    """A name beside `path`: a rename is atomic only within one file system."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")
