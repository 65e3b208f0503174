"""The graphs as PyTorch runs them best: fused attention, caches updated in place, half precision throughout.

They take and give what the ONNX graphs do. Half precision is `module.half()`: the state of a chain, its noise and
its coefficients stay float32.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from export.causal import CausalPair, read_pair
from export.graphs import DecoderGraph, DenoiseStepGraph, ModulationGraph, PathMeansGraph
from export.mar_models import MarPair, read_mar_pair
from export.models.causal import CausalBackbone, CausalModel
from export.models.head import DiffusionHead
from export.models.mar import Block, Mar, MarBackbone
from export.to_onnx import TORCH_TYPES
from specdec_rt.build.bundle_graphs import BundleGraph, bundle_graphs
from specdec_rt.bundle import Bundle
from specdec_rt.manifest import GraphName, Precision

__all__ = ["TorchGraph", "torch_graphs"]


@dataclass(frozen=True)
class TorchGraph:
    """A module, and the names of what it takes and gives."""

    module: nn.Module
    inputs: Sequence[str]
    outputs: Sequence[str]


def torch_graphs(bundle: Bundle, device: torch.device, precision: Precision) -> dict[Path, TorchGraph]:
    """Every graph of the bundle, by its ONNX file in single precision."""
    pair = read_pair(bundle.folder) if bundle.manifest.family == "causal" else read_mar_pair(bundle.folder)
    learned = bundle.manifest.chain.variance == "learned"
    dtype = TORCH_TYPES[precision]
    graphs = {}
    for slot in bundle_graphs(bundle.manifest):
        module = _module(pair, slot, learned=learned).eval().requires_grad_(False)
        single = slot.name in (None, GraphName.TIME_EMBEDDING)
        module = module.to(device=device, dtype=torch.float32 if single else dtype)
        names = [[binding.name for binding in side] for side in (slot.graph.inputs, slot.graph.outputs)]
        graphs[bundle.path(slot.graph)] = TorchGraph(module, *names)
    return graphs


def _module(pair: CausalPair | MarPair, slot: BundleGraph, *, learned: bool) -> nn.Module:
    if slot.name is None:
        assert isinstance(pair, MarPair)
        assert pair.vae is not None
        return _Tuple(DecoderGraph(pair.vae, patch=pair.target.size.patch))
    model = pair.target if slot.owner == "target" else pair.drafts[slot.owner]
    if slot.name is GraphName.BACKBONE:
        if isinstance(model, MarBackbone):
            return _MarBackbone(model)
        backbone = model.backbone if isinstance(model, CausalModel) else model
        assert isinstance(backbone, CausalBackbone)
        return _CachedBackbone(backbone)
    assert isinstance(model, Mar | CausalModel)
    head = model.head
    match slot.name:
        case GraphName.TIME_EMBEDDING:
            return _TimeEmbedding(head)
        case GraphName.MODULATION:
            return _Tuple(ModulationGraph(_casting(head)))
        case GraphName.DENOISE_STEP:
            return DenoiseStepGraph(_casting(head), learned_variance=learned)
        case GraphName.PATH_MEANS:
            return PathMeansGraph(_casting(head), learned_variance=learned)


class _Tuple(nn.Module):
    """A module of one output, as one of several."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Tensor) -> tuple[Tensor]:
        return (self.module(*arguments),)


# --- backbones -------------------------------------------------------------------------------------------


class _FusedBlock(Block):
    """MAR's block with torch's fused attention, which the published models use as well."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> Tensor:
        bias = None if key_bias is None else key_bias[:, None, None].to(query.dtype).expand(-1, -1, query.shape[2], -1)
        return scaled_dot_product_attention(query, key, value, attn_mask=bias)


class _MarBackbone(nn.Module):
    def __init__(self, backbone: MarBackbone) -> None:
        super().__init__()
        for block in (*backbone.encoder_blocks, *backbone.decoder_blocks):
            block.__class__ = _FusedBlock
        self.backbone = backbone

    def forward(
        self, tokens: Tensor, visible: Tensor, visible_mask: Tensor, label: Tensor, query: Tensor
    ) -> tuple[Tensor]:
        tokens = tokens.to(self.backbone.mask_token.dtype)
        return (self.backbone(tokens, visible, visible_mask, label, query),)


class _CachedBackbone(nn.Module):
    """`export.graphs.CausalBackboneGraph`, but keys and values are written where the caches lie."""

    def __init__(self, backbone: CausalBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor, position: Tensor, label: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        model, slots, device = self.backbone, caches[0].shape[2], tokens.device
        place = position[:, None] + torch.arange(tokens.shape[1], device=device)
        clipped = place.clamp(max=model.size.tokens - 1)
        embedded = model.token_embed(tokens.to(model.position_in.dtype))
        hidden = torch.where((place == 0)[..., None], model.label_embed(label)[:, None], embedded)
        hidden = hidden + model.position_in[clipped]
        sees = (torch.arange(slots, device=device) <= place[..., None])[:, None]  # [B, 1, N, S]
        for layer, block in enumerate(model.layers()):
            query, key, value = block.attn.split(block.norm1(hidden))
            index = place[:, None, :, None].expand_as(key)
            for cache, new in zip(caches[2 * layer : 2 * layer + 2], (key, value), strict=True):
                cache.scatter_(2, index, new.to(cache.dtype))
            keys, values = (cache.to(query.dtype) for cache in caches[2 * layer : 2 * layer + 2])
            hidden = hidden + block.attn.merge(scaled_dot_product_attention(query, keys, values, attn_mask=sees))
            hidden = hidden + block.mlp(block.norm2(hidden))
        return model.adapter(model.norm(hidden) + model.position_out[clipped]), *caches


# --- heads -----------------------------------------------------------------------------------------------


class _TimeEmbedding(nn.Module):
    """In single precision, whatever the head's is: sinusoids of steps up to 999 need it, and it runs once."""

    def __init__(self, head: DiffusionHead) -> None:
        super().__init__()
        self.embed = copy.deepcopy(head.time_embed)

    def forward(self, timestep: Tensor) -> tuple[Tensor]:
        return (self.embed(timestep),)


class _CastingLinear(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype))


class _CastingHead(DiffusionHead):
    """A head in its own precision, between arguments and a result in single precision."""

    def forward(self, state: Tensor, condition: Tensor) -> Tensor:
        dtype = self.cond_embed.weight.dtype
        return super().forward(state.to(dtype), condition.to(dtype)).float()

    def modulation(self, condition: Tensor) -> Tensor:
        return super().modulation(condition.to(self.cond_embed.weight.dtype)).float()

    def modulated(self, state: Tensor, modulation: Tensor) -> Tensor:
        dtype = self.cond_embed.weight.dtype
        return super().modulated(state.to(dtype), modulation.to(dtype)).float()


def _casting(head: DiffusionHead) -> DiffusionHead:
    head.__class__ = _CastingHead
    head.cond_embed.__class__ = _CastingLinear
    return head
