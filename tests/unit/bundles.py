"""Copies of the embedded bundle, to be damaged."""

import json
import shutil
from pathlib import Path

from specdec_rt.bundle import load_bundle
from specdec_rt.manifest import MANIFEST


def copy_bundle(folder, name="digits"):
    """An embedded bundle in a new folder."""
    return Path(shutil.copytree(load_bundle(name).folder, folder))


def read_manifest(folder):
    return json.loads((folder / MANIFEST).read_text())


def edit_manifest(folder, *keys, value):
    """Set the manifest's entry at `keys`, as in manifest[keys[0]][keys[1]] = value."""
    manifest = read_manifest(folder)
    entry = manifest
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
