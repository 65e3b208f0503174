"""The scripts of `examples/` run as their first lines say, and print what they promise."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MOST_LINES = 60


def run(folder, *arguments):
    """The output of a script, in `folder`."""
    # One thread for PyTorch: several on busy cores wait for one another at every small operation.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_draw(tmp_path):
    printed = run(tmp_path, EXAMPLES / "draw.py", "here")
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [f"{digit}.png" for digit in range(10)]
    assert "10 images" in printed
    assert "for 490 tokens" in printed


def test_progress(tmp_path):
    lines = run(tmp_path, EXAMPLES / "progress.py").splitlines()
    assert " 49 of 49 " in lines[-2]
    assert lines[-1].startswith(f"{len(lines) - 1} rounds")


def test_compare_modes(tmp_path):
    header, *rows = run(tmp_path, EXAMPLES / "compare_modes.py", "1").splitlines()
    assert "accepted" in header
    assert [row.split()[0].rstrip(",") for row in rows] == ["target", "exact", "exact"]


def test_embed(tmp_path):
    painted, again, refused = run(tmp_path, EXAMPLES / "embed.py").splitlines()
    assert painted == "painted 3 images of (28, 28, 1)"
    assert again.endswith("the same image")
    assert refused.startswith("refused: labels holds 12")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed (the extra `export`)")
def test_compare_with_torch(tmp_path):
    printed = run(tmp_path, "-m", "examples.compare_with_torch", "1")
    assert "PyTorch eager" in printed
    assert "largest difference" in printed


def test_every_example_is_short_and_has_a_test():
    scripts = {path.stem: path.read_text(encoding="utf-8").count("\n") for path in EXAMPLES.glob("*.py")}
    assert {name for name, lines in scripts.items() if lines > MOST_LINES} == set()
    assert {f"test_{name}" for name in scripts} <= set(globals())
