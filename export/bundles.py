"""The folder of a bundle: what may be replaced by one, its manifest, and notes that are added later."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdec_rt.bundle import load_bundle
from specdec_rt.errors import OutputError
from specdec_rt.manifest import MANIFEST, Manifest

__all__ = ["annotate", "replace_bundle", "require_replaceable", "write_manifest"]


def require_replaceable(out: Path) -> None:
    """Raise OutputError unless `out` is a bundle, an empty folder or nothing."""
    if out.exists() and not _is_bundle(out) and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} holds something that is no bundle; expected a new folder, or a bundle to replace")


def _is_bundle(folder: Path) -> bool:
    """Whether `folder` holds a bundle of any release; other programs, too, call a file manifest.json."""
    try:
        return "schema_version" in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def replace_bundle(folder: Path, out: Path) -> None:
    """Move the finished bundle `folder` to `out`; a bundle that is there is removed."""
    require_replaceable(out)
    if out.exists():
        shutil.rmtree(out)
    folder.replace(out)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of the bundle in `folder`, and replace the one that is there in a single step."""
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    part.replace(folder / MANIFEST)


def annotate(folder: Path, notes: Mapping[str, Any]) -> None:
    """Add `notes` to the provenance of the bundle in `folder`."""
    manifest = load_bundle(folder).manifest
    write_manifest(folder, manifest.model_copy(update={"provenance": {**manifest.provenance, **notes}}))
