"""The wheel holds the library, its bundles, and nothing of the repository around it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import specdec_rt

ROOT = Path(__file__).parents[2]
LIMIT_BYTES = 25_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the working tree, made by the build backend itself: no network, no pip needed."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = folder.iterdir()
    return path


def test_name_and_size(wheel):
    assert wheel.name == f"specdec_rt-{specdec_rt.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < LIMIT_BYTES


def test_nothing_but_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"specdec_rt-{specdec_rt.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"specdec_rt", info}
    kinds = {Path(name).suffix for name in names if not name.startswith(info)}
    assert kinds == {".json", ".md", ".onnx", ".py", ".safetensors", ".typed"}
    assert f"{info}/licenses/LICENSE" in names


def test_every_file_of_the_package(wheel):
    """Modules, the bundles, the note on its data, the marker of types: as they are in the tree."""
    archive = zipfile.ZipFile(wheel)
    package = ROOT / "specdec_rt"
    tree = {path.relative_to(ROOT).as_posix(): path for path in package.rglob("*") if path.is_file()}
    expected = {name: path for name, path in tree.items() if "__pycache__" not in name}
    assert {name for name in archive.namelist() if name.startswith("specdec_rt/")} == set(expected)
    assert {"specdec_rt/py.typed", "specdec_rt/assets/README.md", "specdec_rt/assets/digits/manifest.json"} <= set(
        expected
    )
    assert all(archive.read(name) == path.read_bytes() for name, path in expected.items())


def test_what_it_asks_for(wheel):
    """Neither torch nor a GPU library comes with a plain install; the command is installed."""
    archive = zipfile.ZipFile(wheel)
    info = f"specdec_rt-{specdec_rt.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode().split("\n\n")[0].splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in metadata if line.startswith("Requires-Dist: ")]
    plain = {line.split(">")[0] for line in required if "extra ==" not in line}
    assert plain == {"filelock", "numpy", "onnxruntime", "pillow", "platformdirs", "pydantic", "rich", "typer"}
    assert "specdec-rt = specdec_rt.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
