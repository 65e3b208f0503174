"""Which packages of the execution libraries are installed, and whether ONNX Runtime's files are whole.

`onnxruntime` and `onnxruntime-gpu` put their files into one folder. Where both are installed the later one has
overwritten the earlier, and uninstalling either takes the other's files along.
"""

import base64
import hashlib
import io
import sys
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["INSTALL_ONNXRUNTIME_GPU", "installed_version", "onnxruntime_problem", "preload_libraries"]

ONNXRUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
INSTALL_ONNXRUNTIME_GPU = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
HASHED_BYTES = 1 << 20
"""Of larger files only the size is compared: hashing the libraries would take seconds."""


def installed_version(*names: str) -> str | None:
    """The version of the first of these packages that is installed; None where none is."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def preload_libraries(onnxruntime: Any) -> None:  # noqa: ANN401  # a module without types
    """Load CUDA and cuDNN from the wheels that onnxruntime-gpu depends on, where they are."""
    if hasattr(onnxruntime, "preload_dlls"):  # builds for a Jetson may be older
        with redirect_stdout(io.StringIO()):  # it prints what it does not find
            onnxruntime.preload_dlls()


def onnxruntime_problem(folder: Path | None = None) -> str | None:
    """What is wrong with ONNX Runtime's installed files and how to mend it; None where nothing is.

    `folder` is the site-packages to look into; None: wherever Python finds packages.
    """
    where = sys.path if folder is None else [str(folder)]
    found = {
        name: distribution
        for name in ONNXRUNTIME_PACKAGES
        for distribution in list(metadata.distributions(name=name, path=where))[:1]
    }
    if len({distribution.locate_file("") for distribution in found.values()}) < len(found):
        return _overwritten(found)
    for name, distribution in found.items():
        foreign, total = _foreign_files(distribution)
        if foreign:
            return _damaged(name, distribution.version, foreign, total)
    return None


def _overwritten(found: dict[str, metadata.Distribution]) -> str:
    """The problem of two packages in one folder."""
    versions = [f"{name} {distribution.version}" for name, distribution in found.items()]
    counts = [_foreign_files(distribution) for distribution in found.values()]
    lost = [f"{foreign} of {version}'s {total}" for version, (foreign, total) in zip(versions, counts, strict=True)]
    return (
        f"{' and '.join(versions)} are both installed and overwrite each other's files "
        f"({', '.join(lost)} are not its own): {INSTALL_ONNXRUNTIME_GPU}"
    )


def _damaged(name: str, version: str, foreign: int, total: int) -> str:
    """The problem of a package that has lost files."""
    mend = f"pip install --force-reinstall --no-deps {name}" if name == "onnxruntime" else INSTALL_ONNXRUNTIME_GPU
    return (
        f"{name} {version} is damaged: {foreign} of its {total} files are missing or altered, as they are "
        f"once {' or '.join(other for other in ONNXRUNTIME_PACKAGES if other != name)} was uninstalled: {mend}"
    )


def _foreign_files(distribution: metadata.Distribution) -> tuple[int, int]:
    """How many of a package's recorded files are missing or another's, and how many it has."""
    files = [file for file in distribution.files or () if file.parts[0] == "onnxruntime" and file.hash is not None]
    return sum(not _own(file) for file in files), len(files)


def _own(file: metadata.PackagePath) -> bool:
    """Whether the file on disk is the one that its package recorded."""
    path = Path(str(file.locate()))
    try:
        size = path.stat().st_size
        if size != (file.size or size):
            return False
        if size > HASHED_BYTES or file.hash is None or file.hash.mode != "sha256":
            return True
        digest = hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return False
    return base64.urlsafe_b64encode(digest).decode().rstrip("=") == file.hash.value
