"""The deployable folder: a manifest, ONNX graphs, weights.

`load_bundle` trusts nothing: schema, file hashes and bindings are checked before any engine is made.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from specdec_rt.config import SELF_DRAFT
from specdec_rt.errors import BundleError
from specdec_rt.manifest import (
    HEAD_GRAPHS,
    MANIFEST,
    Bindings,
    Graph,
    GraphName,
    Manifest,
    Precision,
    decoder_bindings,
    graph_bindings,
)

__all__ = ["SCHEMA_VERSION", "Bundle", "embedded_bundles", "file_sha256", "load_bundle"]

SCHEMA_VERSION: Final = 4
RESERVED = (SELF_DRAFT, "target")
"""Names that no draft of a bundle may have."""


@dataclass(frozen=True)
class Bundle:
    """A checked bundle on disk."""

    folder: Path
    manifest: Manifest

    def path(self, graph: Graph, precision: Precision = "fp32") -> Path:
        """Where the ONNX file lies that computes the graph in `precision`; BundleError where there is none."""
        files = {"fp32": graph.file, **graph.variants}
        if precision not in files:
            raise BundleError(
                f"{self.folder}: {graph.file} was exported to compute in {', '.join(files)}, not in {precision}; "
                f"export the bundle again with --compute {precision}"
            )
        return self.folder / files[precision]


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def embedded_bundles() -> list[str]:
    """Names of the bundles that the package carries."""
    assets = resources.files("specdec_rt") / "assets"
    return sorted(entry.name for entry in assets.iterdir() if (entry / MANIFEST).is_file())


def load_bundle(bundle: str | Path) -> Bundle:
    """Read and check the bundle in a folder, or the embedded one of that name.

    Raises BundleError, naming the file, where anything is missing, damaged, surplus or does not fit. That a
    graph's own bindings are those of the manifest is checked when its engine is made.
    """
    folder = _find(bundle)
    manifest = _read_manifest(folder / MANIFEST)
    _check_files(folder, manifest)
    _check_models(folder / MANIFEST, manifest)
    return Bundle(folder, manifest)


def _find(bundle: str | Path) -> Path:
    names = embedded_bundles()
    if isinstance(bundle, str | Path):
        if (Path(bundle) / MANIFEST).is_file():
            return Path(bundle)
        if str(bundle) in names:
            return Path(str(resources.files("specdec_rt") / "assets" / str(bundle)))
    raise BundleError(
        f"no bundle at {str(bundle)!r}: expected a folder that holds {MANIFEST}, or one of the embedded bundles "
        f"({', '.join(names)})"
    )


def _read_manifest(path: Path) -> Manifest:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error}); export the bundle again") from error
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema_version {version!r}, this release reads {SCHEMA_VERSION}; "
            "export the bundle again, or install the release that wrote it"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise BundleError(f"{path}: {field}: {problem['msg']}; export the bundle again") from error


def _check_files(folder: Path, manifest: Manifest) -> None:
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST and path.name not in manifest.files:
            # A graph may read its weights from any file beside it: none may escape the check of hashes.
            raise BundleError(f"{path} is not in the manifest's files: remove it, or export the bundle again")
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            found = file_sha256(path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror}); copy or export the bundle again") from error
        if found != expected:
            raise BundleError(
                f"{path} has SHA-256 {found}, the manifest says {expected}: the file is damaged or was altered; "
                "copy or export the bundle again"
            )


def _check_models(path: Path, manifest: Manifest) -> None:
    if manifest.chain.variance == "learned" and manifest.family == "causal":
        raise BundleError(f"{path}: chain.variance is 'learned', but a causal family's head predicts no variance")
    if manifest.target.head != "own":
        raise BundleError(f"{path}: target.head is 'target'; a target needs a head of its own")
    for taken in RESERVED:
        if taken in manifest.drafts:
            raise BundleError(f"{path}: a draft is called {taken!r}, a name that means something else; rename it")
    defaults = manifest.defaults
    if defaults.draft not in (*manifest.drafts, SELF_DRAFT):
        raise BundleError(f"{path}: defaults.draft is {defaults.draft!r}, which is not among its drafts")
    _check_image(path, manifest)
    if defaults.ar_steps > manifest.tokens or (manifest.family == "causal" and defaults.ar_steps != manifest.tokens):
        wanted = "at most" if manifest.family == "mar" else "in the causal family exactly"
        raise BundleError(f"{path}: defaults.ar_steps is {defaults.ar_steps}, expected {wanted} {manifest.tokens}")
    for name in (None, *manifest.drafts):
        _check_model(path, manifest, name)


def _check_image(path: Path, manifest: Manifest) -> None:
    layout, decoder = manifest.image, manifest.decoder
    if layout is None:
        if decoder is not None:
            raise BundleError(f"{path}: decoder makes pixels, but image does not say how many; export the bundle again")
        return
    if layout.height % layout.patch or layout.width % layout.patch:
        raise BundleError(f"{path}: image {layout.height}x{layout.width} cannot be tiled by patches of {layout.patch}")
    grid = (layout.height // layout.patch) * (layout.width // layout.patch)
    values = manifest.token_dim if decoder is not None else layout.patch**2 * layout.channels
    if (grid, values) != (manifest.tokens, manifest.token_dim):
        raise BundleError(
            f"{path}: image {layout.height}x{layout.width}x{layout.channels} in patches of {layout.patch} is not "
            f"{manifest.tokens} tokens of {manifest.token_dim}"
        )
    if decoder is not None:
        _check_graph(path, manifest, "decoder.graph", decoder.graph, decoder_bindings(manifest.dimensions, layout))


def _check_model(path: Path, manifest: Manifest, name: str | None) -> None:
    model = manifest.model(name)
    owner = "target" if name is None else f"drafts.{name}"
    for field, width in (("head_width", model.head_width), ("modulation_width", model.modulation_width)):
        if (width is None) != (model.head == "target"):
            raise BundleError(f"{path}: {owner}.head is {model.head!r} but its {field} is {width}")
    if model.head == "target" and model.z_dim != manifest.target.z_dim:
        raise BundleError(
            f"{path}: {owner} drives the target's head but its z_dim is {model.z_dim}, not {manifest.target.z_dim}"
        )
    if (model.cache is None) != (manifest.family == "mar"):
        given = "missing" if model.cache is None else "given"
        raise BundleError(f"{path}: {owner}.cache is {given}, but the family is {manifest.family!r}")
    wanted = {GraphName.BACKBONE, *(HEAD_GRAPHS if model.head == "own" else ())}
    if set(model.graphs) != wanted:
        raise BundleError(
            f"{path}: {owner} has the graphs {sorted(model.graphs)}, expected {sorted(wanted)}; export the bundle again"
        )
    for graph_name, graph in model.graphs.items():
        bindings = graph_bindings(graph_name, model, manifest.dimensions)
        _check_graph(path, manifest, f"{owner}.graphs.{graph_name}", graph, bindings)


def _check_graph(path: Path, manifest: Manifest, owner: str, graph: Graph, bindings: Bindings) -> None:
    if "fp32" in graph.variants:
        raise BundleError(f"{path}: {owner}.variants has 'fp32', but that is {graph.file!r} itself; remove the entry")
    for file in (graph.file, *graph.variants.values()):
        if file not in manifest.files:
            raise BundleError(f"{path}: {owner} names {file!r}, which is not in files")
    if (graph.inputs, graph.outputs) != bindings:
        raise BundleError(
            f"{path}: the bindings of {owner} ({graph.file}) are not those of this release's contract; "
            "export the bundle again"
        )
