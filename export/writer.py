"""Writes a bundle of any family: every graph is compared with torch, and the folder appears whole or not at all."""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from export.agreement import (
    graph_outputs,
    require_agreement,
    require_precision,
    require_variant,
    torch_outputs,
    variant_outputs,
)
from export.bundles import replace_bundle, require_replaceable, write_manifest
from export.console import print_line
from export.contents import BundleContents, DecoderContents, ModelContents, parameter_count
from export.examples import example_draws, head_examples
from export.graphs import DenoiseStepGraph, ModulationGraph, PathMeansGraph, TimeEmbeddingGraph
from export.models.head import DiffusionHead
from export.precision import write_variant
from export.to_onnx import WeightsFile, export_graph, rounding_changes, save_weights
from specdec_rt.bundle import SCHEMA_VERSION, file_sha256
from specdec_rt.errors import OutputError
from specdec_rt.manifest import (
    Bindings,
    Decoder,
    Graph,
    GraphName,
    Manifest,
    Model,
    Precision,
    decoder_bindings,
    graph_bindings,
)
from specdec_rt.types import Array

__all__ = ["write_contents"]


def write_contents(
    contents: BundleContents, out: Path, *, precision: Precision, compute: Sequence[Precision] = ()
) -> Manifest:
    """Export every graph, compare each with torch, and write the bundle to `out`, replacing a bundle there.

    Weights are stored in `precision`, and the given modules' own parameters are rounded to it. Every graph computes
    in single precision; for each half precision in `compute` it gets a variant that computes in that one. Raises
    ParityError where a graph differs from torch, or where rounding or computing in half changes its results by
    more than that precision's tolerance; OutputError where `out` cannot be written.
    """
    assert "fp32" not in compute
    require_replaceable(out)
    assert not {"target", "decoder"} & contents.drafts.keys(), "file names that are taken"
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


@dataclass(frozen=True)
class _Source:
    """A graph to be exported: the module that computes it, and arguments on which it is traced and compared."""

    module: nn.Module
    examples: Sequence[Any]
    bindings: Bindings
    compared: Sequence[Any] = ()
    """smaller arguments to compare it on, where comparing on `examples` would take too much memory"""

    @property
    def arguments(self) -> Sequence[Any]:
        """The arguments to compare it on."""
        return self.compared or self.examples

    def outputs(self) -> list[Array]:
        """What torch computes from `arguments`."""
        return torch_outputs(self.module, self.arguments)


class _Writer:
    """Writes a bundle's files into `folder`, one graph at a time, and records how far each is from torch."""

    def __init__(
        self, contents: BundleContents, folder: Path, precision: Precision, compute: Sequence[Precision]
    ) -> None:
        self._contents, self._folder, self._precision, self._compute = contents, folder, precision, compute
        self._errors: dict[str, dict[str, float]] = {
            "relative_error_against_torch": {},
            "relative_error_of_precision": {},
            "relative_error_of_variants": {},
        }
        """relative L2 errors by file name, as the provenance holds them"""

    def write(self) -> Manifest:
        """Write every file but the manifest, which is returned."""
        contents = self._contents
        target = self._model("target", contents.target)
        drafts = {name: self._model(name, draft) for name, draft in contents.drafts.items()}
        decoder = None if contents.decoder is None else self._decoder(contents.decoder)
        for path in self._folder.iterdir():
            path.chmod(0o644)
        # A bundle's own models may be exported again: what an earlier export measured is not this one's.
        origin = {key: value for key, value in contents.provenance.items() if key not in self._errors}
        measured = {key: errors for key, errors in self._errors.items() if errors}
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
            provenance={**origin, **measured},
        )

    def _model(self, name: str, model: ModelContents) -> Model:
        dimensions, record = self._contents.dimensions, model.record
        modules: dict[GraphName, nn.Module] = {GraphName.BACKBONE: model.backbone}
        examples: dict[GraphName, Sequence[Any]] = {GraphName.BACKBONE: model.examples}
        if model.head is not None:
            modules |= _head_graphs(model.head, learned_variance=dimensions.learned_variance)
            examples |= head_examples(model.head, learned_variance=dimensions.learned_variance)
        sources = {
            f"{name}.{graph}": _Source(module, examples[graph], graph_bindings(graph, record, dimensions))
            for graph, module in modules.items()
        }
        graphs = self._files(name, model.modules, model.metadata, sources)
        return record.model_copy(update={"graphs": dict(zip(modules, graphs, strict=True))})

    def _decoder(self, decoder: DecoderContents) -> Decoder:
        contents, modules = self._contents, {"": decoder.module}
        assert contents.image is not None
        # Traced on two images, for the tracer would take a batch of one for fixed; compared on one of them.
        tokens = example_draws()(2, contents.tokens, contents.token_dim)
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
        """Write the weights file `name`, and the graphs that read it; `sources` are keyed by file name."""
        began = time.perf_counter()
        unrounded: dict[str, list[Array]] = {}
        if rounding_changes(modules, self._precision):
            # Outputs are kept, not a copy of the weights: `save_weights` rounds these themselves.
            unrounded = {stem: source.outputs() for stem, source in sources.items()}
        path = self._folder / f"{name}.safetensors"
        weights = save_weights(modules, path, precision=self._precision, metadata=metadata)
        _print_progress(path, began)
        return [self._graph(stem, source, weights, unrounded.get(stem)) for stem, source in sources.items()]

    def _graph(self, stem: str, source: _Source, weights: WeightsFile, unrounded: list[Array] | None) -> Graph:
        """Write the graph `stem` and its variants, each compared with torch."""
        began = time.perf_counter()
        path = self._folder / f"{stem}.onnx"
        inputs, outputs = source.bindings
        expected = source.outputs()
        notes = ""
        if unrounded is not None:
            error = require_precision(path, expected, unrounded, self._precision)
            self._errors["relative_error_of_precision"][path.name] = error
            notes = f"; rounding its weights changed it by {error:.1e}"
        with torch.no_grad():
            export_graph(source.module, source.examples, source.bindings, path, weights)
        found = graph_outputs(path, source.arguments, inputs)
        error = self._errors["relative_error_against_torch"][path.name] = require_agreement(path, found, expected)
        _print_progress(path, began, f"differs from torch by {error:.1e}{notes}")
        variants = {half: self._variant(path, source, expected, half) for half in self._compute}
        return Graph(file=path.name, inputs=inputs, outputs=outputs, variants=variants)

    def _variant(self, graph: Path, source: _Source, expected: list[Array], precision: Precision) -> str:
        """Write the variant of `graph` that computes in `precision`; returns its file name."""
        began = time.perf_counter()
        path = graph.with_suffix(f".{precision}.onnx")
        write_variant(graph, path, precision)
        found = variant_outputs(path, precision, source.arguments, source.bindings[0])
        error = require_variant(path, found, expected, precision)
        self._errors["relative_error_of_variants"][path.name] = error
        _print_progress(path, began, f"differs from torch by {error:.1e}")
        return path.name


def _head_graphs(head: DiffusionHead, *, learned_variance: bool) -> dict[GraphName, nn.Module]:
    """The modules of a head's graphs."""
    return {
        GraphName.TIME_EMBEDDING: TimeEmbeddingGraph(head),
        GraphName.MODULATION: ModulationGraph(head),
        GraphName.DENOISE_STEP: DenoiseStepGraph(head, learned_variance=learned_variance),
        GraphName.PATH_MEANS: PathMeansGraph(head, learned_variance=learned_variance),
    }


def _print_progress(path: Path, began: float, notes: str = "") -> None:
    """One line for a finished file: its size, the seconds it took, and what was found."""
    size = float(path.stat().st_size)
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    print_line(f"{path.name:32} {size:6.1f} {unit:2} {time.perf_counter() - began:7.1f} s  {notes}".rstrip())
