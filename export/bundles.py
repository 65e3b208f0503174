"""Torch models as a bundle, of any family: every graph compared with torch, the folder written whole or not at all."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn

from export.agreement import (
    graph_outputs,
    require_agreement,
    require_precision,
    require_variant,
    torch_outputs,
    variant_outputs,
)
from export.graphs import DenoiseStepGraph, LogDensityGraph, ModulationGraph, TimeEmbeddingGraph
from export.models.head import DiffusionHead
from export.precision import write_variant
from export.to_onnx import WeightsFile, export_graph, save_weights
from specdec_rt.bundle import SCHEMA_VERSION, file_sha256, load_bundle
from specdec_rt.chain import ChainSpec
from specdec_rt.errors import OutputError
from specdec_rt.manifest import (
    MANIFEST,
    Bindings,
    Decoder,
    Defaults,
    Dimensions,
    Family,
    Graph,
    GraphName,
    ImageLayout,
    Manifest,
    Model,
    Precision,
    decoder_bindings,
    graph_bindings,
)
from specdec_rt.types import Array

__all__ = [
    "EXAMPLE_IMAGES",
    "EXAMPLE_INPUTS",
    "BundleContents",
    "DecoderContents",
    "ModelContents",
    "annotate",
    "example_draws",
    "parameter_count",
    "replace_bundle",
    "require_replaceable",
    "tell",
    "write_contents",
    "write_manifest",
]

EXAMPLE_IMAGES, EXAMPLE_INPUTS, EXAMPLE_ROWS, EXAMPLE_STEPS, EXAMPLE_PAIRS, EXAMPLE_BRANCHES = 3, 4, 5, 6, 8, 2
"""Sizes of the inputs that graphs are traced and compared on: no two alike, none 0 or 1."""


@dataclass(frozen=True, kw_only=True)
class ModelContents:
    """What a target or a draft is made of."""

    record: Model
    """as in the manifest; its graphs are still to come"""
    modules: Mapping[str, nn.Module]
    """whose weights are saved, by the prefix of their names"""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """of the weights file"""
    backbone: nn.Module
    """the graph"""
    examples: Sequence[Any]
    """arguments of the backbone, to trace and compare it on"""
    head: DiffusionHead | None
    """None where the model drives the target's"""


@dataclass(frozen=True, kw_only=True)
class DecoderContents:
    """What turns tokens into pixels."""

    module: nn.Module
    """whose weights are saved"""
    graph: nn.Module


@dataclass(frozen=True, kw_only=True)
class BundleContents:
    """All that a bundle is made of; fields as in the manifest."""

    name: str
    family: Family
    tokens: int
    token_dim: int
    classes: int
    image: ImageLayout | None
    chain: ChainSpec
    defaults: Defaults
    target: ModelContents
    drafts: Mapping[str, ModelContents]
    decoder: DecoderContents | None
    provenance: Mapping[str, Any]

    @property
    def dimensions(self) -> Dimensions:
        """What the bindings of the graphs depend on."""
        return Dimensions(
            family=self.family,
            tokens=self.tokens,
            token_dim=self.token_dim,
            learned_variance=self.chain.variance == "learned",
        )


def write_contents(
    contents: BundleContents, out: Path, *, precision: Precision, compute: Sequence[Precision] = ()
) -> Manifest:
    """Export every graph, compare each with torch, and write the bundle to `out` (replaced as a whole).

    Weights are stored in `precision`. Graphs compute in single precision; `compute` names the half precisions
    that each has a variant for as well. The models' own parameters are rounded to what is stored. Raises
    ParityError where a graph disagrees with torch, or with the unrounded model or the variant with torch by
    more than the precision accounts for; OutputError where `out` cannot be written.
    """
    assert "fp32" not in compute
    require_replaceable(out)
    assert not {"target", "decoder"} & contents.drafts.keys(), "these names are taken"
    folder = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        manifest = _Writer(contents, folder, precision, compute).write()
        write_manifest(folder, manifest)
        folder.chmod(0o755)
        replace_bundle(folder, out)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{out} cannot be written ({error}); choose another place") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return manifest


def require_replaceable(out: Path) -> None:
    """Raise OutputError where `out` is something else than a bundle, an empty folder, or nothing yet."""
    if out.exists() and not _is_bundle(out) and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} holds something that is no bundle; expected a new folder, or a bundle to replace")


def _is_bundle(folder: Path) -> bool:
    """Whether a bundle of any release lies there; other things are called manifest.json too."""
    try:
        return "schema_version" in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def replace_bundle(folder: Path, out: Path) -> None:
    """Move a finished bundle to `out`, in the place of the one that is there."""
    require_replaceable(out)
    if out.exists():
        shutil.rmtree(out)
    folder.replace(out)


def annotate(folder: Path, notes: Mapping[str, Any]) -> None:
    """Add `notes` to the provenance of the bundle in `folder`."""
    manifest = load_bundle(folder).manifest
    write_manifest(folder, manifest.model_copy(update={"provenance": {**manifest.provenance, **notes}}))


def example_draws() -> Callable[..., Tensor]:
    """Gives normal draws of a shape, the same ones in every export."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def parameter_count(modules: Mapping[str, nn.Module]) -> int:
    """How many weights the modules have."""
    return sum(parameter.numel() for module in modules.values() for parameter in module.parameters())


def tell(line: str) -> None:
    """A line on stderr."""
    Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of the bundle in `folder`, in the place of one that is there."""
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    part.replace(folder / MANIFEST)


@dataclass(frozen=True)
class _Source:
    """A graph to be made: the module that computes it, and arguments to trace and compare it on."""

    module: nn.Module
    examples: Sequence[Any]
    bindings: Bindings
    compared: Sequence[Any] = ()
    """other arguments to compare it on, where those to trace it on would take too much memory"""

    def outputs(self) -> list[Array]:
        """What torch makes of the arguments that are compared."""
        return torch_outputs(self.module, self.compared or self.examples)


class _Writer:
    """Writes a bundle's files into `folder`, one graph at a time, and takes down how far each is from torch."""

    def __init__(
        self, contents: BundleContents, folder: Path, precision: Precision, compute: Sequence[Precision]
    ) -> None:
        self._contents, self._folder, self._precision, self._compute = contents, folder, precision, compute
        self._errors: dict[str, float] = {}
        self._rounding: dict[str, float] = {}
        self._variants: dict[str, float] = {}

    def write(self) -> Manifest:
        """Write every file but the manifest, which is returned."""
        contents = self._contents
        target = self._model("target", contents.target)
        drafts = {name: self._model(name, draft) for name, draft in contents.drafts.items()}
        decoder = None if contents.decoder is None else self._decoder(contents.decoder)
        for path in self._folder.iterdir():
            path.chmod(0o644)
        figures = {"relative_error_against_torch": self._errors}
        if self._rounding:
            figures["relative_error_of_precision"] = self._rounding
        if self._variants:
            figures["relative_error_of_variants"] = self._variants
        return Manifest(
            schema_version=SCHEMA_VERSION,
            name=contents.name,
            family=contents.family,
            precision=self._precision,
            tokens=contents.tokens,
            token_dim=contents.token_dim,
            classes=contents.classes,
            image=contents.image,
            chain=contents.chain,
            defaults=contents.defaults,
            target=target,
            drafts=drafts,
            decoder=decoder,
            files={path.name: file_sha256(path) for path in sorted(self._folder.iterdir())},
            provenance={**contents.provenance, **figures},
        )

    def _model(self, name: str, model: ModelContents) -> Model:
        dimensions, record = self._contents.dimensions, model.record
        sources = {GraphName.BACKBONE: (model.backbone, model.examples)}
        if model.head is not None:
            sources |= _head_sources(model.head, record, dimensions)
        graphs = self._files(
            name,
            model.modules,
            model.metadata,
            {
                f"{name}.{graph}": _Source(*source, graph_bindings(graph, record, dimensions))
                for graph, source in sources.items()
            },
        )
        return record.model_copy(update={"graphs": dict(zip(sources, graphs, strict=True))})

    def _decoder(self, decoder: DecoderContents) -> Decoder:
        contents, modules = self._contents, {"": decoder.module}
        assert contents.image is not None
        tokens = example_draws()(
            2, contents.tokens, contents.token_dim
        )  # of one image, its size would be taken for fixed
        bindings = decoder_bindings(contents.dimensions, contents.image)
        source = _Source(decoder.graph, [tokens], bindings, compared=[tokens[:1]])
        (graph,) = self._files("decoder", modules, {}, {"decoder": source})
        return Decoder(parameters=parameter_count(modules), graph=graph)

    def _files(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        metadata: Mapping[str, str],
        sources: Mapping[str, _Source],
    ) -> list[Graph]:
        """A weights file and the graphs, by the stem of their files, that lie on it."""
        began = time.perf_counter()
        unrounded: dict[str, list[Array]] = {}
        if self._precision != "fp32":
            # Only outputs are kept: rounding then takes place in the weights themselves.
            unrounded = {stem: source.outputs() for stem, source in sources.items()}
        path = self._folder / f"{name}.safetensors"
        weights = save_weights(modules, path, precision=self._precision, metadata=metadata)
        _report(path, began)
        return [self._graph(stem, source, weights, unrounded.get(stem)) for stem, source in sources.items()]

    def _graph(self, stem: str, source: _Source, weights: WeightsFile, unrounded: list[Array] | None) -> Graph:
        began = time.perf_counter()
        path = self._folder / f"{stem}.onnx"
        inputs, outputs = source.bindings
        with torch.no_grad():
            export_graph(source.module, source.examples, source.bindings, path, weights)
        expected = source.outputs()
        found = graph_outputs(path, source.compared or source.examples, inputs)
        notes = ""
        if unrounded is not None:  # first: weights that overflow when they are rounded are no fault of the graph
            error = self._rounding[path.name] = require_precision(path, found, unrounded, self._precision)
            notes = f", from the unrounded model by {error:.1e}"
        error = self._errors[path.name] = require_agreement(path, found, expected)
        notes = f"differs from torch by {error:.1e}{notes}"
        _report(path, began, notes)
        variants = {half: self._variant(path, source, expected, half) for half in self._compute}
        return Graph(file=path.name, inputs=inputs, outputs=outputs, variants=variants)

    def _variant(self, graph: Path, source: _Source, expected: list[Array], precision: Precision) -> str:
        """Write the graph that computes in `precision`; its file's name."""
        began = time.perf_counter()
        path = graph.with_suffix(f".{precision}.onnx")
        write_variant(graph, path, precision)
        found = variant_outputs(path, precision, source.compared or source.examples, source.bindings[0])
        error = self._variants[path.name] = require_variant(path, found, expected, precision)
        _report(path, began, f"differs from torch by {error:.1e}")
        return path.name


def _head_sources(
    head: DiffusionHead, record: Model, dimensions: Dimensions
) -> dict[GraphName, tuple[nn.Module, list[Any]]]:
    """The head's graphs and their arguments; letters as in `manifest.graph_bindings`."""
    learned, dim, normal = dimensions.learned_variance, dimensions.token_dim, example_draws()
    coefficients = normal(EXAMPLE_STEPS, 4)
    if learned:
        coefficients[:, 2:] = coefficients[:, 2:].abs()
        coefficients[-1, 2:] = 0  # as in the last transition of a stock chain
    z = normal(EXAMPLE_BRANCHES, EXAMPLE_ROWS, record.z_dim)
    guidance = normal(EXAMPLE_BRANCHES, EXAMPLE_ROWS)
    time_table = normal(EXAMPLE_STEPS, head.width)
    modulation = normal(EXAMPLE_ROWS, EXAMPLE_BRANCHES, head.modulation_width)
    pairs = torch.arange(EXAMPLE_PAIRS)
    step = torch.arange(EXAMPLE_STEPS - EXAMPLE_ROWS, EXAMPLE_STEPS)
    return {
        GraphName.TIME_EMBEDDING: (TimeEmbeddingGraph(head), [torch.arange(0, 900, 150)]),
        GraphName.MODULATION: (
            ModulationGraph(head),
            [z, pairs % EXAMPLE_ROWS, time_table, pairs % EXAMPLE_STEPS],
        ),
        GraphName.DENOISE_STEP: (
            DenoiseStepGraph(head, learned_variance=learned),
            [normal(EXAMPLE_ROWS, dim), modulation, guidance, coefficients, step, normal(EXAMPLE_ROWS, dim)],
        ),
        GraphName.PATH_MEANS: (
            LogDensityGraph(head, learned_variance=learned),
            [
                normal(EXAMPLE_ROWS, EXAMPLE_STEPS + 1, dim),
                normal(EXAMPLE_STEPS, EXAMPLE_ROWS, EXAMPLE_BRANCHES, head.modulation_width),
                guidance,
                coefficients,
            ],
        ),
    }


def _report(path: Path, began: float, notes: str = "") -> None:
    size = float(path.stat().st_size)
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    tell(f"{path.name:32} {size:6.1f} {unit:2} {time.perf_counter() - began:7.1f} s  {notes}".rstrip())
