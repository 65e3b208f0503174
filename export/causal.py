"""Write a causal pair of torch models as a bundle, and read it back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from export.bundles import (
    EXAMPLE_IMAGES,
    EXAMPLE_INPUTS,
    BundleContents,
    ModelContents,
    example_draws,
    parameter_count,
    write_contents,
)
from export.graphs import CausalBackboneGraph
from export.models.causal import CausalBackbone, CausalBackboneSize, CausalModel
from export.models.head import DiffusionHead
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
    """a bare backbone drives the target's head"""
    chain: ChainSpec
    image: ImageLayout | None
    defaults: Defaults
    provenance: Mapping[str, Any]


def write_bundle(pair: CausalPair, out: Path, *, precision: Precision, compute: Sequence[Precision] = ()) -> Manifest:
    """Write the pair to `out`, as `bundles.write_contents` does."""
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
    """The torch models of a bundle (a folder, or an embedded one's name), from its own weights."""
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
    normal = example_draws()
    slots = size.tokens + 2
    return [
        normal(EXAMPLE_IMAGES, EXAMPLE_INPUTS, size.token_dim),
        # The last image's inputs run past its end.
        torch.tensor([0, size.tokens // 2, size.tokens - 2]),
        torch.arange(EXAMPLE_IMAGES),
        [normal(EXAMPLE_IMAGES, cache.heads, slots, cache.head_dim) for _ in range(2 * cache.layers)],
    ]
