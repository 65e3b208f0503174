"""Write a causal pair of torch models as a bundle."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from export.graphs import CausalBackboneGraph, DenoiseStepGraph, LogDensityGraph, TimeEmbeddingGraph
from export.models.causal import CausalBackbone, CausalBackboneSize, CausalModel
from export.models.head import DiffusionHead
from export.parity import require_parity
from export.to_onnx import WeightsFile, export_graph, save_weights
from specdec_rt.bundle import (
    MANIFEST,
    CacheShape,
    Defaults,
    Graph,
    GraphName,
    ImageLayout,
    Manifest,
    Model,
    file_sha256,
    graph_bindings,
    load_bundle,
)
from specdec_rt.errors import OutputError
from specdec_rt.schedule import ChainSpec

__all__ = ["CausalPair", "annotate", "read_pair", "replace_bundle", "require_replaceable", "write_bundle"]

EXAMPLE_IMAGES, EXAMPLE_INPUTS, EXAMPLE_ROWS, EXAMPLE_STEPS, EXAMPLE_BRANCHES = 3, 4, 5, 6, 2
"""Sizes of the inputs that graphs are traced and compared on: no two alike, none 0 or 1."""


@dataclass(frozen=True, kw_only=True)
class CausalPair:
    """All that a causal bundle is made of."""

    name: str
    target: CausalModel
    drafts: Mapping[str, CausalModel | CausalBackbone]
    """a bare backbone drives the target's head"""
    chain: ChainSpec
    image: ImageLayout
    defaults: Defaults
    provenance: dict[str, Any]


def write_bundle(pair: CausalPair, out: Path, *, half: bool) -> Manifest:
    """Export every graph, compare each with torch, and write the bundle to `out` (replaced as a whole).

    `half` stores weights in half precision; graphs compute in single precision either way. The models'
    own parameters are rounded to what is stored. Raises ParityError where a graph disagrees with torch.
    """
    require_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        errors: dict[str, float] = {}
        target = _export_model(pair.target, "target", folder, errors, half=half)
        drafts = {name: _export_model(model, name, folder, errors, half=half) for name, model in pair.drafts.items()}
        for path in folder.iterdir():
            path.chmod(0o644)
        size = pair.target.backbone.size
        manifest = Manifest(
            schema_version=1,
            name=pair.name,
            family="causal",
            tokens=size.tokens,
            token_dim=size.token_dim,
            classes=size.classes,
            image=pair.image,
            chain=pair.chain,
            defaults=pair.defaults,
            target=target,
            drafts=drafts,
            files={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
            provenance={**pair.provenance, "relative_error_against_torch": errors},
        )
        _write_manifest(folder, manifest)
        folder.chmod(0o755)
        replace_bundle(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def require_replaceable(out: Path) -> None:
    """Raise OutputError where `out` is something else than a bundle, an empty folder, or nothing yet."""
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} holds something that is no bundle; expected a new folder, or a bundle to replace")


def replace_bundle(folder: Path, out: Path) -> None:
    """Move a finished bundle to `out`, in the place of the one that is there."""
    require_replaceable(out)
    if out.exists():
        shutil.rmtree(out)
    folder.replace(out)


def annotate(folder: Path, notes: Mapping[str, Any]) -> None:
    """Add `notes` to the provenance of the bundle in `folder`."""
    manifest = load_bundle(folder).manifest
    _write_manifest(folder, manifest.model_copy(update={"provenance": {**manifest.provenance, **notes}}))


def read_pair(folder: str | Path) -> CausalPair:
    """The torch models of a bundle (a folder, or an embedded one's name), from its own weights."""
    bundle = load_bundle(folder)
    folder, manifest = bundle.folder, bundle.manifest
    target = _read_model(folder, "target", manifest.target, manifest)
    assert isinstance(target, CausalModel)
    return CausalPair(
        name=manifest.name,
        target=target,
        drafts={name: _read_model(folder, name, record, manifest) for name, record in manifest.drafts.items()},
        chain=manifest.chain,
        image=manifest.image,
        defaults=manifest.defaults,
        provenance=manifest.provenance,
    )


def _read_model(folder: Path, name: str, record: Model, manifest: Manifest) -> CausalModel | CausalBackbone:
    weights = {key: tensor.float() for key, tensor in load_file(folder / f"{name}.safetensors").items()}
    size = CausalBackboneSize(
        tokens=manifest.tokens,
        token_dim=manifest.token_dim,
        classes=manifest.classes,
        width=weights["backbone.token_embed.weight"].shape[0],
        depth=record.cache.layers,
        heads=record.cache.heads,
    )
    backbone = CausalBackbone(size, adapter_dim=record.z_dim if "backbone.adapter.weight" in weights else None)
    backbone.load_state_dict(_under("backbone.", weights))
    if record.head_width is None:
        return backbone.eval()
    of_head = _under("head.", weights)
    blocks = {key.split(".")[1] for key in of_head if key.startswith("res_blocks.")}
    head = DiffusionHead(size.token_dim, record.z_dim, record.head_width, len(blocks), learned_variance=False)
    head.load_state_dict(of_head)
    return CausalModel(backbone, head).eval()


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    part.replace(folder / MANIFEST)


def _export_model(
    model: CausalModel | CausalBackbone, name: str, folder: Path, errors: dict[str, float], *, half: bool
) -> Model:
    backbone = model.backbone if isinstance(model, CausalModel) else model
    head = model.head if isinstance(model, CausalModel) else None
    size = backbone.size
    parts: dict[str, nn.Module] = {"backbone": backbone} if head is None else {"backbone": backbone, "head": head}
    weights = save_weights(parts, folder / f"{name}.safetensors", half=half)
    record = Model(
        parameters=sum(p.numel() for part in parts.values() for p in part.parameters()),
        z_dim=backbone.z_dim,
        head_width=None if head is None else head.width,
        head="target" if head is None else "own",
        cache=CacheShape(layers=size.depth, heads=size.heads, head_dim=size.width // size.heads),
        graphs={},
    )
    graphs: dict[GraphName, nn.Module] = {GraphName.BACKBONE: CausalBackboneGraph(backbone)}
    if head is not None:
        graphs[GraphName.TIME_EMBEDDING] = TimeEmbeddingGraph(head)
        graphs[GraphName.DENOISE_STEP] = DenoiseStepGraph(head)
        graphs[GraphName.LOG_DENSITY] = LogDensityGraph(head)
    examples = _examples(record, size.token_dim, size.tokens)
    exported = {
        graph: _export_one(module, examples[graph], graph, record, size.token_dim, folder, name, weights, errors)
        for graph, module in graphs.items()
    }
    return record.model_copy(update={"graphs": exported})


def _export_one(
    module: nn.Module,
    examples: list[Any],
    graph: GraphName,
    record: Model,
    token_dim: int,
    folder: Path,
    name: str,
    weights: WeightsFile,
    errors: dict[str, float],
) -> Graph:
    path = folder / f"{name}.{graph}.onnx"
    inputs, outputs = graph_bindings(graph, record, token_dim=token_dim)
    with torch.no_grad():
        export_graph(module, examples, (inputs, outputs), path, weights)
        errors[path.name] = require_parity(module, examples, inputs, path)
    return Graph(file=path.name, inputs=inputs, outputs=outputs)


def _examples(record: Model, token_dim: int, tokens: int) -> dict[GraphName, list[Any]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cache = record.cache
    slots = tokens + 2
    caches = [normal(EXAMPLE_IMAGES, cache.heads, slots, cache.head_dim) for _ in range(2 * cache.layers)]
    position = torch.tensor([0, tokens // 2, tokens - 2])  # the last one's inputs run past the image's end
    shared = [
        normal(EXAMPLE_BRANCHES, EXAMPLE_ROWS, record.z_dim),
        normal(EXAMPLE_BRANCHES, EXAMPLE_ROWS),
        normal(EXAMPLE_STEPS, record.head_width or 0),
        normal(EXAMPLE_STEPS, 4),
    ]
    step = torch.arange(EXAMPLE_ROWS)
    return {
        GraphName.BACKBONE: [
            normal(EXAMPLE_IMAGES, EXAMPLE_INPUTS, token_dim),
            position,
            torch.arange(EXAMPLE_IMAGES),
            caches,
        ],
        GraphName.TIME_EMBEDDING: [torch.arange(0, 900, 150)],
        GraphName.DENOISE_STEP: [normal(EXAMPLE_ROWS, token_dim), *shared, step, normal(EXAMPLE_ROWS, token_dim)],
        GraphName.LOG_DENSITY: [normal(EXAMPLE_ROWS, EXAMPLE_STEPS + 1, token_dim), *shared],
    }
