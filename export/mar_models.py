"""Write a MAR pair of torch models as a bundle, and read it back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from export.checkpoints import build_vae_decoder, load_weights, read_checkpoint
from export.contents import BundleContents, DecoderContents, ModelContents, parameter_count
from export.examples import EXAMPLE_IMAGES, example_draws
from export.graphs import DecoderGraph, MarBackboneGraph
from export.models.mar import Mar, MarBackbone, MarSize
from export.models.vae import VaeDecoder
from export.writer import write_contents
from specdec_rt.bundle import load_bundle
from specdec_rt.chain import ChainSpec
from specdec_rt.errors import BundleError, UsageError
from specdec_rt.manifest import Defaults, ImageLayout, Manifest, Model, Precision

__all__ = ["MarPair", "image_layout", "read_mar_pair", "write_mar_bundle"]

SIZE_KEY = "mar"
"""Key in a weights file's metadata, under which the MarSize and the adapter's size are kept as JSON."""
VAE_STRIDE, VAE_CHANNELS = 16, 16
"""of the latents that the KL-16 decoder reads"""
PIXEL_CHANNELS: dict[int, Literal[1, 3]] = {1: 1, 3: 3}


@dataclass(frozen=True, kw_only=True)
class MarPair:
    """All that a MAR bundle is made of."""

    name: str
    target: Mar
    drafts: Mapping[str, MarBackbone]
    """by name; a MarBackbone that is no Mar has no head of its own and drives the target's"""
    chain: ChainSpec
    defaults: Defaults
    vae: VaeDecoder | None
    """turns tokens into pixels; None where tokens are pixels themselves, or where only tokens are wanted"""
    provenance: Mapping[str, Any]


def write_mar_bundle(pair: MarPair, out: Path, *, precision: Precision, compute: Sequence[Precision] = ()) -> Manifest:
    """Write the pair to `out`; options and errors are those of `write_contents`."""
    size, vae = pair.target.size, pair.vae
    contents = BundleContents(
        name=pair.name,
        family="mar",
        tokens=size.tokens,
        token_dim=size.token_dim,
        classes=size.classes,
        image=image_layout(size, vae=vae is not None),
        chain=pair.chain,
        defaults=pair.defaults,
        target=_contents(pair.target),
        drafts={name: _contents(draft) for name, draft in pair.drafts.items()},
        decoder=None if vae is None else DecoderContents(module=vae, graph=DecoderGraph(vae, patch=size.patch)),
        provenance=pair.provenance,
    )
    return write_contents(contents, out, precision=precision, compute=compute)


def image_layout(size: MarSize, *, vae: bool) -> ImageLayout | None:
    """How the tokens tile an image; None where nothing can turn them into pixels.

    Raises UsageError where a VAE decoder is given that does not read latents of this kind.
    """
    if vae and (size.stride, size.channels) != (VAE_STRIDE, VAE_CHANNELS):
        raise UsageError(
            f"the model's latents have vae_stride {size.stride} and vae_embed_dim {size.channels}; the KL-16 decoder "
            f"takes {VAE_STRIDE} and {VAE_CHANNELS}; leave out --vae"
        )
    if vae:
        patch = size.stride * size.patch
        side = size.image // patch * patch
        return ImageLayout(height=side, width=side, channels=3, patch=patch)
    channels = PIXEL_CHANNELS.get(size.channels)
    if size.stride != 1 or channels is None:
        return None
    side = size.image // size.patch * size.patch
    return ImageLayout(height=side, width=side, channels=channels, patch=size.patch)


def read_mar_pair(folder: str | Path) -> MarPair:
    """Read a bundle (a folder, or the name of an embedded one) back into torch models."""
    bundle = load_bundle(folder)
    folder, manifest = bundle.folder, bundle.manifest
    if manifest.family != "mar":
        raise BundleError(f"{folder} holds a pair of the family {manifest.family!r}; expected one of 'mar'")
    target = _read_model(folder / "target.safetensors", manifest.target)
    assert isinstance(target, Mar)
    vae = None if manifest.decoder is None else build_vae_decoder(read_checkpoint(folder / "decoder.safetensors"))
    return MarPair(
        name=manifest.name,
        target=target,
        drafts={name: _read_model(folder / f"{name}.safetensors", draft) for name, draft in manifest.drafts.items()},
        chain=manifest.chain,
        defaults=manifest.defaults,
        vae=vae,
        provenance=manifest.provenance,
    )


def _read_model(path: Path, record: Model) -> MarBackbone:
    with safe_open(path, framework="pt") as file:
        described = (file.metadata() or {}).get(SIZE_KEY)
    try:
        found = json.loads(described or "")
        size, adapter_dim = MarSize(**found["size"]), found["adapter_dim"]
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{path}: its metadata describe no MAR model; export the bundle again") from error
    with torch.device("meta"):
        model = Mar(size) if record.head == "own" else MarBackbone(size, adapter_dim=adapter_dim)
    checkpoint = read_checkpoint(path)
    load_weights(model, checkpoint, checkpoint.tensors)
    return model


def _contents(model: MarBackbone) -> ModelContents:
    size, modules = model.size, {"": model}
    head = model.head if isinstance(model, Mar) else None
    adapter_dim = model.z_dim if isinstance(model.adapter, torch.nn.Linear) else None
    return ModelContents(
        record=Model(
            parameters=parameter_count(modules),
            z_dim=model.z_dim,
            head="target" if head is None else "own",
            head_width=None if head is None else head.width,
            modulation_width=None if head is None else head.modulation_width,
            cache=None,
            graphs={},
        ),
        modules=modules,
        metadata={SIZE_KEY: json.dumps({"size": asdict(size), "adapter_dim": adapter_dim})},
        backbone=MarBackboneGraph(model),
        examples=_examples(size),
        head=head,
    )


def _examples(size: MarSize) -> list[Tensor]:
    """Arguments of the backbone graph: tokens, visible positions (up to a quarter), their mask, labels, queries."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(size.tokens, generator=generator) for _ in range(EXAMPLE_IMAGES)])
    visible = order[:, : max(size.tokens // 4 + 1, 2)]
    mask = torch.arange(visible.shape[1]) < torch.tensor([[0], [visible.shape[1] // 2], [visible.shape[1]]])
    label = torch.tensor([0, size.classes - 1, size.classes])  # the last one stands for "no label"
    query = order[:, -max(size.tokens // 3, 2) :]
    return [example_draws()(EXAMPLE_IMAGES, size.tokens, size.token_dim), visible, mask, label, query]
