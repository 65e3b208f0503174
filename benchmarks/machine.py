"""What a figure was measured on."""

import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

from specdec_rt.backends.installed import installed_version

__all__ = ["cpu_model", "machine_record"]

PACKAGES = ("specdec-rt", "torch", "onnxruntime", "numpy")


def machine_record(argv: list[str]) -> dict[str, Any]:
    """The machine, versions of libraries, commit and command, as plain values for JSON."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain")
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in PACKAGES},
        "commit": commit,
        "dirty": None if changed is None else bool(changed),
        "command": shlex.join(["python", "-m", "benchmarks", *argv]),
        "load_average": os.getloadavg()[0],
    }


def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {key.strip(): value.strip() for key, value in values.items()}
    return f"{found.get('model name', 'unknown')} (family {found.get('cpu family')}, model {found.get('model')})"


def _git(*words: str) -> str | None:
    """What git prints; None where there is no repository."""
    try:
        found = subprocess.run(
            ["git", *words],  # noqa: S607  # the user's own
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
