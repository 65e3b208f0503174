"""The deployable folder: a manifest, ONNX graphs, weights. The only place that names bindings.

`load_bundle` trusts nothing: schema, file hashes and bindings are checked before any engine is made.
"""

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from specdec_rt.config import LARGEST, SELF_DRAFT, GuidanceSchedule, Mode
from specdec_rt.errors import BundleError
from specdec_rt.schedule import ChainSpec

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Binding",
    "Bundle",
    "CacheShape",
    "Defaults",
    "Graph",
    "GraphName",
    "ImageLayout",
    "Manifest",
    "Model",
    "embedded_bundles",
    "file_sha256",
    "graph_bindings",
    "load_bundle",
]

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
RESERVED = (SELF_DRAFT, "target")
"""Names that no draft of a bundle may have."""


class GraphName(StrEnum):
    """The graphs of a model."""

    BACKBONE = "backbone"
    TIME_EMBEDDING = "time_embedding"
    DENOISE_STEP = "denoise_step"
    LOG_DENSITY = "log_density"


HEAD_GRAPHS = (GraphName.TIME_EMBEDDING, GraphName.DENOISE_STEP, GraphName.LOG_DENSITY)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Binding(_Record):
    """One input or output of a graph; a string in `shape` is a size fixed only when the graph runs."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


class Graph(_Record):
    """An ONNX file of the bundle and its bindings, in the file's order."""

    file: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]


class CacheShape(_Record):
    """Keys and values that a causal backbone keeps for each token."""

    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)


class Model(_Record):
    """A target or a draft."""

    parameters: int = Field(ge=1)
    """weights of its own (a draft on the target's head counts none of that head)"""
    z_dim: int = Field(ge=1)
    head: Literal["own", "target"]
    head_width: int | None = Field(ge=1)
    """W, values in a row of the time table; None where the head is the target's"""
    cache: CacheShape
    graphs: dict[GraphName, Graph]


class ImageLayout(_Record):
    """How tokens in [-1, 1] tile an image in raster order, where no decoder makes the pixels."""

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    channels: Literal[1, 3]
    patch: int = Field(ge=1)


class Defaults(_Record):
    """What a request takes where it says nothing."""

    mode: Mode
    draft: str
    draft_length: int = Field(ge=1)
    guidance: float = Field(ge=0, le=LARGEST)
    guidance_schedule: GuidanceSchedule


class Manifest(_Record):
    """`manifest.json`."""

    schema_version: Literal[1]
    name: str
    family: Literal["causal"]
    tokens: int = Field(ge=1)
    token_dim: int = Field(ge=1)
    classes: int = Field(ge=1)
    image: ImageLayout
    chain: ChainSpec
    defaults: Defaults
    target: Model
    drafts: dict[str, Model]
    files: dict[str, str]
    """SHA-256 of every other file of the bundle"""
    provenance: dict[str, Any]
    """training command, data, licence, figures measured"""

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if Path(name).name != name or name == MANIFEST:
                raise ValueError(f"{name!r} is not the plain name of a file beside the manifest")
        return files

    def model(self, name: str | None) -> Model:
        """The draft called `name`, or the target for None."""
        return self.target if name is None else self.drafts[name]


@dataclass(frozen=True)
class Bundle:
    """A checked bundle on disk."""

    folder: Path
    manifest: Manifest

    def path(self, graph: Graph) -> Path:
        """Where the graph's ONNX file lies."""
        return self.folder / graph.file


def graph_bindings(name: GraphName, model: Model, *, token_dim: int) -> tuple[tuple[Binding, ...], tuple[Binding, ...]]:
    """Inputs and outputs that graph `name` of a causal `model` must have; letters as in `types`.

    In `denoise_step` and `log_density` the rows' prediction is the sum over the G guidance branches of
    `guidance[g] ε̂(z[g])`; `coefficients` is `Chain.coefficients`, `time_table` holds `time_embedding`
    of each of the chain's n steps.
    """
    z, width = model.z_dim, model.head_width or 0  # a model without a head has no graph that needs it

    def floats(name: str, *shape: int | str) -> Binding:
        return Binding(name=name, dtype="float32", shape=shape)

    def ints(name: str, *shape: int | str) -> Binding:
        return Binding(name=name, dtype="int64", shape=shape)

    shared = (
        floats("z", "G", "R", z),
        floats("guidance", "G", "R"),
        floats("time_table", "n", width),
        floats("coefficients", "n", 4),
    )
    match name:
        case GraphName.BACKBONE:
            slots = [
                (f"{kind}_{layer}", ("B", model.cache.heads, "S", model.cache.head_dim))
                for layer in range(model.cache.layers)
                for kind in ("key", "value")
            ]
            caches = tuple(floats(cache, *shape) for cache, shape in slots)
            updated = tuple(floats(f"{cache}_out", *shape) for cache, shape in slots)
            inputs = (floats("tokens", "B", "N", token_dim), ints("position", "B"), ints("label", "B"), *caches)
            return inputs, (floats("z", "B", "N", z), *updated)
        case GraphName.TIME_EMBEDDING:
            return (ints("timestep", "n"),), (floats("time_table", "n", width),)
        case GraphName.DENOISE_STEP:
            inputs = (floats("state", "R", token_dim), *shared, ints("step", "R"), floats("noise", "R", token_dim))
            return inputs, (floats("next_state", "R", token_dim), floats("mean", "R", token_dim))
        case GraphName.LOG_DENSITY:
            return (floats("path", "R", "n_plus_1", token_dim), *shared), (floats("mean", "R", "n", token_dim),)


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
    if manifest.chain.variance == "learned":
        raise BundleError(f"{path}: chain.variance is 'learned', but a causal family's head predicts no variance")
    if manifest.target.head != "own":
        raise BundleError(f"{path}: target.head is 'target'; a target needs a head of its own")
    for taken in RESERVED:
        if taken in manifest.drafts:
            raise BundleError(f"{path}: a draft is called {taken!r}, a name that means something else; rename it")
    if manifest.defaults.draft not in (*manifest.drafts, SELF_DRAFT):
        raise BundleError(f"{path}: defaults.draft is {manifest.defaults.draft!r}, which is not among its drafts")
    layout = manifest.image
    if layout.height % layout.patch or layout.width % layout.patch:
        raise BundleError(f"{path}: image {layout.height}x{layout.width} cannot be tiled by patches of {layout.patch}")
    grid = (layout.height // layout.patch) * (layout.width // layout.patch)
    if (grid, layout.patch**2 * layout.channels) != (manifest.tokens, manifest.token_dim):
        raise BundleError(
            f"{path}: image {layout.height}x{layout.width}x{layout.channels} in patches of {layout.patch} is not "
            f"{manifest.tokens} tokens of {manifest.token_dim}"
        )
    for name in (None, *manifest.drafts):
        model = manifest.model(name)
        owner = "target" if name is None else f"drafts.{name}"
        if (model.head_width is None) != (model.head == "target"):
            raise BundleError(f"{path}: {owner}.head is {model.head!r} but its head_width is {model.head_width}")
        if model.head == "target" and model.z_dim != manifest.target.z_dim:
            raise BundleError(
                f"{path}: {owner} drives the target's head but its z_dim is {model.z_dim}, not {manifest.target.z_dim}"
            )
        wanted = {GraphName.BACKBONE, *(HEAD_GRAPHS if model.head == "own" else ())}
        if set(model.graphs) != wanted:
            raise BundleError(
                f"{path}: {owner} has the graphs {sorted(model.graphs)}, expected {sorted(wanted)}; "
                "export the bundle again"
            )
        for graph_name, graph in model.graphs.items():
            if graph.file not in manifest.files:
                raise BundleError(f"{path}: {owner}.graphs.{graph_name} names {graph.file!r}, which is not in files")
            expected = graph_bindings(graph_name, model, token_dim=manifest.token_dim)
            if (graph.inputs, graph.outputs) != expected:
                raise BundleError(
                    f"{path}: the bindings of {owner}.graphs.{graph_name} ({graph.file}) are not those of this "
                    "release's contract; export the bundle again"
                )
