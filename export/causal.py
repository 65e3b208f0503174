"""Write a causal pair of torch models as a bundle, and read it back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from export.contents import BundleContents, ModelContents, parameter_count
from export.examples import EXAMPLE_IMAGES, EXAMPLE_INPUTS, example_draws
from export.graphs import CausalBackboneGraph
from export.models.causal import CausalBackbone, CausalBackboneSize, CausalModel
from export.models.head import DiffusionHead
from export.writer import write_contents
from specdec_rt.bundle import load_bundle
from specdec_rt.chain import ChainSpec
from specdec_rt.errors import BundleError
from specdec_rt.manifest import CacheShape, Defaults, ImageLayout, Manifest, Model, Precision

__all__ = ["CausalPair", "read_pair", "write_bundle"]


@dataclass(frozen=True, kw_only=True)
class CausalPair:
    """All that a causal bundle is made of."""

    name: str
    target: CausalModel
    drafts: Mapping[str, CausalModel | CausalBackbone]
    """by name; a backbone without a head of its own drives the target's head"""
    chain: ChainSpec
    image: ImageLayout | None
    defaults: Defaults
    provenance: Mapping[str, Any]


def write_bundle(pair: CausalPair, out: Path, *, precision: Precision, compute: Sequence[Precision] = ()) -> Manifest:
    """Write the pair to `out`; options and errors are those of `write_contents`."""
    size = pair.target.backbone.size
    contents = BundleContents(
        name=pair.name,
        family="causal",
        tokens=size.tokens,
        token_dim=size.token_dim,
        classes=size.classes,
        image=pair.image,
        chain=pair.chain,
        defaults=pair.defaults,
        target=_contents(pair.target),
        drafts={name: _contents(draft) for name, draft in pair.drafts.items()},
        decoder=None,
        provenance=pair.provenance,
    )
    return write_contents(contents, out, precision=precision, compute=compute)


def read_pair(folder: str | Path) -> CausalPair:
    """Read a bundle (a folder, or the name of an embedded one) back into torch models."""
    bundle = load_bundle(folder)
    folder, manifest = bundle.folder, bundle.manifest
    if manifest.family != "causal":
        raise BundleError(f"{folder} holds a pair of the family {manifest.family!r}; expected a causal one")
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
    assert record.cache is not None
    # Sizes that the manifest does not hold are read from the weights' shapes.
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
    backbone.load_state_dict(_with_prefix("backbone.", weights))
    if record.head_width is None:
        return backbone.eval()
    head_weights = _with_prefix("head.", weights)
    blocks = {key.split(".")[1] for key in head_weights if key.startswith("res_blocks.")}
    head = DiffusionHead(size.token_dim, record.z_dim, record.head_width, len(blocks), learned_variance=False)
    head.load_state_dict(head_weights)
    return CausalModel(backbone, head).eval()


def _with_prefix(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, named without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}


def _contents(model: CausalModel | CausalBackbone) -> ModelContents:
    backbone = model.backbone if isinstance(model, CausalModel) else model
    head = model.head if isinstance(model, CausalModel) else None
    size = backbone.size
    modules: dict[str, nn.Module] = {"backbone": backbone} if head is None else {"backbone": backbone, "head": head}
    cache = CacheShape(layers=size.depth, heads=size.heads, head_dim=size.width // size.heads)
    return ModelContents(
        record=Model(
            parameters=parameter_count(modules),
            z_dim=backbone.z_dim,
            head="target" if head is None else "own",
            head_width=None if head is None else head.width,
            modulation_width=None if head is None else head.modulation_width,
            cache=cache,
            graphs={},
        ),
        modules=modules,
        backbone=CausalBackboneGraph(backbone),
        examples=_examples(size, cache),
        head=head,
    )


def _examples(size: CausalBackboneSize, cache: CacheShape) -> list[Any]:
    """Arguments of the backbone graph: tokens, positions, labels, caches."""
    normal = example_draws()
    slots = size.tokens + 2
    return [
        normal(EXAMPLE_IMAGES, EXAMPLE_INPUTS, size.token_dim),
        # The last image's inputs run past its end, as drafts may.
        torch.tensor([0, size.tokens // 2, size.tokens - 2]),
        torch.arange(EXAMPLE_IMAGES),
        [normal(EXAMPLE_IMAGES, cache.heads, slots, cache.head_dim) for _ in range(2 * cache.layers)],
    ]
