"""What a figure was measured on, and how it is written to disk."""

import functools
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec_rt.backends.installed import installed_version
from specdec_rt.backends.nvidia_driver import find_driver
from specdec_rt.cli import doctor
from specdec_rt.errors import BackendError

__all__ = ["machine_record", "write_json"]

PACKAGES = {"torch": ("torch",), **doctor.PACKAGES}
"""The names under which each library is packaged."""


@functools.cache
def machine_record() -> dict[str, Any]:
    """The device, its driver, versions of libraries, commit and command, as plain values for JSON."""
    found: dict[str, Any] = {
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: installed_version(*names) for name, names in PACKAGES.items()},
    }
    try:
        one = find_driver()
    except BackendError as error:
        return {**found, "device": None, "driver": None, "no_device": str(error)}
    cuda = f"{one.cuda[0]}.{one.cuda[1]}"
    return {**found, "device": asdict(one.gpus[0]), "driver": {"version": one.version, "cuda": cuda}}


def write_json(path: Path, content: object) -> None:
    """Write `content` as a whole: a run that is stopped leaves what it wrote last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _commit() -> str:
    """The commit of the working tree, with "+" where files differ from it; $COMMIT where there is no repository."""
    root = Path(__file__).parents[2]
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],  # noqa: S607  # the user's own
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return found.stdout.strip()
