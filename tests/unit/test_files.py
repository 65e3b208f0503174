"""Files written together: all of them or none, and refused before the work where they cannot be."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from specdec_rt.cli.files import array_writer, check_file, check_folder, png_writer, write_together
from specdec_rt.errors import OutputError

PROC = Path("/proc")
FULL_DISK = Path("/dev/full")


def whole(file):
    file.write(b"whole")


def write_half_then(fail):
    """A writer that fails halfway."""

    def write(file):
        file.write(b"half")
        fail()

    return write


def fill_the_disk():
    FULL_DISK.write_bytes(b"one byte too many")


def interrupt():
    raise KeyboardInterrupt


def run_into_a_bug():
    raise RuntimeError("bug")


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        pytest.param(
            fill_the_disk,
            OutputError,
            marks=pytest.mark.skipif(not FULL_DISK.exists(), reason="no device that is always full"),
        ),
        (interrupt, KeyboardInterrupt),
        (run_into_a_bug, RuntimeError),
    ],
)
def test_a_failure_leaves_no_new_file_and_keeps_the_old_ones(tmp_path, fail, expected):
    old, folder = tmp_path / "old.npz", tmp_path / "new"
    old.write_text("old")
    contents = {folder / "0.png": whole, old: write_half_then(fail), tmp_path / "later.npz": whole}
    with pytest.raises(expected):
        write_together(contents, folder=folder)
    assert list(tmp_path.rglob("*")) == [old]
    assert old.read_text() == "old"


@pytest.mark.skipif(not FULL_DISK.exists(), reason="no device that is always full")
def test_a_full_disk_is_named_as_the_reason(tmp_path):
    with pytest.raises(OutputError, match=r"x\.png cannot be written \(No space left on device\); choose another pl"):
        write_together({tmp_path / "x.png": write_half_then(fill_the_disk)})


def test_files_replace_older_ones_and_a_folder_keeps_its_others(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("kept", "replaced"):
        (folder / name).write_text("old")
    write_together({folder / "replaced": whole, folder / "new": whole}, folder=folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "kept": "old",
        "replaced": "whole",
        "new": "whole",
    }


@pytest.mark.skipif(not PROC.is_dir(), reason="no file system here that takes no files from anyone")
def test_a_file_system_that_takes_no_files_is_named_before_the_work():
    with pytest.raises(OutputError, match=r"/proc/x\.png cannot be written \(.+\); choose another place"):
        check_file(PROC / "x.png", ".png")
    with pytest.raises(OutputError, match=r"/proc cannot be written \(.+\); choose another place"):
        check_folder(PROC)


def test_a_check_leaves_nothing_behind(tmp_path):
    check_file(tmp_path / "x.png", ".png")
    check_folder(tmp_path)
    check_folder(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_every_pixel(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    write_together({tmp_path / "x.png": png_writer(image)})
    with Image.open(tmp_path / "x.png") as picture:
        np.testing.assert_array_equal(np.array(picture).reshape(image.shape), image)


def test_an_archive_holds_arrays_under_their_names(tmp_path):
    write_together({tmp_path / "x.npz": array_writer({"tokens": np.arange(3), "labels": np.arange(2)})})
    with np.load(tmp_path / "x.npz") as arrays:
        assert {name: array.tolist() for name, array in arrays.items()} == {"tokens": [0, 1, 2], "labels": [0, 1]}
