"""Bundles that are made of another one to be compared with it: what their writers share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdec_rt.bundle import load_bundle
from specdec_rt.errors import BundleError, SpecDecError

__all__ = ["made_of", "run_writer"]


def made_of(out: Path, key: str) -> Any:  # noqa: ANN401  # of any release
    """What the bundle in `out` was made of, by its manifest's entry `key`; None where there is no sound bundle."""
    try:
        return load_bundle(out).manifest.provenance.get(key)
    except BundleError:
        return None


def run_writer(write: Callable[[], bool], out: Path) -> int:
    """Run a command that writes `out`; `write` returns whether it had to. Returns 0, or an error's exit code."""
    try:
        written = write()
    except SpecDecError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stderr.write(f"{'wrote' if written else 'kept'} {out}\n")
    return 0
