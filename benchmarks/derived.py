"""Bundles that a scenario compares with the one that it names, made of that one: what their two writers share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdec_rt.bundle import load_bundle
from specdec_rt.errors import BundleError, SpecDecError

__all__ = ["made_of", "told"]


def made_of(out: Path, key: str) -> Any:  # noqa: ANN401  # of any release
    """What the bundle in `out` says under `key` that it was made of; None where there is none, or a damaged one."""
    try:
        return load_bundle(out).manifest.provenance.get(key)
    except BundleError:
        return None


def told(make: Callable[[], bool], out: Path) -> int:
    """Run what writes `out` and returns whether that had to be done, as a command: 0, or an error's exit code."""
    try:
        written = make()
    except SpecDecError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stderr.write(f"{'wrote' if written else 'kept'} {out}\n")
    return 0
